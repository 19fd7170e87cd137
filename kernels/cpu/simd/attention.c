#include "kernels/cpu/simd/attention.h"

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/simd/vec.h"

#define INLINE static inline __attribute__((always_inline))

// ---- product --------------------------------------------------------------------------------------------------------

// Accumulators of one register tile: TILE_ROWS x TILE_VECS vectors fit the registers and hide the FMA's latency.
#if defined(__AVX512F__)
enum { TILE_ROWS = 8, TILE_VECS = 2 };
#elif defined(__AVX2__)
enum { TILE_ROWS = 6, TILE_VECS = 2 };
#else
enum { TILE_ROWS = 2, TILE_VECS = 4 };
#endif

// One register tile: rows first .. first+rows-1, vecs vectors of columns from col. rows, vecs, dtype, fetch: constants.
INLINE void product_tile(const struct attention_product *p, size_t first, size_t col, int rows, int vecs,
                         enum dtype dtype, bool fetch)
{
    vec sum[TILE_ROWS][4];
    float *c = p->c + first * p->ldc + col;
    const float *a = p->a + first * p->lda;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++)
            sum[r][v] = p->accumulate ? vec_load(c + (size_t)r * p->ldc + v * VEC_LANES) : (vec){0};
    size_t n_inner = (size_t)p->n_inner, lda = p->lda, ldb = p->ldb, size = dtype == DTYPE_F32 ? 4 : 2;
    for (size_t k = 0; k < n_inner; k++) {
        vec b[4];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) b[v] = vec_load_any(p->b, dtype, k * ldb + col + (size_t)(v * VEC_LANES));
        // Into L2: that doubled decodes on Zen 4, where L1's 24 outstanding misses would be the bound.
        for (size_t byte = 0; fetch && byte < (size_t)(vecs * VEC_LANES) * size; byte += 64)
            __builtin_prefetch((const char *)p->next + (k * ldb + col) * size + byte, 0, 2);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) sum[r][v] = vec_fma(vec_set(a[(size_t)r * lda + k]), b[v], sum[r][v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) vec_store(c + (size_t)r * p->ldc + v * VEC_LANES, sum[r][v]);
}

INLINE void product_cols(const struct attention_product *p, size_t first, int rows, int vecs, enum dtype dtype,
                         bool fetch)
{
    size_t n_cols = (size_t)p->n_cols, col = 0;
    for (; col + (size_t)(vecs * VEC_LANES) <= n_cols; col += (size_t)(vecs * VEC_LANES))
        product_tile(p, first, col, rows, vecs, dtype, fetch);
    for (; col < n_cols; col += VEC_LANES) product_tile(p, first, col, rows, 1, dtype, fetch);
}

INLINE void product_rows(const struct attention_product *p, size_t first, int rows, int vecs, enum dtype dtype)
{
    if (first == 0 && p->next)
        product_cols(p, first, rows, vecs, dtype, true);
    else
        product_cols(p, first, rows, vecs, dtype, false);
}

INLINE void product_dtype(const struct attention_product *p, enum dtype dtype)
{
    size_t row = 0, n_rows = (size_t)p->n_rows;
    for (; row + TILE_ROWS <= n_rows; row += TILE_ROWS) product_rows(p, row, TILE_ROWS, TILE_VECS, dtype);
    for (; TILE_ROWS > 4 && row + 4 <= n_rows; row += 4) product_rows(p, row, 4, TILE_VECS, dtype);
    for (; row + 2 <= n_rows; row += 2) product_rows(p, row, 2, 4, dtype);
    if (row < n_rows) product_rows(p, row, 1, 4, dtype);
}

static void product(const struct attention_product *p)
{
    switch (p->b_dtype) {
    case DTYPE_BF16: product_dtype(p, DTYPE_BF16); break;
    case DTYPE_F16: product_dtype(p, DTYPE_F16); break;
    default: product_dtype(p, DTYPE_F32); break;
    }
}

// ---- softmax --------------------------------------------------------------------------------------------------------

static inline ivec lane_numbers(void)
{
    ivec lanes;
    for (int i = 0; i < VEC_LANES; i++) lanes[i] = i;
    return lanes;
}

static float softmax(float *scores, int32_t n_cols, int32_t first, int32_t end, struct score_params params,
                     struct softmax_state *state)
{
    ivec lanes = lane_numbers();
    vec top = vec_set(-INFINITY);
    for (int32_t j = 0; j < n_cols; j += VEC_LANES) {
        vec x = vec_load(scores + j);
        ivec key = lanes + j;
        if (params.softcap > 0) x = params.softcap * vec_tanh(x / params.softcap);
        if (params.slope != 0) x += params.slope * __builtin_convertvector(key + params.distance, vec);
        if (j < first || j + VEC_LANES > end) x = vec_select((key >= first) & (key < end), x, vec_set(-INFINITY));
        vec_store(scores + j, x);
        top = vec_max(x, top);
    }
    float highest = vec_highest(top), max = highest > state->max ? highest : state->max;
    vec sum = {0};
    for (int32_t j = 0; j < n_cols; j += VEC_LANES) {
        vec e = vec_exp(vec_load(scores + j) - max);
        vec_store(scores + j, e);
        sum += e;
    }
    float factor = max == state->max ? 1 : vec_exp(vec_set(state->max - max))[0];
    state->sum = state->sum * factor + vec_sum(sum);
    state->max = max;
    return factor;
}

static void unpack(float *out, size_t ld, const void *x, enum dtype dtype, size_t n_rows, size_t n_cols)
{
    for (size_t r = 0; r < n_rows; r++) {
        size_t c = 0;
        for (; c + VEC_LANES <= n_cols; c += VEC_LANES)
            vec_store(out + r * ld + c, vec_load_any(x, dtype, r * n_cols + c));
        for (; c < n_cols; c++) out[r * ld + c] = element_get(x, dtype, r * n_cols + c);
        for (; c < ld; c++) out[r * ld + c] = 0;
    }
}

const struct simd_attention SIMD_NAME(simd_attention) = {product, softmax, unpack};
