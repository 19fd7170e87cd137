/* admission.h: how fast requests are begun, and the places that were promised to those who had to be refused.
 *
 * The rate is that of the time in which requests had to wait: what the engine can do, not what is asked of it. The engine
 * thread measures it once a turn, without a lock; any thread reads it.
 * Who is refused is told when a place will be his: places are given out one after the other along the rate, so that a
 * thousand clients who were refused at once do not come back at once. A place is kept from others from a second before its
 * time until some after, up to a quarter of the queue: clients who never come back cannot keep the engine idle. A request that
 * comes back is known by its prompt. Promises are guarded by the inbox's mutex.
 *
 * Times are CLOCK_MONOTONIC seconds; whoever calls gives them.
 */
#ifndef GPTD_ENGINE_ADMISSION_H
#define GPTD_ENGINE_ADMISSION_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum {
    ADMISSION_MEMORY = 20,      // seconds after which what was measured weighs 1/e
    ADMISSION_MAX_RETRY = 60,   // seconds: what clients are told at most; OpenAI's own obey no more than that
    ADMISSION_PROMISES = 4096,
    ADMISSION_GRACE = 2,        // seconds that a place is kept beyond the second it was promised for
};

struct admission {
    // The engine thread's: begun since the last measurement.
    int32_t n_begun;
    int64_t n_begun_tokens, n_begun_bytes;
    // Written by the engine thread, read by any: of the time in which requests waited, older ones weigh less.
    _Atomic double requests, tokens, bytes, seconds;
    _Atomic double at;          // when these were true
    atomic_bool waiting;        // requests have waited since

    // Promises.
    double next_place;          // when the first place that nobody was promised will be free
    struct { int64_t second; uint32_t n; } due[ADMISSION_MAX_RETRY + ADMISSION_GRACE + 2]; // not kept yet, by second
    struct promise { uint64_t key /* of prompt and second */; int64_t second; uint32_t n; } promises[ADMISSION_PROMISES];
};

struct admission_rate {
    double requests;            // begun each second; never 0
    double at_most;             // with one more than was counted: nobody is refused because a first one takes long
    double tokens, bytes;       // of one of them, on average
    bool measured;              // requests have lately waited long enough to tell
};

// The engine thread's: a request was begun; the turn's requests were begun, and whether others still wait.
void admission_note(struct admission *a, int64_t n_tokens, int64_t n_bytes);
void admission_measure(struct admission *a, bool waiting, double now);

// tokens and bytes are those of the request that asks, where nothing was measured.
struct admission_rate admission_rate_get(const struct admission *a, int64_t n_tokens, int64_t n_bytes, double now);

// Promises a place that will be free in that many seconds and is taken for `hold` seconds, after those promised before,
// or, to whom a promise was broken, ahead of them. Returns the whole seconds to tell, 1 to ADMISSION_MAX_RETRY.
int32_t admission_promise(struct admission *a, uint64_t prompt, double seconds, double hold, bool ahead, double now);
// A place was taken that was promised to nobody, for `hold` seconds; or nobody waits any more (INFINITY). Those who come from now
// on are told an earlier time: of those who were promised the ones before it, so many do not come.
void admission_shorten(struct admission *a, double hold);
// Whether a place was promised to the prompt for now; it no longer is.
bool admission_redeem(struct admission *a, uint64_t prompt, double now);
// Places that are kept now for those they were promised to.
int32_t admission_held(const struct admission *a, double now);

#endif
