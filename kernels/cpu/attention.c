/* attention.c: causal attention of ragged batches over the paged cache, with an online softmax: memory O(1) in the
 * context's length (Dao et al., "FlashAttention", 2022; Milakov and Gimelshein, "Online normalizer", 2018).
 *
 * Item: the queries of one sequence and KV head, at most MAX_ROWS rows; a row is one (query, q head of that KV head).
 * The item walks the KV blocks that any of its rows sees, in ascending order:
 *     scores [rows, keys] = Q x K tile; mask, softmax against the running maximum; acc [rows, head_dim] += P x V tile.
 * A row's own arithmetic (order of the dot products, of the blocks, of the sums) is the same in every item it can be
 * in, so its result is the same bit for bit, alone or in a chunk of any size. A key that a row does not see never
 * reaches its acc, not even times zero: what follows in the sequence cannot matter, unused slots may hold anything.
 *
 * FLOPs: 4 * head_dim per (row, key seen). Bytes: 2 * head_dim elements of the cache per (KV head, item, key).
 */
#include "kernels/cpu/attention.h"

#include <math.h>
#include <string.h>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd/attention.h"
#include "kernels/cpu/simd/vector.h"

enum {
    MAX_ROWS = 64,
    UNPACK_ROWS = 8, // with more rows than this, tiles are converted to F32 once, before the products read them
};

struct attention {
    struct device *d;
    const struct attention_params *p;
    int32_t group;         // q heads per KV head
    int32_t heads_of_item; // of them, how many go into one item
    int32_t queries_of_item;
    int32_t n_items;
    int32_t *first_item;   // [n_seqs + 1], in the scratch of thread 0
    size_t out_cols;       // head_dim rounded up to whole vectors
};

// One item, in a thread's scratch.
struct tile {
    const struct attention *op;
    int32_t seq, kv_head, first_head, n_heads, first_query, n_queries;
    int32_t position;    // of the first query
    float *q;            // [rows, head_dim], scaled
    float *scores;       // [rows, ATTENTION_MAX_BLOCK]
    float *acc;          // [rows, out_cols]
    float *k;            // [head_dim, block_size] F32
    float *v;            // [block_size, out_cols] F32
    struct softmax_state state[MAX_ROWS];
};

// Queries first .. end-1 of a tile.
struct queries {
    int32_t first, end;
};

// Keys first .. end-1 of one block.
struct keys {
    int32_t first, end;
};

static size_t round_up(size_t n)
{
    return (n + ATTENTION_TILE_COLS - 1) / ATTENTION_TILE_COLS * ATTENTION_TILE_COLS;
}

static int32_t min_of(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static int32_t max_of(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

static size_t first_item_bytes(size_t n_tokens)
{
    return (n_tokens + 1 + 15) / 16 * 64; // keeps what follows on a cache line
}

size_t attention_scratch_bytes(const struct device_options *o)
{
    size_t dim = round_up((size_t)min_of(o->max_dim, ATTENTION_MAX_HEAD_DIM)), block = ATTENTION_MAX_BLOCK;
    size_t flash = (2 * MAX_ROWS * dim + MAX_ROWS * block + 2 * block * dim) * sizeof(float);
    flash += first_item_bytes((size_t)o->max_tokens);
    size_t reference = o->reference_attention ? (size_t)o->max_context * sizeof(float) : 0;
    return flash > reference ? flash : reference;
}

// ---- one block ------------------------------------------------------------------------------------------------------

static struct keys keys_seen(const struct tile *t, int32_t query, int32_t block_start)
{
    int32_t position = t->position + query, first = attention_first_key(t->op->p, position);
    return (struct keys){max_of(first - block_start, 0), min_of(position + 1 - block_start, t->op->p->block_size)};
}

static void add_values(struct tile *t, struct queries q, struct keys keys, const struct attention_product *v)
{
    if (keys.first >= keys.end) return;
    struct attention_product product = *v;
    size_t row = (size_t)(q.first * t->n_heads);
    product.c = t->acc + row * t->op->out_cols;
    product.a = t->scores + row * ATTENTION_MAX_BLOCK + keys.first;
    product.b = (const char *)v->b + (size_t)keys.first * v->ldb * dtype_size(v->b_dtype);
    product.n_rows = (q.end - q.first) * t->n_heads;
    product.n_inner = keys.end - keys.first;
    if (keys.first != 0) product.next = NULL;
    t->op->d->attention->product(&product);
}

// acc += P x V for queries that do not all see the same keys: what all of them see goes together, the rest one by one.
static void add_values_masked(struct tile *t, struct queries q, int32_t block_start, const struct attention_product *v)
{
    int32_t step = max_of(1, 8 / t->n_heads);
    for (int32_t first = q.first; first < q.end; first += step) {
        struct queries some = {first, min_of(first + step, q.end)};
        struct keys common = {keys_seen(t, some.end - 1, block_start).first, keys_seen(t, first, block_start).end};
        for (int32_t i = some.first; i < some.end; i++) {
            struct keys keys = keys_seen(t, i, block_start);
            add_values(t, (struct queries){i, i + 1}, (struct keys){keys.first, min_of(keys.end, common.first)}, v);
        }
        add_values(t, some, common, v);
        for (int32_t i = some.first; i < some.end; i++) {
            struct keys keys = keys_seen(t, i, block_start);
            int32_t done = max_of(common.end, min_of(keys.end, common.first));
            add_values(t, (struct queries){i, i + 1}, (struct keys){max_of(keys.first, done), keys.end}, v);
        }
    }
}

static void softmax_rows(struct tile *t, struct queries q, int32_t block_start, int32_t n_cols)
{
    const struct attention_params *p = t->op->p;
    size_t out_cols = t->op->out_cols;
    int32_t head = t->kv_head * t->op->group + t->first_head;
    for (int32_t i = q.first; i < q.end; i++) {
        struct keys keys = keys_seen(t, i, block_start);
        struct score_params params = {.softcap = p->softcap, .distance = block_start - (t->position + i)};
        for (int32_t h = 0; h < t->n_heads; h++) {
            size_t row = (size_t)(i * t->n_heads + h);
            params.slope = p->alibi_slopes ? p->alibi_slopes[head + h] : 0;
            float factor = t->op->d->attention->softmax(t->scores + row * ATTENTION_MAX_BLOCK, n_cols, keys.first,
                                                        keys.end, params, &t->state[row]);
            if (factor != 1) t->op->d->vector->scale(t->acc + row * out_cols, factor, out_cols);
        }
    }
}

static void attend_block(struct tile *t, int32_t block_start)
{
    const struct attention_params *p = t->op->p;
    const struct simd_attention *simd = t->op->d->attention;
    struct queries q = {max_of(0, block_start - t->position), t->n_queries};
    if (p->window > 0) q.end = min_of(q.end, block_start + p->block_size - 1 + p->window - t->position);
    struct keys first = keys_seen(t, q.first, block_start), last = keys_seen(t, q.end - 1, block_start);
    size_t tile = attention_tile(p, t->seq, t->kv_head, block_start), dim = (size_t)p->head_dim;
    size_t row = (size_t)(q.first * t->n_heads), element = dtype_size(p->cache.k.dtype);
    int32_t n_rows = (q.end - q.first) * t->n_heads;
    bool unpack = n_rows > UNPACK_ROWS && p->cache.k.dtype != DTYPE_F32;

    struct attention_product k = {
        .c = t->scores + row * ATTENTION_MAX_BLOCK, .a = t->q + row * dim,
        .b = (char *)p->cache.k.data + tile * element,
        .ldc = ATTENTION_MAX_BLOCK, .lda = dim, .ldb = (size_t)p->block_size, .b_dtype = p->cache.k.dtype,
        .n_rows = n_rows, .n_inner = p->head_dim, .n_cols = (int32_t)round_up((size_t)last.end),
    };
    struct attention_product v = {
        .lda = ATTENTION_MAX_BLOCK, .ldc = t->op->out_cols, .n_cols = (int32_t)t->op->out_cols, .accumulate = true,
        .b = (char *)p->cache.v.data + tile * element, .b_dtype = p->cache.v.dtype, .ldb = dim,
    };
    // Few rows wait for memory: the next block's tiles are on their way while this one's are used.
    int32_t next_start = block_start + p->block_size;
    if (!unpack && next_start < t->position + t->n_queries) {
        size_t next = attention_tile(p, t->seq, t->kv_head, next_start);
        k.next = (char *)p->cache.k.data + next * element, v.next = (char *)p->cache.v.data + next * element;
    }
    if (unpack) {
        simd->unpack(t->k, k.ldb, k.b, k.b_dtype, dim, k.ldb);
        k.b = t->k, k.b_dtype = DTYPE_F32;
    }
    simd->product(&k);
    softmax_rows(t, q, block_start, k.n_cols);
    if (unpack || dim != t->op->out_cols) {
        simd->unpack(t->v, t->op->out_cols, v.b, v.b_dtype, (size_t)last.end, dim);
        v.b = t->v, v.b_dtype = DTYPE_F32, v.ldb = t->op->out_cols, v.next = NULL;
    }
    if (first.first == last.first && first.end == last.end)
        add_values(t, q, first, &v);
    else
        add_values_masked(t, q, block_start, &v);
}

// ---- one item -------------------------------------------------------------------------------------------------------

static size_t tile_row(const struct tile *t, int32_t query) // of qkv and out
{
    return (size_t)(t->op->p->cu_seqlens_q[t->seq] + t->first_query + query);
}

static size_t tile_col(const struct tile *t, int32_t head)
{
    return (size_t)(t->kv_head * t->op->group + t->first_head + head) * (size_t)t->op->p->head_dim;
}

static void tile_begin(struct tile *t)
{
    const struct attention_params *p = t->op->p;
    size_t dim = (size_t)p->head_dim, n_rows = (size_t)(t->n_queries * t->n_heads);
    for (size_t row = 0; row < n_rows; row++) {
        int32_t query = (int32_t)row / t->n_heads, head = (int32_t)row % t->n_heads;
        memcpy(t->q + row * dim, row_of(&p->qkv, tile_row(t, query)) + tile_col(t, head), dim * sizeof(float));
        t->state[row] = (struct softmax_state){-INFINITY, 0};
    }
    t->op->d->vector->scale(t->q, p->scale, n_rows * dim);
    memset(t->acc, 0, n_rows * t->op->out_cols * sizeof(float));
}

static void tile_end(struct tile *t)
{
    const struct attention_params *p = t->op->p;
    size_t dim = (size_t)p->head_dim, n_rows = (size_t)(t->n_queries * t->n_heads);
    for (size_t row = 0; row < n_rows; row++) {
        int32_t query = (int32_t)row / t->n_heads, head = (int32_t)row % t->n_heads;
        float *out = row_of(&p->out, tile_row(t, query)) + tile_col(t, head);
        memcpy(out, t->acc + row * t->op->out_cols, dim * sizeof(float));
        t->op->d->vector->scale(out, 1 / t->state[row].sum, dim);
    }
}

// Which queries and heads an item is. Long prefills stand last in a batch and their last queries see most: items are
// numbered from there, so that the longest are handed out first.
static void tile_locate(struct tile *t, int32_t item)
{
    const struct attention *op = t->op;
    const struct attention_params *p = op->p;
    item = op->n_items - 1 - item;
    int32_t low = 0, high = p->n_seqs - 1; // the last sequence with first_item <= item
    while (low < high) {
        int32_t middle = (low + high + 1) / 2;
        if (op->first_item[middle] <= item) low = middle;
        else high = middle - 1;
    }
    int32_t n_q = p->cu_seqlens_q[low + 1] - p->cu_seqlens_q[low], rest = item - op->first_item[low];
    int32_t head_parts = (op->group + op->heads_of_item - 1) / op->heads_of_item;
    t->seq = low;
    t->kv_head = rest % p->n_kv_heads, rest /= p->n_kv_heads;
    t->first_head = rest % head_parts * op->heads_of_item, rest /= head_parts;
    t->n_heads = min_of(op->heads_of_item, op->group - t->first_head);
    t->first_query = rest * op->queries_of_item;
    t->n_queries = min_of(op->queries_of_item, n_q - t->first_query);
    t->position = p->context_lens[low] - n_q + t->first_query;
}

static void attend_item(void *arg, int32_t item, int32_t thread)
{
    const struct attention *op = arg;
    const struct attention_params *p = op->p;
    size_t dim = (size_t)p->head_dim;
    struct tile t = {.op = op};
    t.q = (float *)((char *)device_scratch(op->d, thread) + first_item_bytes((size_t)op->d->options.max_tokens));
    t.acc = t.q + MAX_ROWS * op->out_cols;
    t.scores = t.acc + MAX_ROWS * op->out_cols;
    t.k = t.scores + MAX_ROWS * ATTENTION_MAX_BLOCK;
    t.v = t.k + ATTENTION_MAX_BLOCK * round_up(dim);
    tile_locate(&t, item);
    tile_begin(&t);
    int32_t first = attention_first_key(p, t.position) / p->block_size * p->block_size;
    for (int32_t start = first; start < t.position + t.n_queries; start += p->block_size) attend_block(&t, start);
    tile_end(&t);
}

// ---- the op ---------------------------------------------------------------------------------------------------------

static int check_shapes(const struct attention_params *p, const struct device_options *o, struct error *e)
{
    const struct tensor *k = &p->cache.k, *v = &p->cache.v;
    size_t n_tokens = p->out.shape[0], dim = (size_t)p->head_dim;
    if (p->n_kv_heads < 1 || p->n_heads < 1 || p->n_heads % p->n_kv_heads || p->head_dim < 1 ||
        p->head_dim > ATTENTION_MAX_HEAD_DIM || p->head_dim > o->max_dim || n_tokens > (size_t)o->max_tokens ||
        !tensor_is(&p->out, DTYPE_F32, n_tokens, (size_t)p->n_heads * dim) ||
        !tensor_is(&p->qkv, DTYPE_F32, n_tokens, (size_t)(p->n_heads + 2 * p->n_kv_heads) * dim))
        return error_set(e, ERR_INVALID, "attention: shapes do not fit");
    if (p->block_size < 1 || p->block_size > ATTENTION_MAX_BLOCK || p->block_size % ATTENTION_TILE_COLS ||
        !k->data || !v->data || k->n_dims != 4 || k->dtype != v->dtype || k->dtype == DTYPE_I32 ||
        memcmp(k->shape, v->shape, sizeof(k->shape)) || k->shape[1] != (size_t)p->n_kv_heads ||
        k->shape[2] != (size_t)p->block_size || k->shape[3] != dim)
        return error_set(e, ERR_INVALID, "attention: the cache's shape does not fit (blocks of %d)", p->block_size);
    return 0;
}

static int check_sequence(const struct attention_params *p, int32_t s, int32_t max_context, struct error *e)
{
    int32_t n_q = p->cu_seqlens_q[s + 1] - p->cu_seqlens_q[s], context = p->context_lens[s];
    if (n_q < 1 || context < n_q || context > max_context || (context - 1) / p->block_size >= p->max_blocks)
        return error_set(e, ERR_INVALID, "attention: sequence %d: %d queries, context %d", s, n_q, context);
    int32_t first = attention_first_key(p, context - n_q);
    for (int32_t block = first / p->block_size; block <= (context - 1) / p->block_size; block++) {
        int32_t id = p->block_table[(size_t)s * (size_t)p->max_blocks + (size_t)block];
        if (id < 0 || (size_t)id >= p->cache.k.shape[0])
            return error_set(e, ERR_INVALID, "attention: sequence %d: block %d is %d", s, block, id);
    }
    return 0;
}

static void plan_items(struct attention *op)
{
    const struct attention_params *p = op->p;
    op->group = p->n_heads / p->n_kv_heads;
    op->heads_of_item = min_of(op->group, MAX_ROWS);
    op->queries_of_item = MAX_ROWS / op->heads_of_item;
    op->out_cols = round_up((size_t)p->head_dim);
    op->first_item = device_scratch(op->d, 0);
    int32_t head_parts = (op->group + op->heads_of_item - 1) / op->heads_of_item;
    for (int32_t s = 0; s < p->n_seqs; s++) {
        int32_t n_q = p->cu_seqlens_q[s + 1] - p->cu_seqlens_q[s];
        op->first_item[s] = op->n_items;
        op->n_items += (n_q + op->queries_of_item - 1) / op->queries_of_item * head_parts * p->n_kv_heads;
    }
    op->first_item[p->n_seqs] = op->n_items;
}

int cpu_attention(struct device *d, const struct attention_params *p, struct error *e)
{
    if (check_shapes(p, &d->options, e)) return ERR_INVALID;
    if (p->n_seqs < 1 || p->cu_seqlens_q[0] != 0 || (size_t)p->cu_seqlens_q[p->n_seqs] != p->out.shape[0])
        return error_set(e, ERR_INVALID, "attention: %d sequences do not make %zu rows", p->n_seqs, p->out.shape[0]);
    for (int32_t s = 0; s < p->n_seqs; s++)
        if (check_sequence(p, s, d->options.max_context, e)) return ERR_INVALID;
    if (d->options.reference_attention) {
        attention_reference(d, p);
        return 0;
    }
    struct attention op = {.d = d, .p = p};
    plan_items(&op);
    thread_pool_run(d->pool, op.n_items, attend_item, &op);
    return 0;
}
