/* Request framing: what is taken, and every doubt refused. */
#include "server/http_check.h"

#include <check.h>
#include <string.h>

// Headers as "Name: value" lines; \n between them.
static int check(const char *version, const char *lines, struct http_framing *framing, struct http_error *e)
{
    struct http_headers h = {0};
    while (*lines) {
        const char *end = strchr(lines, '\n'), *colon = strchr(lines, ':');
        if (!end) end = lines + strlen(lines);
        ck_assert(colon && colon < end);
        const char *value = colon[1] == ' ' ? colon + 2 : colon + 1;
        h.list[h.n++] = (struct http_header){lines, value, (size_t)(colon - lines), (size_t)(end - value)};
        lines = *end ? end + 1 : end;
    }
    *e = (struct http_error){0};
    return http_check(&h, version, framing, e);
}

START_TEST(taken)
{
    struct http_framing f;
    struct http_error e;
    ck_assert_int_eq(check("HTTP/1.1", "Host: x", &f, &e), 0);
    ck_assert(!f.has_length && !f.chunked);
    ck_assert_int_eq(check("HTTP/1.1", "host: x\ncontent-length: 17\nX: a\tb", &f, &e), 0);
    ck_assert(f.has_length && f.length == 17 && !f.chunked);
    ck_assert_int_eq(check("HTTP/1.1", "Host: x\nTransfer-Encoding: Chunked", &f, &e), 0);
    ck_assert(f.chunked && !f.has_length);
    ck_assert_int_eq(check("HTTP/1.0", "Content-Length: 0", &f, &e), 0);
    ck_assert_int_eq(check("HTTP/1.1", "Host: x\nX-Text: \xc3\xa4", &f, &e), 0);
    ck_assert_int_eq(check("HTTP/1.1", "Host: x\nContent-Length: 1844674407370955160", &f, &e), 0);
}
END_TEST

START_TEST(refused)
{
    static const char *const wrong[] = {
        "X: y", "Host: a\nHost: a", "Host: a\nhost: b",
        "Host: x\nContent-Length: 1\nContent-Length: 1", "Host: x\nContent-Length: 1\ncontent-length: 2",
        "Host: x\nContent-Length: 1\nTransfer-Encoding: chunked", "Host: x\nTransfer-Encoding: gzip",
        "Host: x\nTransfer-Encoding: gzip, chunked", "Host: x\nTransfer-Encoding: chunked, chunked",
        "Host: x\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked", "Host: x\nTransfer-Encoding:",
        "Host: x\nContent-Length: -1", "Host: x\nContent-Length: +1", "Host: x\nContent-Length: 1 ",
        "Host: x\nContent-Length:", "Host: x\nContent-Length: 0x1", "Host: x\nContent-Length: 99999999999999999999",
        "Host: x\nContent-Length: 1,1", "Host: x\nContent-Length : 1", "Host: x\nContent-Length\t: 1",
        "Host: x\nX-A: a\x01", "Host: x\nX-A: a\x7f", "Host: x\nX-A: a\rb", "Host: x\nX A: a", "Host: x\nX\x80: a",
        "Host: x\n: a",
    };
    struct http_framing f;
    struct http_error e;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        ck_assert_msg(check("HTTP/1.1", wrong[i], &f, &e) != 0, "%s", wrong[i]);
        ck_assert_int_eq(e.status, 400);
    }
    ck_assert_int_ne(check("HTTP/1.0", "Transfer-Encoding: chunked", &f, &e), 0);
    ck_assert_int_ne(check("HTTP/2.0", "Host: x", &f, &e), 0);
    ck_assert_int_eq(e.status, 505);

    struct http_headers h = {.n = 1, .list = {{"Host", "a\0b", 4, 3}}};
    ck_assert_int_ne(http_check(&h, "HTTP/1.1", &f, &e), 0);
    h.list[0] = (struct http_header){"Host", "a", 4, 1};
    h.overflow = true;
    ck_assert_int_ne(http_check(&h, "HTTP/1.1", &f, &e), 0);
    ck_assert_int_eq(e.status, 431);
}
END_TEST

START_TEST(request_lines)
{
    static const char *const methods[] = {"", "G T", "GET\r", "G\xe4T", "GET:", "\x7f"};
    static const char *const targets[] = {"/a b", "/a\t", "/a\r", "/\x01", "/\x7f", "/\xe4"};
    ck_assert(http_method_is_plain("GET") && http_method_is_plain("M-SEARCH"));
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) ck_assert(!http_method_is_plain(methods[i]));
    ck_assert(http_target_is_plain("/v1/models/a%20b?c=d&e=~!") && http_target_is_plain("http://x/") && http_target_is_plain("*"));
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++) ck_assert(!http_target_is_plain(targets[i]));
}
END_TEST

// Examples of https://www.w3.org/TR/trace-context/ and what is nearly one.
START_TEST(trace_ids)
{
#define TRACE "4bf92f3577b34da6a3ce929d0e0e4736"
#define PARENT "00f067aa0ba902b7"
    static const struct { const char *value, *id; } cases[] = {
        {"00-" TRACE "-" PARENT "-01", TRACE},
        {"00-" TRACE "-" PARENT "-00", TRACE},
        {"cc-" TRACE "-" PARENT "-01-what-the-future-will-be-like", TRACE},
        {"cc-" TRACE "-" PARENT "-01", TRACE},
        {"cc-" TRACE "-" PARENT "-01.what", ""},
        {"00-" TRACE "-" PARENT "-01-", ""},
        {"00-" TRACE "-" PARENT "-01 ", ""},
        {"ff-" TRACE "-" PARENT "-01", ""},
        {"0-" TRACE "-" PARENT "-01", ""},
        {"00-" TRACE "-" PARENT "-0", ""},
        {"00-" TRACE "-" PARENT, ""},
        {"00-4BF92F3577B34DA6A3CE929D0E0E4736-" PARENT "-01", ""},
        {"00-00000000000000000000000000000000-" PARENT "-01", ""},
        {"00-" TRACE "-0000000000000000-01", ""},
        {"00_" TRACE "-" PARENT "-01", ""},
        {"00-" TRACE "_" PARENT "-01", ""},
        {"00-" TRACE "-" PARENT "_01", ""},
        {"00-4bf92f3577b34da6a3ce929d0e0e473g-" PARENT "-01", ""},
        {"", ""},
    };
    char id[33];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct http_headers h = {.n = 2};
        h.list[0] = (struct http_header){"Host", "x", 4, 1};
        h.list[1] = (struct http_header){"TraceParent", cases[i].value, 11, strlen(cases[i].value)};
        http_trace_id(&h, id);
        ck_assert_str_eq(id, cases[i].id);
        h.list[h.n++] = h.list[1]; // of two neither counts
        http_trace_id(&h, id);
        ck_assert_str_eq(id, "");
    }
    http_trace_id(&(struct http_headers){0}, id);
    ck_assert_str_eq(id, "");
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("http_check");
    TCase *tc = tcase_create("framing");
    tcase_add_test(tc, taken);
    tcase_add_test(tc, refused);
    tcase_add_test(tc, request_lines);
    tcase_add_test(tc, trace_ids);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
