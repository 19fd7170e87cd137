#include "tokenizer/detokenizer.h"
#include "tokenizer/tokenizer.h"

#include <check.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define VECTORS "tests/vectors/tokenizer/"

static char error[512];

static struct tokenizer *create(const char *dir)
{
    struct tokenizer *t;
    int result = tokenizer_create(&t, dir, error, sizeof error);
    ck_assert_msg(result == 0, "%s: %s", dir, error);
    return t;
}

struct ids {
    int32_t *data; // [n]
    size_t n;
};

static struct ids encode(const struct tokenizer *t, const char *text, size_t length, bool add_special,
                         bool parse_special)
{
    struct ids ids;
    int result = tokenizer_encode(t, text, length, add_special, parse_special, &ids.data, &ids.n, error, sizeof error);
    ck_assert_msg(result == 0, "%s", error);
    return ids;
}

// The ids of a C string as "1 2 3".
static const char *encoded(const struct tokenizer *t, const char *text, bool add_special, bool parse_special)
{
    static char line[1024];
    struct ids ids = encode(t, text, strlen(text), add_special, parse_special);
    int at = 0;
    line[0] = '\0';
    for (size_t i = 0; i < ids.n; i++) at += sprintf(line + at, i ? " %d" : "%d", ids.data[i]);
    free(ids.data);
    return line;
}

static void check_decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip, const char *text,
                         size_t length)
{
    char *decoded;
    size_t decoded_length;
    ck_assert_int_eq(tokenizer_decode(t, ids, n, skip, &decoded, &decoded_length, error, sizeof error), 0);
    ck_assert_uint_eq(decoded_length, length);
    ck_assert_mem_eq(decoded, text, length);
    ck_assert_int_eq(decoded[length], 0);
    free(decoded);
}

// ---- SentencePiece's own answers ----

static size_t unhex(const char *hex, char *out)
{
    size_t n = 0;
    if (hex[0] == '-') return 0;
    for (unsigned byte; sscanf(hex + 2 * n, "%2x", &byte) == 1;) out[n++] = (char)byte;
    return n;
}

// The token bytes, pushed one token at a time, give the decoded text but for spaces dropped at its start.
static void check_stream(const struct tokenizer *t, const struct ids *ids, const char *text, size_t length)
{
    char streamed[8192], *from = streamed;
    size_t n = 0, token_length;
    struct utf8_stream s = {0};
    for (size_t i = 0; i < ids->n; i++) {
        const char *bytes = tokenizer_token_bytes(t, ids->data[i], &token_length);
        ck_assert_ptr_nonnull(bytes);
        n += utf8_stream_push(&s, bytes, token_length, streamed + n);
    }
    n += utf8_stream_finish(&s, streamed + n);
    while (n > length && *from == ' ') from++, n--;
    ck_assert_uint_eq(n, length);
    ck_assert_mem_eq(from, text, n);
}

static void check_case(const struct tokenizer *t, char *line)
{
    static char text[4096], decoded[4096];
    char *save, *word = strtok_r(line, " \n", &save);
    size_t text_length = unhex(word, text), decoded_length = unhex(strtok_r(NULL, " \n", &save), decoded);
    int32_t expected[4096];
    size_t n = 0;
    while ((word = strtok_r(NULL, " \n", &save))) expected[n++] = atoi(word);
    struct ids ids = encode(t, text, text_length, false, false);
    ck_assert_uint_eq(ids.n, n);
    if (n > 0) ck_assert_mem_eq(ids.data, expected, n * sizeof *expected);
    check_decode(t, ids.data, n, true, decoded, decoded_length);
    check_stream(t, &ids, decoded, decoded_length);
    free(ids.data);
}

static const char *const models[] = {"bpe_bytes", "bpe", "unigram_bytes", "unigram"};

START_TEST(vectors_are_reproduced)
{
    char path[128], *line = NULL;
    size_t size = 0;
    int n_cases = 0;
    snprintf(path, sizeof path, VECTORS "%s", models[_i]);
    struct tokenizer *t = create(path);
    snprintf(path, sizeof path, VECTORS "%s/cases.txt", models[_i]);
    FILE *file = fopen(path, "r");
    ck_assert_ptr_nonnull(file);
    for (; getline(&line, &size, file) > 0; n_cases++) check_case(t, line);
    ck_assert_int_gt(n_cases, 100);
    free(line);
    fclose(file);
    tokenizer_destroy(t);
}
END_TEST

START_TEST(control_tokens)
{
    struct tokenizer *t = create(VECTORS "bpe_bytes");
    ck_assert_int_eq(tokenizer_bos_id(t), 1);
    ck_assert_int_eq(tokenizer_eos_id(t), 2);
    ck_assert(tokenizer_adds_bos(t));
    ck_assert(tokenizer_is_special(t, 1) && tokenizer_is_special(t, 2) && !tokenizer_is_special(t, 0));
    ck_assert(!tokenizer_is_special(t, -1) && !tokenizer_is_special(t, tokenizer_vocab_size(t)));
    ck_assert_str_eq(encoded(t, "", true, false), "1");
    ck_assert_str_eq(encoded(t, "", false, true), "");
    ck_assert_str_eq(encoded(t, "<s>", false, true), "1");
    ck_assert_str_eq(encoded(t, "</s></s><s>", true, true), "1 2 2 1");
    char plain[64];
    snprintf(plain, sizeof plain, "1 %s 2", encoded(t, "hello", false, false));
    ck_assert_str_eq(encoded(t, "<s>hello</s>", false, true), plain);
    ck_assert(strstr(encoded(t, "<s>hello</s>", false, false), "1 ") == NULL); // no id 1, nor one that ends with 1
    size_t length;
    ck_assert_str_eq(tokenizer_token_bytes(t, 2, &length), "</s>");
    ck_assert_str_eq(tokenizer_token_bytes(t, 0, &length), " \xE2\x81\x87 ");
    ck_assert_ptr_null(tokenizer_token_bytes(t, tokenizer_vocab_size(t), &length));
    ck_assert_ptr_null(tokenizer_token_bytes(t, -1, &length));
    struct ids ids = encode(t, "<s>hello", 8, false, true);
    check_decode(t, ids.data, ids.n, false, "<s>hello", 8);
    check_decode(t, ids.data, ids.n, true, "hello", 5);
    free(ids.data);
    tokenizer_destroy(t);
}
END_TEST

// Byte tokens that do not make a character: one U+FFFD per maximal ill-formed subpart.
START_TEST(broken_bytes_decode_as_replacements)
{
    struct tokenizer *t = create(VECTORS "bpe_bytes");
    int32_t byte0 = -1; // the id of byte 0; the others follow it
    size_t length;
    for (int32_t id = 0; byte0 < 0; id++)
        if (*tokenizer_token_bytes(t, id, &length) == 0 && length == 1) byte0 = id;
    int32_t ids[] = {byte0 + 0xE2, byte0 + 0x82, byte0 + 'a', byte0 + 0xFF, byte0 + 0, byte0 + 0xF0};
    check_decode(t, ids, 6, true, "\xEF\xBF\xBD" "a" "\xEF\xBF\xBD\0\xEF\xBF\xBD", 11);
    tokenizer_destroy(t);
}
END_TEST

START_TEST(bad_calls_are_refused)
{
    struct tokenizer *t = create(VECTORS "bpe_bytes");
    int32_t *ids, outside[] = {5, tokenizer_vocab_size(t)}, negative[] = {-1};
    size_t n;
    char *text;
    ck_assert_int_eq(tokenizer_encode(t, "ab\xC3", 3, true, false, &ids, &n, error, sizeof error), -1);
    ck_assert_ptr_nonnull(strstr(error, "byte 2"));
    ck_assert_ptr_null(ids);
    ck_assert_int_eq(tokenizer_decode(t, outside, 2, true, &text, &n, error, sizeof error), -1);
    char number[16];
    snprintf(number, sizeof number, " %d ", outside[1]);
    ck_assert_ptr_nonnull(strstr(error, number));
    ck_assert_int_eq(tokenizer_decode(t, negative, 1, true, &text, &n, error, sizeof error), -1);
    check_decode(t, NULL, 0, true, "", 0);
    tokenizer_destroy(t);
}
END_TEST

// ---- long texts ----

static void check_long(const struct tokenizer *t, const char *text, size_t length)
{
    struct ids ids = encode(t, text, length, true, true);
    check_decode(t, ids.data, ids.n, true, text, length);
    free(ids.data);
}

START_TEST(a_megabyte_of_anything)
{
    enum { SIZE = 1 << 20 };
    struct tokenizer *t = create(VECTORS "bpe_bytes"), *plain = create(VECTORS "unigram");
    char *text = malloc(SIZE);
    memset(text, 'a', SIZE);
    check_long(t, text, SIZE);
    memset(text, ' ', SIZE);
    check_long(t, text, SIZE);
    memset(text, '<', SIZE);
    check_long(t, text, SIZE);
    unsigned seed = (unsigned)time(NULL);
    printf("a_megabyte_of_anything: seed %u\n", seed);
    srand(seed);
    size_t n = 0;
    while (n < SIZE - 4) { // U+0000..U+2580 and U+2582..U+FFFF but for surrogates
        unsigned c = (unsigned)rand() % 3 ? (unsigned)rand() % 0xD800 : 0xE000 + (unsigned)rand() % 0x2000;
        if (c == 0x2581) continue; // SentencePiece reads its own space mark as a space
        if (c < 0x80) {
            text[n++] = (char)c;
        } else if (c < 0x800) {
            text[n++] = (char)(0xC0 | c >> 6);
            text[n++] = (char)(0x80 | (c & 0x3F));
        } else {
            text[n++] = (char)(0xE0 | c >> 12);
            text[n++] = (char)(0x80 | (c >> 6 & 0x3F));
            text[n++] = (char)(0x80 | (c & 0x3F));
        }
    }
    check_long(t, text, n);
    memset(text, '~', SIZE); // one long run that the model knows nothing of
    struct ids ids = encode(plain, text, SIZE, false, false);
    ck_assert_uint_eq(ids.n, 1);
    check_decode(plain, ids.data, 1, true, "?", 1);
    free(ids.data);
    free(text);
    tokenizer_destroy(plain);
    tokenizer_destroy(t);
}
END_TEST

// ---- files ----

static char directory[64];

static void make_directory(void)
{
    strcpy(directory, "/tmp/test_tokenizer.XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(directory));
}

static const char *file_path(const char *name)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static void remove_directory(void)
{
    unlink(file_path("tokenizer.model"));
    unlink(file_path("tokenizer_config.json"));
    rmdir(directory);
}

static void write_file(const char *name, const char *data, size_t n)
{
    FILE *file = fopen(file_path(name), "wb");
    ck_assert_ptr_nonnull(file);
    ck_assert_uint_eq(fwrite(data, 1, n, file), n);
    ck_assert_int_eq(fclose(file), 0);
}

static char model[1 << 16];

static size_t read_model(void)
{
    FILE *file = fopen(VECTORS "bpe_bytes/tokenizer.model", "rb");
    ck_assert_ptr_nonnull(file);
    size_t n = fread(model, 1, sizeof model, file);
    fclose(file);
    ck_assert(n > 1000 && n < sizeof model);
    return n;
}

START_TEST(absent_and_broken_files)
{
    struct tokenizer *t;
    make_directory();
    ck_assert_int_eq(tokenizer_create(&t, directory, error, sizeof error), TOKENIZER_ABSENT);
    ck_assert_ptr_null(t);
    size_t n = read_model();
    for (size_t part = 0; part < 20; part++) {
        write_file("tokenizer.model", model, n * part / 20);
        error[0] = '\0';
        ck_assert_int_eq(tokenizer_create(&t, directory, error, sizeof error), -1);
        ck_assert_ptr_nonnull(strstr(error, "tokenizer.model"));
        ck_assert_ptr_null(t);
    }
    for (size_t i = 0; i < n; i++) model[i] = (char)rand();
    write_file("tokenizer.model", model, n);
    ck_assert_int_eq(tokenizer_create(&t, directory, error, sizeof error), -1);
    remove_directory();
}
END_TEST

static struct tokenizer *create_with(const char *config)
{
    write_file("tokenizer.model", model, read_model());
    write_file("tokenizer_config.json", config, strlen(config));
    return create(directory);
}

START_TEST(added_tokens)
{
    make_directory();
    struct tokenizer *t = create_with(
        "{\"add_bos_token\": false, \"added_tokens_decoder\": {"
        "\"0\": {\"content\": \"<unk>\", \"special\": true}, \"2\": {\"content\": \"</s>\", \"special\": true},"
        "\"900\": {\"content\": \"<|im|>\", \"special\": true},"
        "\"901\": {\"content\": \"<|im|>x\", \"special\": false},"
        "\"3\": {\"content\": \"<ctl>\", \"special\": true}, \"4\": {\"content\": \"<|user|>\", \"special\": true}}}");
    ck_assert(!tokenizer_adds_bos(t));
    ck_assert_int_eq(tokenizer_vocab_size(t), 902);
    ck_assert(tokenizer_is_special(t, 900) && !tokenizer_is_special(t, 901));
    ck_assert(!tokenizer_is_special(t, 0) && tokenizer_is_special(t, 4));
    ck_assert_str_eq(encoded(t, "", true, false), "");
    ck_assert_str_eq(encoded(t, "<|im|>", true, true), "900");
    ck_assert_str_eq(encoded(t, "<|im|>x<|im|>", true, true), "901 900"); // the longest wins
    ck_assert_str_eq(encoded(t, "<|im|>x", true, false), "901");          // not special: always
    ck_assert_ptr_null(strstr(encoded(t, "<|im|>", true, false), "900"));
    size_t length;
    ck_assert_str_eq(tokenizer_token_bytes(t, 900, &length), "<|im|>");
    ck_assert_str_eq(tokenizer_token_bytes(t, 800, &length), ""); // an id between, which nothing names
    int32_t ids[] = {900, 901, 800, 2};
    check_decode(t, ids, 4, true, "<|im|>x", 7);
    check_decode(t, ids, 4, false, "<|im|><|im|>x</s>", 17);
    // A user-defined symbol is SentencePiece's to find, special or not: text behind it gets no dummy prefix.
    struct tokenizer *own = create(VECTORS "bpe_bytes");
    char alone[64];
    strcpy(alone, encoded(own, "a<|user|>b", false, true));
    ck_assert_str_eq(encoded(t, "a<|user|>b", false, true), alone);
    tokenizer_destroy(own);
    tokenizer_destroy(t);
    remove_directory();
}
END_TEST

static const char *const bad_configs[] = {
    "", "[]", "{", "{} x", "{\"add_bos_token\": 1}", "{\"added_tokens_decoder\": []}", "{\"a\": \"\xFF\"}",
    "{\"added_tokens_decoder\": {\"x\": {\"content\": \"a\", \"special\": true}}}",
    "{\"added_tokens_decoder\": {\"-1\": {\"content\": \"a\", \"special\": true}}}",
    "{\"added_tokens_decoder\": {\"99999999\": {\"content\": \"a\", \"special\": true}}}",
    "{\"added_tokens_decoder\": {\"9999999999999999999\": {\"content\": \"a\", \"special\": true}}}",
    "{\"added_tokens_decoder\": {\"900\": {\"content\": \"\", \"special\": true}}}",
    "{\"added_tokens_decoder\": {\"900\": {\"content\": 5}}}", "{\"added_tokens_decoder\": {\"900\": 7}}",
    "{\"added_tokens_decoder\": {\"900\": {\"content\": \"a\", \"special\": 1}}}",
};

START_TEST(bad_configs_are_refused)
{
    struct tokenizer *t;
    make_directory();
    write_file("tokenizer.model", model, read_model());
    for (size_t i = 0; i < sizeof bad_configs / sizeof *bad_configs; i++) {
        write_file("tokenizer_config.json", bad_configs[i], strlen(bad_configs[i]));
        ck_assert_msg(tokenizer_create(&t, directory, error, sizeof error) == -1, "%s", bad_configs[i]);
        ck_assert_ptr_nonnull(strstr(error, "tokenizer_config.json: "));
    }
    tokenizer_destroy(create_with("{\"add_bos_token\": null, \"added_tokens_decoder\": null}"));
    remove_directory();
}
END_TEST

// ---- threads ----

static void *encode_many(void *tokenizer)
{
    uintptr_t n = 0;
    for (int i = 0; i < 200; i++) {
        struct ids ids = encode(tokenizer, "hello world<s> \xE6\x97\xA5\xE6\x9C\xAC", 21, true, true);
        n += ids.n;
        free(ids.data);
    }
    return (void *)n;
}

START_TEST(many_threads_share_one)
{
    struct tokenizer *t = create(VECTORS "bpe_bytes");
    pthread_t threads[4];
    void *alone = encode_many(t), *n;
    for (int i = 0; i < 4; i++) ck_assert_int_eq(pthread_create(&threads[i], NULL, encode_many, t), 0);
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], &n);
        ck_assert_ptr_eq(n, alone);
    }
    tokenizer_destroy(t);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("tokenizer");
    TCase *tests = tcase_create("all");
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, vectors_are_reproduced, 0, 4);
    tcase_add_test(tests, control_tokens);
    tcase_add_test(tests, broken_bytes_decode_as_replacements);
    tcase_add_test(tests, bad_calls_are_refused);
    tcase_add_test(tests, a_megabyte_of_anything);
    tcase_add_test(tests, absent_and_broken_files);
    tcase_add_test(tests, added_tokens);
    tcase_add_test(tests, bad_configs_are_refused);
    tcase_add_test(tests, many_threads_share_one);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
