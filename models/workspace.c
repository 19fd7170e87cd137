#include "models/workspace.h"

enum { ALIGNMENT = 64 };

struct cursor { char *base; size_t at; };

static void *take(struct cursor *c, size_t rows, size_t columns, size_t element_size)
{
    void *address = c->base ? c->base + c->at : NULL;
    c->at += (rows * columns * element_size + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
    return address;
}

static void positions_layout(struct workspace *w, const struct model_config *c, struct cursor *at)
{
    size_t n = (size_t)w->max_tokens;
    for (int32_t i = 0; c->family->positions == POSITIONS_ROPE && i < c->n_kinds; i++) {
        size_t dim = (size_t)c->kinds[i].rope.dim;
        w->inv_freq[i] = take(at, 1, dim / 2, sizeof(float));
        w->cos_sin[i] = take(at, n, dim, sizeof(float));
    }
    if (c->family->positions == POSITIONS_ALIBI) w->alibi_slopes = take(at, 1, (size_t)c->n_heads, sizeof(float));
}

static void experts_layout(struct workspace *w, const struct model_config *c, struct cursor *at)
{
    size_t n = (size_t)w->max_tokens, n_experts = (size_t)c->n_experts, n_pairs = n * (size_t)c->n_chosen;
    w->router_logits = take(at, n, n_experts, sizeof(float));
    w->expert_out = take(at, n_pairs, (size_t)c->hidden_dim, dtype_size(w->dtype));
    w->plan = (struct expert_plan){
        .weights = take(at, n_pairs, 1, sizeof(float)), .rows = take(at, n_pairs, 1, sizeof(int32_t)),
        .tokens = take(at, n_pairs, 1, sizeof(int32_t)), .offsets = take(at, n_experts + 1, 1, sizeof(int32_t)),
        .n_experts = c->n_experts, .n_chosen = c->n_chosen,
    };
}

void workspace_layout(struct workspace *w, const struct model_config *c)
{
    struct cursor at = {w->memory, 0};
    size_t n = (size_t)w->max_tokens, n_logits = (size_t)w->max_logits_rows, size = dtype_size(w->dtype);
    size_t hidden = (size_t)c->hidden_dim, head_dim = (size_t)c->head_dim;
    size_t n_heads = (size_t)c->n_heads, n_kv_heads = (size_t)c->n_kv_heads;
    size_t dense = c->family->mlp_out ? (size_t)c->intermediate_dim : 0, chosen = (size_t)c->n_chosen * (size_t)c->expert_dim;
    size_t inter = dense > chosen ? dense : chosen; // for each token
    positions_layout(w, c, &at);
    w->x = take(&at, n, hidden, size);
    w->normed = take(&at, n, hidden, size);
    w->rows = take(&at, n_logits, hidden, size);
    w->logits = take(&at, n_logits, (size_t)c->vocab_size, sizeof(float));
    struct cursor mlp = at;
    w->qkv = take(&at, n, (n_heads + 2 * n_kv_heads) * head_dim, size);
    w->attn = take(&at, n, n_heads * head_dim, size);
    if (c->parallel) mlp = at;
    w->mlp_in = take(&mlp, n, c->family->gated ? 2 * inter : inter, size);
    w->mlp_out = c->family->gated ? take(&mlp, n, inter, size) : w->mlp_in;
    if (c->n_experts) experts_layout(w, c, &mlp);
    w->size = at.at > mlp.at ? at.at : mlp.at;
}
