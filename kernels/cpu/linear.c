#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/simd/linear.h"

enum {
    X_BLOCK = 512,            // most rows of x in one pass over the weights
    PANEL_BYTES = 256 * 1024, // of packed weights per thread: they stay in L2 while the rows of x go by
    ITEM_BYTES = 256 * 1024,  // of weights read in place per item: long runs, few claims
};

// One pass: at most X_BLOCK rows of x times all parts whose weights want x in one type.
struct pass {
    const struct linear_params *p;
    const struct simd_linear *simd;
    size_t first_x;        // row of p->x
    int32_t n_x;
    bool bf16;             // x is rounded to BF16, and the parts are those with BF16 weights
    char *x;               // [n_x, n_cols], rows x_stride bytes apart
    size_t x_stride;
    char *panels;          // [n_threads, panel_bytes]
    size_t panel_bytes;
    int32_t rows_per_item; // of weights
    int32_t first_item[MAX_WEIGHT_PARTS + 1]; // of each part
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

static size_t panel_bytes(size_t n_cols)
{
    size_t least = TILE_W * row_stride(n_cols, sizeof(float));
    return least > PANEL_BYTES ? least : PANEL_BYTES;
}

size_t linear_scratch_bytes(const struct device *d)
{
    size_t dim = (size_t)d->options.max_dim;
    size_t rows = d->options.max_tokens < X_BLOCK ? (size_t)d->options.max_tokens : X_BLOCK;
    return rows * row_stride(dim, sizeof(float)) + (size_t)thread_pool_size(d->pool) * panel_bytes(dim);
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
    const float *from = (const float *)pass->p->x.data + (pass->first_x + (size_t)row) * n_cols;
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

// All rows of x times rows first .. first + n of a part, which lie at w, w_stride apart, as dtype.
static void multiply(const struct pass *pass, int32_t part, size_t first, size_t n, const char *w, size_t w_stride,
                     enum dtype dtype)
{
    const struct weight *weight = pass->p->weight;
    struct linear_tile t = {.x_stride = pass->x_stride, .w_stride = w_stride, .n_cols = weight->n_cols,
                            .out_stride = 0, .accumulate = pass->p->accumulate};
    size_t column = first;
    for (int32_t i = 0; i < weight->n_parts; i++) {
        t.out_stride += weight->part[i].n_rows;
        if (i < part) column += weight->part[i].n_rows;
    }
    float bias[TILE_W];
    t.bias = bias;
    for (int32_t i = 0; i < pass->n_x; i += t.n_x) {
        t.n_x = pass->n_x - i < pass->simd->tile_x ? pass->n_x - i : pass->simd->tile_x;
        t.x = pass->x + (size_t)i * pass->x_stride;
        for (size_t j = 0; j < n; j += TILE_W) {
            t.w = w + j * w_stride;
            t.n_w = n - j < TILE_W ? (int32_t)(n - j) : TILE_W;
            load_bias(pass, bias, &weight->part[part].bias, first + j, (size_t)t.n_w);
            t.next_w = i == 0 ? (const char *)t.w + TILE_W * w_stride : NULL;
            t.out = (float *)pass->p->out.data + (pass->first_x + (size_t)i) * t.out_stride + column + j;
            pass->simd->tile[dtype](&t);
        }
    }
}

static void multiply_rows(void *arg, int32_t item, int32_t thread)
{
    (void)thread;
    const struct pass *pass = arg;
    int32_t part = 0;
    while (item >= pass->first_item[part + 1]) part++;
    const struct weight_part *w = &pass->p->weight->part[part];
    size_t first = (size_t)(item - pass->first_item[part]) * (size_t)pass->rows_per_item;
    size_t left = w->n_rows - first, stride = pass->p->weight->n_cols * dtype_size(w->dtype);
    size_t n = left < (size_t)pass->rows_per_item ? left : (size_t)pass->rows_per_item;
    multiply(pass, part, first, n, (const char *)w->data + first * stride, stride, w->dtype);
}

// ---- the op ---------------------------------------------------------------------------------------------------------

static void run_pass(struct device *d, struct pass *pass)
{
    const struct weight *w = pass->p->weight;
    pass->x_stride = row_stride(w->n_cols, pass->bf16 ? sizeof(uint16_t) : sizeof(float));
    size_t rows = ITEM_BYTES / (w->n_cols * sizeof(uint16_t)) / TILE_W * TILE_W;
    pass->rows_per_item = rows < TILE_W ? TILE_W : (int32_t)rows;
    for (int32_t i = 0; i < w->n_parts; i++) {
        size_t n = part_is_bf16(pass, i) == pass->bf16 ? w->part[i].n_rows : 0;
        size_t items = (n + (size_t)pass->rows_per_item - 1) / (size_t)pass->rows_per_item;
        pass->first_item[i + 1] = pass->first_item[i] + (int32_t)items;
    }
    int32_t n_items = pass->first_item[w->n_parts];
    if (n_items == 0) return;
    thread_pool_run(d->pool, pass->n_x, prepare_x_row, pass);
    thread_pool_run(d->pool, n_items, multiply_rows, pass);
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
    if (w->n_cols > (size_t)d->options.max_dim || p->x.shape[0] > (size_t)d->options.max_tokens)
        return error_set(e, ERR_INVALID, "linear: x [%zu, %zu] is larger than the device was created for",
                         p->x.shape[0], p->x.shape[1]);
    return 0;
}

int cpu_linear(struct device *d, const struct linear_params *p, struct error *e)
{
    int rc = check(d, p, e);
    if (rc) return rc;
    for (int bf16 = 0; bf16 <= d->linear->bf16_products; bf16++) {
        for (size_t first = 0; first < p->x.shape[0]; first += X_BLOCK) {
            size_t left = p->x.shape[0] - first;
            struct pass pass = {.p = p, .simd = d->linear, .first_x = first, .bf16 = bf16, .x = d->linear_scratch};
            pass.n_x = left < X_BLOCK ? (int32_t)left : X_BLOCK;
            run_pass(d, &pass);
        }
    }
    return 0;
}
