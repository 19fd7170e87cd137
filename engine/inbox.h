/* inbox.h: the way into the engine: a bounded queue of requests, and the bell that wakes the engine thread.
 *
 * Any thread submits, signals and wakes; the engine thread takes and sleeps. Requests hold a reference, so that
 * cancelling or reading one is safe after the engine is gone. A request counts as waiting until it is first admitted or ends.
 *
 * Refused (ERR_BUSY) is what would be too many requests, tokens or bytes waiting, and, where something waits, what would not
 * be begun within queue_timeout by the measured rate: better told at once than after the wait. A call's further prompts
 * (request_share_params) are spared the latter: the call has begun with its first.
 */
#ifndef GPTD_ENGINE_INBOX_H
#define GPTD_ENGINE_INBOX_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/admission.h"
#include "kernels/error.h"

struct request;

// Priorities beyond these count as these: the farthest that one request can be put before another is bounded, too.
enum { PRIORITY_MAX = 100, N_PRIORITIES = 2 * PRIORITY_MAX + 1 };

// A choice has what all its tokens will take from the beginning: so much may wait; one request alone may exceed it.
#define INBOX_MAX_BYTES ((int64_t)1 << 30)

struct inbox {
    atomic_int references;
    int32_t max_requests;      // waiting at once
    int64_t max_tokens;        // of their prompts; one request alone may exceed it
    double queue_timeout;      // seconds a request may wait to be begun; 0: any
    uint64_t seed;             // base of the seeds of requests without one
    _Atomic int32_t n_waiting;
    _Atomic int64_t n_waiting_tokens;
    _Atomic int64_t n_waiting_bytes; // that the choices of waiting requests hold
    _Atomic int32_t n_waiting_of[N_PRIORITIES]; // of n_waiting, by priority + PRIORITY_MAX
    _Atomic uint64_t n_full, n_too_long; // refused: the queue was full; the wait would have been too long
    _Atomic uint64_t n_signals; // cancellations and stops so far
    _Atomic double untaken_since; // CLOCK_MONOTONIC seconds: the oldest submission that has not been taken; 0: none
    pthread_mutex_t mutex;     // guards what follows
    pthread_cond_t bell;
    bool rung;
    struct request *first, *last; // submitted, not yet taken
    uint64_t n_submitted;
    double last_submitted;     // seconds: arrivals are in order of time
    struct error closed;       // code 0: open; else what submissions are answered
    struct admission admission; // but for its rate, which has no lock
};

struct inbox *inbox_create(int32_t max_requests, int64_t max_tokens, double queue_timeout, uint64_t seed); // NULL: no memory
void inbox_unref(struct inbox *inbox);

// Queues a prepared request and takes a reference to it: ERR_BUSY (r->retry_after says when to come again), or what the inbox
// was closed with.
int inbox_submit(struct inbox *inbox, struct request *r, double now, struct error *e);
// Seconds after which there will be a place for r, which has left: it is promised one.
int32_t inbox_promise(struct inbox *inbox, const struct request *r, double now);
// How long a request that came now would wait by the measured rate.
double inbox_wait(const struct inbox *inbox, double now);
void inbox_close(struct inbox *inbox, const struct error *why); // the first closing counts, except that a fault wins
void inbox_signal(struct inbox *inbox);                         // some request was cancelled or stopped
void inbox_wake(struct inbox *inbox);

double now_seconds(void);                                       // CLOCK_MONOTONIC

// The engine thread's.
struct request *inbox_take(struct inbox *inbox);                // all that were submitted, in order, linked by next
void inbox_sleep(struct inbox *inbox, double until);            // CLOCK_MONOTONIC seconds; 0: until woken
bool inbox_leave(struct inbox *inbox, struct request *r);       // r no longer waits; false: it had left before

#endif
