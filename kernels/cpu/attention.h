/* attention.h: what the two implementations of attention share. */
#ifndef GPTD_KERNELS_CPU_ATTENTION_H
#define GPTD_KERNELS_CPU_ATTENTION_H

#include "kernels/cpu/cpu.h"

enum { ATTENTION_MAX_BLOCK = 64, ATTENTION_MAX_HEAD_DIM = 512 };

// Keys that the query at `position` sees: first .. position.
static inline int32_t attention_first_key(const struct attention_params *p, int32_t position)
{
    return p->window > 0 && position >= p->window ? position - p->window + 1 : 0;
}

// Index of the first element of the tile that holds `key` of sequence s, in either cache.
static inline size_t attention_tile(const struct attention_params *p, int32_t s, int32_t kv_head, int32_t key)
{
    int32_t block = p->block_table[(size_t)s * (size_t)p->max_blocks + (size_t)(key / p->block_size)];
    return ((size_t)block * (size_t)p->n_kv_heads + (size_t)kv_head) * (size_t)p->block_size * (size_t)p->head_dim;
}

// The standard attention, all scores of a row side by side: the reference that flash attention is compared with.
void attention_reference(struct device *d, const struct attention_params *p);

#endif
