/* The log: readable lines and JSON, nothing a client sends can break a line, nobody is ever blocked. */
#include <check.h>
#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "server/log.h"

static int ends[2]; // a pipe: the log writes to ends[1]
static char text[1 << 20];

static void setup(void)
{
    ck_assert_int_eq(pipe(ends), 0);
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
}

static void teardown(void)
{
    close(ends[0]);
    close(ends[1]);
}

// All that was written so far.
static const char *written(void)
{
    size_t n = 0;
    for (ssize_t got; (got = read(ends[0], text + n, sizeof(text) - 1 - n)) > 0;) n += (size_t)got;
    text[n] = '\0';
    return text;
}

static const struct log_request request = {.id = "cmpl-1",
                                           .method = "POST",
                                           .path = "/v1/completions",
                                           .status = 200,
                                           .finish = "stop",
                                           .prompt_tokens = 12,
                                           .cached_tokens = 0,
                                           .completion_tokens = 16,
                                           .trace_id = "4bf92f3577b34da6a3ce929d0e0e4736",
                                           .key = "alice",
                                           .queue = 0.0001,
                                           .prefill = 0.0031,
                                           .decode = 0.0166,
                                           .ttft = 0.0034,
                                           .total = 0.0201};

START_TEST(text_lines)
{
    log_init(ends[1], LOG_FORMAT_TEXT, LOG_LEVEL_INFO);
    log_message(LOG_LEVEL_WARNING, "%d of %s", 3, "them");
    log_message(LOG_LEVEL_DEBUG, "not shown");
    log_request(&request);
    char *end;
    written();
    strtok_r(text, "\n", &end);
    ck_assert_str_eq(text + 24, " warning 3 of them");
    ck_assert_int_eq(text[10], 'T');
    ck_assert_int_eq(text[23], 'Z');
    ck_assert_str_eq(end + 24, " info    request id=cmpl-1 trace_id=4bf92f3577b34da6a3ce929d0e0e4736 key=alice method=POST"
                               " path=/v1/completions status=200 finish=stop"
                               " prompt_tokens=12 cached_tokens=0 completion_tokens=16 queue=0.1ms prefill=3.1ms ttft=3.4ms"
                               " decode=16.6ms total=20.1ms\n");
}
END_TEST

static cJSON *json_line(void)
{
    const char *end;
    cJSON *json = cJSON_ParseWithOpts(written(), &end, false);
    ck_assert_msg(json != NULL, "not JSON: %s", text);
    ck_assert_str_eq(end, "\n");
    return json;
}

static const char *string_of(const cJSON *json, const char *name)
{
    return cJSON_GetStringValue(cJSON_GetObjectItem(json, name));
}

START_TEST(json_lines)
{
    log_init(ends[1], LOG_FORMAT_JSON, LOG_LEVEL_INFO);
    log_message(LOG_LEVEL_ERROR, "a \"quoted\" back\\slash\nline\x01 of %s", "h\xc3\xa9");
    cJSON *json = json_line();
    ck_assert_str_eq(string_of(json, "level"), "error");
    ck_assert_str_eq(string_of(json, "message"), "a \"quoted\" back\\slash\nline\x01 of h\xc3\xa9");
    ck_assert_uint_eq(strlen(string_of(json, "time")), strlen("2026-01-01T00:00:00.000Z"));
    cJSON_Delete(json);

    log_request(&request);
    json = json_line();
    ck_assert_str_eq(string_of(json, "id"), "cmpl-1");
    ck_assert_str_eq(string_of(json, "finish"), "stop");
    ck_assert_int_eq(cJSON_GetObjectItem(json, "status")->valueint, 200);
    ck_assert_int_eq(cJSON_GetObjectItem(json, "cached_tokens")->valueint, 0);
    ck_assert_double_eq_tol(cJSON_GetObjectItem(json, "ttft_seconds")->valuedouble, 0.0034, 1e-9);
    ck_assert_ptr_null(cJSON_GetObjectItem(json, "error"));
    cJSON_Delete(json);
}
END_TEST

// What is not known is left out; probes that succeed are not worth a line.
START_TEST(request_lines)
{
    struct log_request r = {.id = "x",
                            .method = "GET",
                            .path = "/health",
                            .status = 200,
                            .prompt_tokens = -1,
                            .cached_tokens = -1,
                            .completion_tokens = -1,
                            .queue = -1,
                            .prefill = -1,
                            .ttft = -1,
                            .decode = -1,
                            .total = 0.001};
    log_init(ends[1], LOG_FORMAT_TEXT, LOG_LEVEL_INFO);
    log_request(&r);
    ck_assert_str_eq(written(), "");
    r.status = 503;
    r.error = "the engine = stuck";
    log_request(&r);
    ck_assert_str_eq(written() + 24, " info    request id=x method=GET path=/health status=503 total=1.0ms"
                                     " error=\"the engine = stuck\"\n");
    log_init(ends[1], LOG_FORMAT_TEXT, LOG_LEVEL_DEBUG);
    r.status = 200;
    log_request(&r);
    ck_assert_ptr_nonnull(strstr(written(), "debug"));
}
END_TEST

// Random bytes in every field a client chooses: always one line, always JSON.
START_TEST(hostile_fields)
{
    unsigned seed = (unsigned)getpid();
    printf("hostile_fields: seed %u\n", seed);
    srand(seed);
    char fields[3][2000];
    for (int round = 0; round < 500; round++) {
        for (int f = 0; f < 3; f++) {
            int n = rand() % 1999;
            for (int i = 0; i < n; i++) fields[f][i] = (char)(1 + rand() % 255);
            fields[f][n] = '\0';
        }
        struct log_request r = request;
        r.id = fields[0], r.path = fields[1], r.error = fields[2], r.status = 400;
        log_init(ends[1], LOG_FORMAT_JSON, LOG_LEVEL_INFO);
        log_request(&r);
        cJSON *json = json_line();
        ck_assert_int_eq(cJSON_GetObjectItem(json, "status")->valueint, 400);
        cJSON_Delete(json);
        log_init(ends[1], LOG_FORMAT_TEXT, LOG_LEVEL_INFO);
        log_request(&r);
        log_message(LOG_LEVEL_INFO, "%s", fields[0]);
        const char *first = strchr(written(), '\n');
        ck_assert_ptr_nonnull(first);
        ck_assert_ptr_eq(strchr(first + 1, '\n'), text + strlen(text) - 1);
    }
}
END_TEST

START_TEST(long_message_is_cut)
{
    char longer[10000];
    log_init(ends[1], LOG_FORMAT_JSON, LOG_LEVEL_INFO);
    memset(longer, '"', sizeof(longer));
    longer[sizeof(longer) - 1] = '\0';
    log_message(LOG_LEVEL_INFO, "%s", longer);
    cJSON *json = json_line();
    ck_assert_uint_le(strlen(text), 4096);
    cJSON_Delete(json);
}
END_TEST

// A pipe that nobody empties: lines are dropped, nobody waits, and their number is told later.
START_TEST(full_pipe)
{
    log_init(ends[1], LOG_FORMAT_TEXT, LOG_LEVEL_INFO);
    alarm(20); // blocked: killed
    enum { LINES = 20000 };
    for (int i = 0; i < LINES; i++) log_message(LOG_LEVEL_INFO, "line %d", i);
    int kept = 0, dropped = 0;
    for (const char *p = written(); (p = strchr(p, '\n')); p++) kept++;
    ck_assert_int_lt(kept, LINES);
    log_message(LOG_LEVEL_INFO, "after");
    ck_assert_ptr_nonnull(strstr(written(), "after"));
    ck_assert_int_eq(sscanf(strstr(text, "warning ") + 8, "%d", &dropped), 1);
    ck_assert_int_eq(kept + dropped, LINES);
    alarm(0);
}
END_TEST

START_TEST(closed_pipe)
{
    signal(SIGPIPE, SIG_IGN);
    log_init(ends[1], LOG_FORMAT_TEXT, LOG_LEVEL_INFO);
    close(ends[0]);
    errno = 77;
    log_message(LOG_LEVEL_INFO, "to nobody");
    ck_assert_int_eq(errno, 77);
}
END_TEST

enum { THREADS = 4, LINES_EACH = 100 };

static void *write_lines(void *name)
{
    for (int i = 0; i < LINES_EACH; i++) log_message(LOG_LEVEL_INFO, "thread %s line %d .", (char *)name, i);
    return NULL;
}

START_TEST(threads)
{
    static char names[THREADS][2] = {"a", "b", "c", "d"};
    pthread_t ids[THREADS];
    log_init(ends[1], LOG_FORMAT_TEXT, LOG_LEVEL_INFO);
    for (int i = 0; i < THREADS; i++) pthread_create(&ids[i], NULL, write_lines, names[i]);
    for (int i = 0; i < THREADS; i++) pthread_join(ids[i], NULL);
    int next[THREADS] = {0};
    written();
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        char name, dot;
        int number;
        ck_assert_int_eq(sscanf(line + 33, "thread %c line %d %c", &name, &number, &dot), 3);
        ck_assert_int_eq(next[name - 'a']++, number);
    }
    for (int i = 0; i < THREADS; i++) ck_assert_int_eq(next[i], LINES_EACH);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("log");
    TCase *tcase = tcase_create("log");
    tcase_add_checked_fixture(tcase, setup, teardown);
    tcase_add_test(tcase, text_lines);
    tcase_add_test(tcase, json_lines);
    tcase_add_test(tcase, request_lines);
    tcase_add_test(tcase, hostile_fields);
    tcase_add_test(tcase, long_message_is_cut);
    tcase_add_test(tcase, full_pipe);
    tcase_add_test(tcase, closed_pipe);
    tcase_add_test(tcase, threads);
    tcase_set_timeout(tcase, 30);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
