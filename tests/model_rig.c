#include "tests/model_rig.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

static struct tensor cache_tensor(struct rig *r, const struct kv_spec *spec, int32_t dim)
{
    struct tensor t = {.dtype = spec->dtype, .n_dims = 4,
                       .shape = {(size_t)r->n_blocks, (size_t)spec->n_kv_heads, (size_t)r->block_size, (size_t)dim}};
    t.data = r->kernels->alloc(r->device, t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3] * dtype_size(t.dtype));
    ck_assert_ptr_nonnull(t.data);
    return t;
}

static size_t block_bytes(const struct tensor *t)
{
    return t->shape[1] * t->shape[2] * t->shape[3] * dtype_size(t->dtype);
}

static void poison(struct rig *r, void *to, size_t bytes)
{
    void *bits = malloc(bytes);
    memset(bits, 0xFF, bytes);
    ck_assert_int_eq(r->kernels->copy_in(r->device, to, bits, bytes, NULL), 0);
    free(bits);
}

// All bits set is NaN in every type: whoever reads a poisoned block is found out.
static void block_poison(struct rig *r, int32_t g, int32_t block)
{
    for (int32_t i = 0; i < r->info->kv_groups[g].n_layers; i++) {
        const struct tensor *k = &r->groups[g].layers[i].k, *v = &r->groups[g].layers[i].v;
        poison(r, (char *)k->data + (size_t)block * block_bytes(k), block_bytes(k));
        poison(r, (char *)v->data + (size_t)block * block_bytes(v), block_bytes(v));
    }
}

static void group_init(struct rig *r, int32_t g)
{
    const struct kv_spec *spec = &r->info->kv_groups[g];
    struct rig_group *group = &r->groups[g];
    group->layers = calloc((size_t)spec->n_layers, sizeof *group->layers);
    for (int32_t i = 0; i < spec->n_layers; i++) {
        group->layers[i].k = cache_tensor(r, spec, spec->k_dim);
        group->layers[i].v = cache_tensor(r, spec, spec->v_dim);
    }
    group->free_blocks = calloc((size_t)r->n_blocks, sizeof *group->free_blocks);
    group->block_table = calloc((size_t)r->max_blocks, sizeof *group->block_table);
}

void rig_init(struct rig *r, const struct rig_options *o)
{
    struct error e = {0};
    memset(r, 0, sizeof *r);
    int opened = kernels_open(&r->kernels, o->backend ? o->backend : "cpu", &e);
    ck_assert_msg(opened == 0, "%s", e.message);
    struct model_options mo = {.copies_weights = !r->kernels->reads_mapped_weights, .dtype = o->dtype,
                               .dir = o->dir, .max_model_len = o->max_model_len, .load_format = o->load_format,
                               .max_num_batched_tokens = o->max_tokens, .max_logits_rows = 16, .tp_size = 1};
    int rc = model_create(&r->model, &mo, &e);
    ck_assert_msg(rc == 0, "%s", e.message);
    r->info = model_info_get(r->model);
    ck_assert_int_ge(r->info->max_model_len, o->max_len);
    int32_t max_seqs = o->max_seqs ? o->max_seqs : 1;
    struct device_options options = {.n_threads = 2, .reference_attention = o->reference_attention, .isa = o->isa,
                                     .deterministic = o->deterministic,
                                     .max_vocab_size = r->info->vocab_size, .max_context = o->max_len,
                                     .max_dim = r->info->max_dim, .max_tokens = o->max_tokens,
                                     .max_seqs = max_seqs, .n_heads = r->info->n_heads,
                                     .n_kv_heads = r->info->n_kv_heads, .head_dim = r->info->head_dim,
                                     .n_tables = r->info->n_kv_groups, .block_size = o->block_size};
    rc = r->kernels->device_create(&r->device, &options, &e);
    ck_assert_msg(rc == 0, "%s", e.message);
    rc = model_load(r->model, r->kernels, r->device, &e);
    ck_assert_msg(rc == 0, "%s", e.message);
    r->block_size = o->block_size, r->max_len = o->max_len;
    r->max_blocks = (o->max_len + o->block_size - 1) / o->block_size;
    r->n_blocks = max_seqs * r->max_blocks + 3;
    for (int32_t g = 0; g < r->info->n_kv_groups; g++) group_init(r, g);
    srandom(o->seed);
    rig_reset(r);
}

static void group_reset(struct rig *r, int32_t g)
{
    struct rig_group *group = &r->groups[g];
    for (int32_t i = 0; i < r->n_blocks; i++) {
        int32_t j = (int32_t)(random() % (i + 1));
        group->free_blocks[i] = group->free_blocks[j], group->free_blocks[j] = i;
        block_poison(r, g, i);
    }
    group->n_free = r->n_blocks, group->n_freed = 0;
    for (int32_t i = 0; i < r->max_blocks; i++) group->block_table[i] = -1;
}

void rig_reset(struct rig *r)
{
    for (int32_t g = 0; g < r->info->n_kv_groups; g++) group_reset(r, g);
    r->n_context = 0;
}

void rig_deinit(struct rig *r)
{
    for (int32_t g = 0; g < r->info->n_kv_groups; g++) {
        struct rig_group *group = &r->groups[g];
        for (int32_t i = 0; i < r->info->kv_groups[g].n_layers; i++) {
            r->kernels->free(r->device, group->layers[i].k.data);
            r->kernels->free(r->device, group->layers[i].v.data);
        }
        free(group->layers);
        free(group->free_blocks);
        free(group->block_table);
    }
    model_destroy(r->model);
    r->kernels->device_destroy(r->device);
}

// Gives back the blocks that no later query can see: the next, at n_context, sees keys from n_context - window + 1 on.
static void window_free(struct rig *r, int32_t g)
{
    struct rig_group *group = &r->groups[g];
    int32_t window = r->info->kv_groups[g].window;
    if (window == 0) return;
    while ((group->n_freed + 1) * r->block_size <= r->n_context - window + 1) {
        int32_t *block = &group->block_table[group->n_freed++];
        block_poison(r, g, *block);
        memmove(group->free_blocks + 1, group->free_blocks, (size_t)group->n_free++ * sizeof *group->free_blocks);
        group->free_blocks[0] = *block;
        *block = -1;
    }
}

// Slots of the next n tokens, in blocks that are taken as they are needed.
static int32_t *slots_take(struct rig *r, int32_t g, int32_t n)
{
    struct rig_group *group = &r->groups[g];
    int32_t *slots = calloc((size_t)n, sizeof *slots);
    for (int32_t i = 0; i < n; i++) {
        int32_t position = r->n_context + i, *block = &group->block_table[position / r->block_size];
        if (*block < 0) {
            ck_assert_int_gt(group->n_free, 0);
            *block = group->free_blocks[--group->n_free];
        }
        slots[i] = *block * r->block_size + position % r->block_size;
    }
    return slots;
}

void rig_step(struct rig *r, const int32_t *tokens, int32_t n, const int32_t *rows, int32_t n_rows, float *logits)
{
    int32_t *positions = calloc((size_t)n, sizeof *positions);
    int32_t *history_rows = calloc((size_t)n, sizeof *history_rows);
    ck_assert_int_le(r->n_context + n, r->max_len);
    for (int32_t i = 0; i < n; i++) positions[i] = r->n_context + i;
    struct batch batch = {.n_tokens = n, .n_seqs = 1, .n_logits_rows = n_rows, .is_decode = n == 1 && n_rows == 1,
                          .max_blocks = r->max_blocks,
                          .block_size = r->block_size, .tokens = (int32_t *)tokens, .positions = positions,
                          .history_rows = history_rows, .cu_seqlens_q = (int32_t[]){0, n},
                          .context_lens = &r->n_context, .logits_rows = (int32_t *)rows};
    struct kv_cache kv = {0};
    for (int32_t g = 0; g < r->info->n_kv_groups; g++) {
        batch.slot_mapping[g] = slots_take(r, g, n);
        batch.block_tables[g] = r->groups[g].block_table;
        kv.layers[g] = r->groups[g].layers;
        kv.n_blocks[g] = r->n_blocks;
    }
    r->n_context += n;
    struct tensor out;
    struct error e = {0};
    int rc = model_forward(r->model, &batch, &kv, &out, &e);
    ck_assert_msg(rc == 0, "%s", e.message);
    rc = r->kernels->wait(r->device, r->kernels->record(r->device), &e);
    ck_assert_msg(rc == 0, "%s", e.message);
    ck_assert(n_rows > 0 ? out.data != NULL : out.data == NULL);
    size_t bytes = (size_t)n_rows * (size_t)r->info->vocab_size * sizeof(float);
    if (n_rows) r->kernels->copy_out(r->device, logits, out.data, bytes, NULL);
    for (int32_t g = 0; g < r->info->n_kv_groups; g++) {
        window_free(r, g);
        free(batch.slot_mapping[g]);
    }
    free(positions), free(history_rows);
}
