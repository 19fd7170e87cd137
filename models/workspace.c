#include "models/workspace.h"

enum { ALIGNMENT = 64 };

struct cursor { char *base; size_t at; };

static void *take(struct cursor *c, size_t rows, size_t columns, size_t element_size)
{
    void *address = c->base ? c->base + c->at : NULL;
    c->at += (rows * columns * element_size + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
    return address;
}

void workspace_layout(struct workspace *w, const struct model_config *c)
{
    struct cursor at = {w->memory, 0};
    size_t n = (size_t)w->max_tokens, n_logits = (size_t)w->max_logits_rows, size = dtype_size(w->dtype);
    size_t hidden = (size_t)c->hidden_dim, inter = (size_t)c->intermediate_dim, head_dim = (size_t)c->head_dim;
    size_t n_heads = (size_t)c->n_heads, n_kv_heads = (size_t)c->n_kv_heads;
    size_t rope_dim = c->family->positions == POSITIONS_ROPE ? (size_t)c->rope.dim : 0;
    w->inv_freq = take(&at, 1, rope_dim / 2, sizeof(float));
    w->cos_sin = take(&at, n, rope_dim, sizeof(float));
    w->x = take(&at, n, hidden, size);
    w->normed = take(&at, n, hidden, size);
    w->rows = take(&at, n_logits, hidden, size);
    w->logits = take(&at, n_logits, (size_t)c->vocab_size, sizeof(float));
    struct cursor mlp = at;
    w->qkv = take(&at, n, (n_heads + 2 * n_kv_heads) * head_dim, size);
    w->attn = take(&at, n, n_heads * head_dim, size);
    w->mlp_in = take(&mlp, n, c->family->gated ? 2 * inter : inter, size);
    w->mlp_out = c->family->gated ? take(&mlp, n, inter, size) : w->mlp_in;
    w->size = at.at > mlp.at ? at.at : mlp.at;
}
