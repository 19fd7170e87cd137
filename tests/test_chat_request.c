/* Every field of POST /v1/chat/completions: what is taken, what the template sees of it, and for each way to be wrong the 400 that
 * names it.
 */
#include "server/chat_request.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CONTEXT = 512 };

static const char *const names[] = {"m"};
static struct server_options options;
static struct engine_plan plan;
static struct tokenizer *tokenizer;
static struct chat_template *demo, *shows; // the demo's; one that shows what it gets
static struct completion_limits limits;
static char dir[] = "/tmp/gptd-chat-request.XXXXXX";

static struct chat_template *template_of(const char *source)
{
    char path[128], error[256];
    struct chat_template *t;
    snprintf(path, sizeof path, "%s/chat_template.jinja", dir);
    FILE *file = fopen(path, "wb");
    ck_assert(file != NULL && fputs(source, file) >= 0);
    fclose(file);
    chat_template_create(&t, dir, error, sizeof error);
    unlink(path);
    return t;
}

static void setup(void)
{
    char error[256];
    int failed = tokenizer_create(&tokenizer, "models/demo", error, sizeof error);
    ck_assert_msg(failed == 0, "%s", error);
    failed = chat_template_create(&demo, "models/demo", error, sizeof error);
    ck_assert_msg(failed == 0, "%s", error);
    ck_assert_ptr_nonnull(mkdtemp(dir));
    shows = template_of("{{ messages|tojson }}{% if extra %}{{ extra|tojson }}{% endif %}");
    options.served_model_names = names;
    options.n_served_model_names = 1;
    options.max_prompts = 4;
    options.max_choices = 40;
    options.max_logprobs = 20;
    plan.vocab_size = tokenizer_vocab_size(tokenizer);
    plan.max_model_len = CONTEXT;
    plan.longest_request = CONTEXT;
    limits = (struct completion_limits){.options = &options, .plan = &plan, .tokenizer = tokenizer, .max_token_bytes = 64,
                                        .chat_template = demo};
}

static void teardown(void)
{
    tokenizer_destroy(tokenizer);
    chat_template_destroy(demo);
    chat_template_destroy(shows);
    rmdir(dir);
}

static int parse(struct completion_request *r, const char *body, struct http_error *e)
{
    char *copy = strdup(body);
    *e = (struct http_error){0};
    int failed = chat_request_parse(r, copy, strlen(copy), NULL, &limits, e);
    free(copy);
    return failed;
}

// {"model":"m","messages":[...],...}, unless fields brings its own messages.
static const char *body_of(const char *fields)
{
    static char body[8192];
    bool has_messages = strstr(fields, "\"messages\":");
    snprintf(body, sizeof body, "{\"model\":\"m\"%s%s%s}",
             has_messages ? "" : ",\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]", *fields ? "," : "", fields);
    return body;
}

static void expect_ok(struct completion_request *r, const char *fields)
{
    struct http_error e;
    ck_assert_msg(parse(r, body_of(fields), &e) == 0, "%s: %s", fields, e.message);
    ck_assert(r->chat && r->n_prompts == 1 && r->prompts[0].n_ids > 0);
}

static void expect_refused(const char *fields, const char *param)
{
    struct completion_request r;
    struct http_error e;
    ck_assert_msg(parse(&r, body_of(fields), &e) != 0, "taken: %s", fields);
    ck_assert_msg(e.status == 400, "%s: %d", fields, e.status);
    ck_assert_msg(!strcmp(e.param, param), "%s: `%s` is named: %s", fields, e.param, e.message);
    const char *last = strrchr(param, '.') ? strrchr(param, '.') + 1 : param;
    ck_assert_msg(strstr(e.message, last) || !strcmp(e.code ? e.code : "", "context_length_exceeded"), "%s: %s", fields, e.message);
    ck_assert_ptr_null(r.prompts);
}

// The text of the prompt of {"messages":messages,...}, until the next.
static const char *prompt_text(const char *fields)
{
    static char out[8192];
    char *text, error[256];
    size_t length;
    struct completion_request r;
    expect_ok(&r, fields);
    ck_assert_int_eq(tokenizer_decode(tokenizer, r.prompts[0].ids, (size_t)r.prompts[0].n_ids, false, &text, &length, error,
                                      sizeof error), 0);
    snprintf(out, sizeof out, "%s", text);
    free(text);
    completion_request_deinit(&r);
    return out;
}

// ---- what is taken ----

START_TEST(defaults)
{
    struct completion_request r;
    expect_ok(&r, "");
    ck_assert(r.params.n == 1 && r.n == 1 && r.params.temperature == 1 && r.params.top_p == 1);
    ck_assert_int_eq(r.params.max_tokens, CONTEXT - r.prompts[0].n_ids);
    ck_assert(r.logprobs == -1 && r.params.logprobs == -1 && r.prompt_logprobs == -1 && r.params.prompt_logprobs == -1);
    ck_assert(!r.params.has_seed && !r.echo && !r.stream && !r.stop && r.skip_special_tokens && !r.return_token_ids);
    completion_request_deinit(&r);
}
END_TEST

START_TEST(null_is_absent)
{
    static const char *const fields[] = {
        "max_tokens", "max_completion_tokens", "n", "temperature", "top_p", "frequency_penalty", "presence_penalty", "logprobs",
        "top_logprobs", "logit_bias", "stream", "stop", "seed", "stream_options", "top_k", "min_p", "repetition_penalty",
        "min_tokens", "ignore_eos", "stop_token_ids", "bad_words", "allowed_token_ids", "prompt_logprobs",
        "skip_special_tokens", "include_stop_str_in_output", "return_token_ids", "priority", "cache_salt", "tools",
        "tool_choice", "parallel_tool_calls", "functions", "function_call", "response_format", "audio", "modalities",
        "prediction", "web_search_options", "reasoning_effort", "verbosity", "chat_template", "chat_template_kwargs",
        "documents", "echo", "add_generation_prompt", "continue_final_message", "add_special_tokens", "metadata", "store",
        "service_tier",
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        char text[64];
        struct completion_request r;
        snprintf(text, sizeof text, "\"%s\":null", fields[i]);
        expect_ok(&r, text);
        ck_assert_int_eq(r.params.max_tokens, CONTEXT - r.prompts[0].n_ids);
        completion_request_deinit(&r);
    }
    expect_refused("\"user\":null", "user");
}
END_TEST

START_TEST(ends_of_ranges)
{
    static const char *const taken[] = {
        "\"max_tokens\":1", "\"max_completion_tokens\":1", "\"max_tokens\":9,\"max_completion_tokens\":2", "\"n\":1", "\"n\":40",
        "\"temperature\":0", "\"temperature\":2", "\"top_p\":1", "\"logprobs\":true", "\"logprobs\":false,\"top_logprobs\":0",
        "\"logprobs\":true,\"top_logprobs\":0", "\"logprobs\":true,\"top_logprobs\":20", "\"prompt_logprobs\":20",
        "\"logit_bias\":{\"3\":100}", "\"stop\":[\"a\",\"b\",\"c\",\"d\"]", "\"seed\":-9223372036854775808",
        "\"stream\":true,\"stream_options\":{\"include_usage\":true}", "\"user\":\"u\"", "\"tools\":[]", "\"tool_choice\":\"none\"",
        "\"parallel_tool_calls\":true", "\"response_format\":{\"type\":\"text\"}", "\"modalities\":[\"text\"]",
        "\"metadata\":{\"a\":\"b\"}", "\"store\":true", "\"service_tier\":\"auto\"", "\"safety_identifier\":\"s\"",
        "\"prompt_cache_key\":\"k\"", "\"include_reasoning\":true", "\"request_id\":\"r\"", "\"echo\":false",
        "\"chat_template_kwargs\":{}", "\"chat_template_kwargs\":{\"enable_thinking\":false}", "\"add_generation_prompt\":false",
        "\"add_generation_prompt\":false,\"continue_final_message\":true", "\"use_beam_search\":false", "\"min_tokens\":400",
        "\"messages\":[{\"role\":\"developer\",\"content\":\"x\"},{\"role\":\"user\",\"content\":\"\",\"name\":\"Anna\"}]",
        "\"messages\":[{\"role\":\"assistant\",\"content\":\"x\",\"refusal\":null,\"annotations\":[],\"audio\":null,"
        "\"function_call\":null,\"tool_calls\":null}]",
        "\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"x\"}]}]",
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
    expect_ok(&r, "\"seed\":9007199254740993,\"n\":3,\"logprobs\":true,\"top_logprobs\":4,\"max_tokens\":9,"
                  "\"max_completion_tokens\":7,\"min_tokens\":2,\"stop\":\"x\",\"stream\":true,\"return_token_ids\":true,"
                  "\"top_k\":5,\"ignore_eos\":true,\"stop_token_ids\":[9],\"skip_special_tokens\":false");
    ck_assert(r.params.has_seed && r.params.seed == 9007199254740993 && r.n == 3 && r.params.n == 3);
    ck_assert(r.logprobs == 4 && r.params.logprobs == 4 && r.params.max_tokens == 7 && r.params.min_tokens == 2);
    ck_assert(r.stop && r.stream && r.return_token_ids && r.params.top_k == 5 && r.params.ignore_eos && !r.skip_special_tokens);
    ck_assert(r.params.n_stop_token_ids == 1 && r.params.stop_token_ids[0] == 9);
    completion_request_deinit(&r);
    expect_ok(&r, "\"logprobs\":true,\"prompt_logprobs\":2");
    ck_assert(r.logprobs == 0 && r.params.logprobs == 0 && r.prompt_logprobs == 2 && r.params.prompt_logprobs == 2);
    completion_request_deinit(&r);
}
END_TEST

// No more than what is left of the context, of the cache and of what one request may come to; never a reason to refuse.
START_TEST(default_max_tokens)
{
    static const struct { int32_t longest; int64_t max_request_tokens; const char *fields; int32_t expected; } cases[] = {
        {CONTEXT, 0, "", CONTEXT},
        {200, 0, "", 200},
        {CONTEXT, 100, "", 100},
        {CONTEXT, 1000, "\"n\":10", 0},
        {CONTEXT, 1000, "\"n\":10,\"logprobs\":true,\"top_logprobs\":3", 0},
        {CONTEXT, 0, "\"n\":40,\"logprobs\":true,\"top_logprobs\":20", 0},
        {CONTEXT, 1000, "\"n\":4,\"return_token_ids\":true,\"prompt_logprobs\":2", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct completion_request r;
        plan.longest_request = cases[i].longest;
        options.max_request_tokens = cases[i].max_request_tokens;
        expect_ok(&r, cases[i].fields);
        int32_t max = r.params.max_tokens, n = r.prompts[0].n_ids;
        completion_request_deinit(&r);
        if (cases[i].expected) {
            ck_assert_int_eq(n + max, cases[i].expected);
            continue;
        }
        char more[256]; // what was chosen is taken, one more is not, unless the context ended it
        snprintf(more, sizeof more, "%s,\"max_tokens\":%d", cases[i].fields, max);
        expect_ok(&r, more);
        completion_request_deinit(&r);
        snprintf(more, sizeof more, "%s,\"max_tokens\":%d", cases[i].fields, max + 1);
        expect_refused(more, "max_tokens");
    }
    plan.longest_request = CONTEXT;
    options.max_request_tokens = 0;
}
END_TEST

START_TEST(demo_prompt)
{
    ck_assert_str_eq(prompt_text(""), "<s><|user|>\nHi<|end|>\n<|assistant|>\n");
    ck_assert_str_eq(prompt_text("\"add_special_tokens\":true"), "<s><s><|user|>\nHi<|end|>\n<|assistant|>\n");
    ck_assert_str_eq(prompt_text("\"add_generation_prompt\":false"), "<s><|user|>\nHi<|end|>\n");
    ck_assert_str_eq(prompt_text("\"messages\":[{\"role\":\"developer\",\"content\":\"Be short.\"},"
                                 "{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"Once upon\"}],"
                                 "\"add_generation_prompt\":false,"
                                 "\"continue_final_message\":true"),
                     "<s><|system|>\nBe short.<|end|>\n<|user|>\na<|end|>\n<|assistant|>\nOnce upon");
}
END_TEST

// ---- what the template sees ----

START_TEST(messages_seen)
{
    static const struct { const char *messages, *seen; } cases[] = {
        {"{\"role\":\"user\",\"content\":\"a\\n\\\"b\\\"\",\"name\":\"N\"}",
         "{\"role\": \"user\", \"content\": \"a\\n\\\"b\\\"\", \"name\": \"N\"}"},
        {"{\"content\":\"x\",\"role\":\"wizard\"}", "{\"role\": \"wizard\", \"content\": \"x\"}"},
        {"{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"text\":\"\",\"type\":\"text\"},"
         "{\"type\":\"text\",\"text\":\"b\"}]}", "{\"role\": \"user\", \"content\": \"a\\n\\nb\"}"},
        {"{\"role\":\"assistant\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"type\":\"refusal\",\"refusal\":\"no\"}]}",
         "{\"role\": \"assistant\", \"content\": \"a\\nno\"}"},
        {"{\"role\":\"assistant\",\"content\":null,\"refusal\":\"no\"}", "{\"role\": \"assistant\", \"content\": \"no\"}"},
        {"{\"role\":\"assistant\",\"content\":\"a\",\"reasoning_content\":\"r\",\"reasoning\":\"s\",\"tool_calls\":[]}",
         "{\"role\": \"assistant\", \"content\": \"a\", \"reasoning\": \"s\", \"reasoning_content\": \"r\"}"},
        {"{\"role\":\"assistant\",\"tool_calls\":[{\"id\":\"c1\",\"index\":0,\"type\":\"function\",\"function\":{\"name\":\"f\","
         "\"arguments\":\"{\\\"a\\\": [1, 2.5, \\\"x\\\"]}\"}},{\"function\":{\"name\":\"g\",\"arguments\":\"\"}},"
         "{\"function\":{\"name\":\"h\",\"arguments\":{\"b\":null}}}]}",
         "{\"role\": \"assistant\", \"content\": null, \"tool_calls\": [{\"id\": \"c1\", \"type\": \"function\", \"function\": "
         "{\"name\": \"f\", \"arguments\": {\"a\": [1, 2.5, \"x\"]}}}, {\"type\": \"function\", \"function\": {\"name\": \"g\", "
         "\"arguments\": {}}}, {\"type\": \"function\", \"function\": {\"name\": \"h\", \"arguments\": {\"b\": null}}}]}"},
        {"{\"role\":\"tool\",\"content\":\"12\",\"tool_call_id\":\"c1\"}",
         "{\"role\": \"tool\", \"content\": \"12\", \"tool_call_id\": \"c1\"}"},
        {"{\"role\":\"function\",\"content\":\"12\",\"name\":\"f\"}",
         "{\"role\": \"function\", \"content\": \"12\", \"name\": \"f\"}"},
    };
    limits.chat_template = shows;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char fields[2048], seen[2048];
        snprintf(fields, sizeof fields, "\"messages\":[%s]", cases[i].messages);
        snprintf(seen, sizeof seen, "[%s]", cases[i].seen);
        ck_assert_str_eq(prompt_text(fields), seen);
    }
    // Numbers are what Python's json makes of them.
    ck_assert_str_eq(prompt_text("\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"f\","
                                 "\"arguments\":\"{\\\"5.0\\\": 1234567890123456789, \\\"b\\\": [1.0, -2, {\\\"c\\\": 1e3}, "
                                 "18446744073709551616]}\"}}]}]"),
                     "[{\"role\": \"assistant\", \"content\": null, \"tool_calls\": [{\"type\": \"function\", "
                     "\"function\": {\"name\": \"f\", \"arguments\": {\"5.0\": 1234567890123456789, "
                     "\"b\": [1.0, -2, {\"c\": 1000.0}, 1.8446744073709552e+19]}}}]}]");
    ck_assert_str_eq(prompt_text("\"chat_template_kwargs\":{\"extra\":[1,{\"a\":true}]}"),
                     "[{\"role\": \"user\", \"content\": \"Hi\"}][1, {\"a\": true}]");
    limits.chat_template = demo;
}
END_TEST

// Templates that take a history with tool calls in another form than most.
START_TEST(forms_of_a_history)
{
    static const char history[] =
        "\"messages\":[{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"type\":\"function\",\"function\":"
        "{\"name\":\"f\",\"arguments\":\"{\\\"a\\\": 1}\"}}]}]";
    static const struct { const char *source, *seen; } cases[] = {
        {"{% for m in messages %}{{ '<' + m.content + '>' }}{{ m.tool_calls[0].function.arguments|tojson }}{% endfor %}",
         "<>{\"a\": 1}"},
        {"{% for m in messages %}{% if m.content is none %}{{ '!' + m.tool_calls[0].function.arguments }}{% endif %}{% endfor %}",
         "!{\"a\": 1}"},
        {"{% for m in messages %}{{ m.content + m.tool_calls[0].function.arguments }}{% endfor %}", "{\"a\": 1}"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct chat_template *t = template_of(cases[i].source);
        limits.chat_template = t;
        ck_assert_str_eq(prompt_text(history), cases[i].seen);
        chat_template_destroy(t);
    }
    limits.chat_template = demo;
}
END_TEST

// ---- what is refused ----

static const struct {
    const char *param;
    const char *fields; // several, separated by '|'
} refused[] = {
    {"max_tokens", "\"max_tokens\":0|\"max_tokens\":1.5|\"max_tokens\":\"1\"|\"max_tokens\":2147483648|\"max_tokens\":512"},
    {"max_completion_tokens", "\"max_completion_tokens\":0|\"max_completion_tokens\":-1|\"max_completion_tokens\":true|"
                              "\"max_completion_tokens\":512|\"max_tokens\":1,\"max_completion_tokens\":512"},
    {"n", "\"n\":0|\"n\":129|\"n\":1.5|\"n\":\"2\"|\"n\":41"},
    {"temperature", "\"temperature\":-0.1|\"temperature\":2.1|\"temperature\":\"1\""},
    {"top_p", "\"top_p\":0|\"top_p\":1.1"},
    {"logprobs", "\"logprobs\":1|\"logprobs\":\"true\""},
    {"top_logprobs", "\"logprobs\":true,\"top_logprobs\":21|\"logprobs\":true,\"top_logprobs\":-1|\"top_logprobs\":1|"
                     "\"logprobs\":false,\"top_logprobs\":5|\"logprobs\":true,\"top_logprobs\":true"},
    {"prompt_logprobs", "\"prompt_logprobs\":21|\"prompt_logprobs\":1,\"stream\":true"},
    {"logit_bias", "\"logit_bias\":[]|\"logit_bias\":{\"x\":1}|\"logit_bias\":{\"1\":101}"},
    {"stream", "\"stream\":1"},
    {"stop", "\"stop\":\"\"|\"stop\":[]|\"stop\":[\"a\",\"b\",\"c\",\"d\",\"e\"]|\"stop\":1"},
    {"seed", "\"seed\":1.5|\"seed\":9223372036854775808"},
    {"stream_options", "\"stream_options\":{}|\"stream\":true,\"stream_options\":1"},
    {"stream_options.x", "\"stream\":true,\"stream_options\":{\"x\":1}"},
    {"user", "\"user\":1"},
    {"min_tokens", "\"min_tokens\":-1|\"min_tokens\":17,\"max_tokens\":16|\"min_tokens\":512"},
    {"allowed_token_ids", "\"allowed_token_ids\":[]|\"allowed_token_ids\":[1000000]"},
    {"bad_words", "\"bad_words\":[\"\"]"},
    {"add_special_tokens", "\"add_special_tokens\":1"},
    {"add_generation_prompt", "\"add_generation_prompt\":1"},
    {"continue_final_message", "\"continue_final_message\":true|\"continue_final_message\":\"x\"|"
                               "\"continue_final_message\":true,\"add_generation_prompt\":true"},
    {"chat_template_kwargs", "\"chat_template_kwargs\":[]|\"chat_template_kwargs\":{\"messages\":[]}|"
                             "\"chat_template_kwargs\":{\"tools\":[]}|\"chat_template_kwargs\":{\"bos_token\":\"x\"}|"
                             "\"chat_template_kwargs\":{\"chat_template\":\"x\"}|"
                             "\"chat_template_kwargs\":{\"add_generation_prompt\":false}"},
    {"tools", "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]|\"tools\":{}|\"tools\":false"},
    {"tool_choice", "\"tool_choice\":\"auto\"|\"tool_choice\":\"required\"|\"tool_choice\":{}|\"tool_choice\":false"},
    {"modalities", "\"modalities\":[\"text\",\"audio\"]|\"modalities\":\"text\"|\"modalities\":[]|\"modalities\":[1]"},
    {"response_format", "\"response_format\":{\"type\":\"json_object\"}|\"response_format\":{\"type\":\"json_schema\"}"},
    {"functions", "\"functions\":[]"},
    {"function_call", "\"function_call\":\"none\""},
    {"audio", "\"audio\":{}"},
    {"prediction", "\"prediction\":{}"},
    {"web_search_options", "\"web_search_options\":{}"},
    {"reasoning_effort", "\"reasoning_effort\":\"low\""},
    {"verbosity", "\"verbosity\":\"low\""},
    {"chat_template", "\"chat_template\":\"{{ messages }}\""},
    {"documents", "\"documents\":[]"},
    {"echo", "\"echo\":true"},
    {"structured_outputs", "\"structured_outputs\":{}"},
    {"guided_json", "\"guided_json\":{}"},
    {"mm_processor_kwargs", "\"mm_processor_kwargs\":{}"},
    {"truncate_prompt_tokens", "\"truncate_prompt_tokens\":1"},
    {"nonsense", "\"nonsense\":null"},
    {"prompt", "\"prompt\":\"x\""},
    {"suffix", "\"suffix\":\"x\""},
    {"best_of", "\"best_of\":1"},
    {"Messages", "\"Messages\":[]"},
    {"messages", "\"messages\":[]|\"messages\":null|\"messages\":\"x\"|\"messages\":{}|\"messages\":5"},
    {"messages", "\"messages\":[{\"role\":\"wizard\",\"content\":\"x\"}]"}, // by the template
    {"messages[0]", "\"messages\":[\"x\"]|\"messages\":[null]|\"messages\":[[]]"},
    {"messages[0].role", "\"messages\":[{\"content\":\"x\"}]|\"messages\":[{\"role\":5,\"content\":\"x\"}]|"
                         "\"messages\":[{\"role\":null,\"content\":\"x\"}]|\"messages\":[{\"role\":\"\",\"content\":\"x\"}]"},
    {"messages[0].content", "\"messages\":[{\"role\":\"user\"}]|\"messages\":[{\"role\":\"user\",\"content\":null}]|"
                            "\"messages\":[{\"role\":\"user\",\"content\":5}]|\"messages\":[{\"role\":\"user\",\"content\":{}}]|"
                            "\"messages\":[{\"role\":\"user\",\"content\":[]}]|"
                            "\"messages\":[{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[]}]|"
                            "\"messages\":[{\"role\":\"assistant\"}]"},
    {"messages[1].content[1].type",
     "\"messages\":[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"x\"},"
     "{\"type\":\"image_url\",\"image_url\":{\"url\":\"x\"}}]}]|"
     "\"messages\":[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"x\"},"
     "{\"type\":\"refusal\",\"refusal\":\"x\"}]}]"},
    {"messages[0].content[0]", "\"messages\":[{\"role\":\"user\",\"content\":[\"x\"]}]|"
                               "\"messages\":[{\"role\":\"user\",\"content\":[{\"text\":\"x\"}]}]|"
                               "\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":5}]}]|"
                               "\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"x\",\"y\":1}]}]"},
    {"messages[0].content[0].text", "\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]|"
                                    "\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":5}]}]"},
    {"messages[0].name", "\"messages\":[{\"role\":\"user\",\"content\":\"x\",\"name\":5}]"},
    {"messages[0].x", "\"messages\":[{\"role\":\"user\",\"content\":\"x\",\"x\":null}]"},
    {"messages[0].audio", "\"messages\":[{\"role\":\"assistant\",\"content\":\"x\",\"audio\":{\"id\":\"a\"}}]"},
    {"messages[0].function_call", "\"messages\":[{\"role\":\"assistant\",\"content\":\"x\",\"function_call\":{}}]"},
    {"messages[0].refusal", "\"messages\":[{\"role\":\"user\",\"content\":\"x\",\"refusal\":\"no\"}]|"
                            "\"messages\":[{\"role\":\"assistant\",\"content\":\"x\",\"refusal\":5}]"},
    {"messages[0].tool_call_id", "\"messages\":[{\"role\":\"tool\",\"content\":\"x\",\"tool_call_id\":5}]"},
    {"messages[0].reasoning_content", "\"messages\":[{\"role\":\"assistant\",\"content\":\"x\",\"reasoning_content\":[]}]"},
    {"messages[0].tool_calls", "\"messages\":[{\"role\":\"assistant\",\"content\":\"x\",\"tool_calls\":{}}]|"
                               "\"messages\":[{\"role\":\"user\",\"content\":\"x\",\"tool_calls\":[{}]}]"},
    {"messages[0].tool_calls[0].function", "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{}]}]|"
                                           "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[5]}]"},
    {"messages[0].tool_calls[0].id", "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"id\":5}]}]"},
    {"messages[0].tool_calls[0].type", "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"type\":\"custom\"}]}]|"
                                       "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"type\":5}]}]"},
    {"messages[0].tool_calls[0].function.name", "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{}}]}]"},
    {"messages[0].tool_calls[0].function.arguments",
     "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"f\"}}]}]|"
     "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":[]}}]}]|"
     "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":\"[1]\"}}]}]|"
     "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":\"{\"}}]}]|"
     "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"a\\\":01}\"}}]}]"},
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

// Arguments hide their values in a string: they are counted all the same.
START_TEST(many_values)
{
    struct completion_request r;
    struct http_error e;
    size_t n = 30000, size = 3 * (2 * n + 200);
    char *body = malloc(size), *at = body;
    at += sprintf(at, "{\"model\":\"m\",\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[");
    for (int i = 0; i < 3; i++) {
        at += sprintf(at, "%s{\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"a\\\":[0", i ? "," : "");
        for (size_t k = 0; k < n; k++) at = stpcpy(at, ",0");
        at = stpcpy(at, "]}\"}}");
    }
    strcpy(at, "]}]}");
    ck_assert_int_ne(parse(&r, body, &e), 0);
    ck_assert(e.status == 400 && !strcmp(e.param, "messages[0].tool_calls"));
    free(body);
}
END_TEST

START_TEST(context)
{
    struct http_error e;
    struct completion_request r;
    expect_refused("\"max_tokens\":506", "max_tokens");
    size_t length = 100000;
    char *body = malloc(length + 128);
    int n = sprintf(body, "{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"");
    memset(body + n, '7', length);
    strcpy(body + n + length, "\"}]}");
    ck_assert_int_ne(parse(&r, body, &e), 0);
    ck_assert(e.status == 400 && !strcmp(e.param, "messages") && !strcmp(e.code, "context_length_exceeded"));
    strcpy(body + n + 600, "\"}]}"); // not by its length, but by its tokens
    ck_assert_int_ne(parse(&r, body, &e), 0);
    ck_assert(e.status == 400 && !strcmp(e.param, "messages") && !strcmp(e.code, "context_length_exceeded"));
    free(body);
}
END_TEST

static void expect_words(const char *words, const char *param)
{
    struct completion_request r;
    struct http_error e;
    ck_assert_int_ne(parse(&r, body_of(""), &e), 0);
    bool ok = e.status == 400 && strstr(e.message, words) && !strcmp(e.param, param);
    ck_assert_msg(ok, "%d %s: %s", e.status, e.param, e.message);
}

START_TEST(templates)
{
    static const struct { const char *source, *words; } cases[] = {
        {"{{ raise_exception('No ' ~ messages[0].content) }}", "No Hi"},
        {"{{ nothing.more }}", "line 1"},
        {"{% if", "line 1"},
        {"", "must not be empty"},
        {"{% for m in messages %}{{ raise_exception('世' * 300) }}{% endfor %}", "世世世"}, // cut between characters
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct chat_template *t = template_of(cases[i].source);
        limits.chat_template = t;
        expect_words(cases[i].words, "messages");
        chat_template_destroy(t);
    }
    limits.chat_template = NULL;
    expect_words("no chat template", "");
    limits.tokenizer = NULL;
    expect_words("no tokenizer", "");
    limits.chat_template = demo;
    limits.tokenizer = tokenizer;
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("chat_request");
    TCase *tc = tcase_create("fields");
    tcase_add_unchecked_fixture(tc, setup, teardown);
    tcase_add_test(tc, defaults);
    tcase_add_test(tc, null_is_absent);
    tcase_add_test(tc, ends_of_ranges);
    tcase_add_test(tc, values_arrive);
    tcase_add_test(tc, default_max_tokens);
    tcase_add_test(tc, demo_prompt);
    tcase_add_test(tc, messages_seen);
    tcase_add_test(tc, forms_of_a_history);
    tcase_add_test(tc, every_field_out_of_range);
    tcase_add_test(tc, many_values);
    tcase_add_test(tc, context);
    tcase_add_test(tc, templates);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
