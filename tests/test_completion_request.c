/* Every field of POST /v1/completions: what is taken, and for each way to be wrong the 400 that names it. */
#include "server/completion_request.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CONTEXT = 64, MAX_LOGPROBS_HERE = 5 };

static const char *const names[] = {"m", "alias"};
static struct server_options options;
static struct engine_plan plan;
static struct tokenizer *tokenizer;
static struct completion_limits limits;

static void setup(void)
{
    char error[256];
    int failed = tokenizer_create(&tokenizer, "tests/vectors/tokenizer/unigram_bytes", error, sizeof error);
    ck_assert_msg(failed == 0, "%s", error);
    options.served_model_names = names;
    options.n_served_model_names = 2;
    options.max_prompts = 4;
    options.max_choices = 40;
    options.max_logprobs = MAX_LOGPROBS_HERE;
    plan.vocab_size = tokenizer_vocab_size(tokenizer);
    plan.max_model_len = CONTEXT;
    limits = (struct completion_limits){.options = &options, .plan = &plan, .tokenizer = tokenizer, .max_token_bytes = 64};
}

static void teardown(void) { tokenizer_destroy(tokenizer); }

static int parse(struct completion_request *r, const char *body, struct http_error *e)
{
    char *copy = strdup(body);
    *e = (struct http_error){0};
    int failed = completion_request_parse(r, copy, strlen(copy), NULL, &limits, e);
    free(copy);
    return failed;
}

// The body {"model":"m","prompt":"Once",...}, unless fields brings its own prompt.
static void expect_ok(struct completion_request *r, const char *fields)
{
    char body[4096];
    struct http_error e;
    bool has_prompt = strstr(fields, "\"prompt\":");
    snprintf(body, sizeof body, "{\"model\":\"m\"%s%s%s}", has_prompt ? "" : ",\"prompt\":\"Once\"", *fields ? "," : "",
             fields);
    ck_assert_msg(parse(r, body, &e) == 0, "%s: %s", body, e.message);
}

static void expect_refused(const char *fields, const char *param)
{
    char body[4096];
    struct completion_request r;
    struct http_error e;
    bool has_prompt = strstr(fields, "\"prompt\":");
    snprintf(body, sizeof body, "{\"model\":\"m\"%s,%s}", has_prompt ? "" : ",\"prompt\":\"Once\"", fields);
    ck_assert_msg(parse(&r, body, &e) != 0, "taken: %s", body);
    ck_assert_msg(e.status == 400, "%s: %d", body, e.status);
    ck_assert_msg(!strcmp(e.param, param), "%s: `%s` is named: %s", body, e.param, e.message);
    ck_assert_msg(strstr(e.message, param) || !strcmp(e.code ? e.code : "", "context_length_exceeded") ||
                      strchr(param, '.'), "%s: %s", body, e.message);
    ck_assert_ptr_null(r.prompts);
}

// ---- what is taken ----

START_TEST(defaults)
{
    struct completion_request r;
    expect_ok(&r, "");
    ck_assert_int_eq(r.n_prompts, 1);
    ck_assert_int_gt(r.prompts[0].n_ids, 0);
    ck_assert_int_eq(r.params.max_tokens, 16);
    ck_assert_int_eq(r.params.n, 1);
    ck_assert_int_eq(r.n, 1);
    ck_assert(r.params.temperature == 1 && r.params.top_p == 1 && r.params.repetition_penalty == 1);
    ck_assert(r.params.min_p == 0 && r.params.frequency_penalty == 0 && r.params.presence_penalty == 0);
    ck_assert_int_eq(r.params.top_k, 0);
    ck_assert_int_eq(r.logprobs, -1);
    ck_assert_int_eq(r.params.logprobs, -1);
    ck_assert_int_eq(r.params.prompt_logprobs, -1);
    ck_assert(!r.params.has_seed && !r.echo && !r.stream && !r.include_usage && !r.params.ignore_eos);
    ck_assert(r.skip_special_tokens && !r.include_stop && !r.return_token_ids && !r.stop);
    ck_assert_uint_eq(r.params.cache_salt, 0);
    completion_request_deinit(&r);
}
END_TEST

START_TEST(null_is_absent)
{
    static const char *const fields[] = {
        "max_tokens", "n", "best_of", "temperature", "top_p", "frequency_penalty", "presence_penalty", "logprobs",
        "logit_bias", "echo", "stream", "stop", "suffix", "seed", "stream_options", "top_k", "min_p",
        "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words", "allowed_token_ids",
        "prompt_logprobs", "skip_special_tokens", "include_stop_str_in_output", "return_token_ids", "priority",
        "cache_salt", "guided_json", "response_format", "use_beam_search", "metadata",
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        char text[64];
        struct completion_request r;
        snprintf(text, sizeof text, "\"%s\":null", fields[i]);
        expect_ok(&r, text);
        ck_assert_int_eq(r.params.max_tokens, 16);
        completion_request_deinit(&r);
    }
    expect_refused("\"user\":null", "user");
}
END_TEST

START_TEST(ends_of_ranges)
{
    static const char *const taken[] = {
        "\"max_tokens\":0", "\"max_tokens\":16.0", "\"n\":1", "\"n\":40", "\"best_of\":20", "\"n\":2,\"best_of\":2",
        "\"temperature\":0", "\"temperature\":2", "\"top_p\":1", "\"top_p\":1e-3", "\"min_p\":0", "\"min_p\":1",
        "\"top_k\":-1", "\"top_k\":0", "\"top_k\":2147483647", "\"frequency_penalty\":-2", "\"frequency_penalty\":2",
        "\"presence_penalty\":-2", "\"presence_penalty\":2", "\"repetition_penalty\":2", "\"logprobs\":0",
        "\"logprobs\":5", "\"prompt_logprobs\":5", "\"logit_bias\":{}", "\"logit_bias\":{\"0\":-100,\"3\":100}",
        "\"stop\":\"x\"", "\"stop\":[\"a\",\"b\",\"c\",\"d\"]", "\"suffix\":\"\"", "\"seed\":9223372036854775807",
        "\"seed\":-9223372036854775808", "\"stream\":true,\"stream_options\":{}",
        "\"stream\":true,\"stream_options\":{\"include_usage\":true,\"include_obfuscation\":false}",
        "\"user\":\"\"", "\"min_tokens\":16", "\"stop_token_ids\":[]", "\"stop_token_ids\":[0,5]",
        "\"allowed_token_ids\":[1]", "\"bad_words\":[]", "\"bad_words\":[\"a\",\"two words\"]",
        "\"priority\":-2147483648", "\"cache_salt\":\"s\"", "\"store\":true", "\"metadata\":{\"a\":\"b\"}",
        "\"service_tier\":\"auto\"", "\"prompt_cache_key\":\"k\"", "\"use_beam_search\":false",
        "\"prompt\":[\"a\",\"b\"]", "\"response_format\":{\"type\":\"text\"}",
        "\"prompt\":[1,2]", "\"prompt\":[[1],[2,3]]",
    };
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) {
        struct completion_request r;
        expect_ok(&r, taken[i]);
        completion_request_deinit(&r);
    }
}
END_TEST

START_TEST(values_arrive)
{
    struct completion_request r;
    expect_ok(&r, "\"seed\":9007199254740993,\"logit_bias\":{\"7\":-1.5},\"allowed_token_ids\":[4,2],\"top_k\":-1,"
                  "\"stop_token_ids\":[9],\"n\":2,\"best_of\":3,\"prompt\":[[5,6],[7]],\"echo\":true,\"logprobs\":2,"
                  "\"prompt_logprobs\":1,\"max_tokens\":3,\"min_tokens\":1,\"priority\":-4,\"ignore_eos\":true");
    ck_assert(r.params.has_seed && r.params.seed == 9007199254740993);
    ck_assert_int_eq(r.params.n_logit_bias, 1);
    ck_assert(r.params.logit_bias[0].id == 7 && r.params.logit_bias[0].bias == -1.5f);
    ck_assert_int_eq(r.params.n_allowed_token_ids, 2);
    ck_assert(r.params.allowed_token_ids[0] == 4 && r.params.allowed_token_ids[1] == 2);
    ck_assert(r.params.n_stop_token_ids == 1 && r.params.stop_token_ids[0] == 9);
    ck_assert(r.params.top_k == 0 && r.params.n == 3 && r.n == 2);
    ck_assert(r.n_prompts == 2 && r.prompts[0].n_ids == 2 && r.prompts[1].n_ids == 1 && r.prompts[1].ids[0] == 7);
    ck_assert(r.logprobs == 2 && r.params.logprobs == 2 && r.prompt_logprobs == 1 && r.params.prompt_logprobs == 2);
    ck_assert(r.params.max_tokens == 3 && r.params.min_tokens == 1 && r.params.priority == -4 && r.params.ignore_eos);
    ck_assert_ptr_nonnull(r.prompts[0].text);
    completion_request_deinit(&r);

    expect_ok(&r, "\"best_of\":2"); // the engine must give what the choices are ranked by
    ck_assert(r.logprobs == -1 && r.params.logprobs == 0);
    completion_request_deinit(&r);
}
END_TEST

START_TEST(salts)
{
    struct completion_request r;
    uint64_t salts[4];
    const char *keys[] = {NULL, "a", "b", "a"};
    for (int i = 0; i < 4; i++) {
        char body[] = "{\"model\":\"m\",\"prompt\":\"x\",\"cache_salt\":\"s\"}";
        struct http_error e;
        ck_assert_int_eq(completion_request_parse(&r, body, strlen(body), keys[i], &limits, &e), 0);
        salts[i] = r.params.cache_salt;
        completion_request_deinit(&r);
    }
    ck_assert(salts[0] != 0 && salts[0] != salts[1] && salts[1] != salts[2] && salts[1] == salts[3]);
}
END_TEST

// ---- what is refused ----

static const struct {
    const char *param;
    const char *fields; // several, separated by '|'
} refused[] = {
    {"max_tokens", "\"max_tokens\":-1|\"max_tokens\":1.5|\"max_tokens\":\"1\"|\"max_tokens\":2147483648|"
                   "\"max_tokens\":1e300|\"max_tokens\":true|\"max_tokens\":[]|\"max_tokens\":64"},
    {"n", "\"n\":0|\"n\":129|\"n\":-1|\"n\":1.5|\"n\":\"2\"|\"n\":{}"},
    {"best_of", "\"best_of\":0|\"best_of\":21|\"n\":3,\"best_of\":2|\"best_of\":\"3\"|\"best_of\":2,\"stream\":true"},
    {"temperature", "\"temperature\":-0.1|\"temperature\":2.1|\"temperature\":\"1\"|\"temperature\":1e39"},
    {"top_p", "\"top_p\":0|\"top_p\":1.1|\"top_p\":-1|\"top_p\":[1]"},
    {"min_p", "\"min_p\":-0.1|\"min_p\":1.1|\"min_p\":\"x\""},
    {"top_k", "\"top_k\":-2|\"top_k\":2147483648|\"top_k\":1.5"},
    {"frequency_penalty", "\"frequency_penalty\":-2.1|\"frequency_penalty\":2.1|\"frequency_penalty\":\"0\""},
    {"presence_penalty", "\"presence_penalty\":-2.1|\"presence_penalty\":2.1|\"presence_penalty\":false"},
    {"repetition_penalty", "\"repetition_penalty\":0|\"repetition_penalty\":-1|\"repetition_penalty\":2.1"},
    {"logprobs", "\"logprobs\":-1|\"logprobs\":6|\"logprobs\":true|\"logprobs\":1.5"},
    {"prompt_logprobs", "\"prompt_logprobs\":-1|\"prompt_logprobs\":6|\"prompt_logprobs\":\"1\""},
    {"logit_bias", "\"logit_bias\":[]|\"logit_bias\":1|\"logit_bias\":{\"x\":1}|\"logit_bias\":{\"-1\":1}|"
                   "\"logit_bias\":{\"1000000\":1}|\"logit_bias\":{\"2147483648\":1}|\"logit_bias\":{\"1\":101}|"
                   "\"logit_bias\":{\"1\":-101}|\"logit_bias\":{\"1\":\"1\"}|\"logit_bias\":{\"01\":1}|"
                   "\"logit_bias\":{\"\":1}|\"logit_bias\":{\"1 \":1}|\"logit_bias\":{\"99999999999999999999\":1}"},
    {"echo", "\"echo\":1|\"echo\":\"true\""},
    {"stream", "\"stream\":1|\"stream\":\"true\""},
    {"stop", "\"stop\":\"\"|\"stop\":[]|\"stop\":[\"\"]|\"stop\":[\"a\",\"b\",\"c\",\"d\",\"e\"]|"
             "\"stop\":1|\"stop\":[1]"},
    {"suffix", "\"suffix\":\"x\"|\"suffix\":1"},
    {"seed", "\"seed\":1.5|\"seed\":9223372036854775808|\"seed\":-9223372036854775809|\"seed\":\"1\"|\"seed\":true"},
    {"stream_options", "\"stream_options\":{}|\"stream\":false,\"stream_options\":{}|"
                       "\"stream\":true,\"stream_options\":1"},
    {"stream_options.include_usage", "\"stream\":true,\"stream_options\":{\"include_usage\":1}"},
    {"stream_options.x", "\"stream\":true,\"stream_options\":{\"x\":1}"},
    {"user", "\"user\":1|\"user\":[]"},
    {"min_tokens", "\"min_tokens\":-1|\"min_tokens\":17|\"min_tokens\":\"1\""},
    {"ignore_eos", "\"ignore_eos\":1"},
    {"stop_token_ids", "\"stop_token_ids\":[-1]|\"stop_token_ids\":[1000000]|\"stop_token_ids\":1|"
                       "\"stop_token_ids\":[2147483648]|\"stop_token_ids\":[1.5]|\"stop_token_ids\":[\"1\"]"},
    {"allowed_token_ids", "\"allowed_token_ids\":[]|\"allowed_token_ids\":[-1]|\"allowed_token_ids\":[1000000]"},
    {"bad_words", "\"bad_words\":[\"\"]|\"bad_words\":1|\"bad_words\":[1]"},
    {"skip_special_tokens", "\"skip_special_tokens\":1"},
    {"include_stop_str_in_output", "\"include_stop_str_in_output\":1"},
    {"return_token_ids", "\"return_token_ids\":1"},
    {"return_tokens_as_token_ids", "\"return_tokens_as_token_ids\":1"},
    {"add_special_tokens", "\"add_special_tokens\":\"true\""},
    {"priority", "\"priority\":2147483648|\"priority\":0.5|\"priority\":\"0\""},
    {"cache_salt", "\"cache_salt\":\"\"|\"cache_salt\":1"},
    {"response_format", "\"response_format\":{\"type\":\"json_object\"}"},
    {"response_format", "\"response_format\":{\"type\":\"text\",\"schema\":{}}"},
    {"use_beam_search", "\"use_beam_search\":true"},
    {"prompt_embeds", "\"prompt_embeds\":\"AAAA\""},
    {"nonsense", "\"nonsense\":1|\"nonsense\":null"},
    {"Temperature", "\"Temperature\":1"},
    {"prompt", "\"prompt\":\"\"|\"prompt\":[]|\"prompt\":[[]]|\"prompt\":[\"\"]|\"prompt\":1|\"prompt\":null|"
               "\"prompt\":{}|"
               "\"prompt\":[1,\"a\"]|\"prompt\":[\"a\",1]|\"prompt\":[[1],2]|\"prompt\":[-1]|\"prompt\":[1000000]|"
               "\"prompt\":[2147483648]|\"prompt\":[1.5]|\"prompt\":[[1],[]]|"
               "\"prompt\":[\"a\",\"b\",\"c\",\"d\",\"e\"]|"
               "\"prompt\":[\"a\",\"b\",\"c\",\"d\"],\"n\":11|\"prompt\":[null]|\"prompt\":[[\"a\"]]"},
};

START_TEST(every_field_out_of_range)
{
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        char *list = strdup(refused[i].fields), *rest = list, *fields;
        while ((fields = strsep(&rest, "|"))) expect_refused(fields, refused[i].param);
        free(list);
    }
}
END_TEST

START_TEST(models)
{
    struct completion_request r;
    struct http_error e;
    ck_assert_int_eq(parse(&r, "{\"model\":\"alias\",\"prompt\":\"a\"}", &e), 0);
    completion_request_deinit(&r);
    ck_assert_int_ne(parse(&r, "{\"model\":\"other\",\"prompt\":\"a\"}", &e), 0);
    ck_assert_int_eq(e.status, 404);
    ck_assert_str_eq(e.code, "model_not_found");
    static const char *const wrong[] = {
        "{\"prompt\":\"a\"}", "{\"model\":null,\"prompt\":\"a\"}", "{\"model\":1,\"prompt\":\"a\"}"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        ck_assert_int_ne(parse(&r, wrong[i], &e), 0);
        ck_assert_int_eq(e.status, 400);
        ck_assert_str_eq(e.param, "model");
    }
    static const char *const broken[] = {
        "", "{", "[]", "1", "{}x", "{\"model\":\"m\",\"model\":\"m\",\"prompt\":\"a\"}"};
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        ck_assert_msg(parse(&r, broken[i], &e) != 0, "%s", broken[i]);
        ck_assert_int_eq(e.status, 400);
    }
}
END_TEST

START_TEST(context)
{
    struct completion_request r;
    struct http_error e;
    expect_ok(&r, "\"prompt\":[1,2,3,4],\"max_tokens\":60");
    completion_request_deinit(&r);
    ck_assert_int_ne(parse(&r, "{\"model\":\"m\",\"prompt\":[1,2,3,4],\"max_tokens\":61}", &e), 0);
    ck_assert_str_eq(e.code, "context_length_exceeded");
    ck_assert_ptr_nonnull(strstr(e.message, "64"));
    ck_assert_ptr_nonnull(strstr(e.message, "65"));

    // Too long whatever its tokens are: refused before any of them is computed.
    size_t length = 100000;
    char *body = malloc(length + 64);
    int n = sprintf(body, "{\"model\":\"m\",\"prompt\":\"");
    memset(body + n, 'a', length);
    strcpy(body + n + length, "\"}");
    ck_assert_int_ne(parse(&r, body, &e), 0);
    ck_assert_str_eq(e.code, "context_length_exceeded");
    ck_assert_ptr_nonnull(strstr(e.message, "100000 bytes"));
    free(body);

    options.max_request_tokens = 100;
    expect_ok(&r, "\"prompt\":[[1],[2]],\"max_tokens\":49");
    completion_request_deinit(&r);
    expect_refused("\"prompt\":[[1],[2]],\"max_tokens\":50", "max_tokens");
    options.max_request_tokens = 0;
}
END_TEST

// What an answer repeats of its prompt counts for each choice, and alternatives count.
START_TEST(size_of_the_answer)
{
    static const struct { const char *fields, *param; } cases[] = {
        {"\"max_tokens\":4,\"n\":10", NULL},
        {"\"max_tokens\":4,\"n\":10,\"logprobs\":1", "max_tokens"},
        {"\"max_tokens\":0,\"n\":9,\"echo\":true", NULL},
        {"\"max_tokens\":0,\"n\":10,\"echo\":true", "echo"},
        {"\"max_tokens\":0,\"n\":5,\"echo\":true,\"logprobs\":1", "echo"},
        {"\"max_tokens\":0,\"n\":4,\"best_of\":20,\"echo\":true,\"logprobs\":1", NULL},
        {"\"max_tokens\":0,\"n\":2,\"prompt_logprobs\":3", NULL},
        {"\"max_tokens\":0,\"n\":2,\"prompt_logprobs\":4", "prompt_logprobs"},
        {"\"max_tokens\":0,\"n\":10,\"return_token_ids\":true", "return_token_ids"},
        {"\"max_tokens\":1,\"n\":4,\"return_token_ids\":true,\"echo\":true", NULL},
        {"\"max_tokens\":1,\"n\":5,\"return_token_ids\":true,\"echo\":true", "echo"},
    };
    options.max_request_tokens = 100;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char fields[256];
        struct completion_request r;
        snprintf(fields, sizeof fields, "\"prompt\":[[1,2,3,4],[5,6,7,8,9,10]],%s", cases[i].fields);
        if (cases[i].param) {
            expect_refused(fields, cases[i].param);
            continue;
        }
        expect_ok(&r, fields);
        completion_request_deinit(&r);
    }
    options.max_request_tokens = 0;
}
END_TEST

START_TEST(without_a_tokenizer)
{
    struct completion_request r;
    limits.tokenizer = NULL;
    expect_ok(&r, "\"prompt\":[1,2],\"echo\":true");
    ck_assert_ptr_null(r.prompts[0].text);
    completion_request_deinit(&r);
    expect_refused("\"prompt\":\"text\"", "prompt");
    expect_refused("\"prompt\":[1],\"stop\":\"x\"", "stop");
    expect_refused("\"prompt\":[1],\"bad_words\":[\"x\"]", "bad_words");
    limits.tokenizer = tokenizer;
}
END_TEST

// A bad word is kept out both at the start of a word and inside running text.
START_TEST(bad_words)
{
    struct completion_request r;
    expect_ok(&r, "\"bad_words\":[\"the\"]");
    ck_assert_int_ge(r.params.n_bad_words, 1);
    for (int32_t i = 0; i < r.params.n_bad_words; i++) {
        char text[64] = "";
        for (int32_t j = r.params.bad_word_offsets[i]; j < r.params.bad_word_offsets[i + 1]; j++) {
            size_t n;
            const char *bytes = tokenizer_token_bytes(tokenizer, r.params.bad_word_ids[j], &n);
            strncat(text, bytes, n);
        }
        ck_assert_msg(!strcmp(text, "the") || !strcmp(text, " the"), "`%s`", text);
    }
    completion_request_deinit(&r);
}
END_TEST

START_TEST(suffixes)
{
    struct completion_request r;
    limits.infill = (struct infill){.found = true, .prefix_id = 5, .suffix_id = 6, .middle_id = 7, .end_ids = {5, 6, 7, 1 << 30},
                                    .n_ends = 4};
    expect_ok(&r, "\"suffix\":\"end\",\"prompt\":[\"Once\",\"\"],\"add_special_tokens\":false,\"stop_token_ids\":[9],"
                  "\"echo\":true");
    ck_assert(r.n_prompts == 2 && r.prompts[0].ids[0] == 5 && r.prompts[0].ids[r.prompts[0].n_ids - 1] == 7);
    ck_assert(r.prompts[1].ids[0] == 5 && r.prompts[1].ids[1] == 6 && r.prompts[1].n_ids < r.prompts[0].n_ids);
    ck_assert_str_eq(r.prompts[0].text, "Once");
    const int32_t *stops = r.params.stop_token_ids; // the client's, the tokenizer's EOS, the marks
    ck_assert(r.params.n_stop_token_ids == 5 && stops[0] == 9 && stops[1] == 2 && stops[2] == 5 && stops[4] == 7);
    completion_request_deinit(&r);
    expect_ok(&r, "\"stop_token_ids\":[9]");
    ck_assert(r.params.n_stop_token_ids == 2 && r.params.stop_token_ids[1] == tokenizer_eos_id(limits.tokenizer));
    completion_request_deinit(&r);
    expect_ok(&r, "\"suffix\":\"end\",\"ignore_eos\":true");
    ck_assert_int_eq(r.params.n_stop_token_ids, 0);
    completion_request_deinit(&r);
    expect_ok(&r, "\"suffix\":\"\"");
    ck_assert(r.prompts[0].ids[0] != 5 && r.params.n_stop_token_ids == 1);
    completion_request_deinit(&r);
    expect_refused("\"suffix\":\"end\",\"prompt\":[1]", "suffix");
    expect_refused("\"suffix\":\"end\",\"prompt\":[[1],[2]]", "suffix");
    expect_refused("\"suffix\":\"end\",\"echo\":true,\"logprobs\":0", "suffix");
    expect_refused("\"suffix\":[\"end\"]", "suffix");
    expect_refused("\"suffix\":\"end\",\"prompt\":5", "prompt");
    char *body = malloc(100000), *at = body + sprintf(body, "{\"model\":\"m\",\"prompt\":\"a\",\"suffix\":\"");
    struct http_error e;
    memset(at, 'b', 90000);
    strcpy(at + 90000, "\"}");
    ck_assert_int_ne(parse(&r, body, &e), 0);
    ck_assert_str_eq(e.code, "context_length_exceeded");
    free(body);
    limits.infill = (struct infill){0};
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("completion_request");
    TCase *tc = tcase_create("fields");
    tcase_add_unchecked_fixture(tc, setup, teardown);
    tcase_add_test(tc, defaults);
    tcase_add_test(tc, null_is_absent);
    tcase_add_test(tc, ends_of_ranges);
    tcase_add_test(tc, values_arrive);
    tcase_add_test(tc, salts);
    tcase_add_test(tc, every_field_out_of_range);
    tcase_add_test(tc, models);
    tcase_add_test(tc, context);
    tcase_add_test(tc, size_of_the_answer);
    tcase_add_test(tc, without_a_tokenizer);
    tcase_add_test(tc, bad_words);
    tcase_add_test(tc, suffixes);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
