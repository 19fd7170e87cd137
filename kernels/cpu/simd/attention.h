/* attention.h: the inner loops of flash attention: a small matrix product and one row of the online softmax.
 *
 * Both products of attention are the same one, because the cache keeps each K tile transposed (kernels/cpu/rope.c):
 * scores = Q [rows, head_dim] x K tile [head_dim, keys], out += P [rows, keys] x V tile [keys, head_dim].
 */
#ifndef GPTD_KERNELS_CPU_SIMD_ATTENTION_H
#define GPTD_KERNELS_CPU_SIMD_ATTENTION_H

#include "kernels/kernels.h"

enum { ATTENTION_TILE_COLS = 16 }; // columns of a product come in multiples of this

// c[r][j] = (accumulate ? c[r][j] : 0) + sum over k = 0 .. n_inner-1, in this order, of a[r][k] * b[k][j]
struct attention_product {
    float *c;             // [n_rows, n_cols], rows ldc apart
    const float *a;       // [n_rows, n_inner], rows lda apart
    const void *b;        // [n_inner, n_cols] of b_dtype, rows ldb apart
    size_t ldc, lda, ldb; // elements
    enum dtype b_dtype;
    int32_t n_rows, n_inner, n_cols; // n_cols divides by ATTENTION_TILE_COLS
    bool accumulate;
    const void *next; // what a later product reads in b's place: fetched into the caches meanwhile; NULL: nothing
};

// A row's running softmax: out so far is acc / sum, with all exponentials relative to max.
struct softmax_state {
    float max, sum;
};

// What turns q.k (scaled already) into a score.
struct score_params {
    float softcap; // 0: none
    float slope;   // ALiBi; 0: none
    int32_t distance; // position of key 0 of the tile - position of the query
};

struct simd_attention {
    void (*product)(const struct attention_product *p);
    // scores [n_cols] of one row to probabilities relative to the new max; keys outside first .. end-1 become 0,
    // whatever stood there. Returns what the row's acc has to be multiplied with.
    float (*softmax)(float *scores, int32_t n_cols, int32_t first, int32_t end, struct score_params params,
                     struct softmax_state *state);
    // x [n_rows, n_cols] of dtype, contiguous, to F32 rows of ld elements, ld - n_cols zeros at the end of each
    void (*unpack)(float *out, size_t ld, const void *x, enum dtype dtype, size_t n_rows, size_t n_cols);
};

extern const struct simd_attention simd_attention_generic;
#ifdef __x86_64__
extern const struct simd_attention simd_attention_avx2, simd_attention_avx512, simd_attention_avx512bf16;
#endif

#endif
