/* Options: the table, its four sources and their order, every way a value can be wrong. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/options.h"

enum { MAX_ARGUMENTS = 16 };

static char config_path[] = "/tmp/test_options_XXXXXX";
static char key_path[] = "/tmp/test_options_XXXXXX";

static void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
}

// Arguments and variables are separated by one space each.
static char **split(const char *program, const char *text)
{
    char **list = calloc(MAX_ARGUMENTS, sizeof(*list));
    int n = 0;
    if (program) list[n++] = strdup(program);
    char *copy = strdup(text);
    for (char *p = strtok(copy, " "); p; p = strtok(NULL, " ")) {
        ck_assert_int_lt(n, MAX_ARGUMENTS - 1);
        list[n++] = strdup(p);
    }
    free(copy);
    return list;
}

static void list_free(char **list)
{
    for (char **p = list; *p; p++) free(*p);
    free(list);
}

static int options_read(struct options *o, const char *arguments, const char *variables, struct error *e)
{
    char **argv = split("gptd", arguments), **environment = split(NULL, variables);
    int argc = 0;
    while (argv[argc]) argc++;
    e->message[0] = '\0';
    int result = options_init(o, argc, argv, environment, e);
    list_free(argv);
    list_free(environment);
    return result;
}

static void expect_ok(struct options *o, const char *arguments, const char *variables)
{
    struct error e;
    int result = options_read(o, arguments, variables, &e);
    ck_assert_msg(result == 0, "%s / %s: %s", arguments, variables, e.message);
}

// The message must hold every one of the words.
static void expect_error(int code, const char *arguments, const char *variables, const char *words)
{
    struct options o;
    struct error e;
    int result = options_read(&o, arguments, variables, &e);
    ck_assert_msg(result == code, "%s / %s: %d (%s), not %d", arguments, variables, result, e.message, code);
    char *copy = strdup(words);
    for (char *p = strtok(copy, " "); p; p = strtok(NULL, " "))
        ck_assert_msg(strstr(e.message, p) != NULL, "%s / %s: \"%s\" lacks \"%s\"", arguments, variables, e.message, p);
    free(copy);
}

START_TEST(defaults)
{
    struct options o;
    expect_ok(&o, "--model models/demo", "PATH=/bin HOME=/");
    ck_assert_str_eq(o.engine.model_dir, "models/demo");
    ck_assert_str_eq(o.engine.backend, "auto");
    ck_assert(!o.engine.dummy_weights && !o.engine.reference_attention && o.engine.prefix_caching);
    ck_assert(!o.engine.deterministic);
    ck_assert_int_eq(o.engine.max_num_seqs, 256);
    ck_assert_int_eq(o.engine.max_num_batched_tokens, 0);
    ck_assert_int_eq(o.engine.block_size, 64);
    ck_assert_int_eq(o.engine.max_queue_tokens, 4194304);
    ck_assert(o.engine.queue_timeout == 60 && o.engine.priority_aging == 10);
    ck_assert_str_eq(o.server.host, "127.0.0.1");
    ck_assert_int_eq(o.server.port, 8000);
    ck_assert_uint_eq(o.server.max_body_bytes, 8u << 20);
    ck_assert_double_eq(o.server.send_timeout, o.engine.slow_client_timeout);
    ck_assert_int_eq(o.server.max_logprobs, o.engine.max_logprobs);
    ck_assert_ptr_null(o.server.api_keys);
    ck_assert_uint_eq(o.server.n_served_model_names, 1);
    ck_assert_str_eq(o.server.served_model_names[0], "demo");
    ck_assert_int_eq(o.log_format, LOG_FORMAT_TEXT);
    ck_assert_int_eq(o.log_level, LOG_LEVEL_INFO);
    options_deinit(&o);
}
END_TEST

START_TEST(every_type)
{
    struct options o;
    expect_ok(&o,
              "--model=/ --load-format=dummy --seed 18446744073709551615 --kv-cache-memory-bytes 4G "
              "--max-body-bytes=1536KiB --drain-delay 0.25 --no-enable-prefix-caching --deterministic --log-level debug",
              "GPTD_ATTENTION=reference GPTD_BLOCK_SIZE=16 GPTD_MAX_QUEUE_TOKENS=5000000000");
    ck_assert(o.engine.dummy_weights && o.engine.reference_attention && !o.engine.prefix_caching);
    ck_assert(o.engine.deterministic);
    ck_assert(o.engine.seed == UINT64_MAX);
    ck_assert_uint_eq(o.engine.kv_cache_memory_bytes, (size_t)4 << 30);
    ck_assert_uint_eq(o.server.max_body_bytes, 1536 << 10);
    ck_assert_double_eq(o.server.drain_delay, 0.25);
    ck_assert_int_eq(o.engine.block_size, 16);
    ck_assert_int_eq(o.engine.max_queue_tokens, 5000000000);
    ck_assert_int_eq(o.log_level, LOG_LEVEL_DEBUG);
    ck_assert_str_eq(o.server.served_model_names[0], "model"); // "/" has no last part
    options_deinit(&o);
}
END_TEST

START_TEST(precedence)
{
    struct options o;
    char arguments[128], variables[128];
    write_file(config_path, "{\"model\": \"file\", \"port\": 1, \"max_num_seqs\": 2, \"threads\": 3,"
                            " \"enable-prefix-caching\": false, \"seed\": 9007199254740993}");
    snprintf(arguments, sizeof(arguments), "--config %s --port 11", config_path);
    expect_ok(&o, arguments, "GPTD_PORT=21 GPTD_MAX_NUM_SEQS=22");
    ck_assert_int_eq(o.server.port, 11);
    ck_assert_int_eq(o.engine.max_num_seqs, 22);
    ck_assert_int_eq(o.engine.n_threads, 3);
    ck_assert(!o.engine.prefix_caching);
    ck_assert(o.engine.seed == 9007199254740993);
    ck_assert_str_eq(o.engine.model_dir, "file");
    options_deinit(&o);

    // The file may be named by a variable; a flag turns back on what the file turned off; the last of equal flags wins.
    snprintf(variables, sizeof(variables), "GPTD_CONFIG=%s", config_path);
    expect_ok(&o, "--enable-prefix-caching --port 5 --port 6", variables);
    ck_assert(o.engine.prefix_caching);
    ck_assert_int_eq(o.server.port, 6);
    options_deinit(&o);
}
END_TEST

static const struct {
    const char *arguments, *variables, *words;
} wrong[] = {
    {"", "", "--model required"},
    {"--modle x", "", "--modle command nearest \"model\""},
    {"--max-num-seq 3", "", "--max-num-seq nearest \"max-num-seqs\""},
    {"--zzzzzz 3", "", "--zzzzzz no such option"},
    {"--model", "", "--model needs a value"},
    {"--model --port 1", "", "--model needs a value"},
    {"--model x stray", "", "unexpected stray"},
    {"-m x", "", "unexpected -m"},
    {"--", "", "unexpected"},
    {"--model=", "", "--model empty"},
    {"--no-model x", "", "--no-model no such option"},
    {"--no-enable-prefix-caching=true", "", "no such option"},
    {"--enable-prefix-caching=perhaps", "", "true or false"},
    {"--port 65536", "", "--port 0 65535 is 65536"},
    {"--port -1", "", "--port is -1"},
    {"--port 80x", "", "--port integer"},
    {"--port 1.5", "", "--port integer"},
    {"--port 0x50", "", "--port integer"},
    {"--port 99999999999999999999", "", "--port integer"},
    {"--threads 1025", "", "--threads 1024"},
    {"--block-size 48", "", "--block-size 16|32|64"},
    {"--block-size 016", "", "--block-size 16|32|64"},
    {"--load-format pt", "", "--load-format auto|dummy"},
    {"--gpu-memory-utilization 1.5", "", "--gpu-memory-utilization 1 is 1.5"},
    {"--gpu-memory-utilization all", "", "--gpu-memory-utilization a number"},
    {"--dtype float32", "", "--dtype auto|bfloat16|float16"},
    {"--backend tpu", "", "--backend auto|cpu|cuda"},
    {"--seed -1", "", "--seed 2^64"},
    {"--seed 18446744073709551616", "", "--seed 2^64"},
    {"--kv-cache-memory-bytes 4X", "", "--kv-cache-memory-bytes bytes"},
    {"--kv-cache-memory-bytes 99999999999T", "", "--kv-cache-memory-bytes bytes"},
    {"--kv-cache-memory-bytes -1", "", "--kv-cache-memory-bytes bytes"},
    {"--max-body-bytes 1", "", "--max-body-bytes 1024"},
    {"--drain-delay nan", "", "--drain-delay seconds"},
    {"--drain-delay inf", "", "--drain-delay seconds"},
    {"--drain-delay -1", "", "--drain-delay seconds"},
    {"--drain-delay 1e999", "", "--drain-delay seconds"},
    {"--drain-delay 3601", "", "--drain-delay 3600"},
    {"--max-logprobs 21", "", "--max-logprobs 20"},
    {"--model x --max-num-seqs 600 --max-num-batched-tokens 512", "", "--max-num-batched-tokens 600 512"},
    {"--model x --served-model-name a,,b", "", "--served-model-name empty"},
    {"--model x --api-key-file /nonexistent", "", "--api-key-file /nonexistent No such file"},
    {"--model x --config /nonexistent", "", "--config /nonexistent No such file"},
    {"--model x", "GPTD_PROT=1", "GPTD_PROT environment nearest \"port\""},
    {"--model x", "GPTD_PORT=many", "GPTD_PORT environment integer"},
    {"--model x", "GPTD_PORT=tcp://10.0.0.1:8000", "GPTD_PORT environment enableServiceLinks"},
    {"--model x", "GPTD_SERVICE_HOST=10.0.0.1", "GPTD_SERVICE_HOST enableServiceLinks"},
    {"--model x", "GPTD_DRY_RUN=1", "GPTD_DRY_RUN no such option"},
    {"--model x", "GPTD_API_KEY=", "GPTD_API_KEY empty"},
    {"--model x --port 1", "GPTD_PORT=many", "GPTD_PORT integer"}, // checked even where a flag wins
};

START_TEST(wrong_values)
{
    const char *arguments = wrong[_i].arguments;
    bool missing = strstr(arguments, "/nonexistent");
    expect_error(missing ? ERR_IO : ERR_INVALID, arguments, wrong[_i].variables, wrong[_i].words);
}
END_TEST

static const struct {
    const char *text;
    int code;
    const char *words;
} wrong_files[] = {
    {"{\"model\": \"x\", \"prot\": 1}", ERR_INVALID, "\"prot\" nearest \"port\""},
    {"{\"model\": \"x\", \"port\": 70000}", ERR_INVALID, "\"port\" 65535"},
    {"{\"model\": \"x\", \"port\": [1]}", ERR_INVALID, "\"port\" string, number"},
    {"{\"model\": null}", ERR_INVALID, "\"model\" string"},
    {"{\"model\": \"x\", \"port\": true}", ERR_INVALID, "\"port\" integer"},
    {"{\"model\": \"x\", \"port\": 80.5}", ERR_INVALID, "\"port\" integer"},
    {"{\"model\": \"x\", \"max-num-seqs\": 1, \"max_num_seqs\": 1}", ERR_INVALID, "\"max-num-seqs\" twice"},
    {"{\"model\": \"x\", \"port\": 1, \"port\": 1}", ERR_FORMAT, "test_options"},
    {"{\"config\": \"x\"}", ERR_INVALID, "\"config\" no such option"},
    {"{\"help\": true}", ERR_INVALID, "\"help\" no such option"},
    {"[]", ERR_FORMAT, "test_options"},
    {"", ERR_FORMAT, "test_options"},
    {"{\"model\": \"x\"} x", ERR_FORMAT, "test_options"},
};

START_TEST(wrong_file)
{
    char arguments[64];
    write_file(config_path, wrong_files[_i].text);
    snprintf(arguments, sizeof(arguments), "--config %s", config_path);
    expect_error(wrong_files[_i].code, arguments, "", wrong_files[_i].words);
}
END_TEST

START_TEST(keys_and_names)
{
    struct options o;
    char arguments[160];
    write_file(key_path, "\n  first \r\nsecond\n\nthird");
    snprintf(arguments, sizeof(arguments), "--model x --api-key zero --api-key-file %s --served-model-name a,b/c",
             key_path);
    expect_ok(&o, arguments, "");
    ck_assert_uint_eq(api_keys_count(o.server.api_keys), 4);
    ck_assert_uint_eq(o.server.n_served_model_names, 2);
    ck_assert_str_eq(o.server.served_model_names[0], "a");
    ck_assert_str_eq(o.server.served_model_names[1], "b/c");
    options_deinit(&o);

    snprintf(arguments, sizeof(arguments), "--model x --api-key-file %s", key_path);
    write_file(key_path, "two words\n");
    expect_error(ERR_INVALID, arguments, "", "--api-key-file line");
    write_file(key_path, " \n\n");
    expect_error(ERR_INVALID, arguments, "", "--api-key-file no key");
}
END_TEST

// An error may be logged: it must not hold the key.
START_TEST(key_stays_secret)
{
    struct options o;
    struct error e;
    ck_assert_int_eq(options_read(&o, "--model x --api-key secr\x7ft", "", &e), ERR_INVALID);
    ck_assert_ptr_null(strstr(e.message, "secr"));
    ck_assert_int_eq(options_read(&o, "--model x --api-kye=secret", "", &e), ERR_INVALID);
    ck_assert_ptr_null(strstr(e.message, "secret"));
}
END_TEST

START_TEST(help_and_version)
{
    struct options o;
    expect_ok(&o, "--help", "GPTD_NONSENSE=1");
    ck_assert(o.help);
    options_deinit(&o);
    expect_ok(&o, "-h", "");
    ck_assert(o.help);
    options_deinit(&o);
    expect_ok(&o, "--version", "");
    ck_assert(o.version);
    options_deinit(&o);
    // It needs to know where the server is, no more.
    expect_ok(&o, "--probe --api-key-file /nowhere", "GPTD_PORT=9");
    ck_assert(o.probe && o.server.port == 9 && !o.server.api_keys);
    options_deinit(&o);

    char *text;
    size_t n;
    FILE *out = open_memstream(&text, &n);
    options_help(out);
    fclose(out);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) ck_assert_uint_le(strlen(line), 120);
    free(text);
}
END_TEST

int main(void)
{
    int config = mkstemp(config_path), key = mkstemp(key_path);
    if (config < 0 || key < 0) return 1;
    close(config);
    close(key);
    Suite *suite = suite_create("options");
    TCase *tcase = tcase_create("options");
    tcase_add_test(tcase, defaults);
    tcase_add_test(tcase, every_type);
    tcase_add_test(tcase, precedence);
    tcase_add_loop_test(tcase, wrong_values, 0, sizeof(wrong) / sizeof(wrong[0]));
    tcase_add_loop_test(tcase, wrong_file, 0, sizeof(wrong_files) / sizeof(wrong_files[0]));
    tcase_add_test(tcase, keys_and_names);
    tcase_add_test(tcase, key_stays_secret);
    tcase_add_test(tcase, help_and_version);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    unlink(config_path);
    unlink(key_path);
    return failed != 0;
}
