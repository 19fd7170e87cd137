#include "engine/inbox.h"

#include <math.h>
#include <stdlib.h>
#include <time.h>

#include "engine/request.h"

struct inbox *inbox_create(int32_t max_requests, int64_t max_tokens, double queue_timeout, uint64_t seed)
{
    struct inbox *inbox = calloc(1, sizeof *inbox);
    if (inbox == NULL)
        return NULL;
    inbox->references = 1;
    inbox->max_requests = max_requests;
    inbox->max_tokens = max_tokens;
    inbox->queue_timeout = queue_timeout;
    inbox->seed = seed;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&inbox->mutex, NULL);
    pthread_cond_init(&inbox->bell, &attr);
    pthread_condattr_destroy(&attr);
    return inbox;
}

void inbox_unref(struct inbox *inbox)
{
    if (atomic_fetch_sub_explicit(&inbox->references, 1, memory_order_acq_rel) > 1)
        return;
    pthread_cond_destroy(&inbox->bell);
    pthread_mutex_destroy(&inbox->mutex);
    free(inbox);
}

// splitmix64's output function (Steele, Lea, Flood 2014): distinct inputs give distinct, well-mixed seeds.
static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void append(struct inbox *inbox, struct request *r, double now)
{
    uint64_t arrival = ++inbox->n_submitted;
    r->arrival = arrival;
    r->seed = r->params.has_seed ? (uint64_t)r->params.seed : mix(inbox->seed + arrival * 0x9e3779b97f4a7c15);
    r->submitted = inbox->last_submitted = fmax(now, inbox->last_submitted);
    r->counted = true;
    r->next = NULL;
    atomic_fetch_add(&inbox->references, 1);
    atomic_fetch_add(&r->references, 1);
    atomic_fetch_add(&inbox->n_waiting, 1);
    atomic_fetch_add(&inbox->n_waiting_tokens, r->n_prompt);
    atomic_fetch_add(&inbox->n_waiting_bytes, (int64_t)r->storage_bytes);
    atomic_fetch_add(&inbox->n_waiting_of[request_priority(r) + PRIORITY_MAX], 1);
    if (inbox->first == NULL)
        atomic_store(&inbox->untaken_since, atomic_load(&r->submitted));
    *(inbox->last != NULL ? &inbox->last->next : &inbox->first) = r;
    inbox->last = r;
    atomic_store(&r->inbox, inbox);
    if (atomic_load(&r->cancelled)) // by somebody who did not see the inbox yet: see request_cancel
        atomic_fetch_add(&inbox->n_signals, 1);
    inbox->rung = true;
    pthread_cond_signal(&inbox->bell);
}

// ---- who may come in ------------------------------------------------------------------------------------------------

// Why there is no place for a request (code 0: there is one), and when there will be.
struct shortage {
    struct error why;
    bool too_long;  // not for want of a place in the queue, but of time
    double seconds; // until there is a place
    double hold;    // until there is the next one, when this is taken
};

// Of the waiting requests those that come before one of the same priority. What lower ones have gained by their age is left
// out: a request may be let in that then waits too long, but none is refused for those who wait behind it.
static int32_t n_ahead(const struct inbox *inbox, const struct request *r)
{
    int32_t n = 0;
    for (int32_t i = 0; i <= request_priority(r) + PRIORITY_MAX; i++)
        n += atomic_load_explicit(&inbox->n_waiting_of[i], memory_order_relaxed);
    return n;
}

// A number of requests: the places that are left, of those there are.
struct places { double left, most; bool by_time; };

static struct places places_left(const struct inbox *inbox, const struct request *r, const struct admission_rate *rate)
{
    int32_t n = atomic_load(&inbox->n_waiting), ahead;
    struct places p = {inbox->max_requests - n, inbox->max_requests, false};
    if (inbox->queue_timeout == 0 || !rate->measured || r->params_of != NULL || (ahead = n_ahead(inbox, r)) == 0)
        return p;
    double most = floor(fmax(1, inbox->queue_timeout * rate->at_most));
    p.by_time = most - ahead < p.left;
    p.left = fmin(p.left, most - ahead);
    p.most = fmin(p.most, most);
    return p;
}

// promised: a place is kept for r.
static void find_shortage(const struct inbox *inbox, const struct request *r, bool promised, double now, struct shortage *s)
{
    const struct admission *a = &inbox->admission;
    const struct admission_rate rate = admission_rate_get(a, r->n_prompt, (int64_t)r->storage_bytes, now);
    const struct places places = places_left(inbox, r, &rate);
    int32_t n = atomic_load(&inbox->n_waiting);
    int64_t tokens = atomic_load(&inbox->n_waiting_tokens), bytes = atomic_load(&inbox->n_waiting_bytes);
    int64_t more_tokens = tokens + r->n_prompt - inbox->max_tokens;
    int64_t more_bytes = bytes + (int64_t)r->storage_bytes - INBOX_MAX_BYTES;
    double held = promised || r->params_of != NULL ? 0 : fmin(admission_held(a, now), floor(places.most / 4));
    *s = (struct shortage){.seconds = fmax(0, 1 - places.left) / rate.requests, .hold = 1 / rate.requests};
    if (n == 0)
        return; // one alone is taken, whatever it holds
    if (n >= inbox->max_requests) {
        error_set(&s->why, ERR_BUSY, "%d requests are waiting, the most allowed", n);
    } else if (more_tokens > 0) {
        error_set(&s->why, ERR_BUSY, "waiting requests hold %lld prompt tokens; with %d more they exceed %lld",
                  (long long)tokens, r->n_prompt, (long long)inbox->max_tokens);
        s->seconds = (double)more_tokens / (rate.tokens * rate.requests);
        s->hold = r->n_prompt / (rate.tokens * rate.requests);
    } else if (more_bytes > 0) {
        error_set(&s->why, ERR_BUSY, "waiting requests hold %lld MiB for their answers; with %lld more they exceed %lld",
                  (long long)(bytes >> 20), (long long)(r->storage_bytes >> 20), (long long)(INBOX_MAX_BYTES >> 20));
        s->seconds = (double)more_bytes / (rate.bytes * rate.requests);
        s->hold = (double)r->storage_bytes / (rate.bytes * rate.requests);
    } else if (places.left <= held) {
        s->too_long = places.by_time;
        if (places.by_time && places.left < 1)
            error_set(&s->why, ERR_BUSY, "%d requests are waiting; another would wait for more than %g s", n, inbox->queue_timeout);
        else
            error_set(&s->why, ERR_BUSY, "%d requests are waiting, and the places left are promised to others", n);
    }
}

int inbox_submit(struct inbox *inbox, struct request *r, double now, struct error *e)
{
    struct shortage s = {0};
    pthread_mutex_lock(&inbox->mutex);
    bool promised = r->params_of == NULL && admission_redeem(&inbox->admission, r->fingerprint, now);
    if (inbox->closed.code != 0)
        s.why = inbox->closed;
    else
        find_shortage(inbox, r, promised, now, &s);
    if (s.why.code == ERR_BUSY) {
        r->retry_after = admission_promise(&inbox->admission, r->fingerprint, s.seconds, s.hold, promised, now);
        atomic_fetch_add(s.too_long ? &inbox->n_too_long : &inbox->n_full, 1);
    } else if (s.why.code == 0) {
        if (!promised && r->params_of == NULL)
            admission_shorten(&inbox->admission, atomic_load(&inbox->n_waiting) > 0 ? s.hold : INFINITY);
        append(inbox, r, now);
    }
    pthread_mutex_unlock(&inbox->mutex);
    return s.why.code != 0 ? error_set(e, s.why.code, "%s", s.why.message) : 0;
}

int32_t inbox_promise(struct inbox *inbox, const struct request *r, double now)
{
    struct shortage s;
    pthread_mutex_lock(&inbox->mutex);
    find_shortage(inbox, r, false, now, &s);
    int32_t seconds = admission_promise(&inbox->admission, r->fingerprint, s.seconds, s.hold, false, now);
    pthread_mutex_unlock(&inbox->mutex);
    return seconds;
}

double inbox_wait(const struct inbox *inbox, double now)
{
    const struct admission_rate rate = admission_rate_get(&inbox->admission, 0, 0, now);
    return rate.measured ? atomic_load(&inbox->n_waiting) / rate.requests : 0;
}

void inbox_close(struct inbox *inbox, const struct error *why)
{
    pthread_mutex_lock(&inbox->mutex);
    if (inbox->closed.code == 0 || why->code == ERR_DEVICE)
        inbox->closed = *why;
    pthread_mutex_unlock(&inbox->mutex);
}

void inbox_signal(struct inbox *inbox)
{
    atomic_fetch_add_explicit(&inbox->n_signals, 1, memory_order_release);
    inbox_wake(inbox);
}

void inbox_wake(struct inbox *inbox)
{
    pthread_mutex_lock(&inbox->mutex);
    inbox->rung = true;
    pthread_cond_signal(&inbox->bell);
    pthread_mutex_unlock(&inbox->mutex);
}

struct request *inbox_take(struct inbox *inbox)
{
    pthread_mutex_lock(&inbox->mutex);
    struct request *r = inbox->first;
    inbox->first = inbox->last = NULL;
    atomic_store(&inbox->untaken_since, 0);
    pthread_mutex_unlock(&inbox->mutex);
    return r;
}

void inbox_sleep(struct inbox *inbox, double until)
{
    struct timespec t = {.tv_sec = (time_t)until, .tv_nsec = (long)((until - (double)(time_t)until) * 1e9)};
    int rc = 0;
    pthread_mutex_lock(&inbox->mutex);
    while (!inbox->rung && rc == 0)
        rc = until > 0 ? pthread_cond_timedwait(&inbox->bell, &inbox->mutex, &t)
                       : pthread_cond_wait(&inbox->bell, &inbox->mutex);
    inbox->rung = false;
    pthread_mutex_unlock(&inbox->mutex);
}

bool inbox_leave(struct inbox *inbox, struct request *r)
{
    if (!r->counted)
        return false;
    r->counted = false;
    atomic_fetch_sub(&inbox->n_waiting, 1);
    atomic_fetch_sub(&inbox->n_waiting_tokens, r->n_prompt);
    atomic_fetch_sub(&inbox->n_waiting_bytes, (int64_t)r->storage_bytes);
    atomic_fetch_sub(&inbox->n_waiting_of[request_priority(r) + PRIORITY_MAX], 1);
    return true;
}
