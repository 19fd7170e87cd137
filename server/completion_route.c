/* POST /v1/completions and /v1/chat/completions: the life of a call, from body to answer. */
#include "server/answer_json.h"
#include "server/chat_json.h"
#include "server/chat_request.h"
#include "server/completion.h"
#include "server/completion_json.h"
#include "server/context.h"
#include "server/log.h"

#include <math.h>
#include <stdlib.h>

// What the two routes differ in.
struct call_kind {
    size_t short_body; // see work_begin
    int (*parse)(struct completion_request *r, char *body, size_t length, const char *api_key,
                 const struct completion_limits *limits, struct http_error *e);
    void (*write_head)(struct text_buffer *out, const char *model, bool stream);
    void (*write_chunk)(struct text_buffer *out, const struct completion *c, struct choice *ch, int32_t index);
    void (*write_whole)(struct text_buffer *out, struct completion *c);
};

static const struct call_kind completion_kind = {SHORT_TEXT, completion_request_parse, completion_write_head,
                                                 completion_write_chunk, completion_write_whole};
static const struct call_kind chat_kind = {SHORT_CHAT, chat_request_parse, chat_write_head, chat_write_chunk,
                                           chat_write_whole};

struct call {
    struct work work;
    const struct call_kind *kind;
    struct http_error error;
    struct completion completion;
    bool submitted;
    bool limited;         // its API key's limit has it running
    int64_t n_charged;    // tokens
    double last_sent;     // CLOCK_MONOTONIC seconds
    struct text_buffer head;
};

static void parse_body(struct exchange *x)
{
    struct call *call = x->state;
    call->kind->parse(&call->completion.request, x->body.data ? x->body.data : "", x->body.length,
                      x->api_key ? api_key_id(x->api_key) : NULL, &x->server->limits, &call->error);
}

// ---- limits of the API key ----

static int limit_begin(struct exchange *x, struct call *call)
{
    if (!x->api_key) return 0;
    int failed = rate_limit_begin(api_key_limit(x->api_key), watchdog_now(), &call->error);
    call->limited = !failed;
    return failed;
}

static int limit_charge(struct exchange *x, struct call *call)
{
    if (!call->limited) return 0;
    int64_t n = completion_request_tokens(&call->completion.request);
    int failed = rate_limit_charge(api_key_limit(x->api_key), n, watchdog_now(), &call->error);
    if (!failed) call->n_charged = n;
    return failed;
}

// Before the last of an answer goes out: who has read it may ask again at once.
static void limit_end(struct exchange *x, struct call *call)
{
    const struct completion *c = &call->completion;
    if (!call->limited) return;
    int64_t n_used = call->submitted ? completion_prompt_tokens(c) + completion_tokens(c) : 0;
    rate_limit_end(api_key_limit(x->api_key), call->n_charged, n_used);
    call->limited = false;
}

static enum exchange_next reply_error(struct exchange *x, struct call *call)
{
    limit_end(x, call);
    return exchange_reply_error(x, &call->error);
}

// ---- answered whole ----

static enum exchange_next answer_whole(struct exchange *x, struct call *call)
{
    struct completion *c = &call->completion;
    x->deadline = request_deadline(x);
    if (completion_collect(c, &call->error) || (!completion_done(c) && request_check_time(x, &call->error)))
        return reply_error(x, call);
    if (!completion_done(c)) return EXCHANGE_WAIT;
    limit_end(x, call);
    call->kind->write_whole(&call->head, c);
    return exchange_reply_json(x, &call->head);
}

// ---- streamed: until there is something to say ----

static bool has_chunks(const struct completion *c)
{
    for (int32_t i = 0; i < c->n_choices; i++)
        if (choice_has_news(&c->choices[i])) return true;
    return false;
}

// Status and headers wait for the first token, so that what fails before it is told by a status, which load balancers and
// clients act on. After keep_alive_interval of silence they go out without.
static enum exchange_next begin_stream(struct exchange *x, struct call *call)
{
    struct completion *c = &call->completion;
    double heard_by = call->last_sent + x->server->options.keep_alive_interval;
    bool failed = completion_collect(c, &call->error) || (!completion_done(c) && request_check_time(x, &call->error));
    if (failed && completion_tokens(c) == 0) return reply_error(x, call);
    if (failed || has_chunks(c) || completion_done(c) || watchdog_now() >= heard_by) return exchange_reply_stream(x);
    x->deadline = fmin(request_deadline(x), heard_by);
    return EXCHANGE_WAIT;
}

static enum exchange_next answer(struct exchange *x, struct call *call)
{
    return call->completion.request.stream ? begin_stream(x, call) : answer_whole(x, call);
}

static enum exchange_next submit(struct exchange *x, struct call *call)
{
    struct server *s = x->server;
    exchange_drop_body(x);
    if (limit_charge(x, call) || completion_start(&call->completion, s->engine, s->tokenizer, s->metrics, &call->error))
        return reply_error(x, call);
    call->submitted = true;
    call->last_sent = watchdog_now();
    call->kind->write_head(&call->head, s->options.served_model_names[0], call->completion.request.stream);
    return answer(x, call);
}

static void log_body(const struct exchange *x)
{
    enum { MOST = 3900 };
    if (!x->server->options.log_prompts || !x->body.data) return;
    log_message(LOG_LEVEL_INFO, "body of %s: %.*s", x->id, (int)(x->body.length < MOST ? x->body.length : MOST), x->body.data);
}

static enum exchange_next handle(struct exchange *x, const struct call_kind *kind)
{
    struct call *call = x->state;
    struct http_error e;
    if (!call) {
        if (!atomic_load(&x->server->open)) {
            http_error_set(&e, 503, NULL, NULL, "the model is being loaded");
            return exchange_reply_error(x, &e);
        }
        x->state = call = calloc(1, sizeof *call);
        if (!call) {
            http_error_set(&e, 503, NULL, NULL, "out of memory");
            return exchange_reply_error(x, &e);
        }
        call->kind = kind;
        log_body(x); // before the parser writes into it
        if (limit_begin(x, call)) return reply_error(x, call);
        if (!work_begin(&call->work, x, kind->short_body, parse_body)) {
            http_error_set(&call->error, 503, NULL, NULL, "too many long prompts at once");
            return reply_error(x, call);
        }
    }
    if (!work_over(&call->work)) return EXCHANGE_WAIT;
    if (atomic_load(&x->gone)) return EXCHANGE_ABORT;
    if (call->error.status || (!call->submitted && request_check_time(x, &call->error))) return reply_error(x, call);
    return call->submitted ? answer(x, call) : submit(x, call);
}

enum exchange_next completion_handle(struct exchange *x) { return handle(x, &completion_kind); }
enum exchange_next chat_handle(struct exchange *x) { return handle(x, &chat_kind); }

bool completion_ready(const struct exchange *x)
{
    const struct call *call = x->state;
    if (!call->submitted) return atomic_load(&call->work.finished);
    return completion_has_news(&call->completion, call->completion.request.stream);
}

// ---- streamed ----

static void begin_event(struct text_buffer *out, const struct call *call)
{
    text_string(out, "data: ");
    text_append(out, call->head.data, call->head.length);
    text_string(out, ",\"choices\":[");
}

static void write_chunks(struct text_buffer *out, struct call *call)
{
    struct completion *c = &call->completion;
    for (int32_t i = 0; i < c->n_choices; i++) {
        while (choice_has_news(&c->choices[i])) {
            begin_event(out, call);
            call->kind->write_chunk(out, c, &c->choices[i], i);
            text_string(out, c->request.include_usage ? ",\"usage\":null}\n\n" : "}\n\n");
        }
    }
}

static enum exchange_next write_end(struct exchange *x, struct call *call)
{
    struct text_buffer *out = &x->out;
    limit_end(x, call);
    if (call->completion.request.include_usage) {
        begin_event(out, call);
        text_string(out, "],\"usage\":");
        answer_write_usage(out, &call->completion);
        text_string(out, "}\n\n");
    }
    text_string(out, "data: [DONE]\n\n");
    return EXCHANGE_END;
}

// The status is out already: the error goes in band, and no [DONE] follows.
static enum exchange_next write_error(struct exchange *x, struct call *call)
{
    limit_end(x, call);
    text_string(&x->out, "data: ");
    http_error_write(&x->out, &call->error);
    text_string(&x->out, "\n\n");
    x->error = call->error;
    return EXCHANGE_END;
}

enum exchange_next completion_stream(struct exchange *x)
{
    struct call *call = x->state;
    struct completion *c = &call->completion;
    double interval = x->server->options.keep_alive_interval, now = watchdog_now();
    if (atomic_load(&x->gone)) return EXCHANGE_ABORT;
    bool failed = call->error.status || completion_collect(c, &call->error); // begin_stream may have met it already
    write_chunks(&x->out, call);
    if (failed) return write_error(x, call);
    if (completion_done(c)) return write_end(x, call);
    if (request_check_time(x, &call->error)) return write_error(x, call);
    if (x->out.length == 0 && now >= call->last_sent + interval) text_string(&x->out, ": keep-alive\n\n");
    if (x->out.length) call->last_sent = now;
    x->deadline = fmin(request_deadline(x), call->last_sent + interval);
    return x->out.length ? EXCHANGE_GO : EXCHANGE_WAIT;
}

// ---- end ----

static const char *finish_of(const struct exchange *x, const struct completion *c)
{
    if (!completion_done(c)) return x->error.status ? "error" : "cancelled";
    return c->choices[0].finish;
}

static void fill_log(struct exchange *x, const struct completion *c)
{
    struct request_times t = completion_times(c);
    x->log.prompt_tokens = (int32_t)completion_prompt_tokens(c);
    x->log.cached_tokens = (int32_t)completion_cached_tokens(c);
    x->log.completion_tokens = (int32_t)completion_tokens(c);
    if (t.scheduled > 0) x->log.queue = t.scheduled - t.submitted;
    if (t.first_token > 0) x->log.prefill = t.first_token - t.scheduled;
    if (t.first_token > 0) x->log.ttft = t.first_token - x->received;
    if (t.finished > 0 && t.first_token > 0) x->log.decode = t.finished - t.first_token;
    x->log.finish = finish_of(x, c);
}

void completion_done_with(struct exchange *x)
{
    struct call *call = x->state;
    work_end(&call->work);
    if (call->submitted) fill_log(x, &call->completion);
    limit_end(x, call);
    completion_deinit(&call->completion);
    text_deinit(&call->head);
    free(call);
}
