#include "server/context.h"

#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { AHEAD_PER_WORKER = 16 << 20 }; // bytes: a second or a few

static const double LINGER = 1.0;     // seconds without a request, after which nobody comes on a connection there is
static const double LAST_WORDS = 1.0; // seconds that a stop waits for new clients to ask, and for answers to go out

static size_t longest_token(const struct tokenizer *t)
{
    size_t longest = 0, n;
    for (int32_t id = 0; id < tokenizer_vocab_size(t); id++)
        if (tokenizer_token_bytes(t, id, &n) && n > longest) longest = n;
    return longest;
}

static int check_options(const struct server_options *o, struct error *e)
{
    if (o->n_served_model_names < 1) return error_set(e, ERR_INVALID, "the served model has no name");
    if (o->http_threads < 1 || o->http_threads > 64) return error_set(e, ERR_INVALID, "HTTP threads: 1 to 64");
    if (o->max_connections < 1 || o->max_connections > 1000000)
        return error_set(e, ERR_INVALID, "connections: 1 to 1000000");
    if (o->max_body_bytes < 1 || o->max_body_bytes > SIZE_MAX / 64) return error_set(e, ERR_INVALID, "bytes of a body");
    if (o->max_prompts < 1 || o->max_choices < 1) return error_set(e, ERR_INVALID, "prompts and choices: at least 1");
    return 0;
}

int server_create(struct server **out, const struct server_options *options, struct engine *engine,
                  const struct tokenizer *tokenizer, const struct chat_template *chat_template, struct error *e)
{
    int failed = check_options(options, e);
    if (failed) return failed;
    struct server *s = calloc(1, sizeof *s);
    if (!s) return error_set(e, ERR_NOMEM, "out of memory");
    s->options = *options;
    s->engine = engine;
    s->tokenizer = tokenizer;
    s->created = (int64_t)time(NULL);
    s->limits = (struct completion_limits){.options = &s->options, .plan = engine_plan_get(engine), .tokenizer = tokenizer,
                                           .max_token_bytes = tokenizer ? longest_token(tokenizer) : 0,
                                           .chat_template = chat_template};
    infill_find(&s->limits.infill, tokenizer);
    const struct infill *f = &s->limits.infill;
    for (int32_t i = 0; i < f->n_ends; i++)
        if (f->end_ids[i] >= s->limits.plan->vocab_size) s->limits.infill.found = false; // a tokenizer with more than its model
    s->metrics = metrics_create(options->served_model_names[0], s->limits.plan->max_model_len);
    failed = s->metrics ? 0 : error_set(e, ERR_NOMEM, "out of memory");
    if (!failed) failed = http_create(&s->http, &s->options, server_routes, server_n_routes, s, s->metrics, e);
    if (failed) {
        server_destroy(s);
        return failed;
    }
    *out = s;
    return 0;
}

int server_start(struct server *s, struct error *e)
{
    int failed = workers_create(&s->workers, s->options.tokenizer_threads,
                                AHEAD_PER_WORKER * (size_t)s->options.tokenizer_threads, e);
    if (!failed) failed = http_start(s->http, e);
    return failed || s->options.listen_fd ? failed : http_listen(s->http, e);
}

int server_open(struct server *s, struct error *e)
{
    int failed = http_notify_from(s->http, engine_event_fd(s->engine), e);
    if (failed) return failed;
    atomic_store(&s->open, true);
    return s->options.listen_fd ? http_listen(s->http, e) : 0;
}

uint16_t server_port(const struct server *s) { return http_port(s->http); }

void server_drain(struct server *s)
{
    s->quiesce_at = watchdog_now() + (s->options.listen_fd ? 0 : s->options.drain_delay);
    atomic_store(&s->draining, true);
}

bool server_drained(struct server *s)
{
    if (!atomic_load(&s->draining) || watchdog_now() < s->quiesce_at) return false;
    if (!s->quiesced) http_quiesce(s->http);
    s->quiesced = true;
    // A client in a loop comes once more on its connection, and is told to connect anew.
    if (s->options.listen_fd && (http_n_new(s->http) > 0 || watchdog_now() < http_last_end(s->http) + LINGER)) return false;
    return http_n_active(s->http) == 0;
}

const char *server_trouble(const struct server *s)
{
    struct engine_stats stats;
    engine_stats_get(s->engine, &stats);
    if (stats.failure) return "the device failed";
    bool stalled = watchdog_now() - stats.last_beat > s->options.stall_timeout;
    return stalled ? "the engine makes no progress" : NULL;
}

void server_stop(struct server *s)
{
    atomic_store(&s->stopping, true);
    atomic_store(&s->draining, true);
    http_quiesce(s->http);
    if (s->workers) workers_close(s->workers);
    http_wake_all(s->http);
    for (double end = watchdog_now() + LAST_WORDS;
         (http_n_new(s->http) > 0 || http_n_active(s->http) > 0) && watchdog_now() < end;)
        usleep(1000);
    http_stop(s->http);
}

void server_destroy(struct server *s)
{
    if (!s) return;
    http_destroy(s->http);
    workers_destroy(s->workers);
    metrics_destroy(s->metrics);
    free(s);
}
