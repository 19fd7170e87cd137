/* The server when memory runs out: each allocation that a request causes fails once, for every kind of request. Whoever
 * met it gets an error or a closed connection, never half of an answer for a whole one; the next request gets what it
 * always gets, and every KV block comes back.
 *
 * Under a sanitizer, which brings its own allocator, requests are only compared with each other.
 */
#include "server/log.h"
#include "server/server.h"

#include <arpa/inet.h>
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

static atomic_long fail_after = -1; // allocations until one fails; -1: none does
static __thread bool exempt;        // the test's own thread

#if !defined __SANITIZE_ADDRESS__ && !defined __SANITIZE_THREAD__
#define FAILING 1

void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *memory, size_t bytes);

static bool allowed(void)
{
    if (exempt || atomic_load(&fail_after) < 0 || atomic_fetch_sub(&fail_after, 1) != 0) return true;
    errno = ENOMEM;
    return false;
}

void *malloc(size_t bytes) { return allowed() ? __libc_malloc(bytes) : NULL; }
void *calloc(size_t n, size_t size) { return allowed() ? __libc_calloc(n, size) : NULL; }
void *realloc(void *memory, size_t bytes) { return allowed() ? __libc_realloc(memory, bytes) : NULL; }

// operator new: SentencePiece's protobuf aborts the process when memory runs out, so its allocations never fail here.
void *_Znwm(size_t bytes) { return __libc_malloc(bytes); }
void *_Znam(size_t bytes) { return __libc_malloc(bytes); }
#endif

static struct engine *engine;
static struct tokenizer *tokenizer;
static struct chat_template *chat_template;
static struct server *server;

static void setup(void)
{
    static const char *const names[] = {"demo"};
    struct error e;
    static const struct server_options options = {
        .host = "127.0.0.1", .served_model_names = names, .n_served_model_names = 1, .http_threads = 2,
        .tokenizer_threads = 1, .max_connections = 64, .max_body_bytes = 1 << 20, .max_prompts = 64,
        .max_choices = 64, .max_logprobs = 5, .header_timeout = 10, .body_timeout = 30, .idle_timeout = 75,
        .request_timeout = 600, .send_timeout = 60, .keep_alive_interval = 15, .stall_timeout = 30,
    };
    struct engine_options engine_options = {
        .model_dir = "models/demo", .backend = "cpu", .prefix_caching = true, .n_threads = 1, .max_num_seqs = 8,
        .max_num_batched_tokens = 64, .block_size = 16, .kv_cache_memory_bytes = 4 << 20, .max_queue_requests = 64,
        .max_queue_tokens = 4096, .max_logprobs = 5, .slow_client_timeout = 10, .max_model_len = 512,
    };
    exempt = true;
    log_init(open("/dev/null", O_WRONLY), LOG_FORMAT_TEXT, LOG_LEVEL_INFO);
    ck_assert_msg(engine_create(&engine, &engine_options, &e) == 0, "%s", e.message);
    ck_assert_int_eq(tokenizer_create(&tokenizer, "models/demo", e.message, sizeof e.message), 0);
    ck_assert_int_eq(chat_template_create(&chat_template, "models/demo", e.message, sizeof e.message), 0);
    ck_assert_msg(server_create(&server, &options, engine, tokenizer, chat_template, &e) == 0, "%s", e.message);
    ck_assert_msg(server_start(server, &e) == 0, "%s", e.message);
    ck_assert_msg(engine_start(engine, &e) == 0, "%s", e.message);
    ck_assert_msg(server_open(server, &e) == 0, "%s", e.message);
}

static void teardown(void)
{
    server_stop(server);
    server_destroy(server);
    engine_destroy(engine);
    tokenizer_destroy(tokenizer);
    chat_template_destroy(chat_template);
}

// Sends one request, returns all that comes back, NUL-terminated: from the status line to the end of the connection.
static char *ask(const char *path, const char *body)
{
    static char answer[1 << 20];
    char request[4096];
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(server_port(server)),
                                  .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct timeval timeout = {.tv_sec = 20};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    int n = snprintf(request, sizeof request,
                     "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n"
                     "Connection: close\r\n\r\n%s", path, strlen(body), body);
    (void)!send(fd, request, (size_t)n, MSG_NOSIGNAL);
    size_t length = 0;
    ssize_t got;
    while ((got = recv(fd, answer + length, sizeof answer - 1 - length, 0)) > 0) length += (size_t)got;
    ck_assert_msg(got == 0 || errno == ECONNRESET, "%s: no end after 20 s: %s", path, body);
    answer[length] = '\0';
    close(fd);
    return answer;
}

// What must be the same each time: the texts of an answer, one after another.
static char *texts(const char *answer)
{
    char *all = calloc(1, strlen(answer) + 1), *end = all;
    static const char *const keys[] = {"\"text\":\"", "\"tokens\":[", "\"content\":\""};
    for (const char *p = answer; *p; p++)
        for (size_t i = 0; i < 3; i++)
            if (!strncmp(p, keys[i], strlen(keys[i])))
                for (const char *q = p + strlen(keys[i]); *q && *q != '"' && *q != ']'; q++) *end++ = *q;
    return all;
}

static const struct {
    const char *path, *body;
} kinds[] = {
    {"/v1/completions", "{\"model\":\"demo\",\"prompt\":\"Once upon\",\"max_tokens\":6,\"temperature\":0}"},
    {"/v1/completions", "{\"model\":\"demo\",\"prompt\":[\"Once\",\"Say\"],\"n\":2,\"seed\":1,\"max_tokens\":4,"
                        "\"logprobs\":2,"
                        "\"echo\":true,\"stop\":[\"zzz\",\"yy\"],\"logit_bias\":{\"5\":1},\"stop_token_ids\":[9],"
                        "\"allowed_token_ids\":[300,301,302,303],\"bad_words\":[\"bad\"],\"return_token_ids\":true}"},
    {"/v1/completions", "{\"model\":\"demo\",\"prompt\":[5,6,7],\"max_tokens\":8,\"temperature\":0,\"stream\":true,"
                        "\"stream_options\":{\"include_usage\":true},\"logprobs\":1}"},
    {"/v1/chat/completions", "{\"model\":\"demo\",\"messages\":[{\"role\":\"system\",\"content\":\"Be kind.\"},"
                             "{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"Say\"},{\"type\":\"text\","
                             "\"text\":\"this\"}]}],\"max_tokens\":4,\"temperature\":0,\"logprobs\":true,\"top_logprobs\":2}"},
    {"/v1/chat/completions", "{\"model\":\"demo\",\"messages\":[{\"role\":\"assistant\",\"content\":\"a\",\"tool_calls\":[{"
                             "\"id\":\"c\",\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"x\\\":1}\"}}]},"
                             "{\"role\":\"assistant\","
                             "\"content\":\"Once\"}],\"max_tokens\":4,\"temperature\":0,\"stream\":true,"
                             "\"add_generation_prompt\":false,\"continue_final_message\":true}"},
    {"/tokenize", "{\"prompt\":\"Once upon a time\"}"},
    {"/detokenize", "{\"tokens\":[300,301,302]}"},
};

static void expect_all_blocks_free(void)
{
    struct engine_stats stats;
    for (int i = 0; i < 2000; i++, usleep(1000)) {
        engine_stats_get(engine, &stats);
        if (!stats.busy && stats.n_free_blocks == stats.n_blocks) return;
    }
    ck_abort_msg("%d of %d blocks are free, %d sequences run", stats.n_free_blocks, stats.n_blocks, stats.n_running);
}

static void expect_honest(const char *answer, const char *body, const char *expected, long n)
{
    if (!*answer) return; // closed without a word: there was no memory for one
    bool ok = !strncmp(answer, "HTTP/1.1 200", 12);
    bool error = !strncmp(answer, "HTTP/1.1 503", 12) || !strncmp(answer, "HTTP/1.1 500", 12) ||
                 !strncmp(answer, "HTTP/1.1 400", 12); // the tokenizer's own "out of memory"
    ck_assert_msg(ok || error, "allocation %ld of %s: %s", n, body, answer);
    // A stream that broke off says so in band, or lacks its end; it does not claim to be done.
    bool whole = ok && (!strstr(answer, "text/event-stream") || strstr(answer, "data: [DONE]"));
    char *found = texts(answer);
    ck_assert_msg(!whole || !strcmp(found, expected), "allocation %ld of %s: `%s`, not `%s`", n, body, found, expected);
    free(found);
}

START_TEST(each_allocation_fails_once)
{
    const char *path = kinds[_i].path, *body = kinds[_i].body;
    char *expected = texts(ask(path, body));
    long n = 0;
    for (bool reached = true; reached && n < 5000; n++) {
        atomic_store(&fail_after, n);
        char *answer = ask(path, body);
#ifdef FAILING
        reached = atomic_exchange(&fail_after, -1) < 0;
#else
        atomic_store(&fail_after, -1);
        reached = n < 3;
#endif
        expect_honest(answer, body, expected, n);
        char *again = texts(ask(path, body));
        ck_assert_msg(!strcmp(again, expected), "after allocation %ld failed: `%s`, not `%s`", n, again, expected);
        free(again);
    }
#ifdef FAILING
    fprintf(stderr, "%ld allocations of a %s\n", n - 1, path);
    ck_assert_int_gt(n, 10);
#endif
    expect_all_blocks_free();
    free(expected);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("server_memory");
    TCase *tc = tcase_create("failing");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_loop_test(tc, each_allocation_fails_once, 0, sizeof kinds / sizeof *kinds);
    tcase_set_timeout(tc, 120);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
