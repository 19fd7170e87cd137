/* token_ring.h: the way of one choice's tokens from the engine thread (the writer) to its reader, without a lock.
 *
 * The writer never writes more than `capacity` unread tokens. Their ids lie where the sequence keeps all that it has
 * generated; the ring has what comes with them. Top log-probabilities have twice as many places: what the reader got last
 * stays untouched until it reads again.
 */
#ifndef GPTD_ENGINE_TOKEN_RING_H
#define GPTD_ENGINE_TOKEN_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/arena.h"
#include "engine/engine.h"

enum { TOKEN_RING_MAX = 4096 }; // tokens

struct ring_logprob { float logprob; int32_t n_top; };

struct token_ring {
    _Atomic uint64_t head;          // tokens written so far: the writer's
    uint64_t seen_tail;             // the writer's: tail when it last had to look
    int32_t capacity, max_top;      // tokens; entries a token, -1: no log-probabilities are wanted
    const int32_t *ids;             // [head]
    struct ring_logprob *logprobs;  // [capacity]; NULL where max_top is -1
    struct token_logprob *top;      // [2 * capacity, max_top]
    // The reader's word has a cache line of its own: each read would take the writer's away from it.
    char before_tail[CACHE_LINE];
    _Atomic uint64_t tail;          // tokens read so far
    char after_tail[CACHE_LINE];
};

// ids outlive the ring; capacity is at least 1. Returns 0 or ERR_NOMEM; deinit also takes a zeroed ring.
int token_ring_init(struct token_ring *ring, const int32_t *ids, int32_t capacity, int32_t max_top);
void token_ring_deinit(struct token_ring *ring);
size_t token_ring_bytes(int32_t capacity, int32_t max_top); // that init allocates
int32_t token_ring_used(const struct token_ring *ring); // unread tokens: either side
bool token_ring_fits(struct token_ring *ring, int32_t n); // n more tokens: the writer
// Publishes ids[head], which is there already; the rest is kept as far as it is wanted.
void token_ring_write(struct token_ring *ring, float logprob, const struct token_logprob *top, int32_t n_top);
int32_t token_ring_read(struct token_ring *ring, struct token_out *out, int32_t max);

#endif
