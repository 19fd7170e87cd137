/* attention_reference.c: attention as the formula has it, in plain C: all scores of one query and head, their softmax,
 * the weighted sum of V. Scratch: [max_context] F32 a thread. Item: one query and head. */
#include <math.h>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/rows.h"

struct reference {
    struct device *d;
    const struct attention_params *p;
};

static float score(const struct attention_params *p, const float *q, size_t tile, int32_t key, float slope,
                   int32_t distance)
{
    size_t column = (size_t)(key % p->block_size), block_size = (size_t)p->block_size; // K tiles lie transposed
    float dot = 0;
    for (size_t i = 0; i < (size_t)p->head_dim; i++)
        dot += q[i] * element_get(p->cache.k.data, p->cache.k.dtype, tile + i * block_size + column);
    float x = dot * p->scale;
    if (p->softcap > 0) x = p->softcap * tanhf(x / p->softcap);
    return x + slope * (float)distance;
}

static void reference_row(const struct reference *op, int32_t s, int32_t row, int32_t head, float *scores)
{
    const struct attention_params *p = op->p;
    size_t dim = (size_t)p->head_dim;
    int32_t kv_head = head / (p->n_heads / p->n_kv_heads);
    int32_t position = p->context_lens[s] - (p->cu_seqlens_q[s + 1] - row);
    int32_t first = attention_first_key(p, position);
    const float *q = row_of(&p->qkv, (size_t)row) + (size_t)head * dim;
    float *out = row_of(&p->out, (size_t)row) + (size_t)head * dim;
    float slope = p->alibi_slopes ? p->alibi_slopes[head] : 0, max = -INFINITY, sum = 0;
    for (int32_t key = first; key <= position; key++) {
        float x = score(p, q, attention_tile(p, s, kv_head, key), key, slope, key - position);
        scores[key] = x;
        if (!(x <= max)) max = x;
    }
    for (int32_t key = first; key <= position; key++) sum += scores[key] = expf(scores[key] - max);
    for (size_t i = 0; i < dim; i++) out[i] = 0;
    for (int32_t key = first; key <= position; key++) {
        size_t v = attention_tile(p, s, kv_head, key) + (size_t)(key % p->block_size) * dim;
        float weight = scores[key] / sum;
        for (size_t i = 0; i < dim; i++) out[i] += weight * element_get(p->cache.v.data, p->cache.v.dtype, v + i);
    }
}

static void reference_item(void *arg, int32_t item, int32_t thread)
{
    const struct reference *op = arg;
    int32_t row = item / op->p->n_heads, s = 0;
    while (row >= op->p->cu_seqlens_q[s + 1]) s++;
    reference_row(op, s, row, item % op->p->n_heads, device_scratch(op->d, thread));
}

void attention_reference(struct device *d, const struct attention_params *p)
{
    struct reference op = {d, p};
    thread_pool_run(d->pool, p->cu_seqlens_q[p->n_seqs] * p->n_heads, reference_item, &op);
}
