#include "engine/inbox.h"

#include <stdlib.h>
#include <time.h>

#include "engine/request.h"

struct inbox *inbox_create(int32_t max_requests, int64_t max_tokens, uint64_t seed)
{
    struct inbox *inbox = calloc(1, sizeof *inbox);
    if (inbox == NULL)
        return NULL;
    inbox->references = 1;
    inbox->max_requests = max_requests;
    inbox->max_tokens = max_tokens;
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

static void append(struct inbox *inbox, struct request *r)
{
    uint64_t arrival = ++inbox->n_submitted;
    r->arrival = arrival;
    r->seed = r->params.has_seed ? (uint64_t)r->params.seed : mix(inbox->seed + arrival * 0x9e3779b97f4a7c15);
    r->submitted = now_seconds();
    r->counted = true;
    r->next = NULL;
    atomic_fetch_add(&inbox->references, 1);
    atomic_fetch_add(&r->references, 1);
    atomic_fetch_add(&inbox->n_waiting, 1);
    atomic_fetch_add(&inbox->n_waiting_tokens, r->n_prompt);
    atomic_fetch_add(&inbox->n_waiting_bytes, (int64_t)r->storage_bytes);
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

int inbox_submit(struct inbox *inbox, struct request *r, struct error *e)
{
    pthread_mutex_lock(&inbox->mutex);
    int32_t n = atomic_load(&inbox->n_waiting);
    int64_t tokens = atomic_load(&inbox->n_waiting_tokens), bytes = atomic_load(&inbox->n_waiting_bytes);
    int rc = 0;
    if (inbox->closed.code != 0)
        rc = error_set(e, inbox->closed.code, "%s", inbox->closed.message);
    else if (n >= inbox->max_requests)
        rc = error_set(e, ERR_BUSY, "%d requests are waiting, the most allowed", n);
    else if (n > 0 && tokens + r->n_prompt > inbox->max_tokens)
        rc = error_set(e, ERR_BUSY, "waiting requests hold %lld prompt tokens; with %d more they exceed %lld",
                       (long long)tokens, r->n_prompt, (long long)inbox->max_tokens);
    else if (n > 0 && bytes + (int64_t)r->storage_bytes > INBOX_MAX_BYTES)
        rc = error_set(e, ERR_BUSY, "waiting requests hold %lld MiB for their answers; with %lld more they exceed %lld",
                       (long long)(bytes >> 20), (long long)(r->storage_bytes >> 20), (long long)(INBOX_MAX_BYTES >> 20));
    else
        append(inbox, r);
    pthread_mutex_unlock(&inbox->mutex);
    return rc;
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

void inbox_leave(struct inbox *inbox, struct request *r)
{
    if (!r->counted)
        return;
    r->counted = false;
    atomic_fetch_sub(&inbox->n_waiting, 1);
    atomic_fetch_sub(&inbox->n_waiting_tokens, r->n_prompt);
    atomic_fetch_sub(&inbox->n_waiting_bytes, (int64_t)r->storage_bytes);
}
