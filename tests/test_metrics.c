/* Metrics: the text parses as Prometheus', histograms add up, values come from where they should. */
#include <check.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "server/metrics.h"

static struct metrics *m;

static void setup(void) { m = metrics_create("de\"mo\\", 2048); }
static void teardown(void) { metrics_destroy(m); }

static char *render(void)
{
    struct engine_stats stats = {.n_running = 3,
                                 .n_waiting = 2,
                                 .n_waiting_tokens = 70,
                                 .n_blocks = 100,
                                 .n_free_blocks = 25,
                                 .n_steps = 9,
                                 .n_preemptions = 4,
                                 .n_refused_full = 5,
                                 .n_refused_wait = 6,
                                 .n_expired = 7,
                                 .queue_wait = 1.5,
                                 .step_seconds = 2.5,
                                 .host_seconds = 0.125,
                                 .launch_seconds = 0.25,
                                 .device_seconds = 0.5,
                                 .weights_seconds = 2.5,
                                 .warm_up_seconds = 0.125,
                                 .warm_up_bytes = 4096,
                                 .prefix_queries = 640,
                                 .prefix_hits = 128,
                                 .prompt_tokens = 1000,
                                 .generation_tokens = ((uint64_t)1 << 53) - 1};
    size_t n;
    char *text = metrics_render(m, &stats, &n);
    ck_assert_ptr_nonnull(text);
    ck_assert_uint_eq(strlen(text), n);
    return text;
}

// The value of the series written so, labels included.
static double value_of(const char *text, const char *series)
{
    size_t n = strlen(series);
    for (const char *p = text; (p = strstr(p, series)); p += n)
        if ((p == text || p[-1] == '\n') && p[n] == ' ') return strtod(p + n, NULL);
    ck_abort_msg("no series %s", series);
}

#define MODEL "model_name=\"de\\\"mo\\\\\""

START_TEST(engine_values)
{
    char *text = render();
    ck_assert_double_eq(value_of(text, "gptd_num_requests_running{" MODEL "}"), 3);
    ck_assert_double_eq(value_of(text, "gptd_num_requests_waiting{" MODEL "}"), 2);
    ck_assert_double_eq(value_of(text, "gptd_kv_cache_usage_ratio{" MODEL "}"), 0.75);
    ck_assert_double_eq(value_of(text, "gptd_prefix_cache_queries_total{" MODEL "}"), 640);
    ck_assert_double_eq(value_of(text, "gptd_prefix_cache_hits_total{" MODEL "}"), 128);
    ck_assert_double_eq(value_of(text, "gptd_prompt_tokens_total{" MODEL "}"), 1000);
    ck_assert_double_eq(value_of(text, "gptd_generation_tokens_total{" MODEL "}"), 9007199254740991.0);
    ck_assert_double_eq(value_of(text, "gptd_num_preemptions_total{" MODEL "}"), 4);
    ck_assert_double_eq(value_of(text, "gptd_requests_refused_total{" MODEL ",reason=\"queue_full\"}"), 5);
    ck_assert_double_eq(value_of(text, "gptd_requests_refused_total{" MODEL ",reason=\"queue_wait\"}"), 6);
    ck_assert_double_eq(value_of(text, "gptd_requests_refused_total{" MODEL ",reason=\"queue_timeout\"}"), 7);
    ck_assert_double_eq(value_of(text, "gptd_queue_wait_seconds{" MODEL "}"), 1.5);
    ck_assert_double_eq(value_of(text, "gptd_engine_step_seconds_total{" MODEL "}"), 2.5);
    ck_assert_double_eq(value_of(text, "gptd_engine_host_seconds_total{" MODEL "}"), 0.125);
    ck_assert_double_eq(value_of(text, "gptd_engine_launch_seconds_total{" MODEL "}"), 0.25);
    ck_assert_double_eq(value_of(text, "gptd_start_device_seconds{" MODEL "}"), 0.5);
    ck_assert_double_eq(value_of(text, "gptd_start_weights_seconds{" MODEL "}"), 2.5);
    ck_assert_double_eq(value_of(text, "gptd_start_warm_up_seconds{" MODEL "}"), 0.125);
    ck_assert_double_eq(value_of(text, "gptd_start_warm_up_bytes{" MODEL "}"), 4096);
    free(text);
}
END_TEST

START_TEST(process_values)
{
    char *text = render();
    ck_assert_double_gt(value_of(text, "process_resident_memory_bytes"), 100000);
    ck_assert_double_ge(value_of(text, "process_virtual_memory_bytes"),
                        value_of(text, "process_resident_memory_bytes"));
    ck_assert_double_ge(value_of(text, "process_open_fds"), 3);
    ck_assert_double_gt(value_of(text, "process_max_fds"), value_of(text, "process_open_fds"));
    ck_assert_double_gt(value_of(text, "process_start_time_seconds"), 1.7e9);
    double fds = value_of(text, "process_open_fds");
    free(text);
    int fd = dup(0);
    text = render();
    ck_assert_double_eq(value_of(text, "process_open_fds"), fds + 1);
    close(fd);
    free(text);
}
END_TEST

// submitted 1, scheduled 1.5, first token 3.5, end 13.5
static const struct request_times times = {1, 1.5, 3.5, 13.5};

START_TEST(requests)
{
    metrics_request(m, &times, FINISH_STOP, 7, 300);
    metrics_request(m, &times, FINISH_LENGTH, 7, 300);
    metrics_request(m, &(struct request_times){1, 0, 0, 2}, FINISH_CANCELLED, 7, 0); // never ran
    metrics_request(m, &(struct request_times){1, 0, 0, 2}, FINISH_SLOW, 7, 0);
    metrics_request(m, &(struct request_times){1, 0, 0, 2}, FINISH_ERROR, 7, 0);
    char *text = render();
    ck_assert_double_eq(value_of(text, "gptd_request_success_total{" MODEL ",finished_reason=\"stop\"}"), 1);
    ck_assert_double_eq(value_of(text, "gptd_request_success_total{" MODEL ",finished_reason=\"length\"}"), 1);
    ck_assert_double_eq(value_of(text, "gptd_request_success_total{" MODEL ",finished_reason=\"abort\"}"), 2);
    ck_assert_double_eq(value_of(text, "gptd_request_success_total{" MODEL ",finished_reason=\"error\"}"), 1);
    ck_assert_double_eq(value_of(text, "gptd_time_to_first_token_seconds_count{" MODEL "}"), 2);
    ck_assert_double_eq(value_of(text, "gptd_time_to_first_token_seconds_sum{" MODEL "}"), 5);
    ck_assert_double_eq(value_of(text, "gptd_time_to_first_token_seconds_bucket{" MODEL ",le=\"1\"}"), 0);
    ck_assert_double_eq(value_of(text, "gptd_time_to_first_token_seconds_bucket{" MODEL ",le=\"2.5\"}"),
                        2); // inclusive
    ck_assert_double_eq(value_of(text, "gptd_request_queue_time_seconds_sum{" MODEL "}"), 1);
    ck_assert_double_eq(value_of(text, "gptd_request_prefill_time_seconds_sum{" MODEL "}"), 4);
    ck_assert_double_eq(value_of(text, "gptd_request_decode_time_seconds_sum{" MODEL "}"), 20);
    ck_assert_double_eq(value_of(text, "gptd_e2e_request_latency_seconds_sum{" MODEL "}"), 28);
    ck_assert_double_eq(value_of(text, "gptd_e2e_request_latency_seconds_count{" MODEL "}"), 5);
    ck_assert_double_eq(value_of(text, "gptd_request_prompt_tokens_bucket{" MODEL ",le=\"5\"}"), 0);
    ck_assert_double_eq(value_of(text, "gptd_request_prompt_tokens_bucket{" MODEL ",le=\"10\"}"), 5);
    ck_assert_double_eq(value_of(text, "gptd_request_generation_tokens_sum{" MODEL "}"), 600);
    ck_assert_ptr_nonnull(strstr(text, "le=\"2000\"")); // the last bucket of token counts fits the context
    ck_assert_ptr_null(strstr(text, "le=\"5000\""));
    free(text);
}
END_TEST

START_TEST(inter_token)
{
    metrics_inter_token(m, 0, 5);
    metrics_inter_token(m, 4, 0.1); // 25 ms each
    metrics_inter_token(m, 1, 1000);
    char *text = render();
    ck_assert_double_eq(value_of(text, "gptd_inter_token_latency_seconds_count{" MODEL "}"), 5);
    ck_assert_double_eq(value_of(text, "gptd_inter_token_latency_seconds_bucket{" MODEL ",le=\"0.01\"}"), 0);
    ck_assert_double_eq(value_of(text, "gptd_inter_token_latency_seconds_bucket{" MODEL ",le=\"0.025\"}"), 4);
    ck_assert_double_eq(value_of(text, "gptd_inter_token_latency_seconds_bucket{" MODEL ",le=\"80\"}"), 4);
    ck_assert_double_eq(value_of(text, "gptd_inter_token_latency_seconds_bucket{" MODEL ",le=\"+Inf\"}"), 5);
    ck_assert_double_eq_tol(value_of(text, "gptd_inter_token_latency_seconds_sum{" MODEL "}"), 1000.1, 1e-5);
    free(text);
}
END_TEST

START_TEST(http)
{
    for (int i = 0; i < 3; i++) metrics_http(m, "POST", "/v1/completions", 200);
    metrics_http(m, "POST", "/v1/completions", 429);
    metrics_http(m, "GET", "/health", 200);
    for (int i = 0; i < 1000; i++) metrics_http(m, "GET", "other", i); // bounded, whatever comes
    char *text = render();
    ck_assert_double_eq(
        value_of(text, "gptd_http_requests_total{method=\"POST\",route=\"/v1/completions\",status=\"200\"}"), 3);
    ck_assert_double_eq(
        value_of(text, "gptd_http_requests_total{method=\"POST\",route=\"/v1/completions\",status=\"429\"}"), 1);
    ck_assert_double_eq(value_of(text, "gptd_http_requests_total{method=\"GET\",route=\"/health\",status=\"200\"}"), 1);
    free(text);
}
END_TEST

// Every line is a comment or `name{labels} number`; each family has one HELP and one TYPE, before its samples; buckets
// never fall and end at the count.
START_TEST(well_formed)
{
    metrics_request(m, &times, FINISH_STOP, 7, 300);
    metrics_inter_token(m, 3, 0.3);
    metrics_http(m, "POST", "/v1/completions", 200);
    char *text = render(), *save, family[128] = "", name[128];
    double last_bucket = -1;
    int families = 0;
    ck_assert_int_eq(text[strlen(text) - 1], '\n');
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        if (sscanf(line, "# HELP %127s", name) == 1) continue;
        if (sscanf(line, "# TYPE %127s", name) == 1) {
            ck_assert_str_ne(name, family);
            strcpy(family, name);
            families++;
            last_bucket = -1;
            continue;
        }
        size_t n = strcspn(line, "{ ");
        ck_assert_msg(!strncmp(line, family, strlen(family)), "%s is not of %s", line, family);
        ck_assert_uint_eq(strspn(line, "abcdefghijklmnopqrstuvwxyz0123456789_"), n);
        char *space = strrchr(line, ' '), *end;
        double value = strtod(space + 1, &end);
        ck_assert_msg(end > space + 1 && !*end, "%s", line);
        ck_assert(line[n] == ' ' || space[-1] == '}');
        if (strstr(line, "_bucket{")) {
            ck_assert_double_ge(value, last_bucket);
            last_bucket = value;
        } else if (strstr(line, "_count{")) {
            ck_assert_double_eq(value, last_bucket);
        }
    }
    ck_assert_int_ge(families, 25);
    free(text);
}
END_TEST

enum { THREADS = 4, ROUNDS = 2000 };

static void *observe(void *unused)
{
    (void)unused;
    for (int i = 0; i < ROUNDS; i++) {
        metrics_inter_token(m, 1, 0.5);
        metrics_request(m, &times, FINISH_STOP, 1, 1);
        metrics_http(m, "POST", "/v1/completions", 200);
    }
    return NULL;
}

START_TEST(threads)
{
    pthread_t ids[THREADS];
    for (int i = 0; i < THREADS; i++) pthread_create(&ids[i], NULL, observe, NULL);
    free(render());
    for (int i = 0; i < THREADS; i++) pthread_join(ids[i], NULL);
    char *text = render();
    ck_assert_double_eq(value_of(text, "gptd_inter_token_latency_seconds_count{" MODEL "}"), THREADS * ROUNDS);
    ck_assert_double_eq(value_of(text, "gptd_inter_token_latency_seconds_sum{" MODEL "}"), THREADS * ROUNDS / 2);
    ck_assert_double_eq(value_of(text, "gptd_request_success_total{" MODEL ",finished_reason=\"stop\"}"),
                        THREADS * ROUNDS);
    free(text);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("metrics");
    TCase *tcase = tcase_create("metrics");
    tcase_add_checked_fixture(tcase, setup, teardown);
    tcase_add_test(tcase, engine_values);
    tcase_add_test(tcase, process_values);
    tcase_add_test(tcase, requests);
    tcase_add_test(tcase, inter_token);
    tcase_add_test(tcase, http);
    tcase_add_test(tcase, well_formed);
    tcase_add_test(tcase, threads);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
