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

// Runs run(x) at once if the body is short, else on a worker; x->route->ready must then look at w->finished, and nobody
// else may touch what run touches before it is set. False: the workers have too much to do.
bool work_begin(struct work *w, struct exchange *x, void (*run)(struct exchange *x));

enum exchange_next completion_handle(struct exchange *x);
enum exchange_next completion_stream(struct exchange *x);
bool completion_ready(const struct exchange *x);
void completion_done_with(struct exchange *x);

// The table of routes.
extern const struct route server_routes[];
extern const size_t server_n_routes;

#endif
