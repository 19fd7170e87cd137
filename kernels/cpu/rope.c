/* rope.c: norms of the heads of Q and K, rotary positions, and the write of K and V into the paged cache.
 *
 * This backend keeps each K tile transposed, [head_dim, block_size]: attention then multiplies Q with the tile as it
 * lies (simd/attention.h), and a token's K is one column. V tiles lie as [block_size, head_dim].
 */
#include <math.h>
#include <string.h>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd/vector.h"

struct rope {
    struct device *d;
    const struct rope_kv_write_params *p;
};

enum { TOKENS_PER_ITEM = 64 }; // neighbours in a block share cache lines of its K tile: one thread writes them

int cpu_rope_table(struct device *d, const struct rope_table_params *p, struct error *e)
{
    (void)d;
    size_t n_tokens = p->cos_sin.shape[0], half = p->cos_sin.shape[1] / 2;
    if (!tensor_is(&p->cos_sin, DTYPE_F32, n_tokens, 2 * half))
        return error_set(e, ERR_INVALID, "rope_table: shapes do not fit");
    for (size_t t = 0; t < n_tokens; t++) {
        float *cos_row = row_of(&p->cos_sin, t), *sin_row = cos_row + half;
        for (size_t i = 0; i < half; i++) {
            float angle = (float)p->positions[t] * p->inv_freq[i];
            cos_row[i] = cosf(angle) * p->attention_factor;
            sin_row[i] = sinf(angle) * p->attention_factor;
        }
    }
    return 0;
}

static void norm_head(const struct rope *op, float *head, const struct tensor *weight)
{
    const struct simd_vector *v = op->d->vector;
    size_t dim = (size_t)op->p->head_dim;
    const struct normalization how = {
        .scale = 1.0f / sqrtf(v->sum_squares(head, 0, dim) / (float)dim + op->p->norm_eps), .weight = weight,
        .offset = op->p->norm_weight_offset,
    };
    v->normalize(head, head, &how, dim);
}

static void turn_head(const struct rope *op, float *head, size_t t, const struct tensor *norm)
{
    const struct tensor *cos_sin = &op->p->cos_sin;
    if (norm->data) norm_head(op, head, norm);
    if (!cos_sin->data) return;
    size_t half = (size_t)op->p->rope_dim / 2;
    const float *cos_row = row_of(cos_sin, t);
    op->d->vector->rotate(head, head + half, cos_row, cos_row + half, half);
}

// Column `offset` of the tile.
static void write_k(const struct rope *op, void *tile, enum dtype dtype, size_t block_size, size_t offset,
                    const float *k, size_t head_dim)
{
    enum { PIECE = 64 };
    uint32_t piece[PIECE];
    size_t size = dtype_size(dtype);
    for (size_t start = 0; start < head_dim; start += PIECE) {
        size_t n = head_dim - start < PIECE ? head_dim - start : PIECE;
        op->d->vector->store(piece, dtype, k + start, n);
        char *to = (char *)tile + (start * block_size + offset) * size;
        if (size == 2)
            for (size_t i = 0; i < n; i++) memcpy(to + i * block_size * 2, (uint16_t *)piece + i, 2);
        else
            for (size_t i = 0; i < n; i++) memcpy(to + i * block_size * 4, piece + i, 4);
    }
}

static void write_token(const struct rope *op, size_t t, size_t kv_head)
{
    const struct rope_kv_write_params *p = op->p;
    const struct tensor *k = &p->cache.k, *v = &p->cache.v;
    size_t n_heads = (size_t)p->n_heads, n_kv = (size_t)p->n_kv_heads, dim = (size_t)p->head_dim;
    size_t block_size = k->shape[2], slot = (size_t)p->slot_mapping[t];
    size_t group = n_heads / n_kv, tile = slot / block_size * n_kv + kv_head, offset = slot % block_size;
    float *row = row_of(&p->qkv, t);
    for (size_t h = kv_head * group; h < (kv_head + 1) * group; h++) turn_head(op, row + h * dim, t, &p->q_norm);
    float *k_row = row + (n_heads + kv_head) * dim, *v_row = row + (n_heads + n_kv + kv_head) * dim;
    turn_head(op, k_row, t, &p->k_norm);
    size_t tile_bytes = block_size * dim * dtype_size(k->dtype);
    write_k(op, (char *)k->data + tile * tile_bytes, k->dtype, block_size, offset, k_row, dim);
    op->d->vector->store((char *)v->data + (tile * block_size + offset) * dim * dtype_size(v->dtype), v->dtype, v_row,
                         dim);
}

static void write_item(void *arg, int32_t item, int32_t thread)
{
    (void)thread;
    const struct rope *op = arg;
    size_t n_kv = (size_t)op->p->n_kv_heads, kv_head = (size_t)item % n_kv;
    size_t start = (size_t)item / n_kv * TOKENS_PER_ITEM, end = start + TOKENS_PER_ITEM;
    if (end > op->p->qkv.shape[0]) end = op->p->qkv.shape[0];
    for (size_t t = start; t < end; t++) write_token(op, t, kv_head);
}

static bool norms_fit(const struct rope_kv_write_params *p)
{
    size_t dim = (size_t)p->head_dim;
    if (!p->q_norm.data || !p->k_norm.data) return !p->q_norm.data && !p->k_norm.data;
    return tensor_is_vector(&p->q_norm, dim) && tensor_is_vector(&p->k_norm, dim);
}

static int check_cache(const struct rope_kv_write_params *p, struct error *e)
{
    const struct tensor *k = &p->cache.k, *v = &p->cache.v;
    size_t n_kv = (size_t)p->n_kv_heads, dim = (size_t)p->head_dim;
    if (!k->data || !v->data || k->dtype != v->dtype || k->dtype == DTYPE_I32 || k->n_dims != 4 || v->n_dims != 4 ||
        memcmp(k->shape, v->shape, sizeof(k->shape)) || k->shape[1] != n_kv || k->shape[3] != dim)
        return error_set(e, ERR_INVALID, "rope_kv_write: the cache's shape does not fit");
    int64_t n_slots = (int64_t)(k->shape[0] * k->shape[2]);
    for (size_t t = 0; t < p->qkv.shape[0]; t++)
        if (p->slot_mapping[t] < 0 || p->slot_mapping[t] >= n_slots)
            return error_set(e, ERR_INVALID, "rope_kv_write: slot %d of %lld", p->slot_mapping[t], (long long)n_slots);
    return 0;
}

int cpu_rope_kv_write(struct device *d, const struct rope_kv_write_params *p, struct error *e)
{
    size_t n_tokens = p->qkv.shape[0], dim = (size_t)p->head_dim;
    if (p->n_kv_heads < 1 || p->n_heads < 1 || p->n_heads % p->n_kv_heads || p->head_dim < 1 || !norms_fit(p) ||
        !tensor_is(&p->qkv, DTYPE_F32, n_tokens, (size_t)(p->n_heads + 2 * p->n_kv_heads) * dim) ||
        (p->cos_sin.data && (p->rope_dim < 0 || p->rope_dim > p->head_dim || p->rope_dim % 2 ||
                             !tensor_is(&p->cos_sin, DTYPE_F32, n_tokens, (size_t)p->rope_dim))))
        return error_set(e, ERR_INVALID, "rope_kv_write: shapes do not fit");
    if (check_cache(p, e)) return ERR_INVALID;
    struct rope op = {d, p};
    size_t n_chunks = (n_tokens + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM;
    size_t heads_of_item = (size_t)(p->n_heads / p->n_kv_heads + 2);
    rows_run(d, (int32_t)(n_chunks * (size_t)p->n_kv_heads), (n_tokens < 64 ? n_tokens : 64) * heads_of_item * dim,
             write_item, &op);
    return 0;
}
