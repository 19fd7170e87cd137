/* forward.c: the one forward pass: a pre-norm decoder, whatever the family.
 *
 *   x = [norm] (embed(tokens) [+ positions])
 *   each layer:  x += [norm] W_o attention(rope([norm] W_qkv norm(x)))
 *                x += [norm] W_out act(W_in norm(x))      or the weighted sum of the token's experts' such products
 *   logits = [softcap] W_vocab norm(x)   of the wanted rows only
 *
 * Parallel layers read the same x in both halves.
 */
#include <math.h>

#include "kernels/progress.h"
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
        if ((p)->status) break;                                                                                       \
        progress_at(#op, (p)->layer);                                                                                 \
        finish(p, #op, (p)->kernels->op((p)->device, __VA_ARGS__, (p)->error));                                       \
    } while (0)

static struct norm_params norm_of(const struct pass *p, void *out, void *x, int32_t n_rows, const struct norm_weights *w)
{
    size_t dim = (size_t)p->config->hidden_dim;
    return (struct norm_params){
        .out = matrix(out, p->ws->dtype, n_rows, dim), .x = matrix(x, p->ws->dtype, n_rows, dim), .weight = w->weight,
        .bias = w->bias, .kind = p->config->family->norm, .eps = p->config->norm_eps,
        .weight_offset = p->config->family->norm_weight_offset,
    };
}

// What transformers multiplies with: rounded to the activations' type.
static float embedding_scale(const struct pass *p)
{
    float scale = p->config->family->scales_embedding ? sqrtf((float)p->config->hidden_dim) : 1;
    uint16_t rounded;
    if (p->ws->dtype == DTYPE_F32) return scale;
    dtype_convert(&rounded, p->ws->dtype, &scale, DTYPE_F32, 1);
    dtype_convert(&scale, DTYPE_F32, &rounded, p->ws->dtype, 1);
    return scale;
}

static void embed(struct pass *p, const struct weights *w)
{
    const struct embedding_params params = {
        .out = matrix(p->ws->x, p->ws->dtype, p->batch->n_tokens, (size_t)p->config->hidden_dim),
        .token_table = w->token_embed, .pos_table = w->pos_embed, .tokens = p->batch->tokens,
        .positions = p->batch->positions, .history_rows = p->batch->history_rows, .history = p->batch->history,
        .scale = embedding_scale(p),
    };
    RUN(p, embedding, &params);
    if (!w->embed_norm.weight.data) return;
    const struct norm_params norm = norm_of(p, p->ws->x, p->ws->x, p->batch->n_tokens, &w->embed_norm);
    RUN(p, norm, &norm);
}

static void rope(struct pass *p)
{
    for (int32_t i = 0; i < p->config->n_kinds; i++) {
        const struct rope_config *r = &p->config->kinds[i].rope;
        const struct rope_table_params params = {
            .cos_sin = matrix(p->ws->cos_sin[i], DTYPE_F32, p->batch->n_tokens, (size_t)r->dim),
            .positions = p->batch->positions, .inv_freq = p->ws->inv_freq[i],
            .attention_factor = (float)r->attention_factor,
        };
        if (p->config->family->positions == POSITIONS_ROPE) RUN(p, rope_table, &params);
    }
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

static struct rope_kv_write_params rope_kv_write_of(const struct pass *p, const struct layer_weights *w,
                                                    const struct kv_layer *cache, int32_t kind)
{
    const struct model_config *c = p->config;
    size_t qkv_dim = (size_t)(c->n_heads + 2 * c->n_kv_heads) * (size_t)c->head_dim;
    int32_t rope_dim = c->kinds[kind].rope.dim;
    return (struct rope_kv_write_params){
        .qkv = matrix(p->ws->qkv, p->ws->dtype, p->batch->n_tokens, qkv_dim), .q_norm = w->q_norm.weight,
        .k_norm = w->k_norm.weight, .norm_eps = c->norm_eps, .norm_weight_offset = c->family->norm_weight_offset,
        .cos_sin = matrix(p->ws->cos_sin[kind], DTYPE_F32, p->batch->n_tokens, (size_t)rope_dim),
        .cache = *cache, .slot_mapping = p->batch->slot_mapping[kind], .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads, .head_dim = c->head_dim, .rope_dim = rope_dim,
    };
}

static void attention(struct pass *p, const struct kv_layer *cache, int32_t kind)
{
    const struct model_config *c = p->config;
    const struct batch *b = p->batch;
    size_t q_dim = (size_t)c->n_heads * (size_t)c->head_dim, kv_dim = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    const struct attention_params params = {
        .out = matrix(p->ws->attn, p->ws->dtype, b->n_tokens, q_dim),
        .qkv = matrix(p->ws->qkv, p->ws->dtype, b->n_tokens, q_dim + 2 * kv_dim), .cache = *cache,
        .cu_seqlens_q = b->cu_seqlens_q, .context_lens = b->context_lens, .block_table = b->block_tables[kind],
        .n_seqs = b->n_seqs, .max_blocks = b->max_blocks, .block_size = b->block_size, .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads, .head_dim = c->head_dim, .window = c->kinds[kind].window,
        .scale = c->attn_scale, .softcap = c->attn_softcap, .alibi_slopes = p->ws->alibi_slopes,
    };
    RUN(p, attention, &params);
}

// Of n rows.
static struct activation_params activation_of(const struct pass *p, int32_t n, int32_t columns)
{
    const struct model_config *c = p->config;
    size_t dim = (size_t)columns;
    bool gated = c->family->gated;
    return (struct activation_params){
        .out = matrix(p->ws->mlp_out, p->ws->dtype, n, dim),
        .x = matrix(p->ws->mlp_in, p->ws->dtype, n, gated ? 2 * dim : dim), .kind = c->activation, .gated = gated,
    };
}

// attn = attention(rope(W_qkv norm(x)))
static void attend(struct pass *p, const struct layer_weights *w, const struct kv_layer *cache, int32_t kind)
{
    const struct workspace *ws = p->ws;
    const int32_t n = p->batch->n_tokens;
    const struct norm_params norm = norm_of(p, ws->normed, ws->x, n, &w->norm1);
    const struct linear_params qkv = linear_of(p, ws->qkv, ws->dtype, false, ws->normed, n, &w->qkv);
    const struct rope_kv_write_params rope_kv_write = rope_kv_write_of(p, w, cache, kind);
    if (p->kernels->norm_linear_rope) {
        RUN(p, norm_linear_rope, &norm, &qkv, &rope_kv_write);
    } else {
        RUN(p, norm, &norm);
        RUN(p, linear, &qkv);
        RUN(p, rope_kv_write, &rope_kv_write);
    }
    attention(p, cache, kind);
}

// mlp_out = act(W_in norm(x))
static void activate(struct pass *p, const struct layer_weights *w)
{
    const struct workspace *ws = p->ws;
    const int32_t n = p->batch->n_tokens;
    const struct norm_params norm = norm_of(p, ws->normed, ws->x, n, &w->norm2);
    const struct linear_params in = linear_of(p, ws->mlp_in, ws->dtype, false, ws->normed, n, &w->mlp_in);
    const struct activation_params activation = activation_of(p, n, p->config->intermediate_dim);
    if (p->kernels->norm_linear_activation) {
        RUN(p, norm_linear_activation, &norm, &in, &activation);
    } else {
        RUN(p, norm, &norm);
        RUN(p, linear, &in);
        RUN(p, activation, &activation);
    }
}

// x += [norm] W from
static void add_product(struct pass *p, void *from, const struct weight *weight, const struct norm_weights *post_norm)
{
    const struct workspace *ws = p->ws;
    const int32_t n = p->batch->n_tokens;
    const bool normed = post_norm->weight.data != NULL;
    const struct linear_params out = linear_of(p, normed ? ws->normed : ws->x, ws->dtype, !normed, from, n, weight);
    RUN(p, linear, &out);
    if (!normed) return;
    struct norm_params norm = norm_of(p, ws->x, ws->normed, n, post_norm);
    norm.accumulate = true;
    RUN(p, norm, &norm);
}

// x += sum over each token's experts of weight * W_out act(W_in norm(x))
static void experts_half(struct pass *p, const struct layer_weights *w)
{
    const struct workspace *ws = p->ws;
    const struct model_config *c = p->config;
    const int32_t n = p->batch->n_tokens, n_pairs = n * c->n_chosen;
    const size_t hidden = (size_t)c->hidden_dim;
    const struct norm_params norm = norm_of(p, ws->normed, ws->x, n, &w->norm2);
    const struct linear_params router = linear_of(p, ws->router_logits, DTYPE_F32, false, ws->normed, n, &w->router);
    const struct route_params route = {.logits = router.out, .plan = ws->plan, .renormalize = c->renormalize};
    const struct activation_params activation = activation_of(p, n_pairs, c->expert_dim);
    const struct linear_experts_params in = {
        .out = activation.x, .x = norm.out, .by_token = true, .weights = w->expert_in, .plan = ws->plan,
    };
    const struct linear_experts_params out = {
        .out = matrix(ws->expert_out, ws->dtype, n_pairs, hidden), .x = activation.out, .weights = w->expert_out,
        .plan = ws->plan,
    };
    const struct combine_experts_params combine = {
        .out = matrix(ws->x, ws->dtype, n, hidden), .x = out.out, .plan = ws->plan,
    };
    RUN(p, norm, &norm);
    RUN(p, linear, &router);
    RUN(p, route, &route);
    RUN(p, linear_experts, &in);
    RUN(p, activation, &activation);
    RUN(p, linear_experts, &out);
    RUN(p, combine_experts, &combine);
}

static void layer(struct pass *p, const struct layer_weights *w, const struct kv_layer *cache, int32_t kind)
{
    const struct workspace *ws = p->ws;
    attend(p, w, cache, kind);
    if (p->config->parallel) activate(p, w);
    add_product(p, ws->attn, &w->attn_out, &w->post_attn_norm);
    if (w->expert_in) {
        experts_half(p, w);
        return;
    }
    if (!p->config->parallel) activate(p, w);
    add_product(p, ws->mlp_out, &w->mlp_out, &w->post_mlp_norm);
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
    const struct softcap_params softcap = {.x = logits.out, .cap = p->config->logit_softcap};
    if (softcap.cap > 0) RUN(p, softcap, &softcap);
}

// Hands the step's arrays to the device at once: every layer reads them.
static void stage(struct pass *p)
{
    const struct batch *b = p->batch;
    const size_t size = sizeof(int32_t), n = (size_t)b->n_tokens, seqs = (size_t)b->n_seqs;
    const size_t max_tokens = (size_t)p->ws->max_tokens, max_seqs = b->max_seqs ? (size_t)b->max_seqs : seqs;
    const size_t n_rows = (size_t)b->n_logits_rows, max_rows = (size_t)p->ws->max_logits_rows;
    const int32_t n_kinds = p->config->n_kinds;
    if (!p->kernels->stage) return;
    struct stage_array arrays[6 + MAX_LAYER_KINDS] = {
        {b->tokens, n * size, max_tokens * size},
        {b->positions, n * size, max_tokens * size},
        {b->history_rows, n * size, max_tokens * size},
        {b->cu_seqlens_q, (seqs + 1) * size, (max_seqs + 1) * size},
        {b->context_lens, seqs * size, max_seqs * size},
        {b->logits_rows, n_rows * size, max_rows * size},
    };
    struct stage_table tables[MAX_LAYER_KINDS];
    for (int32_t i = 0; i < n_kinds; i++) {
        arrays[6 + i] = (struct stage_array){b->slot_mapping[i], n * size, max_tokens * size};
        tables[i] = (struct stage_table){b->block_tables[i], b->cu_seqlens_q, b->context_lens, b->n_seqs, b->max_blocks,
                                         b->block_size, p->config->kinds[i].window, b->table_stamps};
    }
    finish(p, "stage", p->kernels->stage(p->device, arrays, 6 + n_kinds, tables, n_kinds, p->error));
}

static void run(struct pass *p, const struct model *m, const struct kv_cache *kv)
{
    int32_t next[MAX_LAYER_KINDS] = {0}; // in the cache of the kind
    embed(p, &m->weights);
    rope(p);
    for (p->layer = 0; p->layer < m->config.n_layers; p->layer++) {
        const int32_t kind = m->config.kind_of_layer[p->layer];
        layer(p, &m->weights.layers[p->layer], &kv->layers[kind][next[kind]++], kind);
        if (p->batch->layer_tickets) p->batch->layer_tickets[p->layer] = p->kernels->record(p->device);
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
