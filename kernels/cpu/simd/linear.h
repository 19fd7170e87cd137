/* simd/linear.h: the inner loops of matrix products, one table per instruction set.
 *
 * Called by kernels/cpu/linear.c. A product is made of dot products along K (columns), the dimension in which both x
 * and w are contiguous: K is cut into chunks whose length depends on K and the type alone; each output element has one
 * vector of partial sums a chunk, lane l summing the columns l, l + lanes, l + 2 lanes ... in ascending order, one fixed
 * tree that adds the lanes up, and the chunks' sums are added in ascending order. That order is the same whatever the
 * number of rows and which row of a tile it is.
 */
#ifndef GPTD_KERNELS_CPU_SIMD_LINEAR_H
#define GPTD_KERNELS_CPU_SIMD_LINEAR_H

#include "kernels/kernels.h"

enum { TILE_W = 4, MAX_TILE_X = 8 };

// out[n_x, TILE_W] = x[n_x, n_cols] w[TILE_W, n_cols]^T + bias, added to out if accumulate. w has n_w <= TILE_W rows:
// only that many columns of out are written. `tile` takes the columns of one chunk, `stream` those of all.
struct linear_tile {
    const void *x;      // [n_x, n_cols], rows x_stride bytes apart, F32 or BF16, zeros up to a whole vector
    size_t x_stride;
    const void *w;      // [n_w, n_cols], rows w_stride bytes apart, at any address
    size_t w_stride;
    const void *fetch;  // TILE_W rows of n_cols, w_stride bytes apart, to fetch into L2 meanwhile; NULL: none
    size_t n_cols;
    size_t chunk;       // columns of a chunk; stream only
    int32_t n_x, n_w;
    const float *bias;  // [TILE_W]
    float *out;         // [n_x, n_w], rows out_stride floats apart
    size_t out_stride;
    bool accumulate;
};

struct simd_linear {
    int32_t tile_x;     // most rows of x in one tile, <= MAX_TILE_X
    bool bf16_products; // BF16 weights are multiplied with activations rounded to BF16; else both are widened to F32

    // One tile, by dtype of the weights in memory. n_x is 1 .. tile_x.
    void (*tile[3])(const struct linear_tile *t);
    // The same for one row of x, with the rows of w read one after the other: as fast as the memory is.
    void (*stream[3])(const struct linear_tile *t);
    // to[n] = from[n] rounded to BF16 (nearest even).
    void (*round_bf16)(uint16_t *to, const float *from, size_t n);
    // to[n] = from[n] of dtype, exactly.
    void (*widen)(float *to, const void *from, enum dtype dtype, size_t n);
};

extern const struct simd_linear simd_linear_generic, simd_linear_avx2, simd_linear_avx512, simd_linear_avx512bf16;

#endif
