/* rows.c: the ops that only move memory: gathering rows, token history, whole KV blocks. */
#include "kernels/cpu/rows.h"

#include <string.h>

static void gather_row(void *arg, int32_t i, int32_t thread)
{
    (void)thread;
    const struct gather_rows_params *p = arg;
    memcpy(row_of(&p->out, (size_t)i), row_of(&p->x, (size_t)p->rows[i]), p->x.shape[1] * sizeof(float));
}

int cpu_gather_rows(struct device *d, const struct gather_rows_params *p, struct error *e)
{
    if (p->n < 0 || p->x.n_dims != 2 || p->x.dtype != DTYPE_F32 ||
        !tensor_is(&p->out, DTYPE_F32, (size_t)p->n, p->x.shape[1]))
        return error_set(e, ERR_INVALID, "gather_rows: shapes do not fit");
    for (int32_t i = 0; i < p->n; i++)
        if (p->rows[i] < 0 || (size_t)p->rows[i] >= p->x.shape[0])
            return error_set(e, ERR_INVALID, "gather_rows: row %d of %zu", p->rows[i], p->x.shape[0]);
    rows_run(d, p->n, p->x.shape[1], gather_row, (void *)p);
    return 0;
}

int cpu_history_write(struct device *d, struct history history, int32_t row, int32_t position, const int32_t *tokens,
                      int32_t n, struct error *e)
{
    (void)d;
    if (row < 0 || row >= history.n_slots || position < 0 || n < 0 || n > history.max_len - position)
        return error_set(e, ERR_INVALID, "history_write: row %d, positions %d + %d do not fit", row, position, n);
    memcpy(history.tokens + (size_t)row * (size_t)history.max_len + position, tokens, (size_t)n * sizeof(*tokens));
    return 0;
}

static void copy_block(const struct tensor *cache, int32_t from, int32_t to)
{
    size_t bytes = cache->shape[1] * cache->shape[2] * cache->shape[3] * dtype_size(cache->dtype);
    memcpy((char *)cache->data + (size_t)to * bytes, (const char *)cache->data + (size_t)from * bytes, bytes);
}

int cpu_copy_blocks(struct device *d, struct kv_layer cache, const int32_t *from, const int32_t *to, int32_t n,
                    struct error *e)
{
    (void)d;
    int64_t n_blocks = (int64_t)cache.k.shape[0];
    for (int32_t i = 0; i < n; i++) {
        if (from[i] < 0 || from[i] >= n_blocks || to[i] < 0 || to[i] >= n_blocks || from[i] == to[i])
            return error_set(e, ERR_INVALID, "copy_blocks: block %d to %d of %lld", from[i], to[i],
                             (long long)n_blocks);
        copy_block(&cache.k, from[i], to[i]);
        copy_block(&cache.v, from[i], to[i]);
    }
    return 0;
}
