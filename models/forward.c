/* forward.c: the one forward pass: a pre-norm decoder, whatever the family.
 *
 *   x = embed(tokens) [+ positions]
 *   each layer:  x += W_o attention(rope(W_qkv norm(x)))
 *                x += W_out act(W_in norm(x))
 *   logits = W_vocab norm(x)   of the wanted rows only
 */
#include <math.h>

#include "models/model_impl.h"

// One step. The first op that fails is kept; later ones are not enqueued.
struct pass {
    const struct kernels *kernels;
    struct device *device;
    const struct model_config *config;
    const struct workspace *ws;
    const struct batch *batch;
    struct error *error;
    int status;
    int32_t layer;  // for messages
};

static struct tensor matrix(void *data, enum dtype dtype, int32_t n_rows, size_t n_cols)
{
    return (struct tensor){data, dtype, 2, {(size_t)n_rows, n_cols}};
}

static void finish(struct pass *p, const char *op, int rc)
{
    if (rc) p->status = error_prefix(p->error, "layer %d: %s, %d tokens", p->layer, op, p->batch->n_tokens);
    if (rc && !p->error) p->status = rc;
}

#define RUN(p, op, ...)                                                                                               \
    do {                                                                                                              \
        const struct op##_params params = {__VA_ARGS__};                                                              \
        if (!(p)->status) finish(p, #op, (p)->kernels->op((p)->device, &params, (p)->error));                         \
    } while (0)

static void embed(struct pass *p, const struct weights *w)
{
    RUN(p, embedding, .out = matrix(p->ws->x, p->ws->dtype, p->batch->n_tokens, (size_t)p->config->hidden_dim),
        .token_table = w->token_embed, .pos_table = w->pos_embed, .tokens = p->batch->tokens,
        .positions = p->batch->positions, .history_rows = p->batch->history_rows, .history = p->batch->history,
        .scale = 1);
}

static void rope(struct pass *p)
{
    const struct rope_config *r = &p->config->rope;
    if (p->config->family->positions != POSITIONS_ROPE) return;
    RUN(p, rope_table, .cos_sin = matrix(p->ws->cos_sin, DTYPE_F32, p->batch->n_tokens, (size_t)r->dim),
        .positions = p->batch->positions, .inv_freq = p->ws->inv_freq, .attention_factor = (float)r->attention_factor);
}

static void norm(struct pass *p, void *out, void *x, int32_t n_rows, const struct norm_weights *w)
{
    size_t dim = (size_t)p->config->hidden_dim;
    RUN(p, norm, .out = matrix(out, p->ws->dtype, n_rows, dim), .x = matrix(x, p->ws->dtype, n_rows, dim),
        .weight = w->weight, .bias = w->bias, .kind = p->config->family->norm, .eps = p->config->norm_eps);
}

// out = W x, or out += W x.
static void linear(struct pass *p, void *out, enum dtype out_dtype, bool accumulate, void *x, int32_t n_rows,
                   const struct weight *w)
{
    size_t n_out = 0;
    for (int32_t i = 0; i < w->n_parts; i++) n_out += w->part[i].n_rows;
    RUN(p, linear, .out = matrix(out, out_dtype, n_rows, n_out), .x = matrix(x, p->ws->dtype, n_rows, w->n_cols),
        .weight = w, .accumulate = accumulate);
}

static void rope_kv_write(struct pass *p, const struct kv_layer *cache, int32_t group)
{
    const struct model_config *c = p->config;
    size_t qkv_dim = (size_t)(c->n_heads + 2 * c->n_kv_heads) * (size_t)c->head_dim;
    bool rotates = c->family->positions == POSITIONS_ROPE;
    int32_t rope_dim = rotates ? c->rope.dim : 0;
    RUN(p, rope_kv_write, .qkv = matrix(p->ws->qkv, p->ws->dtype, p->batch->n_tokens, qkv_dim),
        .cos_sin = matrix(rotates ? p->ws->cos_sin : NULL, DTYPE_F32, p->batch->n_tokens, (size_t)rope_dim),
        .cache = *cache, .slot_mapping = p->batch->slot_mapping[group], .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads, .head_dim = c->head_dim, .rope_dim = rope_dim);
}

static void attention(struct pass *p, const struct kv_layer *cache, int32_t group)
{
    const struct model_config *c = p->config;
    const struct batch *b = p->batch;
    size_t q_dim = (size_t)c->n_heads * (size_t)c->head_dim, kv_dim = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    RUN(p, attention, .out = matrix(p->ws->attn, p->ws->dtype, b->n_tokens, q_dim),
        .qkv = matrix(p->ws->qkv, p->ws->dtype, b->n_tokens, q_dim + 2 * kv_dim), .cache = *cache,
        .cu_seqlens_q = b->cu_seqlens_q, .context_lens = b->context_lens, .block_table = b->block_tables[group],
        .n_seqs = b->n_seqs, .max_blocks = b->max_blocks, .block_size = b->block_size, .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads, .head_dim = c->head_dim, .window = c->window,
        .scale = 1 / sqrtf((float)c->head_dim));
}

static void activation(struct pass *p)
{
    const struct model_config *c = p->config;
    size_t dim = (size_t)c->intermediate_dim;
    bool gated = c->family->gated;
    RUN(p, activation, .out = matrix(p->ws->mlp_out, p->ws->dtype, p->batch->n_tokens, dim),
        .x = matrix(p->ws->mlp_in, p->ws->dtype, p->batch->n_tokens, gated ? 2 * dim : dim), .kind = c->activation,
        .gated = gated);
}

static void gather_rows(struct pass *p)
{
    size_t dim = (size_t)p->config->hidden_dim;
    RUN(p, gather_rows, .out = matrix(p->ws->rows, p->ws->dtype, p->batch->n_logits_rows, dim),
        .x = matrix(p->ws->x, p->ws->dtype, p->batch->n_tokens, dim), .rows = p->batch->logits_rows,
        .n = p->batch->n_logits_rows);
}

// Hands the step's arrays to the device at once: every layer reads them.
static void stage(struct pass *p)
{
    const struct batch *b = p->batch;
    const size_t size = sizeof(int32_t), n = (size_t)b->n_tokens, seqs = (size_t)b->n_seqs;
    const size_t max_tokens = (size_t)p->ws->max_tokens, max_seqs = b->max_seqs ? (size_t)b->max_seqs : seqs;
    const size_t n_rows = (size_t)b->n_logits_rows, max_rows = (size_t)p->ws->max_logits_rows;
    const int32_t group = 0;
    if (!p->kernels->stage) return;
    const struct stage_array arrays[] = {
        {b->tokens, n * size, max_tokens * size},
        {b->positions, n * size, max_tokens * size},
        {b->history_rows, n * size, max_tokens * size},
        {b->slot_mapping[group], n * size, max_tokens * size},
        {b->cu_seqlens_q, (seqs + 1) * size, (max_seqs + 1) * size},
        {b->context_lens, seqs * size, max_seqs * size},
        {b->logits_rows, n_rows * size, max_rows * size},
        {b->block_tables[group], seqs * (size_t)b->max_blocks * size, max_seqs * (size_t)b->max_blocks * size},
    };
    finish(p, "stage", p->kernels->stage(p->device, arrays, sizeof arrays / sizeof *arrays, p->error));
}

int model_forward(struct model *m, const struct batch *batch, const struct kv_cache *kv, struct tensor *logits,
                  struct error *e)
{
    const struct workspace *ws = &m->workspace;
    const enum dtype a = ws->dtype;
    const int32_t n = batch->n_tokens, n_logits = batch->n_logits_rows, group = 0;
    *logits = matrix(n_logits ? ws->logits : NULL, DTYPE_F32, n_logits, (size_t)m->config.vocab_size);
    if (n < 1 || n > ws->max_tokens || n_logits < 0 || n_logits > ws->max_logits_rows) {
        return error_set(e, ERR_INVALID, "%d tokens and %d rows of logits do not fit a workspace for %d and %d", n,
                         n_logits, ws->max_tokens, ws->max_logits_rows);
    }
    struct pass pass = {.kernels = m->kernels, .device = m->device, .config = &m->config, .ws = ws, .batch = batch,
                        .error = e}, *p = &pass;
    stage(p);
    embed(p, &m->weights);
    rope(p);
    for (p->layer = 0; p->layer < m->config.n_layers; p->layer++) {
        const struct layer_weights *w = &m->weights.layers[p->layer];
        const struct kv_layer *cache = &kv->layers[group][p->layer];
        norm(p, ws->normed, ws->x, n, &w->norm1);
        linear(p, ws->qkv, a, false, ws->normed, n, &w->qkv);
        rope_kv_write(p, cache, group);
        attention(p, cache, group);
        linear(p, ws->x, a, true, ws->attn, n, &w->attn_out);
        norm(p, ws->normed, ws->x, n, &w->norm2);
        linear(p, ws->mlp_in, a, false, ws->normed, n, &w->mlp_in);
        activation(p);
        linear(p, ws->x, a, true, ws->mlp_out, n, &w->mlp_out);
    }
    if (n_logits == 0) return p->status;
    gather_rows(p);
    norm(p, ws->rows, ws->rows, n_logits, &m->weights.final_norm);
    linear(p, ws->logits, DTYPE_F32, false, ws->rows, n_logits, &m->weights.lm_head);
    return p->status;
}
