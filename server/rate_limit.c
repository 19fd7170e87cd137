#include "server/rate_limit.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>

struct rate_limit {
    pthread_mutex_t lock;
    struct rate_limits limits;
    double requests, promised, used; // requests begun, tokens charged, tokens used: what has not run off at `at`
    double at;                       // CLOCK_MONOTONIC seconds
    int64_t n_running;
    int32_t n_holders;
};

struct rate_limit *rate_limit_create(const struct rate_limits *limits)
{
    struct rate_limit *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    pthread_mutex_init(&r->lock, NULL);
    r->limits = *limits;
    r->n_holders = 1;
    return r;
}

void rate_limit_hold(struct rate_limit *r)
{
    pthread_mutex_lock(&r->lock);
    r->n_holders++;
    pthread_mutex_unlock(&r->lock);
}

void rate_limit_release(struct rate_limit *r)
{
    if (!r) return;
    pthread_mutex_lock(&r->lock);
    bool last = --r->n_holders == 0;
    pthread_mutex_unlock(&r->lock);
    if (!last) return;
    pthread_mutex_destroy(&r->lock);
    free(r);
}

void rate_limit_set(struct rate_limit *r, const struct rate_limits *limits)
{
    pthread_mutex_lock(&r->lock);
    r->limits = *limits;
    pthread_mutex_unlock(&r->lock);
}

static double run_off(double used, int64_t per_minute, double seconds)
{
    return per_minute > 0 ? fmax(0, used - seconds * (double)per_minute / 60) : 0;
}

static void advance(struct rate_limit *r, double now)
{
    double seconds = fmax(0, now - r->at);
    r->requests = run_off(r->requests, r->limits.requests_per_minute, seconds);
    r->promised = run_off(r->promised, r->limits.tokens_per_minute, seconds);
    r->used = run_off(r->used, r->limits.tokens_per_minute, seconds);
    r->at = fmax(r->at, now);
}

// too_much: how much has to run off first.
static int refuse(struct http_error *e, const char *what, int64_t limit, double too_much)
{
    http_error_set(e, 429, "rate_limit_exceeded", NULL, "this API key may use %lld %s", (long long)limit, what);
    e->retry_after = (int32_t)fmin(fmax(1, ceil(too_much * 60 / (double)limit)), 3600);
    return -1;
}

int rate_limit_begin(struct rate_limit *r, double now, struct http_error *e)
{
    int failed = 0;
    pthread_mutex_lock(&r->lock);
    advance(r, now);
    const struct rate_limits *l = &r->limits;
    if (l->max_concurrent > 0 && r->n_running >= l->max_concurrent) {
        failed = http_error_set(e, 429, "rate_limit_exceeded", NULL, "this API key may have %lld requests at once",
                                (long long)l->max_concurrent);
    } else if (l->requests_per_minute > 0 && r->requests + 1 > (double)l->requests_per_minute) {
        failed = refuse(e, "requests a minute", l->requests_per_minute, r->requests + 1 - (double)l->requests_per_minute);
    } else {
        r->requests++;
        r->n_running++;
    }
    pthread_mutex_unlock(&r->lock);
    return failed;
}

int rate_limit_charge(struct rate_limit *r, int64_t n_tokens, double now, struct http_error *e)
{
    int failed = 0;
    pthread_mutex_lock(&r->lock);
    advance(r, now);
    int64_t limit = r->limits.tokens_per_minute;
    double most = fmax(r->promised, r->used);
    if (limit > 0 && most >= (double)limit)
        failed = refuse(e, "tokens a minute", limit, most - (double)limit);
    else
        r->promised += (double)n_tokens;
    pthread_mutex_unlock(&r->lock);
    return failed;
}

void rate_limit_end(struct rate_limit *r, int64_t n_charged, int64_t n_used)
{
    pthread_mutex_lock(&r->lock);
    r->n_running--;
    r->promised = fmax(0, r->promised - (double)(n_charged - n_used));
    r->used += (double)n_used;
    pthread_mutex_unlock(&r->lock);
}
