#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models/model_impl.h"

static int options_check(const struct model_options *o, struct error *e)
{
    const struct { const char *name; int32_t value, min; } sizes[] = {
        {"max_num_batched_tokens", o->max_num_batched_tokens, 1}, {"max_logits_rows", o->max_logits_rows, 1},
        {"max_model_len", o->max_model_len, 0},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (sizes[i].value >= sizes[i].min) continue;
        return error_set(e, ERR_INVALID, "%s: %d is less than %d", sizes[i].name, sizes[i].value, sizes[i].min);
    }
    if (o->tp_size != 1 || o->tp_rank != 0) {
        return error_set(e, ERR_UNSUPPORTED, "tensor parallelism of %d (rank %d)", o->tp_size, o->tp_rank);
    }
    return 0;
}

static int32_t max_dim(const struct model_config *c)
{
    int32_t qkv = (c->n_heads + 2 * c->n_kv_heads) * c->head_dim;
    int32_t inter = c->family->mlp_out && c->intermediate_dim > c->expert_dim ? c->intermediate_dim : c->expert_dim;
    int32_t mlp = c->family->gated ? 2 * inter : inter;
    int32_t widest = qkv > mlp ? qkv : mlp;
    return widest > c->hidden_dim ? widest : c->hidden_dim;
}

static void info_fill(struct model *m)
{
    const struct model_config *c = &m->config;
    enum dtype dtype = m->weights.layers[0].qkv.part[0].dtype;
    m->info = (struct model_info){
        .dtype = dtype, .vocab_size = c->vocab_size, .n_layers = c->n_layers, .hidden_dim = c->hidden_dim,
        .n_heads = c->n_heads, .n_kv_heads = c->n_kv_heads, .head_dim = c->head_dim,
        .intermediate_dim = c->intermediate_dim, .max_model_len = c->max_model_len, .bos_token_id = c->bos_token_id,
        .n_eos_token_ids = c->n_eos_token_ids, .n_kv_groups = c->n_kinds, .max_dim = max_dim(c),
        .n_parameters = m->weights.n_parameters, .weights_bytes = m->weights.mapped_bytes + m->weights.arena_bytes,
        .workspace_bytes = m->workspace.size,
    };
    snprintf(m->info.architecture, sizeof m->info.architecture, "%s", c->family->architecture);
    memcpy(m->info.eos_token_ids, c->eos_token_ids, sizeof m->info.eos_token_ids);
    for (int32_t i = 0; i < c->n_kinds; i++) {
        m->info.kv_groups[i] = (struct kv_spec){
            .n_layers = c->kinds[i].n_layers, .window = c->kinds[i].window, .n_kv_heads = c->n_kv_heads,
            .k_dim = c->head_dim, .v_dim = c->head_dim, .dtype = dtype,
        };
    }
}

static enum dtype copied_dtype(const struct model_options *o, const struct model_config *c)
{
    if (o->dtype != DTYPE_F32) return o->dtype;
    return c->dtype == DTYPE_F16 ? DTYPE_F16 : DTYPE_BF16;
}

static int plan(struct model *m, struct error *e)
{
    const struct model_options *o = &m->options;
    int rc = options_check(o, e);
    if (!rc) rc = config_read(&m->config, o->dir, e);
    if (rc) return rc;
    if (o->max_model_len > m->config.max_model_len) {
        return error_set(e, ERR_INVALID, "max_model_len: %d is more than the %d that the checkpoint allows",
                         o->max_model_len, m->config.max_model_len);
    }
    // Stretching "dynamic" frequencies changes every answer: only when a longer context was asked for.
    if (o->max_model_len) m->config.max_model_len = o->max_model_len;
    else if (m->config.kinds[0].rope.type == ROPE_DYNAMIC) m->config.max_model_len = m->config.max_positions;
    if (o->copies_weights && (m->config.expert_dim % 8 || (m->config.n_experts && m->config.hidden_dim % 8))) {
        return error_set(e, ERR_UNSUPPORTED, "on a GPU, experts of %d by %d elements, which are no multiples of 8",
                         m->config.expert_dim, m->config.hidden_dim);
    }
    for (int32_t i = 0; i < m->config.n_kinds; i++) { // a window that no context outgrows
        struct layer_kind *kind = &m->config.kinds[i];
        if (kind->window >= m->config.max_model_len) kind->window = 0;
    }
    bool dummy = o->load_format == LOAD_DUMMY;
    if (!dummy) rc = checkpoint_open(&m->checkpoint, o->dir, e);
    if (!dummy && !rc && !m->config.dtype_is_given) m->config.dtype = weights_dtype(&m->config, &m->checkpoint);
    if (!rc) rc = weights_plan(&m->weights, &m->config, dummy ? NULL : &m->checkpoint, o->copies_weights,
                               copied_dtype(o, &m->config), e);
    if (rc) return rc;
    m->workspace.max_tokens = o->max_num_batched_tokens;
    m->workspace.max_logits_rows = o->max_logits_rows;
    // A device that has copies computes in their type; F32 is the widest that activations can be.
    m->workspace.dtype = o->copies_weights ? copied_dtype(o, &m->config) : DTYPE_F32;
    workspace_layout(&m->workspace, &m->config);
    info_fill(m);
    return 0;
}

int model_create(struct model **out, const struct model_options *options, struct error *e)
{
    *out = NULL;
    struct model *m = calloc(1, sizeof *m);
    if (!m) return error_set(e, ERR_NOMEM, "out of memory");
    m->options = *options;
    int rc = plan(m, e);
    m->options.dir = NULL; // the caller's, and not read again
    if (rc) model_destroy(m);
    else *out = m;
    return rc;
}

void model_destroy(struct model *m)
{
    if (!m) return;
    if (m->workspace.memory) m->kernels->free(m->device, m->workspace.memory);
    weights_free(&m->weights, m->kernels, m->device);
    checkpoint_close(&m->checkpoint);
    free(m);
}

const struct model_info *model_info_get(const struct model *m) { return &m->info; }

const char *model_file_at(const void *address) { return safetensors_file_at(address); }

// Powers of one base for the first 2^k heads, for others those between them: https://arxiv.org/abs/2108.12409, as BLOOM has it.
static float alibi_slope(int32_t head, int32_t n_heads)
{
    int32_t whole = 1;
    while (2 * whole <= n_heads) whole *= 2;
    float base = exp2f(-8.0f / (float)whole);
    return head < whole ? powf(base, (float)(head + 1)) : powf(sqrtf(base), (float)(2 * (head - whole) + 1));
}

// What the device is to know of positions.
static int positions_fill(struct model *m, struct error *e)
{
    const struct model_config *c = &m->config;
    float values[MAX_HEADS];
    int rc = 0;
    for (int32_t i = 0; c->family->positions == POSITIONS_ROPE && i < c->n_kinds && !rc; i++) {
        const struct rope_config *rope = &c->kinds[i].rope;
        rope_inv_freq(rope, c->max_model_len, values);
        rc = m->kernels->copy_in(m->device, m->workspace.inv_freq[i], values, (size_t)rope->dim / 2 * sizeof *values, e);
    }
    if (rc || c->family->positions != POSITIONS_ALIBI) return rc;
    for (int32_t i = 0; i < c->n_heads; i++) values[i] = alibi_slope(i, c->n_heads);
    return m->kernels->copy_in(m->device, m->workspace.alibi_slopes, values, (size_t)c->n_heads * sizeof *values, e);
}

static int workspace_create(struct model *m, struct error *e)
{
    struct workspace *w = &m->workspace;
    w->dtype = m->kernels->activation_dtype(m->device, m->info.dtype);
    workspace_layout(w, &m->config);
    m->info.workspace_bytes = w->size;
    w->memory = m->kernels->alloc(m->device, w->size);
    if (!w->memory) return error_set(e, ERR_NOMEM, "no memory for %zu bytes of workspace", w->size);
    workspace_layout(w, &m->config);
    return positions_fill(m, e);
}

int model_load(struct model *m, const struct kernels *kernels, struct device *device, struct error *e)
{
    m->kernels = kernels, m->device = device;
    bool dummy = m->options.load_format == LOAD_DUMMY;
    int rc = weights_load(&m->weights, &m->config, dummy ? NULL : &m->checkpoint, m->options.seed, kernels, device, e);
    return rc ? rc : workspace_create(m, e);
}
