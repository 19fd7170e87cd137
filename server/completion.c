#include "server/completion.h"

#include "server/answer_json.h"
#include "server/chat_json.h"
#include "server/completion_json.h"
#include "server/watchdog.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    READ_AT_ONCE = 32,  // tokens of one choice per collect: bounds what a slow stream holds in memory
    WORTH_A_WAKE = 2048, // tokens of an answer that is sent whole: half of a ring
    WORTH_WITH_STOP = 8, // sooner, for a stop string not to come long after its place
};

// ---- start ----

static void *copy_ids(const void *ids, int32_t n, size_t size, bool *failed)
{
    void *copy = n ? malloc((size_t)n * size) : NULL;
    if (copy) memcpy(copy, ids, (size_t)n * size);
    if (n && !copy) *failed = true;
    return copy;
}

// One copy for the call. The request owns its arrays from here on, also when this fails.
static int set_params(const struct completion *c, struct request *r)
{
    const struct sampling_params *s = &c->request.params;
    if (c->requests[0]) {
        request_share_params(r, c->requests[0]);
        return 0;
    }
    struct sampling_params *p = request_params(r);
    bool failed = false;
    *p = *s;
    int32_t n_words = s->n_bad_words;
    p->stop_token_ids = copy_ids(s->stop_token_ids, s->n_stop_token_ids, sizeof(int32_t), &failed);
    p->logit_bias = copy_ids(s->logit_bias, s->n_logit_bias, sizeof *s->logit_bias, &failed);
    p->allowed_token_ids = copy_ids(s->allowed_token_ids, s->n_allowed_token_ids, sizeof(int32_t), &failed);
    p->bad_word_offsets = copy_ids(s->bad_word_offsets, n_words ? n_words + 1 : 0, sizeof(int32_t), &failed);
    p->bad_word_ids = copy_ids(s->bad_word_ids, n_words ? s->bad_word_offsets[n_words] : 0, sizeof(int32_t), &failed);
    return failed ? -1 : 0;
}

// What the engine says of a field begins with its name. Its prompt is a chat's messages.
static int refuse(const struct completion *c, struct http_error *e, const struct error *cause)
{
    char field[sizeof e->param] = "";
    const char *colon = strchr(cause->message, ':');
    if (cause->code == ERR_INVALID && colon)
        snprintf(field, sizeof field, "%.*s", (int)(colon - cause->message), cause->message);
    return http_error_from(e, cause, c->request.chat && !strcmp(field, "prompt") ? "messages" : field);
}

static int submit(struct completion *c, int32_t i, struct engine *engine, struct http_error *e)
{
    const struct completion_prompt *prompt = &c->request.prompts[i];
    struct error cause;
    struct request *r = request_create(prompt->ids, prompt->n_ids);
    if (!r || set_params(c, r)) {
        if (r) request_release(r);
        return http_error_set(e, 503, NULL, NULL, "out of memory");
    }
    if (engine_submit(engine, r, &cause)) {
        refuse(c, e, &cause);
        if (cause.code == ERR_BUSY) e->retry_after = request_retry_after(r);
        request_release(r);
        return -1;
    }
    c->requests[i] = r;
    for (int32_t j = 0; j < c->request.params.n; j++) {
        c->choices[i * c->request.params.n + j] =
            (struct choice){.request = r, .index = j, .prompt = prompt, .deferred = -1};
    }
    return 0;
}

int completion_start(struct completion *c, struct engine *engine, const struct tokenizer *tokenizer,
                     struct metrics *metrics, struct http_error *e)
{
    int32_t n = c->request.n_prompts;
    c->plan = engine_plan_get(engine);
    c->tokenizer = tokenizer;
    c->metrics = metrics;
    c->n_choices = n * c->request.params.n;
    c->requests = calloc((size_t)n, sizeof *c->requests);
    c->choices = calloc((size_t)c->n_choices, sizeof *c->choices);
    if (!c->requests || !c->choices) return http_error_set(e, 503, NULL, NULL, "out of memory");
    for (int32_t i = 0; i < n; i++)
        if (submit(c, i, engine, e)) return -1;
    return 0;
}

// ---- text ----

static void append_text(struct completion *c, struct choice *ch, const char *text, size_t n)
{
    const struct stop_matcher *stop = c->request.stop;
    if (!stop || ch->n_tokens <= c->request.params.min_tokens) {
        text_append(&ch->text, text, n);
        return;
    }
    char *out = text_reserve(&ch->text, stop_stream_bound(n));
    if (out) ch->text.length += stop_stream_push(stop, &ch->stop, text, n, out);
}

static void push_bytes(struct completion *c, struct choice *ch, const char *bytes, size_t n)
{
    text_clear(&c->scratch);
    char *text = text_reserve(&c->scratch, utf8_stream_bound(n));
    if (!text) return;
    size_t length = utf8_stream_push(&ch->utf8, bytes, n, text);
    ch->n_chars += utf8_length(text, length);
    append_text(c, ch, text, length);
}

static void push_token_text(struct completion *c, struct choice *ch, int32_t id)
{
    size_t n = 0;
    const char *bytes = c->tokenizer ? tokenizer_token_bytes(c->tokenizer, id, &n) : NULL;
    if (bytes && !(c->request.skip_special_tokens && tokenizer_is_special(c->tokenizer, id)))
        push_bytes(c, ch, bytes, n);
}

static void push_deferred(struct completion *c, struct choice *ch)
{
    if (ch->deferred >= 0) push_token_text(c, ch, ch->deferred);
    ch->deferred = -1;
}

static void flush_text(struct completion *c, struct choice *ch)
{
    char held[16];
    size_t n = utf8_stream_finish(&ch->utf8, held);
    append_text(c, ch, held, n);
    if (!c->request.stop || ch->stop.stopped) return;
    char *out = text_reserve(&ch->text, STOP_MAX_BYTES);
    if (out) ch->text.length += stop_stream_finish(c->request.stop, &ch->stop, out);
}

// ---- tokens ----

// A token that may turn out to be the one that ended the choice, whose text is not part of the answer.
static bool may_stop(const struct completion *c, int32_t id)
{
    const struct sampling_params *p = &c->request.params;
    for (int32_t i = 0; i < p->n_stop_token_ids; i++)
        if (p->stop_token_ids[i] == id) return true;
    for (int32_t i = 0; i < c->plan->n_eos_token_ids; i++)
        if (c->plan->eos_token_ids[i] == id) return true;
    return c->tokenizer && tokenizer_is_special(c->tokenizer, id);
}

static void push_token(struct completion *c, struct choice *ch, const struct token_out *token)
{
    push_deferred(c, ch);
    if (ch->stop.stopped) return;
    ch->n_tokens++;
    ch->sum_logprob += (double)token->logprob;
    if (c->request.logprobs >= 0 && c->request.chat) chat_write_logprob(c, ch, token, c->request.logprobs);
    else if (c->request.logprobs >= 0) completion_write_logprob(c, ch, token, c->request.logprobs, ch->n_chars);
    answer_write_token_id(c, ch, token->id);
    if (may_stop(c, token->id))
        ch->deferred = token->id;
    else
        push_token_text(c, ch, token->id);
}

static void finish_choice(struct completion *c, struct choice *ch, bool stopped)
{
    push_deferred(c, ch);
    flush_text(c, ch);
    ch->ended = stopped || ch->stop.stopped ? FINISH_STOP : FINISH_LENGTH;
    ch->finish = ch->ended == FINISH_STOP ? "stop" : "length";
    c->n_finished++;
}

// The prompt, where it is asked for, comes first.
static void begin_choice(struct completion *c, struct choice *ch)
{
    ch->begun = true;
    if (!c->request.echo) return;
    const struct token_out *logprobs = request_prompt_logprobs(ch->request);
    if (c->request.logprobs >= 0 && logprobs) completion_write_prompt_logprobs(c, ch, logprobs);
    ch->n_chars = utf8_length(ch->prompt->text, ch->prompt->text_length);
    text_append(&ch->text, ch->prompt->text, ch->prompt->text_length);
}

static int end_choice(struct completion *c, struct choice *ch, enum finish_reason reason, int32_t stop_id,
                      struct http_error *e)
{
    ch->ended = reason;
    switch (reason) {
    case FINISH_STOP:
        if (stop_id == ch->deferred && !c->request.include_stop) ch->deferred = -1;
        finish_choice(c, ch, true);
        return 0;
    case FINISH_LENGTH: finish_choice(c, ch, false); return 0;
    case FINISH_CANCELLED: return http_error_set(e, 503, NULL, NULL, "the server is shutting down");
    case FINISH_EXPIRED:
        http_error_set(e, 503, NULL, NULL, "too many requests were ahead of this one: it could not be begun in time");
        e->retry_after = request_retry_after(ch->request);
        return -1;
    case FINISH_SLOW: return http_error_set(e, 408, NULL, NULL, "the answer was not read fast enough");
    case FINISH_BARRED:
        return http_error_set(e, 400, NULL, "bad_words", "'bad_words': after %d tokens, they and the other constraints "
                              "leave no token to go on with", ch->n_tokens);
    default: return http_error_set(e, 500, NULL, NULL, "%s", request_error(ch->request));
    }
}

static void count_tokens(struct completion *c, struct choice *ch, int32_t n)
{
    double now = watchdog_now();
    if (c->request.stream && ch->last_read > 0) metrics_inter_token(c->metrics, n, now - ch->last_read);
    ch->last_read = now;
}

static int collect_choice(struct completion *c, struct choice *ch, struct http_error *e)
{
    struct token_out tokens[READ_AT_ONCE];
    int32_t stop_id = -1, n;
    do {
        n = request_read(ch->request, ch->index, tokens, READ_AT_ONCE);
        enum finish_reason reason = choice_finish(ch->request, ch->index, &stop_id); // none before all tokens are read
        if (!ch->begun && (n > 0 || reason != FINISH_NONE)) begin_choice(c, ch);
        if (n > 0) count_tokens(c, ch, n);
        for (int32_t i = 0; i < n && !ch->stop.stopped; i++) push_token(c, ch, &tokens[i]);
        if (ch->stop.stopped) {
            choice_stop(ch->request, ch->index);
            finish_choice(c, ch, true);
            return 0;
        }
        if (reason != FINISH_NONE) return end_choice(c, ch, reason, stop_id, e);
    } while (n > 0 && !c->request.stream);
    return 0;
}

static bool lost_something(const struct completion *c, const struct choice *ch)
{
    return c->scratch.failed || ch->text.failed || ch->tokens.failed || ch->token_logprobs.failed ||
           ch->top_logprobs.failed || ch->text_offset.failed || ch->token_ids.failed;
}

int completion_collect(struct completion *c, struct http_error *e)
{
    for (int32_t i = 0; i < c->n_choices; i++) {
        struct choice *ch = &c->choices[i];
        if (ch->finish) continue;
        if (collect_choice(c, ch, e)) return -1;
        if (lost_something(c, ch)) return http_error_set(e, 503, NULL, NULL, "out of memory");
    }
    return 0;
}

static bool all_ended(const struct completion *c)
{
    for (int32_t i = 0; i < c->request.n_prompts; i++)
        if (!request_done(c->requests[i])) return false;
    return true;
}

bool completion_has_news(const struct completion *c, bool eager)
{
    int32_t enough = eager ? 1 : c->request.stop ? WORTH_WITH_STOP : WORTH_A_WAKE;
    if (choice_finish(c->choices[0].request, 0, NULL) == FINISH_EXPIRED) return true; // the call's other prompts are not waited for
    for (int32_t i = 0; i < c->n_choices; i++) {
        const struct choice *ch = &c->choices[i];
        if (ch->finish) continue;
        if (request_available(ch->request, ch->index) >= enough) return true;
        if (eager && choice_finish(ch->request, ch->index, NULL) != FINISH_NONE) return true;
    }
    return !eager && all_ended(c);
}

// ---- sums ----

int64_t completion_prompt_tokens(const struct completion *c)
{
    int64_t n = 0;
    for (int32_t i = 0; i < c->request.n_prompts; i++) n += c->request.prompts[i].n_ids;
    return n;
}

int64_t completion_cached_tokens(const struct completion *c)
{
    int64_t n = 0;
    for (int32_t i = 0; c->requests && i < c->request.n_prompts; i++)
        if (c->requests[i]) n += request_cached_tokens(c->requests[i]);
    return n;
}

int64_t completion_tokens(const struct completion *c)
{
    int64_t n = 0;
    for (int32_t i = 0; c->choices && i < c->n_choices; i++) n += c->choices[i].n_tokens;
    return n;
}

static double earliest(double a, double b) { return a == 0 || (b > 0 && b < a) ? b : a; }

struct request_times completion_times(const struct completion *c)
{
    struct request_times all = {0};
    for (int32_t i = 0; c->requests && i < c->request.n_prompts; i++) {
        if (!c->requests[i]) continue;
        struct request_times t = request_times_get(c->requests[i]);
        all.submitted = earliest(all.submitted, t.submitted);
        all.scheduled = earliest(all.scheduled, t.scheduled);
        all.first_token = earliest(all.first_token, t.first_token);
        if (t.finished > all.finished) all.finished = t.finished;
    }
    return all;
}

// ---- end ----

// What a request counts as whose choices ended in two ways: a failure before an end, a stop before the full length.
static enum finish_reason worse(enum finish_reason a, enum finish_reason b)
{
    if (a > FINISH_LENGTH || b > FINISH_LENGTH) return a > b ? a : b;
    return a < b ? a : b;
}

static void observe(struct completion *c, int32_t i)
{
    int32_t n = c->request.params.n, n_tokens = 0;
    enum finish_reason reason = FINISH_LENGTH;
    for (int32_t j = i * n; j < (i + 1) * n; j++) {
        enum finish_reason ended = c->choices[j].ended;
        n_tokens += c->choices[j].n_tokens;
        reason = worse(reason, ended == FINISH_NONE ? FINISH_CANCELLED : ended);
    }
    struct request_times times = request_times_get(c->requests[i]);
    if (times.finished == 0) times.finished = watchdog_now();
    if (!c->request.stream && n_tokens > n && times.first_token > 0)
        metrics_inter_token(c->metrics, (n_tokens - n) / n, times.finished - times.first_token);
    metrics_request(c->metrics, &times, reason, request_prompt_tokens(c->requests[i]), n_tokens);
}

static void choice_deinit(struct choice *ch)
{
    text_deinit(&ch->text);
    text_deinit(&ch->tokens);
    text_deinit(&ch->token_logprobs);
    text_deinit(&ch->top_logprobs);
    text_deinit(&ch->text_offset);
    text_deinit(&ch->token_ids);
}

void completion_deinit(struct completion *c)
{
    for (int32_t i = 0; c->requests && i < c->request.n_prompts; i++) {
        if (!c->requests[i]) continue;
        observe(c, i);
        request_release(c->requests[i]);
    }
    for (int32_t i = 0; c->choices && i < c->n_choices; i++) choice_deinit(&c->choices[i]);
    free(c->requests);
    free(c->choices);
    text_deinit(&c->scratch);
    completion_request_deinit(&c->request);
}
