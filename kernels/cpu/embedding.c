/* embedding.c: token embedding, scaled, plus learned positions. */
#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd/vector.h"

struct embedding {
    struct device *d;
    const struct embedding_params *p;
};

static int32_t token_of(const struct embedding_params *p, int32_t t)
{
    if (p->tokens[t] >= 0) return p->tokens[t];
    return p->history.tokens[(size_t)p->history_rows[t] * (size_t)p->history.max_len + (size_t)p->positions[t]];
}

// A table's row begins at an element, which has no address of its own before its type is known.
static const void *table_row(const struct tensor *table, int32_t row)
{
    return (const char *)table->data + (size_t)row * table->shape[1] * dtype_size(table->dtype);
}

static void embed_row(void *arg, int32_t t, int32_t thread)
{
    (void)thread;
    const struct embedding *op = arg;
    const struct embedding_params *p = op->p;
    float *out = row_of(&p->out, (size_t)t);
    size_t hidden = p->out.shape[1];
    op->d->vector->load(out, table_row(&p->token_table, token_of(p, t)), p->token_table.dtype, hidden);
    if (p->scale != 1) op->d->vector->scale(out, p->scale, hidden);
    if (p->pos_table.data)
        op->d->vector->add(out, table_row(&p->pos_table, p->positions[t]), p->pos_table.dtype, hidden);
}

static int check_token(const struct embedding_params *p, int32_t t, struct error *e)
{
    if (p->tokens[t] < 0) {
        int32_t row = p->history_rows[t];
        if (row < 0 || row >= p->history.n_slots || p->positions[t] < 0 || p->positions[t] >= p->history.max_len)
            return error_set(e, ERR_INVALID, "embedding: no history at [%d, %d]", row, p->positions[t]);
    }
    int32_t token = token_of(p, t);
    if (token < 0 || (size_t)token >= p->token_table.shape[0])
        return error_set(e, ERR_INVALID, "embedding: token %d of %zu", token, p->token_table.shape[0]);
    if (p->pos_table.data && (p->positions[t] < 0 || (size_t)p->positions[t] >= p->pos_table.shape[0]))
        return error_set(e, ERR_INVALID, "embedding: position %d of %zu", p->positions[t], p->pos_table.shape[0]);
    return 0;
}

int cpu_embedding(struct device *d, const struct embedding_params *p, struct error *e)
{
    size_t n_tokens = p->out.shape[0], hidden = p->out.shape[1];
    if (p->out.n_dims != 2 || p->out.dtype != DTYPE_F32 || p->token_table.shape[1] != hidden ||
        (p->pos_table.data && p->pos_table.shape[1] != hidden))
        return error_set(e, ERR_INVALID, "embedding: shapes do not fit");
    for (size_t t = 0; t < n_tokens; t++)
        if (check_token(p, (int32_t)t, e)) return ERR_INVALID;
    struct embedding op = {d, p};
    rows_run(d, (int32_t)n_tokens, hidden, embed_row, &op);
    return 0;
}
