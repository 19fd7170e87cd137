/* linear.c: out[T, N] = x[T, K] w[N, K]^T (+ bias) (+ out), weights in place in the mapped checkpoint.
 *
 * x is F32 in memory; for one pass its rows are copied into scratch, rounded to BF16 where the CPU multiplies BF16 and
 * the weights are BF16, with zeros up to a whole vector. Each output element is one dot product whose order of summation
 * is fixed (simd/linear.h): its bits depend on neither T nor the threads.
 *
 * Work: 2 T N K FLOPs; bytes: N K sizeof(w) + 4 T (N + K). T = 1 is bound by the memory, T from about 16 by the FMA
 * units. Items are blocks of rows of w that fit L2; the thread passes all rows of x over its block, one tile of x at a
 * time, while it fetches the block it will probably take next.
 *
 * Measured (2 Zen 4 cores of a shared host, 2026-11; tests/bench/bench_cpu, all products of a Llama of 1.1 B, share of the
 * ceiling of the same run): T = 512 BF16 84 to 86 %, F32 85 to 90 %, F16 91 %; T = 1 97 % of 34 GB/s. In a whole model at
 * T = 1: 95 % of what reading the same weights gives when that is 35 GB/s, 79 % when it is 57 to 62 (the host's memory
 * gives either, by the minute and by the place).
 * Tried without gain: packing the weights (not tried further: the kernel has 95 % of its peak out of L2 as they lie);
 * fetching the next tile of x as well; blocks of 1 MiB (spill from L2); chunks of 8 KiB (F32 5 % slower), then with
 * blocks of 512 KiB (F32 5 % slower). At T = 1: four rows at once with the next item fetched ahead, 68 to 73 % of the fast
 * memory; one stream in runs of 128 KiB, 68 %; of 1 MiB, 79 %.
 */
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/simd/linear.h"

enum {
    X_BLOCK = 512,            // most rows of x in one pass over the weights
    BLOCK_BYTES = 704 * 1024, // of weights per item at most: they stay in L2 (1 MiB) while the rows of x go by
    RUN_BYTES = 1024 * 1024,  // the same when they are read once: one tile holds all rows of x
    CHUNK_BYTES = 16 * 1024,  // of a row of x, at most: so many that a tile's rows stay in L2 beside the block
    CHUNK_MULTIPLE = 64,      // columns: whole vectors of any type
    FETCH_TILES = 8,          // the next item's weights are fetched during the last so many tiles of x
};

// One pass: at most X_BLOCK rows of x times all parts whose weights want x in one type.
struct pass {
    const struct linear_params *p;
    const int32_t *rows;   // [T]: row t of x is x[rows[t]]; NULL: t
    const struct simd_linear *simd;
    size_t first_x;        // row of p->x
    int32_t n_x, n_x_tiles;
    bool bf16;             // x is rounded to BF16, and the parts are those with BF16 weights
    char *x;               // [n_x, n_cols], rows x_stride bytes apart
    size_t x_stride;
    size_t chunk;          // columns whose products are summed up before they are added to the output
    size_t rows_per_item;  // of weights
    int32_t first_item[MAX_WEIGHT_PARTS + 1]; // of each part
    int32_t n_threads;
};

// An item of a pass: consecutive rows of one part.
struct block {
    const struct weight_part *part;
    size_t first, n_rows; // rows of the part
    size_t column;        // of the output, where the block's first row goes
    const char *w;        // its first row; NULL: no such item
    size_t w_stride;      // bytes
};

static size_t round_up(size_t n, size_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

// Rows end in zeros up to a whole vector and are spread over the sets of the caches: powers of two are not.
static size_t row_stride(size_t n_cols, size_t element)
{
    size_t stride = round_up(n_cols * element, 64);
    return stride / 64 % 2 ? stride : stride + 64;
}

// Rows of x that go through the scratch at once.
static size_t x_block(const struct device *d)
{
    return d->options.max_tokens < X_BLOCK ? (size_t)d->options.max_tokens : X_BLOCK;
}

size_t linear_scratch_bytes(const struct device *d)
{
    return x_block(d) * row_stride((size_t)d->options.max_dim, sizeof(float));
}

static bool part_is_bf16(const struct pass *pass, int32_t part)
{
    return pass->simd->bf16_products && pass->p->weight->part[part].dtype == DTYPE_BF16;
}

// ---- items ----------------------------------------------------------------------------------------------------------

static void prepare_x_row(void *arg, int32_t row, int32_t thread)
{
    (void)thread;
    const struct pass *pass = arg;
    size_t n_cols = pass->p->weight->n_cols;
    size_t t = pass->first_x + (size_t)row;
    const float *from = (const float *)pass->p->x.data + (pass->rows ? (size_t)pass->rows[t] : t) * n_cols;
    char *to = pass->x + (size_t)row * pass->x_stride;
    size_t used = n_cols * (pass->bf16 ? sizeof(uint16_t) : sizeof(float));
    if (pass->bf16) pass->simd->round_bf16((uint16_t *)to, from, n_cols);
    else memcpy(to, from, used);
    memset(to + used, 0, pass->x_stride - used);
}

static void load_bias(const struct pass *pass, float bias[TILE_W], const struct tensor *from, size_t first, size_t n)
{
    memset(bias, 0, TILE_W * sizeof *bias);
    if (from->data)
        pass->simd->widen(bias, (const char *)from->data + first * dtype_size(from->dtype), from->dtype, n);
}

static struct block block_at(const struct pass *pass, int32_t item)
{
    const struct weight *w = pass->p->weight;
    struct block b = {.w = NULL};
    int32_t part = 0;
    for (; part < w->n_parts && item >= pass->first_item[part + 1]; part++) b.column += w->part[part].n_rows;
    if (part == w->n_parts) return b;
    b.part = &w->part[part];
    b.first = (size_t)(item - pass->first_item[part]) * pass->rows_per_item;
    b.n_rows = b.part->n_rows - b.first < pass->rows_per_item ? b.part->n_rows - b.first : pass->rows_per_item;
    b.column += b.first;
    b.w_stride = w->n_cols * dtype_size(b.part->dtype);
    b.w = (const char *)b.part->data + b.first * b.w_stride;
    return b;
}

static size_t chunk_cols(const struct pass *pass, size_t first)
{
    size_t left = pass->p->weight->n_cols - first;
    return left < pass->chunk ? left : pass->chunk;
}

static const char *block_row(const struct block *b, size_t row, size_t first_col)
{
    return b->w + row * b->w_stride + first_col * dtype_size(b->part->dtype);
}

// What call number `call` of a chunk's tiles fetches: TILE_W rows of the chunk that this thread will probably work on
// next, spread evenly over the last tiles of x.
static const void *rows_to_fetch(const struct pass *pass, const struct block *next, size_t first_col, size_t call,
                                 size_t calls_per_x_tile)
{
    size_t n_tiles = pass->n_x_tiles < FETCH_TILES ? (size_t)pass->n_x_tiles : FETCH_TILES;
    size_t skipped = ((size_t)pass->n_x_tiles - n_tiles) * calls_per_x_tile;
    if (!next->w || call < skipped || (call - skipped) % n_tiles) return NULL;
    size_t row = (call - skipped) / n_tiles * TILE_W;
    return row < next->n_rows ? block_row(next, row, first_col) : NULL;
}

// Adds the products of one chunk of columns to the block's outputs; the first chunk also gives them their bias.
static void multiply_chunk(const struct pass *pass, const struct block *b, size_t first_col, const struct block *next,
                           size_t next_col)
{
    float bias[TILE_W] = {0};
    struct linear_tile t = {.x_stride = pass->x_stride, .w_stride = b->w_stride, .n_cols = chunk_cols(pass, first_col),
                            .bias = bias, .out_stride = pass->p->out.shape[1],
                            .accumulate = pass->p->accumulate || first_col > 0};
    size_t call = 0, calls_per_x_tile = (b->n_rows + TILE_W - 1) / TILE_W;
    size_t x_offset = first_col * (pass->bf16 ? sizeof(uint16_t) : sizeof(float));
    for (int32_t i = 0; i < pass->n_x; i += t.n_x) {
        t.n_x = pass->n_x - i < pass->simd->tile_x ? pass->n_x - i : pass->simd->tile_x;
        t.x = pass->x + (size_t)i * pass->x_stride + x_offset;
        float *out = (float *)pass->p->out.data + (pass->first_x + (size_t)i) * t.out_stride + b->column;
        for (size_t j = 0; j < b->n_rows; j += TILE_W) {
            t.w = block_row(b, j, first_col);
            t.n_w = b->n_rows - j < TILE_W ? (int32_t)(b->n_rows - j) : TILE_W;
            t.fetch = rows_to_fetch(pass, next, next_col, call++, calls_per_x_tile);
            if (first_col == 0) load_bias(pass, bias, &b->part->bias, b->first + j, (size_t)t.n_w);
            t.out = out + j;
            pass->simd->tile[b->part->dtype](&t);
        }
    }
}

// The same for one row of x and all columns.
static void stream_block(const struct pass *pass, const struct block *b)
{
    float bias[TILE_W];
    struct linear_tile t = {.x = pass->x, .w_stride = b->w_stride, .n_cols = pass->p->weight->n_cols,
                            .chunk = pass->chunk, .n_x = 1, .bias = bias, .accumulate = pass->p->accumulate};
    float *out = (float *)pass->p->out.data + pass->first_x * pass->p->out.shape[1] + b->column;
    for (size_t j = 0; j < b->n_rows; j += TILE_W) {
        t.w = block_row(b, j, 0);
        t.n_w = b->n_rows - j < TILE_W ? (int32_t)(b->n_rows - j) : TILE_W;
        load_bias(pass, bias, &b->part->bias, b->first + j, (size_t)t.n_w);
        t.out = out + j;
        pass->simd->stream[b->part->dtype](&t);
    }
}

static void multiply_block(void *arg, int32_t item, int32_t thread)
{
    (void)thread;
    const struct pass *pass = arg;
    const struct block b = block_at(pass, item), next = block_at(pass, item + pass->n_threads);
    if (pass->n_x == 1) {
        stream_block(pass, &b);
        return;
    }
    size_t n_cols = pass->p->weight->n_cols;
    for (size_t first = 0; first < n_cols; first += pass->chunk) {
        bool last = first + pass->chunk >= n_cols;
        multiply_chunk(pass, &b, first, last ? &next : &b, last ? 0 : first + pass->chunk);
    }
}

// ---- the op ---------------------------------------------------------------------------------------------------------

// Divides each part into items small enough for the cache and, for the balance, at least four to a thread.
static void divide(struct pass *pass)
{
    const struct weight *w = pass->p->weight;
    size_t bytes = pass->n_x_tiles > 1 ? BLOCK_BYTES : RUN_BYTES, element = pass->bf16 ? sizeof(uint16_t) : sizeof(float);
    size_t n_chunks = (w->n_cols * element + CHUNK_BYTES - 1) / CHUNK_BYTES;
    pass->chunk = round_up((w->n_cols + n_chunks - 1) / n_chunks, CHUNK_MULTIPLE);
    size_t rows = bytes / (pass->chunk * element) / TILE_W * TILE_W;
    size_t share = round_up(pass->p->out.shape[1] / (4 * (size_t)pass->n_threads) + 1, TILE_W);
    if (rows > share) rows = share;
    pass->rows_per_item = rows < TILE_W ? TILE_W : rows;
    for (int32_t i = 0; i < w->n_parts; i++) {
        size_t n = part_is_bf16(pass, i) == pass->bf16 ? w->part[i].n_rows : 0;
        pass->first_item[i + 1] = pass->first_item[i] + (int32_t)((n + pass->rows_per_item - 1) / pass->rows_per_item);
    }
}

static void run_pass(struct device *d, struct pass *pass)
{
    const struct weight *w = pass->p->weight;
    pass->x_stride = row_stride(w->n_cols, pass->bf16 ? sizeof(uint16_t) : sizeof(float));
    pass->n_x_tiles = (pass->n_x + pass->simd->tile_x - 1) / pass->simd->tile_x;
    pass->n_threads = thread_pool_size(d->pool);
    divide(pass);
    if (pass->first_item[w->n_parts] == 0) return;
    thread_pool_run(d->pool, pass->n_x, prepare_x_row, pass);
    thread_pool_run(d->pool, pass->first_item[w->n_parts], multiply_block, pass);
}

static int check(const struct device *d, const struct linear_params *p, struct error *e)
{
    const struct weight *w = p->weight;
    if (w->n_parts < 1 || w->n_parts > MAX_WEIGHT_PARTS || w->n_cols < 1)
        return error_set(e, ERR_INVALID, "linear: %d parts of %zu columns", w->n_parts, w->n_cols);
    size_t n_rows = 0;
    for (int32_t i = 0; i < w->n_parts; i++) {
        if (w->part[i].dtype == DTYPE_I32 || w->part[i].scales)
            return error_set(e, ERR_INVALID, "linear: part %d has %s weights%s", i, dtype_name(w->part[i].dtype),
                             w->part[i].scales ? " with scales" : "");
        n_rows += w->part[i].n_rows;
    }
    if (p->x.dtype != DTYPE_F32 || p->out.dtype != DTYPE_F32 || p->x.n_dims != 2 || p->out.n_dims != 2 ||
        p->x.shape[1] != w->n_cols || p->out.shape[1] != n_rows || p->x.shape[0] != p->out.shape[0])
        return error_set(e, ERR_INVALID, "linear: x [%zu, %zu], weight [%zu, %zu], out [%zu, %zu]", p->x.shape[0],
                         p->x.shape[1], n_rows, w->n_cols, p->out.shape[0], p->out.shape[1]);
    if (w->n_cols > (size_t)d->options.max_dim)
        return error_set(e, ERR_INVALID, "linear: x [%zu, %zu] is larger than the device was created for",
                         p->x.shape[0], p->x.shape[1]);
    return 0;
}

// Rows of p->out; those of p->x likewise, or as `rows` has them.
static void multiply(struct device *d, const struct linear_params *p, const int32_t *rows)
{
    for (int bf16 = 0; bf16 <= d->linear->bf16_products; bf16++) {
        for (size_t first = 0, block = x_block(d); first < p->out.shape[0]; first += block) {
            size_t left = p->out.shape[0] - first;
            struct pass pass = {.p = p, .rows = rows, .simd = d->linear, .first_x = first, .bf16 = bf16,
                                .x = d->linear_scratch, .n_x = (int32_t)(left < block ? left : block)};
            run_pass(d, &pass);
        }
    }
}

int cpu_linear(struct device *d, const struct linear_params *p, struct error *e)
{
    int rc = check(d, p, e);
    if (!rc && p->x.shape[0] > (size_t)d->options.max_tokens)
        rc = error_set(e, ERR_INVALID, "linear: %zu rows of %d", p->x.shape[0], d->options.max_tokens);
    if (!rc) multiply(d, p, NULL);
    return rc;
}

int cpu_linear_experts(struct device *d, const struct linear_experts_params *p, struct error *e)
{
    const struct expert_plan *plan = &p->plan;
    size_t n_pairs = p->out.shape[0], n_x = p->x.shape[0];
    struct linear_params product = {.out = p->out, .x = p->x};
    if (n_x * (p->by_token ? (size_t)plan->n_chosen : 1) != n_pairs)
        return error_set(e, ERR_INVALID, "linear_experts: %zu rows for %zu pairs", n_x, n_pairs);
    product.x.shape[0] = n_pairs;
    for (int32_t i = 0; i < plan->n_experts; i++) {
        product.weight = &p->weights[i];
        if (check(d, &product, e)) return ERR_INVALID;
    }
    for (int32_t i = 0; i < plan->n_experts; i++) {
        size_t first = (size_t)plan->offsets[i], n = (size_t)plan->offsets[i + 1] - first;
        product.weight = &p->weights[i];
        product.out.data = (float *)p->out.data + first * p->out.shape[1];
        product.x.data = p->by_token ? p->x.data : (float *)p->x.data + first * p->x.shape[1];
        product.out.shape[0] = product.x.shape[0] = n;
        multiply(d, &product, p->by_token ? plan->tokens + first : NULL);
    }
    return 0;
}
