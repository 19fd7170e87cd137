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

// An op with the addresses of its params.
#define RUN(p, op, ...)                                                                                               \
    do {                                                                                                              \
        if (!(p)->status) finish(p, #op, (p)->kernels->op((p)->device, __VA_ARGS__, (p)->error));                     \
    } while (0)

static void embed(struct pass *p, const struct weights *w)
{
    const struct embedding_params params = {
        .out = matrix(p->ws->x, p->ws->dtype, p->batch->n_tokens, (size_t)p->config->hidden_dim),
        .token_table = w->token_embed, .pos_table = w->pos_embed, .tokens = p->batch->tokens,
        .positions = p->batch->positions, .history_rows = p->batch->history_rows, .history = p->batch->history,
        .scale = 1,
    };
    RUN(p, embedding, &params);
}

static void rope(struct pass *p)
{
    const struct rope_config *r = &p->config->rope;
    if (p->config->family->positions != POSITIONS_ROPE) return;
    const struct rope_table_params params = {
        .cos_sin = matrix(p->ws->cos_sin, DTYPE_F32, p->batch->n_tokens, (size_t)r->dim),
        .positions = p->batch->positions, .inv_freq = p->ws->inv_freq, .attention_factor = (float)r->attention_factor,
    };
    RUN(p, rope_table, &params);
}

static struct norm_params norm_of(const struct pass *p, void *out, void *x, int32_t n_rows, const struct norm_weights *w)
{
    size_t dim = (size_t)p->config->hidden_dim;
    return (struct norm_params){
        .out = matrix(out, p->ws->dtype, n_rows, dim), .x = matrix(x, p->ws->dtype, n_rows, dim), .weight = w->weight,
        .bias = w->bias, .kind = p->config->family->norm, .eps = p->config->norm_eps,
    };
}

// out = W x, or out += W x.
static struct linear_params linear_of(const struct pass *p, void *out, enum dtype out_dtype, bool accumulate, void *x,
                                      int32_t n_rows, const struct weight *w)
{
    size_t n_out = 0;
    for (int32_t i = 0; i < w->n_parts; i++) n_out += w->part[i].n_rows;
    return (struct linear_params){
        .out = matrix(out, out_dtype, n_rows, n_out), .x = matrix(x, p->ws->dtype, n_rows, w->n_cols), .weight = w,
        .accumulate = accumulate,
    };
}

static struct rope_kv_write_params rope_kv_write_of(const struct pass *p, const struct kv_layer *cache, int32_t group)
{
    const struct model_config *c = p->config;
    size_t qkv_dim = (size_t)(c->n_heads + 2 * c->n_kv_heads) * (size_t)c->head_dim;
    bool rotates = c->family->positions == POSITIONS_ROPE;
    int32_t rope_dim = rotates ? c->rope.dim : 0;
    return (struct rope_kv_write_params){
        .qkv = matrix(p->ws->qkv, p->ws->dtype, p->batch->n_tokens, qkv_dim),
        .cos_sin = matrix(rotates ? p->ws->cos_sin : NULL, DTYPE_F32, p->batch->n_tokens, (size_t)rope_dim),
        .cache = *cache, .slot_mapping = p->batch->slot_mapping[group], .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads, .head_dim = c->head_dim, .rope_dim = rope_dim,
    };
}

static void attention(struct pass *p, const struct kv_layer *cache, int32_t group)
{
    const struct model_config *c = p->config;
    const struct batch *b = p->batch;
    size_t q_dim = (size_t)c->n_heads * (size_t)c->head_dim, kv_dim = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    const struct attention_params params = {
        .out = matrix(p->ws->attn, p->ws->dtype, b->n_tokens, q_dim),
        .qkv = matrix(p->ws->qkv, p->ws->dtype, b->n_tokens, q_dim + 2 * kv_dim), .cache = *cache,
        .cu_seqlens_q = b->cu_seqlens_q, .context_lens = b->context_lens, .block_table = b->block_tables[group],
        .n_seqs = b->n_seqs, .max_blocks = b->max_blocks, .block_size = b->block_size, .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads, .head_dim = c->head_dim, .window = c->window,
        .scale = 1 / sqrtf((float)c->head_dim),
    };
    RUN(p, attention, &params);
}

static struct activation_params activation_of(const struct pass *p)
{
    const struct model_config *c = p->config;
    size_t dim = (size_t)c->intermediate_dim;
    bool gated = c->family->gated;
    return (struct activation_params){
        .out = matrix(p->ws->mlp_out, p->ws->dtype, p->batch->n_tokens, dim),
        .x = matrix(p->ws->mlp_in, p->ws->dtype, p->batch->n_tokens, gated ? 2 * dim : dim), .kind = c->activation,
        .gated = gated,
    };
}

// x += W_o attention(rope(W_qkv norm(x)))
static void attention_half(struct pass *p, const struct layer_weights *w, const struct kv_layer *cache, int32_t group)
{
    const struct workspace *ws = p->ws;
    const int32_t n = p->batch->n_tokens;
    const struct norm_params norm = norm_of(p, ws->normed, ws->x, n, &w->norm1);
    const struct linear_params qkv = linear_of(p, ws->qkv, ws->dtype, false, ws->normed, n, &w->qkv);
    const struct linear_params out = linear_of(p, ws->x, ws->dtype, true, ws->attn, n, &w->attn_out);
    const struct rope_kv_write_params rope_kv_write = rope_kv_write_of(p, cache, group);
    if (p->kernels->norm_linear_rope) {
        RUN(p, norm_linear_rope, &norm, &qkv, &rope_kv_write);
    } else {
        RUN(p, norm, &norm);
        RUN(p, linear, &qkv);
        RUN(p, rope_kv_write, &rope_kv_write);
    }
    attention(p, cache, group);
    RUN(p, linear, &out);
}

// x += W_out act(W_in norm(x))
static void mlp_half(struct pass *p, const struct layer_weights *w)
{
    const struct workspace *ws = p->ws;
    const int32_t n = p->batch->n_tokens;
    const struct norm_params norm = norm_of(p, ws->normed, ws->x, n, &w->norm2);
    const struct linear_params in = linear_of(p, ws->mlp_in, ws->dtype, false, ws->normed, n, &w->mlp_in);
    const struct linear_params out = linear_of(p, ws->x, ws->dtype, true, ws->mlp_out, n, &w->mlp_out);
    const struct activation_params activation = activation_of(p);
    if (p->kernels->norm_linear_activation) {
        RUN(p, norm_linear_activation, &norm, &in, &activation);
    } else {
        RUN(p, norm, &norm);
        RUN(p, linear, &in);
        RUN(p, activation, &activation);
    }
    RUN(p, linear, &out);
}

// Logits of the rows that are wanted.
static void logits_of(struct pass *p, const struct weights *w)
{
    const struct workspace *ws = p->ws;
    const int32_t n = p->batch->n_logits_rows;
    size_t dim = (size_t)p->config->hidden_dim;
    const struct gather_rows_params gather_rows = {
        .out = matrix(ws->rows, ws->dtype, n, dim), .x = matrix(ws->x, ws->dtype, p->batch->n_tokens, dim),
        .rows = p->batch->logits_rows, .n = n,
    };
    const bool in_place = p->batch->is_decode; // all rows, in order
    const struct norm_params norm = norm_of(p, ws->rows, in_place ? ws->x : ws->rows, n, &w->final_norm);
    const struct linear_params logits = linear_of(p, ws->logits, DTYPE_F32, false, ws->rows, n, &w->lm_head);
    if (!in_place) RUN(p, gather_rows, &gather_rows);
    if (p->kernels->norm_linear) {
        RUN(p, norm_linear, &norm, &logits);
    } else {
        RUN(p, norm, &norm);
        RUN(p, linear, &logits);
    }
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
    };
    const struct stage_table table = {b->block_tables[group], b->cu_seqlens_q, b->context_lens, b->n_seqs, b->max_blocks,
                                      b->block_size, p->config->window, b->table_stamps};
    finish(p, "stage", p->kernels->stage(p->device, arrays, sizeof arrays / sizeof *arrays, &table, p->error));
}

static void run(struct pass *p, const struct model *m, const struct kv_cache *kv)
{
    const int32_t group = 0;
    embed(p, &m->weights);
    rope(p);
    for (p->layer = 0; p->layer < m->config.n_layers; p->layer++) {
        attention_half(p, &m->weights.layers[p->layer], &kv->layers[group][p->layer], group);
        mlp_half(p, &m->weights.layers[p->layer]);
    }
    if (p->batch->n_logits_rows > 0) logits_of(p, &m->weights);
}

// A decode step is recorded when its number of rows is met for the first time, and launched whole from then on; op by op
// where there is no memory for the record.
static void run_recorded(struct pass *p, const struct model *m, const struct kv_cache *kv)
{
    bool replayed = false, launched = false;
    if (!p->status)
        finish(p, "graph_begin", p->kernels->graph_begin(p->device, m, p->batch->n_tokens, &replayed, p->error));
    if (p->status || replayed) return;
    run(p, m, kv);
    bool keep = !p->status;
    int rc = p->kernels->graph_end(p->device, keep, &launched, keep ? p->error : NULL);
    if (keep) finish(p, "graph_end", rc);
    if (!p->status && !launched) run(p, m, kv);
}

int model_forward(struct model *m, const struct batch *batch, const struct kv_cache *kv, struct tensor *logits,
                  struct error *e)
{
    const struct workspace *ws = &m->workspace;
    const int32_t n = batch->n_tokens, n_logits = batch->n_logits_rows;
    *logits = matrix(n_logits ? ws->logits : NULL, DTYPE_F32, n_logits, (size_t)m->config.vocab_size);
    if (n < 1 || n > ws->max_tokens || n_logits < 0 || n_logits > ws->max_logits_rows) {
        return error_set(e, ERR_INVALID, "%d tokens and %d rows of logits do not fit a workspace for %d and %d", n,
                         n_logits, ws->max_tokens, ws->max_logits_rows);
    }
    struct pass pass = {.kernels = m->kernels, .device = m->device, .config = &m->config, .ws = ws, .batch = batch,
                        .error = e}, *p = &pass;
    stage(p);
    if (batch->is_decode && m->kernels->graph_begin) run_recorded(p, m, kv);
    else run(p, m, kv);
    return p->status;
}
