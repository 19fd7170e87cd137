#include "server/metrics.h"

#include <dirent.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { MAX_BUCKETS = 32, MAX_HTTP_SERIES = 256 };

struct histogram {
    const char *name, *help;
    double bounds[MAX_BUCKETS];       // [n_bounds] ascending
    uint64_t counts[MAX_BUCKETS + 1]; // [n_bounds + 1]: of values over bound i-1 up to bound i; the last: over all
    int32_t n_bounds;
    double sum;
};

enum {
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    E2E_REQUEST_LATENCY,
    REQUEST_QUEUE_TIME,
    REQUEST_PREFILL_TIME,
    REQUEST_DECODE_TIME,
    REQUEST_PROMPT_TOKENS,
    REQUEST_GENERATION_TOKENS,
    N_HISTOGRAMS
};

enum outcome { OUTCOME_STOP, OUTCOME_LENGTH, OUTCOME_ABORT, OUTCOME_ERROR, N_OUTCOMES };
static const char *const outcome_names[N_OUTCOMES] = {"stop", "length", "abort", "error"};

struct http_series {
    const char *method, *route; // constants
    int32_t status;
    uint64_t count;
};

struct metrics {
    pthread_mutex_t mutex; // guards all below but the labels
    struct histogram histograms[N_HISTOGRAMS];
    uint64_t outcomes[N_OUTCOMES];
    struct http_series http[MAX_HTTP_SERIES]; // [n_http]
    int32_t n_http;
    double start_time; // seconds since the epoch
    char *model;       // escaped: what stands between the quotes of the label model_name
};

// vLLM's buckets; those of inter-token latency and of whole requests begin lower, for small models and fast machines.
static const double ttft_bounds[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
                                     1,     2.5,   5,    7.5,  10,   20,   40,   80,  160,  640, 2560};
static const double inter_token_bounds[] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
                                            0.4,   0.5,    0.75,  1,    2.5,   5,    7.5,   10,  20,   40,  80};
static const double request_bounds[] = {0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1,   1.5, 2,   2.5, 5,    10,
                                        15,   20,   30,  40,  50,  60,  120, 240, 480, 960, 1920, 7680};

#define LENGTH(array) ((int32_t)(sizeof(array) / sizeof((array)[0])))

static void histogram_init(struct histogram *h, const char *name, const char *help, const double *bounds, int32_t n)
{
    *h = (struct histogram){.name = name, .help = help, .n_bounds = n};
    memcpy(h->bounds, bounds, (size_t)n * sizeof(*bounds));
}

static void histogram_observe(struct histogram *h, double value, uint64_t times)
{
    int32_t i = 0;
    while (i < h->n_bounds && value > h->bounds[i]) i++;
    h->counts[i] += times;
    h->sum += value * (double)times;
}

// 1, 2, 5, 10, 20, 50 ... up to most: vLLM's buckets for numbers of tokens.
static int32_t token_bounds(int32_t most, double bounds[MAX_BUCKETS])
{
    static const double mantissas[] = {1, 2, 5};
    int32_t n = 0;
    for (double power = 1; n < MAX_BUCKETS; power *= 10)
        for (int i = 0; i < 3; i++) {
            if (mantissas[i] * power > most || n == MAX_BUCKETS) return n;
            bounds[n++] = mantissas[i] * power;
        }
    return n;
}

static void histograms_init(struct histogram *h, int32_t max_model_len)
{
    double tokens[MAX_BUCKETS];
    int32_t n_tokens = token_bounds(max_model_len, tokens), n_request = LENGTH(request_bounds);
    histogram_init(&h[TIME_TO_FIRST_TOKEN], "time_to_first_token_seconds", "From submission to the first token.",
                   ttft_bounds, LENGTH(ttft_bounds));
    histogram_init(&h[INTER_TOKEN_LATENCY], "inter_token_latency_seconds", "Between two tokens of one choice.",
                   inter_token_bounds, LENGTH(inter_token_bounds));
    histogram_init(&h[E2E_REQUEST_LATENCY], "e2e_request_latency_seconds", "From submission to the last token.",
                   request_bounds, n_request);
    histogram_init(&h[REQUEST_QUEUE_TIME], "request_queue_time_seconds", "From submission to the first step.",
                   request_bounds, n_request);
    histogram_init(&h[REQUEST_PREFILL_TIME], "request_prefill_time_seconds", "From the first step to the first token.",
                   request_bounds, n_request);
    histogram_init(&h[REQUEST_DECODE_TIME], "request_decode_time_seconds", "From the first token to the last.",
                   request_bounds, n_request);
    histogram_init(&h[REQUEST_PROMPT_TOKENS], "request_prompt_tokens", "Tokens of the prompt.", tokens, n_tokens);
    histogram_init(&h[REQUEST_GENERATION_TOKENS], "request_generation_tokens", "Tokens generated, over all choices.",
                   tokens, n_tokens);
}

// text as a label value: backslash, quote and newline escaped. malloc'd.
static char *label_escape(const char *text)
{
    char *out = malloc(2 * strlen(text) + 1), *p = out;
    if (!out) return NULL;
    for (; *text; text++) {
        if (*text == '\\' || *text == '"' || *text == '\n') *p++ = '\\';
        *p++ = *text == '\n' ? 'n' : *text;
    }
    *p = '\0';
    return out;
}

struct metrics *metrics_create(const char *model_name, int32_t max_model_len)
{
    struct metrics *m = calloc(1, sizeof(*m));
    char *model = label_escape(model_name);
    if (!m || !model) {
        free(m);
        free(model);
        return NULL;
    }
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    m->start_time = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    m->model = model;
    pthread_mutex_init(&m->mutex, NULL);
    histograms_init(m->histograms, max_model_len);
    return m;
}

void metrics_destroy(struct metrics *m)
{
    if (!m) return;
    pthread_mutex_destroy(&m->mutex);
    free(m->model);
    free(m);
}

void metrics_http(struct metrics *m, const char *method, const char *route, int32_t status)
{
    pthread_mutex_lock(&m->mutex);
    int32_t i = 0;
    while (i < m->n_http &&
           (m->http[i].status != status || strcmp(m->http[i].route, route) || strcmp(m->http[i].method, method)))
        i++;
    if (i == m->n_http && i < MAX_HTTP_SERIES)
        m->http[m->n_http++] = (struct http_series){.method = method, .route = route, .status = status};
    if (i < MAX_HTTP_SERIES) m->http[i].count++;
    pthread_mutex_unlock(&m->mutex);
}

void metrics_inter_token(struct metrics *m, int32_t n, double seconds)
{
    if (n < 1) return;
    pthread_mutex_lock(&m->mutex);
    histogram_observe(&m->histograms[INTER_TOKEN_LATENCY], seconds / n, (uint64_t)n);
    pthread_mutex_unlock(&m->mutex);
}

static enum outcome outcome_of(enum finish_reason reason)
{
    switch (reason) {
    case FINISH_STOP: return OUTCOME_STOP;
    case FINISH_LENGTH: return OUTCOME_LENGTH;
    case FINISH_BARRED:
    case FINISH_ERROR: return OUTCOME_ERROR;
    case FINISH_NONE:
    case FINISH_CANCELLED:
    case FINISH_EXPIRED:
    case FINISH_SLOW: break;
    }
    return OUTCOME_ABORT;
}

// The time from one event to another, if both came.
static void observe_between(struct histogram *h, double from, double to)
{
    if (from > 0 && to >= from) histogram_observe(h, to - from, 1);
}

void metrics_request(struct metrics *m, const struct request_times *t, enum finish_reason reason, int32_t prompt_tokens,
                     int32_t generation_tokens)
{
    struct histogram *h = m->histograms;
    pthread_mutex_lock(&m->mutex);
    m->outcomes[outcome_of(reason)]++;
    observe_between(&h[TIME_TO_FIRST_TOKEN], t->submitted, t->first_token);
    observe_between(&h[E2E_REQUEST_LATENCY], t->submitted, t->finished);
    observe_between(&h[REQUEST_QUEUE_TIME], t->submitted, t->scheduled);
    observe_between(&h[REQUEST_PREFILL_TIME], t->scheduled, t->first_token);
    observe_between(&h[REQUEST_DECODE_TIME], t->first_token, t->finished);
    histogram_observe(&h[REQUEST_PROMPT_TOKENS], prompt_tokens, 1);
    histogram_observe(&h[REQUEST_GENERATION_TOKENS], generation_tokens, 1);
    pthread_mutex_unlock(&m->mutex);
}

// ---- exposition -----------------------------------------------------------------------------------------------------

static void render_head(FILE *out, const char *name, const char *type, const char *help)
{
    fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void render_histogram(FILE *out, const struct histogram *h, const char *model)
{
    char name[64];
    uint64_t total = 0;
    snprintf(name, sizeof(name), "gptd_%s", h->name);
    render_head(out, name, "histogram", h->help);
    for (int32_t i = 0; i < h->n_bounds; i++) {
        total += h->counts[i];
        fprintf(out, "%s_bucket{model_name=\"%s\",le=\"%.15g\"} %" PRIu64 "\n", name, model, h->bounds[i], total);
    }
    total += h->counts[h->n_bounds];
    fprintf(out, "%s_bucket{model_name=\"%s\",le=\"+Inf\"} %" PRIu64 "\n", name, model, total);
    fprintf(out, "%s_sum{model_name=\"%s\"} %.9g\n", name, model, h->sum);
    fprintf(out, "%s_count{model_name=\"%s\"} %" PRIu64 "\n", name, model, total);
}

static void render_engine(FILE *out, const struct engine_stats *s, const char *model)
{
    double used = s->n_blocks > 0 ? (double)(s->n_blocks - s->n_free_blocks) / s->n_blocks : 0;
    const struct {
        const char *name, *type, *help;
        double value;
    } series[] = {
        {"gptd_num_requests_running", "gauge", "Sequences running.", s->n_running},
        {"gptd_num_requests_waiting", "gauge", "Requests waiting.", s->n_waiting},
        {"gptd_num_tokens_waiting", "gauge", "Prompt tokens of the requests waiting.", (double)s->n_waiting_tokens},
        {"gptd_queue_wait_seconds", "gauge", "What a request that comes now would wait, by the measured rate.", s->queue_wait},
        {"gptd_kv_cache_usage_ratio", "gauge", "Share of the KV blocks in use; 1: all.", used},
        {"gptd_kv_cache_blocks", "gauge", "KV blocks there are.", (double)s->n_all_blocks},
        {"gptd_prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache.",
         (double)s->prefix_queries},
        {"gptd_prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache.", (double)s->prefix_hits},
        {"gptd_prompt_tokens_total", "counter", "Prompt tokens of requests begun, cached ones included.",
         (double)s->prompt_tokens},
        {"gptd_generation_tokens_total", "counter", "Tokens generated.", (double)s->generation_tokens},
        {"gptd_num_preemptions_total", "counter", "Sequences preempted for want of KV blocks.",
         (double)s->n_preemptions},
        {"gptd_engine_steps_total", "counter", "Steps of the engine.", (double)s->n_steps},
        {"gptd_engine_step_seconds_total", "counter", "Time in steps of the engine.", s->step_seconds},
        {"gptd_engine_host_seconds_total", "counter", "Of it, time outside the device's ops and the wait for them.",
         s->host_seconds},
        {"gptd_engine_launch_seconds_total", "counter", "Of it, time in calls of the device's ops: enqueueing, on a GPU.",
         s->launch_seconds},
        {"gptd_start_device_seconds", "gauge", "Of the start: finding the device and planning its memory.", s->device_seconds},
        {"gptd_start_weights_seconds", "gauge", "Of the start: loading the weights.", s->weights_seconds},
        {"gptd_start_warm_up_seconds", "gauge", "Of the start: first steps, which a GPU records.", s->warm_up_seconds},
        {"gptd_start_warm_up_bytes", "gauge", "What those took of the GPU's memory beyond the plan.", (double)s->warm_up_bytes},
    };
    for (size_t i = 0; i < sizeof(series) / sizeof(series[0]); i++) {
        render_head(out, series[i].name, series[i].type, series[i].help);
        fprintf(out, "%s{model_name=\"%s\"} %.17g\n", series[i].name, model, series[i].value);
    }
}

static void render_refused(FILE *out, const struct engine_stats *s, const char *model)
{
    const struct { const char *reason; uint64_t n; } refused[] = {
        {"queue_full", s->n_refused_full}, {"queue_wait", s->n_refused_wait}, {"queue_timeout", s->n_expired},
    };
    render_head(out, "gptd_requests_refused_total", "counter",
                "Requests not begun: the queue was full, the wait would have been over --queue-timeout (429), or was (503).");
    for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++)
        fprintf(out, "gptd_requests_refused_total{model_name=\"%s\",reason=\"%s\"} %" PRIu64 "\n", model, refused[i].reason,
                refused[i].n);
}

static int32_t open_fds(void)
{
    int32_t n = 0;
    DIR *dir = opendir("/proc/self/fd");
    if (!dir) return 0;
    for (struct dirent *entry; (entry = readdir(dir));) n += entry->d_name[0] != '.';
    closedir(dir);
    return n - 1; // but for the one this took
}

static void render_value(FILE *out, const char *name, const char *type, const char *help, double value)
{
    render_head(out, name, type, help);
    fprintf(out, "%s %.17g\n", name, value);
}

static void render_process(FILE *out, double start_time)
{
    struct timespec cpu;
    struct rlimit files = {0};
    unsigned long long pages = 0, resident = 0;
    double page = (double)sysconf(_SC_PAGESIZE);
    FILE *statm = fopen("/proc/self/statm", "r");
    if (statm) {
        if (fscanf(statm, "%llu %llu", &pages, &resident) != 2) pages = resident = 0;
        fclose(statm);
    }
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
    getrlimit(RLIMIT_NOFILE, &files);
    render_value(out, "process_cpu_seconds_total", "counter", "User and system CPU time.",
                 (double)cpu.tv_sec + 1e-9 * (double)cpu.tv_nsec);
    render_value(out, "process_resident_memory_bytes", "gauge", "Resident memory.", (double)resident * page);
    render_value(out, "process_virtual_memory_bytes", "gauge", "Virtual memory.", (double)pages * page);
    render_value(out, "process_open_fds", "gauge", "Open file descriptors.", open_fds());
    render_value(out, "process_max_fds", "gauge", "Most file descriptors that may be open.", (double)files.rlim_cur);
    render_value(out, "process_start_time_seconds", "gauge", "Start, in seconds since the epoch.", start_time);
}

// What this struct holds; the mutex is taken by the caller.
static void render_counts(FILE *out, const struct metrics *m)
{
    render_head(out, "gptd_request_success_total", "counter", "Requests that ended, by reason.");
    for (int32_t i = 0; i < N_OUTCOMES; i++)
        fprintf(out, "gptd_request_success_total{model_name=\"%s\",finished_reason=\"%s\"} %" PRIu64 "\n", m->model,
                outcome_names[i], m->outcomes[i]);
    for (int32_t i = 0; i < N_HISTOGRAMS; i++) render_histogram(out, &m->histograms[i], m->model);
    render_head(out, "gptd_http_requests_total", "counter",
                "HTTP answers; status 0: the client left before there was one.");
    for (int32_t i = 0; i < m->n_http; i++)
        fprintf(out, "gptd_http_requests_total{method=\"%s\",route=\"%s\",status=\"%d\"} %" PRIu64 "\n",
                m->http[i].method, m->http[i].route, m->http[i].status, m->http[i].count);
}

char *metrics_render(struct metrics *m, const struct engine_stats *stats, size_t *length)
{
    char *text = NULL;
    FILE *out = open_memstream(&text, length);
    if (!out) return NULL;
    render_engine(out, stats, m->model);
    render_refused(out, stats, m->model);
    pthread_mutex_lock(&m->mutex);
    render_counts(out, m);
    pthread_mutex_unlock(&m->mutex);
    render_process(out, m->start_time);
    render_head(out, "gptd_build_info", "gauge", "Always 1; the version is in the label.");
    fputs("gptd_build_info{version=\"" GPTD_VERSION "\"} 1\n", out);
    bool failed = ferror(out);
    if (!fclose(out) && !failed) return text;
    free(text);
    return NULL;
}
