/* test_chat_template.c: where a checkpoint's chat template and its special tokens come from, what a template sees, what a broken
 * one does, and where a final message that is to be continued ends.
 */
#include "tokenizer/chat_template.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char error[512], dir[] = "/tmp/gptd-chat-template.XXXXXX";
static const char *const files[] = {"chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"};

static const char *path_of(const char *name)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

static void remove_files(void)
{
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) unlink(path_of(files[i]));
}

// contents: of files, in their order; NULL: there is none.
static int create(struct chat_template **t, const char *template, const char *config, const char *map)
{
    const char *contents[] = {template, config, map};
    remove_files();
    for (size_t i = 0; i < 3; i++) {
        if (!contents[i]) continue;
        FILE *file = fopen(path_of(files[i]), "wb");
        ck_assert(file != NULL && fputs(contents[i], file) >= 0);
        fclose(file);
    }
    error[0] = '\0';
    return chat_template_create(t, dir, error, sizeof error);
}

static struct chat_template *created(const char *template, const char *config, const char *map)
{
    struct chat_template *t;
    int rc = create(&t, template, config, map);
    ck_assert_msg(rc == 0, "%s", error);
    return t;
}

// The text of a rendering, until the next; NULL: it failed, with *result.
static const char *rendered(const struct chat_template *t, const char *messages, const char *kwargs, bool generate, bool go_on,
                            int *result)
{
    static char out[4096];
    char *text;
    size_t length = 0;
    cJSON *list = cJSON_Parse(messages), *more = kwargs ? cJSON_Parse(kwargs) : NULL;
    ck_assert(list != NULL && (more != NULL) == (kwargs != NULL));
    struct chat_conversation c = {list, more, generate, go_on};
    *result = chat_template_render(t, &c, 1735732800, &text, &length, error, sizeof error);
    if (*result == 0) {
        ck_assert_uint_eq(strlen(text), length);
        snprintf(out, sizeof out, "%s", text);
        free(text);
    }
    cJSON_Delete(list);
    cJSON_Delete(more);
    return *result == 0 ? out : NULL;
}

static void check_text(const struct chat_template *t, const char *messages, const char *kwargs, const char *expected)
{
    int result;
    const char *text = rendered(t, messages, kwargs, true, false, &result);
    ck_assert_msg(result == 0, "%s", error);
    ck_assert_str_eq(text, expected);
}

static const char hello[] = "[{\"role\": \"user\", \"content\": \"Hello\"}]";

// ---- where it comes from ----

START_TEST(places)
{
    static const struct { const char *template, *config, *expected; } places[] = {
        {"file {{ messages[0].content }}", NULL, "file Hello"},
        {"file", "{\"chat_template\": \"config\"}", "file"},
        {"file", "{\"chat_template\": \"{% broken\"}", "file"},
        {NULL, "{\"chat_template\": \"config {{ messages|length }}\"}", "config 1"},
        {NULL, "{\"chat_template\": [{\"name\": \"tool_use\", \"template\": \"a\"},"
               " {\"name\": \"default\", \"template\": \"b\"}]}", "b"},
        {"", NULL, ""},
    };
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        struct chat_template *t = created(places[i].template, places[i].config, NULL);
        check_text(t, hello, NULL, places[i].expected);
        chat_template_destroy(t);
    }
}
END_TEST

START_TEST(absent)
{
    static const char *const configs[] = {NULL, "{}", "{\"chat_template\": null}", "{\"bos_token\": \"<s>\"}"};
    struct chat_template *t;
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++) {
        ck_assert_int_eq(create(&t, NULL, configs[i], NULL), CHAT_TEMPLATE_ABSENT);
        ck_assert_ptr_null(t);
    }
}
END_TEST

// The server starts all the same: what was wrong is told by every rendering.
START_TEST(broken)
{
    static const struct { const char *template, *config, *map, *why; } cases[] = {
        {"a\n{% if x %}", NULL, NULL, "chat_template.jinja: line 2: "},
        {"{{ x|nosuchfilter }}", NULL, NULL, "nosuchfilter"},
        {"\xff", NULL, NULL, "not UTF-8"},
        {NULL, "{\"chat_template\": \"{{ \"}", NULL, "\"chat_template\": line 1: "},
        {NULL, "{\"chat_template\": 5}", NULL, "neither a string nor a list"},
        {NULL, "{\"chat_template\": []}", NULL, "no template called \"default\""},
        {NULL, "{\"chat_template\": [{\"name\": \"default\"}]}", NULL, "no template called \"default\""},
        {"x", "{", NULL, "tokenizer_config.json: not a JSON object"},
        {"x", "[]", NULL, "tokenizer_config.json: not a JSON object"},
        {"x", "{\"a\": \"\xff\"}", NULL, "tokenizer_config.json: not a JSON object"},
        {"x", NULL, "5", "special_tokens_map.json: not a JSON object"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct chat_template *t;
        int result;
        ck_assert_int_eq(create(&t, cases[i].template, cases[i].config, cases[i].map), -1);
        ck_assert_msg(strstr(error, cases[i].why) != NULL, "`%s` instead of `%s`", error, cases[i].why);
        ck_assert_ptr_nonnull(t);
        error[0] = '\0';
        ck_assert_ptr_null(rendered(t, hello, NULL, true, false, &result));
        ck_assert_int_eq(result, -1);
        ck_assert_msg(strstr(error, cases[i].why) != NULL, "`%s` instead of `%s`", error, cases[i].why);
        chat_template_destroy(t);
    }
    remove_files();
    ck_assert_int_eq(mkdir(path_of("chat_template.jinja"), 0700), 0); // there, and cannot be read
    struct chat_template *t;
    ck_assert_int_eq(chat_template_create(&t, dir, error, sizeof error), -1);
    chat_template_destroy(t);
    rmdir(path_of("chat_template.jinja"));
}
END_TEST

START_TEST(special_tokens)
{
    static const char show[] = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token is defined }}|{{ image_token }}|"
                               "{{ additional_special_tokens }}";
    struct chat_template *t = created(show, "{\"bos_token\": \"<s>\", \"eos_token\": {\"content\": \"</s>\", \"lstrip\": false},"
                                            " \"pad_token\": null, \"extra_special_tokens\": {\"image_token\": \"<img>\"},"
                                            " \"additional_special_tokens\": [\"<a>\", {\"content\": \"<b>\"}]}",
                                      "{\"bos_token\": \"<other>\", \"unk_token\": {\"content\": \"<unk>\"}}");
    check_text(t, hello, NULL, "<s>|</s>|<unk>|False|<img>|['<a>', '<b>']");
    chat_template_destroy(t);
    t = created("{{ bos_token }}|{{ eos_token }}", NULL, NULL);
    check_text(t, hello, NULL, "|");
    chat_template_destroy(t);
    t = created("{{ bos_token }}{{ eos_token }}", "{\"bos_token\": 5, \"eos_token\": {\"content\": 5}}", NULL);
    check_text(t, hello, NULL, "");
    chat_template_destroy(t);
}
END_TEST

// ---- what it sees ----

START_TEST(variables)
{
    int result;
    struct chat_template *t = created("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ thinking }}"
                                      " {{ messages|tojson }}", NULL, NULL);
    check_text(t, hello, "{\"thinking\": {\"on\": [1, true, null]}}",
               "True True True {'on': [1, True, None]} [{\"role\": \"user\", \"content\": \"Hello\"}]");
    const char *text = rendered(t, "[]", NULL, false, false, &result);
    ck_assert_str_eq(text, "True True False  []");
    chat_template_destroy(t);
}
END_TEST

START_TEST(reserved)
{
    static const char *const names[] = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
                                        "chat_template", "bos_token"};
    struct chat_template *t = created("x", "{\"bos_token\": \"<s>\"}", NULL);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        cJSON *kwargs = cJSON_CreateObject();
        cJSON_AddTrueToObject(kwargs, "enable_thinking");
        cJSON_AddNullToObject(kwargs, "Messages");
        cJSON_AddNullToObject(kwargs, "eos_token");
        ck_assert_ptr_null(chat_template_reserved(t, kwargs));
        cJSON_AddNullToObject(kwargs, names[i]);
        ck_assert_str_eq(chat_template_reserved(t, kwargs), names[i]);
        cJSON_Delete(kwargs);
    }
    chat_template_destroy(t);
}
END_TEST

START_TEST(failures)
{
    static const struct { const char *template; int result; const char *words; } cases[] = {
        {"{{ raise_exception('roles: ' ~ messages[0].role) }}", CHAT_TEMPLATE_RAISED, "roles: user"},
        {"a\n{{ messages[0].nothing.more }}", -1, "line 2"},
        {"{{ messages[0] + 1 }}", -1, "line 1"},
        {"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", -1, "too many steps"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int result;
        struct chat_template *t = created(cases[i].template, NULL, NULL);
        ck_assert_ptr_null(rendered(t, hello, NULL, true, false, &result));
        ck_assert_int_eq(result, cases[i].result);
        ck_assert_msg(strstr(error, cases[i].words) != NULL, "`%s` instead of `%s`", error, cases[i].words);
        chat_template_destroy(t);
    }
}
END_TEST

START_TEST(local_time)
{
    struct chat_template *t = created("{{ strftime_now('%d %b %Y %H:%M') }}", NULL, NULL);
    setenv("TZ", "XXX-5:30", 1);
    tzset();
    check_text(t, hello, NULL, "01 Jan 2025 17:30");
    unsetenv("TZ");
    tzset();
    chat_template_destroy(t);
}
END_TEST

// ---- a final message that goes on ----

static const char keeps[] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
                            "{% if add_generation_prompt %}<>{% endif %}";
static const char trims[] = "{% for m in messages %}<{{ m.role }}>{{ m.content|trim }}</>\n{% endfor %}";

START_TEST(final_message)
{
    static const struct { const char *template, *content, *expected; } cases[] = {
        {keeps, "Once upon", "<user>Hello</>\n<assistant>Once upon"},
        {keeps, "Once upon ", "<user>Hello</>\n<assistant>Once upon "},
        {keeps, "", "<user>Hello</>\n<assistant>"},
        {keeps, "</>\\n<user>Hello", "<user>Hello</>\n<assistant></>\n<user>Hello"},
        {keeps, "GptdTheMessageGoesOn ", "<user>Hello</>\n<assistant>GptdTheMessageGoesOn "},
        {trims, "Once upon", "<user>Hello</>\n<assistant>Once upon"},
        {trims, " Once upon \\n", "<user>Hello</>\n<assistant>Once upon"},
        {"{{ messages[1].content ~ messages[1].content }}", "ab", "abGptdTheMessageGoesOn ab"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char messages[256];
        int result;
        struct chat_template *t = created(cases[i].template, NULL, NULL);
        snprintf(messages, sizeof messages, "[{\"role\": \"user\", \"content\": \"Hello\"},"
                                            " {\"content\": \"%s\", \"role\": \"assistant\"}]", cases[i].content);
        const char *text = rendered(t, messages, NULL, false, true, &result);
        ck_assert_msg(result == 0, "%s: %s", cases[i].content, error);
        ck_assert_str_eq(text, cases[i].expected);
        chat_template_destroy(t);
    }
    static const char *const lose[] = {"nothing of it", "{{ messages[0].content|upper }}", "{{ messages[0].content[:3] }}", ""};
    for (size_t i = 0; i < sizeof lose / sizeof *lose; i++) {
        int result;
        struct chat_template *t = created(lose[i], NULL, NULL);
        ck_assert_ptr_null(rendered(t, hello, NULL, false, true, &result));
        ck_assert_int_eq(result, -1);
        ck_assert_ptr_nonnull(strstr(error, "final message"));
        chat_template_destroy(t);
    }
}
END_TEST

// ---- memory ----

static long fail_after = -1; // of cJSON's allocations, until one fails; -1: none does

static void *failing_malloc(size_t bytes)
{
    if (fail_after == 0) return NULL;
    if (fail_after > 0) fail_after--;
    return malloc(bytes);
}

START_TEST(each_allocation_fails)
{
    cJSON_Hooks hooks = {failing_malloc, free}, plain = {malloc, free};
    struct chat_template *t = created(keeps, "{\"bos_token\": \"<s>\", \"additional_special_tokens\": [\"<a>\"]}", NULL), *other;
    cJSON *messages = cJSON_Parse(hello), *kwargs = cJSON_Parse("{\"a\": 1}");
    int n_failed = 0;
    cJSON_InitHooks(&hooks);
    for (long n = 0; n < 100; n++) {
        char *text = NULL;
        size_t length;
        struct chat_conversation c = {messages, kwargs, n % 2 == 0, n % 2 == 1};
        fail_after = n / 2;
        int result = chat_template_render(t, &c, 0, &text, &length, error, sizeof error);
        ck_assert(result == -1 || (result == 0 && text != NULL));
        n_failed += result != 0;
        free(text);
        fail_after = n / 2;
        result = chat_template_create(&other, dir, error, sizeof error);
        ck_assert(result == -1 || (result == 0 && other != NULL));
        n_failed += result != 0;
        fail_after = -1;
        chat_template_destroy(other);
    }
    ck_assert_int_gt(n_failed, 20);
    cJSON_InitHooks(&plain);
    cJSON_Delete(messages);
    cJSON_Delete(kwargs);
    chat_template_destroy(t);
}
END_TEST

int main(void)
{
    if (!mkdtemp(dir)) return 1;
    Suite *suite = suite_create("chat_template");
    TCase *tc = tcase_create("templates");
    tcase_add_test(tc, places);
    tcase_add_test(tc, absent);
    tcase_add_test(tc, broken);
    tcase_add_test(tc, special_tokens);
    tcase_add_test(tc, variables);
    tcase_add_test(tc, reserved);
    tcase_add_test(tc, failures);
    tcase_add_test(tc, local_time);
    tcase_add_test(tc, final_message);
    tcase_add_test(tc, each_allocation_fails);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    remove_files();
    rmdir(dir);
    return failed != 0;
}
