/* completion.h: a running completion: prompts times choices, from token rings to text.
 *
 * completion_collect reads what the engine has written, and appends to each choice what is certain of it: text that can
 * no longer be part of a stop string or of a split character, and log-probabilities as JSON fragments. Whoever writes
 * an answer takes it from there and clears it; a stream does so each step, a whole answer once at the end, so that the
 * two cannot differ.
 */
#ifndef GPTD_SERVER_COMPLETION_H
#define GPTD_SERVER_COMPLETION_H

#include "server/completion_request.h"
#include "server/metrics.h"
#include "server/text_buffer.h"
#include "tokenizer/detokenizer.h"

struct choice {
    struct request *request; // of its prompt
    int32_t index;           // within request
    const struct completion_prompt *prompt;

    // Not yet taken by completion_json.h or chat_json.h:
    struct text_buffer text;
    struct text_buffer tokens, token_logprobs, top_logprobs, text_offset; // elements of JSON lists, with commas between;
                                                                          // a chat's are whole entries in the first
    struct text_buffer token_ids;                                         // likewise
    bool begun;          // echo is in
    bool first_written;  // what stands in the first chunk alone has been written
    enum finish_reason ended; // FINISH_NONE: it runs
    const char *finish;  // "stop", "length"; NULL: it runs, or ended without an answer
    bool finish_written;

    int32_t n_tokens;
    double sum_logprob;
    size_t n_chars;      // code points of text so far, held back or not
    double last_read;    // CLOCK_MONOTONIC seconds; 0: nothing yet
    int32_t deferred;    // token whose text waits for what comes next: the stop token has none; -1: none
    struct utf8_stream utf8;
    struct stop_stream stop;
};

struct completion {
    struct completion_request request;
    const struct engine_plan *plan;
    const struct tokenizer *tokenizer; // NULL: none
    struct metrics *metrics;
    struct request **requests;         // [request.n_prompts]; NULL entries until submitted
    struct choice *choices;            // [n_choices], prompt by prompt
    int32_t n_choices, n_finished;
    struct text_buffer scratch;
};

// Submits c->request, which has been parsed. On failure nothing runs.
int completion_start(struct completion *c, struct engine *engine, const struct tokenizer *tokenizer,
                     struct metrics *metrics, struct http_error *e);
// Reads the rings. Fails when the engine ended a choice for a reason that is no answer.
int completion_collect(struct completion *c, struct http_error *e);
// Whether completion_collect would find anything (eager), or enough to be worth it. Lock-free, any thread.
bool completion_has_news(const struct completion *c, bool eager);
static inline bool completion_done(const struct completion *c) { return c->n_finished == c->n_choices; }

int64_t completion_prompt_tokens(const struct completion *c);
int64_t completion_cached_tokens(const struct completion *c);
int64_t completion_tokens(const struct completion *c); // generated, over all choices
// Of all prompts: earliest submission, scheduling and first token, latest end; zeros before the start.
struct request_times completion_times(const struct completion *c);

// Cancels what runs, counts the requests in the metrics, frees everything. Zero-initialized is fine.
void completion_deinit(struct completion *c);

#endif
