/* context.h: what the route handlers share: the inside of struct server. */
#ifndef GPTD_SERVER_CONTEXT_H
#define GPTD_SERVER_CONTEXT_H

#include "server/completion_request.h"
#include "server/http.h"
#include "server/workers.h"

struct server {
    struct server_options options;
    struct completion_limits limits; // points to options
    struct engine *engine;
    const struct tokenizer *tokenizer; // NULL: none
    struct http *http;
    struct workers *workers;
    struct metrics *metrics;
    int64_t created;                 // Unix time
    atomic_bool open, draining, stopping;
    double quiesce_at;               // CLOCK_MONOTONIC seconds; when draining
    bool quiesced;
};

// Work on an exchange's body that may take longer than an event loop can spare.
struct work {
    struct job job;
    struct exchange *x;
    void (*run)(struct exchange *x);
    atomic_bool finished;
};

// Bytes of a body that are parsed and tokenized on the event loop: about 1 ms. A template may take the square of its messages
// (12 ms for 250 of them in 8 KB), so that a chat goes to a worker sooner.
enum { SHORT_TEXT = 8192, SHORT_CHAT = 2048 };

// Runs run(x) at once if the body has no more than short_body bytes, else on a worker; x->route->ready must then look at
// w->finished, and nobody else may touch what run touches before work_over. False: the workers have too much to do. Sets
// x->deadline.
bool work_begin(struct work *w, struct exchange *x, size_t short_body, void (*run)(struct exchange *x));
// Whether run has returned; or never will, because nobody waits for it any more: the client has gone (x->gone), or
// request_check_time fails.
bool work_over(struct work *w);
// Before what run uses is freed: takes it back, or waits for its end.
void work_end(struct work *w);

double request_deadline(const struct exchange *x); // CLOCK_MONOTONIC seconds
// Fails when the request cannot go on, whatever its handler says: its time is up, or the server stops.
int request_check_time(const struct exchange *x, struct http_error *e);

enum exchange_next completion_handle(struct exchange *x);
enum exchange_next chat_handle(struct exchange *x); // the other three are for both
enum exchange_next completion_stream(struct exchange *x);
bool completion_ready(const struct exchange *x);
void completion_done_with(struct exchange *x);

enum exchange_next page_handle(struct exchange *x);
enum exchange_next debug_state_handle(struct exchange *x);

// The table of routes.
extern const struct route server_routes[];
extern const size_t server_n_routes;

#endif
