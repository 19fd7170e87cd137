/* simd/linear.c: one register tile of a matrix product: TILE_X rows of x times TILE_W rows of w.
 *
 * One step along K loads TILE_X + TILE_W vectors for TILE_X * TILE_W products (AVX-512: 10 for 24, so that Zen 4's one
 * load a cycle suffices), every sum in its own register. Alone, out of L2, at K = 2048: 97 % of the FMA peak with F32 or
 * F16 weights, 95 % of the vdpbf16ps peak with BF16. The rest is what happens once per K: adding up the lanes of
 * n_x * TILE_W sums. It had cost 7 to 13 % by 512-bit shuffles and with memcpy of a variable size in the store.
 */
#include "kernels/cpu/simd/linear.h"

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/simd/dot.h"

#if defined(__AVX512F__)
enum { TILE_X = 6 }; // 24 sums, 6 rows of x and one of w: 31 of 32 registers
#elif defined(__AVX2__)
enum { TILE_X = 3 }; // 12 sums, 3 rows of x and one of w: all 16 registers
#else
enum { TILE_X = 2 };
#endif

#ifdef __AVX512BF16__
enum { BF16_PRODUCTS = 1 };
INLINE vec fma_bf16(vec a, vec b, vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
#else
enum { BF16_PRODUCTS = 0 };
INLINE vec fma_bf16(vec a, vec b, vec c) { return vec_fma(a, b, c); }
#endif

// Columns of w in one vector, and bytes of memory they take.
INLINE size_t step_cols(enum dtype dtype) { return BF16_PRODUCTS && dtype == DTYPE_BF16 ? 2 * LANES : LANES; }
INLINE size_t step_bytes(enum dtype dtype) { return step_cols(dtype) * (dtype == DTYPE_F32 ? 4 : 2); }

INLINE vec load_wide(enum dtype dtype, const char *p)
{
    if (dtype == DTYPE_F16) return vec_load_f16(p);
    if (dtype == DTYPE_BF16) return vec_load_bf16(p);
    return vec_load(p);
}

// One vector of w as it enters the products.
INLINE vec load_w(enum dtype dtype, const char *p)
{
    return BF16_PRODUCTS && dtype == DTYPE_BF16 ? vec_load(p) : load_wide(dtype, p);
}

INLINE vec fma_w(enum dtype dtype, vec w, vec x, vec sum)
{
    return dtype == DTYPE_BF16 ? fma_bf16(w, x, sum) : vec_fma(w, x, sum);
}

INLINE void add_step(enum dtype dtype, int n_x, vec sum[TILE_X][TILE_W], const char *const x[TILE_X],
                     const char *const w[TILE_W], size_t x_offset, size_t w_offset)
{
    vec row[TILE_X];
#pragma GCC unroll 8
    for (int i = 0; i < n_x; i++) row[i] = vec_load(x[i] + x_offset);
#pragma GCC unroll 8
    for (int j = 0; j < TILE_W; j++) {
        vec column = load_w(dtype, w[j] + w_offset);
#pragma GCC unroll 8
        for (int i = 0; i < n_x; i++)
            sum[i][j] = fma_w(dtype, column, row[i], sum[i][j]);
    }
}

// What is left of a row of w past the last whole vector, with zeros after it.
INLINE const char *row_end(enum dtype dtype, char end[sizeof(vec)], const char *w, size_t n_cols)
{
    memset(end, 0, sizeof(vec));
    return memcpy(end, w, n_cols * (dtype == DTYPE_F32 ? 4 : 2));
}

INLINE void store_row(const struct linear_tile *t, int i, vec4 sums)
{
    float *out = t->out + (size_t)i * t->out_stride;
    vec4 bias, old;
    memcpy(&bias, t->bias, sizeof bias);
    sums += bias;
    if (t->n_w < TILE_W) {
        for (int j = 0; j < t->n_w; j++) out[j] = t->accumulate ? out[j] + sums[j] : sums[j];
        return;
    }
    if (t->accumulate) {
        memcpy(&old, out, sizeof old);
        sums = old + sums;
    }
    memcpy(out, &sums, sizeof sums);
}

INLINE void tile(const struct linear_tile *t, enum dtype dtype, int n_x)
{
    const char *x[TILE_X], *w[TILE_W];
    vec sum[TILE_X][TILE_W];
#pragma GCC unroll 8
    for (int i = 0; i < n_x; i++) x[i] = (const char *)t->x + (size_t)i * t->x_stride;
#pragma GCC unroll 8
    for (int j = 0; j < TILE_W; j++) // rows that are not there repeat the last one
        w[j] = (const char *)t->w + (size_t)(j < t->n_w ? j : t->n_w - 1) * t->w_stride;
#pragma GCC unroll 8
    for (int i = 0; i < n_x; i++)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_W; j++) sum[i][j] = vec_zero();

    size_t n_steps = t->n_cols / step_cols(dtype), s = 0, x_offset = 0, w_offset = 0;
    for (size_t j = 0; j < TILE_W; j++) {
        const char *fetch = t->fetch ? (const char *)t->fetch + j * t->w_stride : NULL;
        for (; s < n_steps * (j + 1) / TILE_W; s++) {
            if (fetch) { // in the order of its addresses: that is how DRAM and the hardware's own prefetch like it
#pragma GCC unroll 8
                for (size_t line = 0; line < TILE_W * step_bytes(dtype); line += 64)
                    __builtin_prefetch(fetch + line, 0, 2);
                fetch += TILE_W * step_bytes(dtype);
            }
            add_step(dtype, n_x, sum, x, w, x_offset, w_offset);
            x_offset += sizeof(vec);
            w_offset += step_bytes(dtype);
        }
    }
    vec4 rows[TILE_X];
    size_t tail = t->n_cols % step_cols(dtype);
    if (tail) {
        char end[TILE_W][sizeof(vec)];
        for (int j = 0; j < TILE_W; j++) w[j] = row_end(dtype, end[j], w[j] + w_offset, tail);
        add_step(dtype, n_x, sum, x, w, x_offset, 0);
    }
#pragma GCC unroll 8
    for (int i = 0; i < n_x; i++) rows[i] = vec_sum4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
#pragma GCC unroll 8
    for (int i = 0; i < n_x; i++) store_row(t, i, rows[i]);
}

INLINE float dot(enum dtype dtype, const char *x, const char *w, size_t n_cols)
{
    vec sum = vec_zero();
    size_t tail = n_cols % step_cols(dtype);
    for (size_t s = n_cols / step_cols(dtype); s > 0; s--) {
        sum = fma_w(dtype, load_w(dtype, w), vec_load(x), sum);
        x += sizeof(vec);
        w += step_bytes(dtype);
    }
    char end[sizeof(vec)];
    if (tail) sum = fma_w(dtype, load_w(dtype, row_end(dtype, end, w, tail)), vec_load(x), sum);
    return vec_sum4(sum, vec_zero(), vec_zero(), vec_zero())[0];
}

INLINE size_t chunk_cols(const struct linear_tile *t, size_t first)
{
    return t->n_cols - first < t->chunk ? t->n_cols - first : t->chunk;
}

// One stream of addresses a thread: with four rows at once the hardware's prefetch gives half of the bandwidth.
INLINE void stream(const struct linear_tile *t, enum dtype dtype)
{
    size_t w_size = dtype == DTYPE_F32 ? 4 : 2, x_size = sizeof(vec) / step_cols(dtype);
    for (int j = 0; j < t->n_w; j++) {
        const char *x = t->x, *w = (const char *)t->w + (size_t)j * t->w_stride;
        float sum = dot(dtype, x, w, chunk_cols(t, 0)) + t->bias[j];
        if (t->accumulate) sum = t->out[j] + sum;
        for (size_t c = t->chunk; c < t->n_cols; c += t->chunk)
            sum += 0.0f + dot(dtype, x + c * x_size, w + c * w_size, chunk_cols(t, c)); // 0: tile's bias there
        t->out[j] = sum;
    }
}

INLINE void tile_any(const struct linear_tile *t, enum dtype dtype)
{
    switch (t->n_x) {
    case 1: tile(t, dtype, 1); break;
    case 2: tile(t, dtype, 2); break;
#if defined(__AVX2__)
    case 3: tile(t, dtype, 3); break;
#endif
#if defined(__AVX512F__)
    case 4: tile(t, dtype, 4); break;
    case 5: tile(t, dtype, 5); break;
    case 6: tile(t, dtype, 6); break;
#endif
    }
}

static void tile_f32(const struct linear_tile *t) { tile_any(t, DTYPE_F32); }
static void tile_f16(const struct linear_tile *t) { tile_any(t, DTYPE_F16); }
static void tile_bf16(const struct linear_tile *t) { tile_any(t, DTYPE_BF16); }
static void stream_f32(const struct linear_tile *t) { stream(t, DTYPE_F32); }
static void stream_f16(const struct linear_tile *t) { stream(t, DTYPE_F16); }
static void stream_bf16(const struct linear_tile *t) { stream(t, DTYPE_BF16); }

static void round_bf16(uint16_t *to, const float *from, size_t n)
{
    for (size_t i = 0; i < n; i++) to[i] = f32_to_bf16(from[i]);
}

static void widen(float *to, const void *from, enum dtype dtype, size_t n)
{
    const char *p = from;
    size_t size = dtype == DTYPE_F32 ? 4 : 2, i = 0;
    for (; i + LANES <= n; i += LANES) vec_store(to + i, load_wide(dtype, p + i * size));
    if (i == n) return;
    char last[sizeof(vec)] = {0};
    float wide[LANES];
    memcpy(last, p + i * size, (n - i) * size);
    vec_store(wide, load_wide(dtype, last));
    memcpy(to + i, wide, (n - i) * sizeof *wide);
}

const struct simd_linear SIMD_NAME(simd_linear) = {
    .tile_x = TILE_X,
    .bf16_products = BF16_PRODUCTS,
    .tile = {[DTYPE_F32] = tile_f32, [DTYPE_F16] = tile_f16, [DTYPE_BF16] = tile_bf16},
    .stream = {[DTYPE_F32] = stream_f32, [DTYPE_F16] = stream_f16, [DTYPE_BF16] = stream_bf16},
    .round_bf16 = round_bf16,
    .widen = widen,
};
