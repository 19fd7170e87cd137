#include "engine/token_ring.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

int token_ring_init(struct token_ring *ring, const int32_t *ids, int32_t capacity, int32_t max_top)
{
    ring->ids = ids;
    ring->capacity = capacity;
    ring->max_top = max_top;
    if (max_top >= 0)
        ring->logprobs = malloc((size_t)capacity * sizeof *ring->logprobs);
    if (max_top > 0)
        ring->top = malloc(2 * (size_t)capacity * (size_t)max_top * sizeof *ring->top);
    return (max_top >= 0 && ring->logprobs == NULL) || (max_top > 0 && ring->top == NULL) ? ERR_NOMEM : 0;
}

size_t token_ring_bytes(int32_t capacity, int32_t max_top)
{
    size_t logprobs = max_top >= 0 ? sizeof(struct ring_logprob) : 0, top = max_top > 0 ? (size_t)max_top : 0;
    return (size_t)capacity * (logprobs + 2 * top * sizeof(struct token_logprob));
}

void token_ring_deinit(struct token_ring *ring)
{
    free(ring->logprobs);
    free(ring->top);
    ring->logprobs = NULL;
    ring->top = NULL;
}

int32_t token_ring_used(const struct token_ring *ring)
{
    uint64_t tail = atomic_load(&ring->tail); // first: head is never behind a tail read earlier
    return (int32_t)(atomic_load_explicit(&ring->head, memory_order_acquire) - tail);
}

bool token_ring_fits(struct token_ring *ring, int32_t n)
{
    uint64_t end = atomic_load_explicit(&ring->head, memory_order_relaxed) + (uint64_t)n;
    if (end - ring->seen_tail > (uint64_t)ring->capacity)
        ring->seen_tail = atomic_load(&ring->tail);
    return end - ring->seen_tail <= (uint64_t)ring->capacity;
}

static struct token_logprob *top_of(const struct token_ring *ring, uint64_t at)
{
    return ring->top + at % (2 * (uint64_t)ring->capacity) * (uint64_t)ring->max_top;
}

void token_ring_write(struct token_ring *ring, float logprob, const struct token_logprob *top, int32_t n_top)
{
    uint64_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);
    assert(token_ring_fits(ring, 1) && (ring->max_top < 0 || n_top <= ring->max_top));
    if (ring->max_top >= 0)
        ring->logprobs[head % (uint64_t)ring->capacity] = (struct ring_logprob){logprob, n_top};
    if (ring->max_top > 0 && n_top > 0)
        memcpy(top_of(ring, head), top, (size_t)n_top * sizeof *top);
    atomic_store_explicit(&ring->head, head + 1, memory_order_release);
}

int32_t token_ring_read(struct token_ring *ring, struct token_out *out, int32_t max)
{
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    int32_t n = token_ring_used(ring);
    n = n < max ? n : max;
    for (int32_t i = 0; i < n; i++) {
        out[i] = (struct token_out){.id = ring->ids[tail + (uint64_t)i]};
        if (ring->max_top < 0)
            continue;
        const struct ring_logprob *t = &ring->logprobs[(tail + (uint64_t)i) % (uint64_t)ring->capacity];
        out[i].logprob = t->logprob;
        out[i].n_top = t->n_top;
        if (t->n_top > 0)
            out[i].top = top_of(ring, tail + (uint64_t)i);
    }
    atomic_store(&ring->tail, tail + (uint64_t)n); // sequentially consistent: pairs with park() in scheduler.c
    return n;
}
