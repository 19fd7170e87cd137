/* rate_limit.h: what one API key may use: requests and tokens a minute, requests at once.
 *
 * What is used runs off evenly, a minute's worth in a minute, so that a key that has been silent may use a minute's worth at once.
 * Of tokens there are two accounts. One is charged with what a request may come to when it begins, and gets back what it left when
 * it ends: it holds bursts down. The other is charged with what was used, at the end: it keeps the rate, however long requests run.
 * A request begins while both have anything left, however much it wants; those after it wait for what it took too much. Any thread.
 */
#ifndef GPTD_SERVER_RATE_LIMIT_H
#define GPTD_SERVER_RATE_LIMIT_H

#include "server/error_response.h"

#include <stdint.h>

// 0: no limit.
struct rate_limits {
    int64_t requests_per_minute, tokens_per_minute;
    int64_t max_concurrent;
};

struct rate_limit; // counted: create gives the first hold

struct rate_limit *rate_limit_create(const struct rate_limits *limits); // NULL: no memory
void rate_limit_hold(struct rate_limit *r);
void rate_limit_release(struct rate_limit *r); // NULL is fine
// Other limits; what has been used counts on.
void rate_limit_set(struct rate_limit *r, const struct rate_limits *limits);

// now: CLOCK_MONOTONIC seconds. A request begins; -1: not yet, a 429 that says when. If 0, rate_limit_end is owed.
int rate_limit_begin(struct rate_limit *r, double now, struct http_error *e);
// It may come to so many tokens, prompts included. -1: a 429 that says when.
int rate_limit_charge(struct rate_limit *r, int64_t n_tokens, double now, struct http_error *e);
// It has ended: n_used of the n_charged tokens were used.
void rate_limit_end(struct rate_limit *r, int64_t n_charged, int64_t n_used);

#endif
