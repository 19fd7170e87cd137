#include "models/weights.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "models/dummy.h"
#include "models/load.h"

enum { MAX_NAME = 256, NO_LAYER = -1, ALIGNMENT = 64 };

// What a walk carries. The first failure is kept; later steps do nothing.
struct walk {
    struct weights *weights;
    const struct model_config *config;
    const struct checkpoint *checkpoint; // NULL: dummy weights
    const struct kernels *kernels;       // NULL: planning
    struct device *device;
    struct dummy *dummy;                 // when loading dummy weights
    struct load_item *items;             // [n_copies]: when loading a checkpoint: what is to be copied in
    const char *root;                    // before the names in this checkpoint
    uint64_t n_tensors;                  // met so far
    int status;
    struct error *error;
};

enum fill { FILL_NORMAL, FILL_ONE, FILL_ZERO }; // dummy values

// How a tensor lies in the file: as it is wanted, transposed, or with q, k and v of each head together.
enum layout { AS_WANTED, TRANSPOSED, INTERLEAVED };

// ---- one tensor -----------------------------------------------------------------------------------------------------

static void name_make(const struct walk *k, char name[MAX_NAME], int32_t layer, const char *stem, const char *suffix)
{
    if (layer == NO_LAYER) snprintf(name, MAX_NAME, "%s%s%s", k->root, stem, suffix);
    else snprintf(name, MAX_NAME, "%s%s%d.%s%s", k->root, k->config->family->layers, layer, stem, suffix);
}

// Takes the next `bytes` of the arena: their address, or NULL while planning.
static void *arena_take(struct walk *k, size_t bytes)
{
    struct weights *w = k->weights;
    char *at = w->arena ? (char *)w->arena + w->arena_bytes : NULL;
    w->arena_bytes += (bytes + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
    return at;
}

// Notes a run of rows to be copied in when the walk is over: n_rows of found, from `from` on, become those of t from `to` on.
static void copy_note(struct walk *k, const struct tensor *t, const struct safetensors_tensor *found, bool transposed,
                      size_t from, size_t to, size_t n_rows)
{
    size_t n_cols = t->n_dims == 2 ? t->shape[1] : 1, n = k->weights->n_copies++;
    if (!t->data) return;
    k->items[n] = (struct load_item){found, from * n_cols, (char *)t->data + to * n_cols * dtype_size(t->dtype), t->dtype,
                                     transposed, n_rows, n_cols};
}

// In place, or in the arena.
static void bind_mapped(struct walk *k, struct tensor *t, struct safetensors_tensor *found, enum layout layout)
{
    found->used = true;
    if (layout == AS_WANTED && !k->weights->copied && (uintptr_t)found->data % dtype_size(t->dtype) == 0) {
        k->weights->mapped_bytes += found->size;
        t->data = (void *)found->data;
        return;
    }
    if (k->weights->copied && t->n_dims == 2) t->dtype = k->weights->dtype;
    t->data = arena_take(k, t->shape[0] * (t->n_dims == 2 ? t->shape[1] : 1) * dtype_size(t->dtype));
    if (layout != INTERLEAVED) {
        copy_note(k, t, found, layout == TRANSPOSED, 0, 0, t->shape[0]);
        return;
    }
    size_t head_dim = (size_t)k->config->head_dim, n_heads = (size_t)k->config->n_heads;
    for (size_t i = 0; i < n_heads * 3; i++)
        copy_note(k, t, found, false, i * head_dim, (i % 3 * n_heads + i / 3) * head_dim, head_dim);
}

static int bind_dummy(struct walk *k, struct tensor *t, enum fill fill)
{
    size_t n = t->shape[0] * (t->n_dims == 2 ? t->shape[1] : 1);
    t->dtype = k->weights->copied ? k->weights->dtype : k->config->dtype;
    t->data = arena_take(k, n * dtype_size(t->dtype));
    if (!t->data) return 0;
    if (fill == FILL_NORMAL) {
        return dummy_fill_normal(k->dummy, k->n_tensors, k->kernels, k->device, t->data, n, k->error);
    }
    return dummy_fill_value(k->dummy, fill == FILL_ONE, k->kernels, k->device, t->data, n, k->error);
}

static int shape_check(const struct walk *k, const struct tensor *t, const struct safetensors_tensor *found,
                       bool transposed)
{
    if (found->dtype < 0) return error_set(k->error, ERR_UNSUPPORTED, "%s is none of F32, F16, BF16", found->type);
    size_t first = t->shape[transposed], second = t->shape[!transposed];
    bool fits = found->n_dims == t->n_dims && found->shape[0] == first;
    if (fits && (t->n_dims == 1 || found->shape[1] == second)) return 0;
    if (t->n_dims == 1) return error_set(k->error, ERR_FORMAT, "its shape is not [%zu], as config.json has it", first);
    return error_set(k->error, ERR_FORMAT, "its shape is not [%zu, %zu], as config.json has it", first, second);
}

// The tensor `name`, [n_rows, n_cols] or, with n_cols 0, [n_rows].
static struct tensor tensor_bind(struct walk *k, const char *name, size_t n_rows, size_t n_cols, enum layout layout,
                                 enum fill fill)
{
    struct tensor t = {.n_dims = n_cols ? 2 : 1, .shape = {n_rows, n_cols}};
    if (k->status) return t;
    if (!k->checkpoint) {
        k->status = bind_dummy(k, &t, fill);
    } else {
        struct safetensors_tensor *found = checkpoint_find(k->checkpoint, name);
        k->status = found ? shape_check(k, &t, found, layout == TRANSPOSED) : error_set(k->error, ERR_FORMAT, "missing");
        t.dtype = k->status ? DTYPE_F32 : (enum dtype)found->dtype;
        if (!k->status) bind_mapped(k, &t, found, layout);
    }
    if (k->status) error_prefix(k->error, "%s", name);
    k->weights->n_parameters += n_rows * (n_cols ? n_cols : 1);
    k->n_tensors++;
    return t;
}

// ---- groups of tensors ----------------------------------------------------------------------------------------------

// stem NULL: there is none.
static struct norm_weights norm_bind(struct walk *k, int32_t layer, const char *stem, int32_t dim)
{
    char name[MAX_NAME];
    struct norm_weights norm = {0};
    if (!stem) return norm;
    name_make(k, name, layer, stem, ".weight");
    norm.weight = tensor_bind(k, name, (size_t)dim, 0, AS_WANTED, k->config->family->norm_weight_offset ? FILL_ZERO : FILL_ONE);
    name_make(k, name, layer, stem, ".bias");
    if (k->config->family->norm_bias) norm.bias = tensor_bind(k, name, (size_t)dim, 0, AS_WANTED, FILL_ZERO);
    return norm;
}

// One matrix of up to n row blocks. stems[1] NULL: the checkpoint holds them fused, in one tensor.
static struct weight linear_bind(struct walk *k, int32_t layer, const char *const *stems, const size_t *n_rows,
                                 int32_t n, size_t n_cols, bool bias)
{
    const struct family *f = k->config->family;
    enum layout layout = f->transposed ? TRANSPOSED : f->interleaved && stems == f->qkv ? INTERLEAVED : AS_WANTED;
    char name[MAX_NAME];
    struct weight w = {.n_cols = n_cols};
    size_t total = 0;
    for (int32_t i = 0; i < n; i++) total += n_rows[i];
    w.n_parts = n > 1 && stems[1] ? n : 1;
    for (int32_t i = 0; i < w.n_parts; i++) {
        struct weight_part *part = &w.part[i];
        part->n_rows = w.n_parts == 1 ? total : n_rows[i];
        name_make(k, name, layer, stems[i], ".weight");
        struct tensor t = tensor_bind(k, name, part->n_rows, n_cols, layout, FILL_NORMAL);
        part->data = t.data, part->dtype = t.dtype;
    }
    for (int32_t i = 0; bias && i < w.n_parts; i++) { // after all of them: matrices, like biases, that meet are one
        struct weight_part *part = &w.part[i];
        name_make(k, name, layer, stems[i], ".bias");
        part->bias = tensor_bind(k, name, part->n_rows, 0, layout == INTERLEAVED ? layout : AS_WANTED, FILL_ZERO);
    }
    return w;
}

static struct weight expert_bind(struct walk *k, int32_t layer, int32_t expert, const char *const stems[2], size_t n_rows,
                                 size_t n_cols)
{
    char names[2][MAX_NAME / 2];
    const char *full[2] = {names[0], stems[1] ? names[1] : NULL};
    for (int32_t i = 0; i < 2 && stems[i]; i++)
        snprintf(names[i], sizeof names[i], "%s%d.%s", k->config->family->experts, expert, stems[i]);
    return linear_bind(k, layer, full, (size_t[]){n_rows, n_rows}, stems[1] ? 2 : 1, n_cols, false);
}

// One expert after the other, so that on a device equal parts lie at equal distances.
static void experts_bind(struct walk *k, int32_t layer)
{
    const struct model_config *c = k->config;
    const struct family *f = c->family;
    struct layer_weights *w = &k->weights->layers[layer];
    const char *const out[2] = {f->expert_out, NULL};
    size_t hidden = (size_t)c->hidden_dim, dim = (size_t)c->expert_dim, n = (size_t)c->n_experts;
    w->router = linear_bind(k, layer, &f->router, &n, 1, hidden, false);
    w->expert_in = &k->weights->experts[2 * (size_t)layer * n];
    w->expert_out = w->expert_in + n;
    for (int32_t i = 0; i < c->n_experts; i++) {
        w->expert_in[i] = expert_bind(k, layer, i, f->expert_in, dim, hidden);
        w->expert_out[i] = expert_bind(k, layer, i, out, hidden, dim);
    }
}

static void layer_bind(struct walk *k, int32_t i)
{
    const struct model_config *c = k->config;
    const struct family *f = c->family;
    struct layer_weights *layer = &k->weights->layers[i];
    size_t hidden = (size_t)c->hidden_dim, inter = (size_t)c->intermediate_dim;
    size_t q_rows = (size_t)c->n_heads * (size_t)c->head_dim, kv_rows = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    layer->norm1 = norm_bind(k, i, f->norm1, c->hidden_dim);
    layer->qkv = linear_bind(k, i, f->qkv, (size_t[]){q_rows, kv_rows, kv_rows}, 3, hidden, c->qkv_bias);
    layer->q_norm = norm_bind(k, i, f->q_norm, c->head_dim);
    layer->k_norm = norm_bind(k, i, f->k_norm, c->head_dim);
    layer->attn_out = linear_bind(k, i, &f->attn_out, &hidden, 1, q_rows, c->attn_out_bias);
    layer->post_attn_norm = norm_bind(k, i, f->post_attn_norm, c->hidden_dim);
    layer->norm2 = norm_bind(k, i, f->norm2, c->hidden_dim);
    layer->post_mlp_norm = norm_bind(k, i, f->post_mlp_norm, c->hidden_dim);
    if (c->has_experts[i]) {
        experts_bind(k, i);
        return;
    }
    layer->mlp_in = linear_bind(k, i, f->mlp_in, (size_t[]){inter, inter}, f->gated ? 2 : 1, hidden, c->mlp_bias);
    layer->mlp_out = linear_bind(k, i, &f->mlp_out, &hidden, 1, inter, c->mlp_bias);
}

// The token embedding and the output layer. When they are tied, the checkpoint may hold either name, or both.
static void embeddings_bind(struct walk *k)
{
    const struct model_config *c = k->config;
    const struct family *f = c->family;
    struct weights *w = k->weights;
    size_t vocab = (size_t)c->vocab_size, hidden = (size_t)c->hidden_dim;
    char embed_name[MAX_NAME], head_name[MAX_NAME];
    name_make(k, embed_name, NO_LAYER, f->token_embed, ".weight");
    snprintf(head_name, MAX_NAME, "%s.weight", f->lm_head);
    struct safetensors_tensor *head = k->checkpoint ? checkpoint_find(k->checkpoint, head_name) : NULL;
    bool only_head = c->tied && head && !checkpoint_find(k->checkpoint, embed_name);
    w->token_embed = tensor_bind(k, only_head ? head_name : embed_name, vocab, hidden, AS_WANTED, FILL_NORMAL);
    struct tensor t = w->token_embed;
    if (!c->tied) t = tensor_bind(k, head_name, vocab, hidden, AS_WANTED, FILL_NORMAL);
    else if (head) head->used = true;
    w->lm_head = (struct weight){.n_parts = 1, .n_cols = hidden};
    w->lm_head.part[0] = (struct weight_part){.data = t.data, .dtype = t.dtype, .n_rows = vocab};
}

// ---- the walk -------------------------------------------------------------------------------------------------------

// A checkpoint of the bare model leaves the root away as a whole.
static const char *root_find(const struct model_config *config, const struct checkpoint *checkpoint)
{
    const struct family *f = config->family;
    const char *const roots[] = {f->root[1], ""};
    char name[MAX_NAME];
    for (size_t i = 0; checkpoint && i < sizeof roots / sizeof *roots; i++) {
        snprintf(name, sizeof name, "%s%s.weight", roots[i] ? roots[i] : f->root[0], f->token_embed);
        if (checkpoint_find(checkpoint, name)) return roots[i] ? roots[i] : f->root[0];
    }
    return f->root[0];
}

enum dtype weights_dtype(const struct model_config *config, const struct checkpoint *checkpoint)
{
    char name[MAX_NAME];
    snprintf(name, sizeof name, "%s%s.weight", root_find(config, checkpoint), config->family->token_embed);
    const struct safetensors_tensor *t = checkpoint_find(checkpoint, name);
    return t && t->dtype >= 0 ? (enum dtype)t->dtype : DTYPE_BF16;
}

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

// A tensor that the configured model has no place for means that the two do not belong together.
static int unused_refuse(const struct walk *k)
{
    const struct family *f = k->config->family;
    for (size_t i = 0; i < k->checkpoint->n_tensors; i++) {
        const struct safetensors_tensor *t = k->checkpoint->tensors[i];
        bool known = t->used;
        for (size_t j = 0; j < sizeof f->ignored / sizeof *f->ignored && f->ignored[j]; j++) {
            known = known || ends_with(t->name, f->ignored[j]);
        }
        for (size_t j = 0; j < sizeof f->other_parts / sizeof *f->other_parts && f->other_parts[j]; j++) {
            known = known || strncmp(t->name, f->other_parts[j], strlen(f->other_parts[j])) == 0;
        }
        if (known) continue;
        return error_set(k->error, ERR_FORMAT, "%.200s: no place for it in the %s that config.json describes", t->name,
                         f->architecture);
    }
    return 0;
}

static int walk(struct walk *k)
{
    struct weights *w = k->weights;
    const struct model_config *c = k->config;
    w->n_parameters = 0, w->mapped_bytes = 0, w->arena_bytes = 0, w->n_copies = 0;
    k->root = root_find(c, k->checkpoint);
    embeddings_bind(k);
    if (c->family->positions == POSITIONS_LEARNED) {
        char name[MAX_NAME];
        name_make(k, name, NO_LAYER, c->family->pos_embed, ".weight");
        w->pos_embed = tensor_bind(k, name, (size_t)c->max_positions, (size_t)c->hidden_dim, AS_WANTED, FILL_NORMAL);
    }
    w->embed_norm = norm_bind(k, NO_LAYER, c->family->embed_norm, c->hidden_dim);
    for (int32_t i = 0; i < c->n_layers; i++) layer_bind(k, i);
    w->final_norm = norm_bind(k, NO_LAYER, c->family->final_norm, c->hidden_dim);
    if (!k->status && k->checkpoint) k->status = unused_refuse(k);
    return k->status;
}

int weights_plan(struct weights *w, const struct model_config *config, const struct checkpoint *checkpoint,
                 bool copied, enum dtype dtype, struct error *e)
{
    memset(w, 0, sizeof *w);
    w->copied = copied;
    w->dtype = dtype;
    size_t n_layers = (size_t)config->n_layers, n_experts = 2 * n_layers * (size_t)config->n_experts;
    w->layers = calloc(n_layers, sizeof *w->layers);
    if (n_experts) w->experts = calloc(n_experts, sizeof *w->experts);
    if (!w->layers || (n_experts && !w->experts)) {
        weights_free(w, NULL, NULL);
        return error_set(e, ERR_NOMEM, "out of memory for %zu layers", n_layers);
    }
    struct walk k = {.weights = w, .config = config, .checkpoint = checkpoint, .error = e};
    int rc = walk(&k);
    if (rc) weights_free(w, NULL, NULL);
    return rc;
}

// The whole pages of what has been copied need not stay in memory.
static void drop_pages(const void *data, size_t size)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = ((uintptr_t)data + page - 1) & ~(page - 1), end = ((uintptr_t)data + size) & ~(page - 1);
    if (begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

// Binds the checkpoint's tensors and copies in those that are not used in place.
static int load_checkpoint(struct walk *k)
{
    k->items = calloc(k->weights->n_copies + 1, sizeof *k->items);
    if (!k->items) return error_set(k->error, ERR_NOMEM, "out of memory for %zu tensors", k->weights->n_copies);
    int rc = walk(k);
    if (!rc) rc = load_run(k->items, k->weights->n_copies, k->checkpoint, k->kernels, k->device, k->error);
    for (size_t i = 0; i < k->weights->n_copies; i++) {
        const struct safetensors_tensor *from = k->items[i].from;
        if (k->items[i].offset == 0) drop_pages(from->data, from->size);
    }
    free(k->items);
    return rc;
}

static int load_dummy(struct walk *k, uint64_t seed)
{
    k->dummy = dummy_create(k->weights->copied ? k->weights->dtype : k->config->dtype, seed);
    if (!k->dummy) return error_set(k->error, ERR_NOMEM, "out of memory");
    int rc = walk(k);
    dummy_destroy(k->dummy);
    return rc ? rc : k->kernels->wait(k->device, k->kernels->record(k->device), k->error);
}

int weights_load(struct weights *w, const struct model_config *config, struct checkpoint *checkpoint, uint64_t seed,
                 const struct kernels *kernels, struct device *device, struct error *e)
{
    struct walk k = {.weights = w, .config = config, .checkpoint = checkpoint, .kernels = kernels, .device = device,
                     .error = e};
    bool reads_map = checkpoint && (!w->copied || config->family->transposed);
    int rc = reads_map ? checkpoint_populate(checkpoint, e) : 0;
    if (rc) return rc;
    if (w->arena_bytes) {
        w->arena = kernels->alloc(device, w->arena_bytes);
        if (!w->arena) return error_set(e, ERR_NOMEM, "no memory for %zu bytes of weights", w->arena_bytes);
    }
    if (!checkpoint) return load_dummy(&k, seed);
    rc = load_checkpoint(&k);
    checkpoint_read_end(checkpoint);
    return rc;
}

void weights_free(struct weights *w, const struct kernels *kernels, struct device *device)
{
    if (w->arena) kernels->free(device, w->arena);
    free(w->layers);
    free(w->experts);
    memset(w, 0, sizeof *w);
}
