/* What the comparison with jinja2 (tests/jinja/compare.py) does not show: limits, words and lines of errors, hostile templates,
 * failing allocations. Under a sanitizer, which brings its own allocator, allocations don't fail.
 */
#include "tokenizer/jinja.h"

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if !defined __SANITIZE_ADDRESS__ && !defined __SANITIZE_THREAD__
#define COUNTING 1

void *__libc_malloc(size_t bytes);
void *__libc_realloc(void *memory, size_t bytes);
void __libc_free(void *memory);

static __thread long n_allocations, n_frees;
static __thread long fail_after = -1; // allocations until one fails; -1: none does

static bool allowed(void)
{
    n_allocations++;
    if (fail_after < 0 || fail_after-- > 0) return true;
    errno = ENOMEM;
    return false;
}

void *malloc(size_t bytes)
{
    return allowed() ? __libc_malloc(bytes) : NULL;
}

void *realloc(void *memory, size_t bytes)
{
    if (!allowed()) return NULL;
    n_frees += memory != NULL;
    return __libc_realloc(memory, bytes);
}

void free(void *memory)
{
    n_frees += memory != NULL;
    __libc_free(memory);
}
#endif

static char error[512], *text;
static size_t length;

static int render_limited(const char *source, const char *variables, const struct jinja_limits *limits)
{
    struct jinja_template *t;
    cJSON *json = cJSON_Parse(variables);
    ck_assert_ptr_nonnull(json);
    error[0] = '\0';
    text = NULL;
    int result = jinja_create(&t, source, strlen(source), error, sizeof error);
    if (result == 0) result = jinja_render(t, json, limits, 0, &text, &length, error, sizeof error);
    jinja_destroy(t);
    cJSON_Delete(json);
    return result;
}

static int render(const char *source, const char *variables)
{
    return render_limited(source, variables, &jinja_default_limits);
}

static void check_text(const char *source, const char *variables, const char *expected)
{
    ck_assert_msg(render(source, variables) == 0, "%s: %s", source, error);
    ck_assert_str_eq(text, expected);
    ck_assert_uint_eq(length, strlen(expected));
    free(text);
}

static void check_error(const char *source, const char *expected)
{
    ck_assert_msg(render(source, "{\"d\": {\"a\": 1}, \"l\": [1, 2]}") == -1, "%s: %s", source, text);
    ck_assert_msg(strstr(error, expected) != NULL, "%s: '%s' instead of '%s'", source, error, expected);
}

// part n times, between begin and end. Freed by the caller.
static char *repeated(const char *begin, const char *part, size_t n, const char *end)
{
    size_t size = strlen(part);
    char *whole = malloc(strlen(begin) + n * size + strlen(end) + 1), *at = stpcpy(whole, begin);
    for (size_t i = 0; i < n; i++) at = stpcpy(at, part);
    strcpy(at, end);
    return whole;
}

// ---- what it is for ----

static const char chat[] =
    "{%- set ns = namespace(n=0) -%}\n"
    "{%- macro turn(role, text='') -%}<|{{ role }}|>{{ text|trim }}<|end|>{%- endmacro -%}\n"
    "{%- for m in messages if m.role != 'system' -%}\n"
    "  {%- if m.role not in ('user', 'assistant', 'tool') -%}{{ raise_exception('no role ' ~ m.role) }}{%- endif -%}\n"
    "  {%- set ns.n = ns.n + 1 -%}\n"
    "  {{ turn(m.role, text=m.content or m.calls|tojson(indent=1)) }}\n"
    "{% endfor -%}\n"
    "{{ ns.n }}{{ messages|map(attribute='role')|unique|sort|join(',') }}{% set x %}{{ messages }}{% endset %}{{ x|length }}\n";

static const char conversation[] =
    "{\"messages\": [{\"role\": \"user\", \"content\": \" h\\u00e9 \"}, {\"role\": \"assistant\", \"calls\": [{\"a\": 1.5}]}]}";

START_TEST(a_chat_is_rendered)
{
    check_text(chat, conversation, "<|user|>h\xC3\xA9<|end|>\n<|assistant|>[\n {\n  \"a\": 1.5\n }\n]<|end|>\n2assistant,user83");
}
END_TEST

START_TEST(a_template_raises)
{
    ck_assert_int_eq(render("a\n{{ raise_exception('only ' ~ n) }}", "{\"n\": 3}"), JINJA_RAISED);
    ck_assert_str_eq(error, "only 3");
    ck_assert_ptr_null(text);
}
END_TEST

START_TEST(time_is_given)
{
    setenv("TZ", "UTC", 1);
    check_text("{{ strftime_now('%Y-%m-%d') }}{{ strftime_now('') }}", "{}", "1970-01-01");
}
END_TEST

START_TEST(errors_have_lines)
{
    check_error("a\n\n{{ b c }}", "line 3: expected '}}', got 'c'");
    check_error("{#\n\n#}\n{{ d.zz.y }}", "line 4: 'dict object' has no attribute 'zz'");
    check_error("{% for x in l %}\n{{ x.y.z }}\n{% endfor %}", "line 2: 'int object' has no attribute 'y'");
    check_error("\r\n\r\n{{ nothing + 1 }}", "line 3: 'nothing' is undefined");
    check_error("{{ l[7].x }}", "line 1: list object has no element 7");
    check_error("{{ none.x.y }}", "line 1: 'None' has no attribute 'x'");
    check_error("\n{{ l.append(1) }}", "line 2: access to attribute 'append' of 'list' object is unsafe.");
    check_error("{{ 'a' + 1 }}", "line 1: unsupported operand types for +: 'str' and 'int'");
    check_error("{% macro m(a) %}\n{{ a.b }}\n{% endmacro %}{{ m() }}", "line 2: parameter 'a' was not provided");
    check_error("{{ (1 if false).x }}", "the inline if-expression evaluated to false");
    check_error("{{ 9223372036854775807 + 1 }}", "integer overflow");
    check_error("{{ 99999999999999999999 }}", "an integer beyond 64 bits");
    check_error("\n{% if l %}", "a block without 'elif'");
    check_error("\n{% if l %}{% endfor %}", "line 2: unknown tag 'endfor'");
    check_error("{{ '\n' }}{{ 'a }}", "line 2: a string without its end");
    check_error("\n{# {{", "line 2: Missing end of comment tag");
}
END_TEST

START_TEST(the_unknown_is_refused_by_name)
{
    check_error("a\n{% include 'x' %}", "line 2: unknown tag 'include'");
    check_error("{% if false %}\n{{ d|nofilter }}{% endif %}", "line 2: unknown filter 'nofilter'");
    check_error("{% if false %}\n\n{{ d is notest }}{% endif %}", "line 3: unknown test 'notest'");
    check_error("{% if false %}{{ nofunction(1) }}{% endif %}", "line 1: unknown function 'nofunction'");
    check_error("{% for x in l recursive %}{% endfor %}", "recursive loops are not supported");
    check_error("{{ 'a'.zfill(3) }}", "'zfill' is not supported");
    check_error("{{ d|tojson(nope=1) }}", "tojson got an unexpected keyword argument 'nope'");
    check_error("\xFF", "line 1: the template is not UTF-8");
}
END_TEST

START_TEST(undefined_is_nothing_until_it_is_used)
{
    check_text("[{{ x }}{{ x ~ 'a' }}{% for i in x %}{% endfor %}{{ 1 if x else 2 }}{{ x|default(3) }}{{ x is defined }}]", "{}",
               "[a23False]");
    check_error("{{ x.y }}", "'x' is undefined");
    check_error("{{ x() }}", "unknown function 'x'");
    check_error("{{ -x }}", "'x' is undefined");
    check_error("{{ x < 1 }}", "'x' is undefined");
    check_error("{{ x|tojson }}", "Object of type Undefined is not JSON serializable");
}
END_TEST

START_TEST(numbers_are_as_json_has_them)
{
    check_text("{{ [a, b, c, d, e] }}", "{\"a\": 5, \"b\": 1.25, \"c\": -0.5, \"d\": 9007199254740992, \"e\": 1e300}",
               "[5, 1.25, -0.5, 9007199254740992, 1e+300]");
}
END_TEST

START_TEST(broken_text_in_variables_stays)
{
    check_text("{{ s }}|{{ s|length }}|{{ s[1:] }}|{{ s|upper }}", "{\"s\": \"a\xFF\xE4z\"}", "a\xFF\xE4z|4|\xFF\xE4z|A\xFF\xE4Z");
}
END_TEST

// ---- limits ----

static void check_limit(const char *source, struct jinja_limits limits, const char *expected)
{
    ck_assert_msg(render_limited(source, "{\"l\": [1, 2, 3]}", &limits) == -1, "%s gave %zu bytes", source, length);
    ck_assert_msg(strstr(error, expected) != NULL, "%s: %s", source, error);
}

START_TEST(steps_are_limited)
{
    struct jinja_limits limits = jinja_default_limits;
    limits.steps = 1000;
    check_limit("{% for i in range(5000) %}{% endfor %}", limits, "too many steps");
    check_limit("{{ range(5000)|list|length }}", limits, "too many steps");
    check_limit("{{ [1] * 5000 }}", limits, "too many steps");
    check_limit("{{ 5000 in range(10000) }}", limits, "too many steps");
    check_limit("{{ ('a,' * 5000).split(',')|length }}", limits, "too many steps");
    check_limit("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", limits, "");
    check_limit("{% for a in range(90000) %}{% for b in range(90000) %}{{ a * b }}{% endfor %}{% endfor %}", jinja_default_limits,
                "too many steps");
}
END_TEST

START_TEST(depth_is_limited)
{
    struct jinja_limits limits = jinja_default_limits;
    check_limit("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", limits, "nested too deeply");
    limits.depth = 1 << 30;
    check_limit("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", limits, "nested too deeply");
#define DEEP "{% set ns = namespace(a=()) %}{% for i in range(99999) %}{% set ns.a = (ns.a,) %}{% endfor %}"
    check_limit(DEEP "{{ ns.a }}", limits, "nested too deeply");
    check_limit(DEEP "{{ ns.a|tojson }}", limits, "nested too deeply");
    check_limit(DEEP "{{ ns.a == (ns.a,) }}", limits, "nested too deeply");
    check_limit(DEEP "{{ ns.a < (ns.a,) }}", limits, "nested too deeply");
    check_limit(DEEP "{% set x = {ns.a: 1} %}", limits, "nested too deeply");
    check_limit(DEEP "{{ ns.a in {} }}", limits, "nested too deeply");
    check_limit("{% set ns = namespace(a='x') %}{% for i in range(99999) %}{% set ns.a = ns.a|map('string') %}{% endfor %}"
                "{{ ns.a|list }}",
                limits, "nested too deeply");
    check_limit("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}", limits, "nested too deeply");
}
END_TEST

START_TEST(memory_is_limited)
{
    struct jinja_limits limits = jinja_default_limits;
    limits.memory_bytes = 1 << 20;
    check_limit("{{ 'a' * 9999999 }}", limits, "bytes of memory");
    check_limit("{{ 'a' * 9223372036854775807 }}", limits, "bytes of memory");
    check_limit("{{ [1, 2] * 9223372036854775807 }}", limits, "too many steps");
    check_limit("{{ '%999999999s' % 1 }}", limits, "");
    check_limit("{{ l|tojson(indent=99999999) }}", limits, "bytes of memory");
    check_limit("{{ 'x'|indent(99999999, true) }}", limits, "bytes of memory");
    check_limit("{{ [1]|batch(99999999, 0)|list|length }}", limits, "");
    check_limit("{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", limits,
                "bytes of memory");
    check_limit("{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s|replace('a', 'aab') %}{% endfor %}",
                limits, "bytes of memory");
    limits.memory_bytes = 10;
    check_limit("{{ l }}", limits, "bytes of memory");
}
END_TEST

START_TEST(output_is_limited)
{
    struct jinja_limits limits = jinja_default_limits;
    limits.output_bytes = 1000;
    check_limit("{% for i in range(101) %}0123456789{% endfor %}", limits, "more than 1000 bytes of output");
    check_limit("{% set x %}{% for i in range(101) %}0123456789{% endfor %}{% endset %}", limits, "more than 1000 bytes of output");
    ck_assert_int_eq(render_limited("{% for i in range(100) %}0123456789{% endfor %}", "{}", &limits), 0);
    ck_assert_uint_eq(length, 1000);
    free(text);
}
END_TEST

// Appending to a text again and again copies it seldom.
START_TEST(accumulation_is_cheap)
{
    static const char source[] = "{% set ns = namespace(s='') %}{% for i in range(50000) %}{% set ns.s = ns.s ~ 'some words ' %}"
                                 "{% endfor %}{{ ns.s|length }}";
    check_text(source, "{}", "550000");
}
END_TEST

START_TEST(a_text_extended_twice_is_two_texts)
{
    check_text("{% set a = 'x' * 50 ~ 'a' %}{% set b = a ~ 'b' %}{% set c = a ~ 'c' %}{% set d = b ~ 'd' %}"
               "{{ a[50:] }},{{ b[50:] }},{{ c[50:] }},{{ d[50:] }}",
               "{}", "a,ab,ac,abd");
}
END_TEST

// ---- hostile templates ----

static const struct {
    const char *begin, *part, *end;
} towers[] = {
    {"{{ ", "(", ""},
    {"{{ ", "[", ""},
    {"{{ ", "{1:", ""},
    {"{{ ", "-", "1 }}"},
    {"{{ ", "not ", "1 }}"},
    {"{{ 1", "[1", ""},
    {"{{ 1", " if 1 else 1", " }}"},
    {"{{ a", ".a", " }}"},
    {"{{ 1", "(1)", " }}"},
    {"{{ ", "f(", ""},
    {"{{ 1", "|abs", " }}"},
    {"{{ 1", "|default(1", " }}"},
    {"{{ 1", " is in [1", " }}"},
    {"", "{% if 1 %}", ""},
    {"", "{% for a in b %}", ""},
    {"", "{% macro a() %}", ""},
    {"", "{% set a %}", ""},
    {"", "{% call a() %}", ""},
    {"", "{% with %}", ""},
    {"{% for ", "(", ""},
    {"{% set x|", "upper|", "upper %}{% endset %}"},
    {"", "{#", ""},
    {"", "{% raw %}", ""},
    {"{{ '", "\\", "' }}"},
    {"{{ ", "9", " }}"},
    {"{{ ", "0x", " }}"},
    {"{{ a", " a", " }}"},
};

START_TEST(towers_fall_safely)
{
    char *source = repeated(towers[_i].begin, towers[_i].part, 100000, towers[_i].end);
    int result = render(source, "{\"a\": {}}");
    ck_assert_msg(result == -1 || (result == 0 && text), "%s", towers[_i].part);
    if (result == -1) ck_assert_uint_gt(strlen(error), 8);
    free(text);
    free(source);
}
END_TEST

START_TEST(long_is_not_deep)
{
    char *source = repeated("{{ 0", " + 1", 20000, " }}");
    check_text(source, "{}", "20000");
    free(source);
    source = repeated("{{ 'x'", " ~ 'y'", 20000, " | length }}");
    ck_assert_int_eq(render(source, "{}"), 0);
    free(text);
    free(source);
    source = repeated("{{ 0", " or 0", 20000, " or 5 }}");
    check_text(source, "{}", "5");
    free(source);
    source = repeated("{% if 0 %}", "{% elif 0 %}a", 20000, "{% else %}b{% endif %}");
    check_text(source, "{}", "b");
    free(source);
}
END_TEST

START_TEST(deep_variables_are_refused)
{
    char *variables = repeated("{\"a\": ", "[", 900, "");
    char *whole = repeated(variables, "]", 900, "}");
    ck_assert_int_eq(render("x", whole), -1);
    ck_assert_ptr_nonnull(strstr(error, "nested too deeply"));
    free(whole);
    free(variables);
}
END_TEST

// Pieces of templates in any order: whatever comes out, it comes out.
START_TEST(any_pieces)
{
    static const char *const pieces[] = {
        "{{", "}}", "{%", "%}", "{#", "#}", "-", "+", " ", "\n", "a", "l", "d", "'x'", "1", "0", "2.5", "(", ")", "[",
        "]", "{", "}", ":", ",", ".", "|", "~", "*", "**", "//", "%", "==", "<", " in ", " not ", " and ", " or ", " if ",
        " else ", " is ", "for ", "endfor", "endif", "set ", "endset", "=", "macro m(a) ", "endmacro", "m(", "call ",
        "endcall", "range(", "namespace(", "join", "loop.index", "map('upper')", "tojson", "upper", "defined", "none",
        "true", "raw", "endraw", "break", "generation", "items()", "endgeneration", "\xC3\xA9", "\"", "\\",
        "{% for x in l %}", "{% endfor %}", "{% if a %}", "{% endif %}", "{{ x }}", "{{ l", "|list", "|first", "[::-1]",
        "[1:]",
    };
    unsigned long long state = 88172645463325252ull + (unsigned long long)_i;
    char source[2048];
    for (int round = 0; round < 3000; round++) {
        char *at = source;
        size_t n = 1 + state % 40;
        for (size_t i = 0; i < n; i++) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            at = stpcpy(at, pieces[state % (sizeof pieces / sizeof *pieces)]);
        }
        int result = render(source, "{\"a\": \"b\", \"l\": [1, \"two\", null], \"d\": {\"k\": [true]}}");
        ck_assert(result == 0 || error[0]);
        if (result == 0) free(text);
    }
}
END_TEST

// ---- allocations ----

#ifdef COUNTING
START_TEST(every_allocation_may_fail)
{
    char big[9000];
    cJSON *json = cJSON_Parse(conversation);
    long n = 0;
    struct jinja_template *t = NULL;
    memset(big, 'x', sizeof big - 1);
    big[sizeof big - 1] = '\0';
    memcpy(big, chat, sizeof chat - 1);
    for (int result = -1; result != 0; n++) {
        n_allocations = n_frees = 0;
        error[0] = '\0';
        fail_after = n;
        result = jinja_create(&t, big, strlen(big), error, sizeof error);
        if (result == 0) result = jinja_render(t, json, &jinja_default_limits, 0, &text, &length, error, sizeof error);
        bool failed = fail_after == -1;
        fail_after = -1;
        jinja_destroy(t);
        ck_assert_int_eq(result, failed ? -1 : 0);
        if (failed) ck_assert_msg(strstr(error, "out of memory") != NULL, "allocation %ld: %s", n, error);
        else free(text);
        ck_assert_int_eq(n_allocations - failed, n_frees);
    }
    ck_assert_int_gt(n, 5);
    cJSON_Delete(json);
}
END_TEST

START_TEST(failures_leave_nothing_behind)
{
    static const char *const sources[] = {"{{ 1 + }}", "{{ x.y }}", "abc{% set a %}def{{ x.y }}", "{{ raise_exception('no') }}",
                                          "{{ 'a' * 999999999 }}"};
    for (size_t i = 0; i < sizeof sources / sizeof *sources; i++) {
        n_allocations = n_frees = 0;
        ck_assert_int_ne(render(sources[i], "{}"), 0);
        ck_assert_int_eq(n_allocations, n_frees);
    }
}
END_TEST
#endif

// ---- threads ----

static void *render_many(void *t)
{
    uintptr_t sum = 0;
    cJSON *json = cJSON_Parse(conversation);
    for (int i = 0; i < 300; i++) {
        char *out, message[100];
        size_t n;
        if (jinja_render(t, json, &jinja_default_limits, 0, &out, &n, message, sizeof message)) return NULL;
        sum += n;
        free(out);
    }
    cJSON_Delete(json);
    return (void *)sum;
}

START_TEST(many_threads_share_one)
{
    struct jinja_template *t;
    pthread_t threads[4];
    ck_assert_int_eq(jinja_create(&t, chat, strlen(chat), error, sizeof error), 0);
    void *alone = render_many(t), *sum;
    for (int i = 0; i < 4; i++) ck_assert_int_eq(pthread_create(&threads[i], NULL, render_many, t), 0);
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], &sum);
        ck_assert_ptr_eq(sum, alone);
    }
    ck_assert_ptr_nonnull(alone);
    jinja_destroy(t);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("jinja");
    TCase *tests = tcase_create("all");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, a_chat_is_rendered);
    tcase_add_test(tests, a_template_raises);
    tcase_add_test(tests, time_is_given);
    tcase_add_test(tests, errors_have_lines);
    tcase_add_test(tests, the_unknown_is_refused_by_name);
    tcase_add_test(tests, undefined_is_nothing_until_it_is_used);
    tcase_add_test(tests, numbers_are_as_json_has_them);
    tcase_add_test(tests, broken_text_in_variables_stays);
    tcase_add_test(tests, steps_are_limited);
    tcase_add_test(tests, depth_is_limited);
    tcase_add_test(tests, memory_is_limited);
    tcase_add_test(tests, output_is_limited);
    tcase_add_test(tests, accumulation_is_cheap);
    tcase_add_test(tests, a_text_extended_twice_is_two_texts);
    tcase_add_loop_test(tests, towers_fall_safely, 0, sizeof towers / sizeof *towers);
    tcase_add_test(tests, long_is_not_deep);
    tcase_add_test(tests, deep_variables_are_refused);
    tcase_add_loop_test(tests, any_pieces, 0, 4);
#ifdef COUNTING
    tcase_add_test(tests, every_allocation_may_fail);
    tcase_add_test(tests, failures_leave_nothing_behind);
#endif
    tcase_add_test(tests, many_threads_share_one);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
