/* vector.h: the inner loops of everything that goes element by element: conversions, norms, activations, sampling.
 *
 * One table per instruction set. Rows are whole: reductions add in an order that depends on n alone.
 */
#ifndef GPTD_KERNELS_CPU_SIMD_VECTOR_H
#define GPTD_KERNELS_CPU_SIMD_VECTOR_H

#include "kernels/kernels.h"

// out = (x - shift) * scale * (weight + offset) + bias, or out += it
struct normalization {
    float shift, scale, offset;
    const struct tensor *weight, *bias; // [n] of their types; bias NULL: none
    bool accumulate;
};

struct simd_vector {
    void (*load)(float *out, const void *x, enum dtype dtype, size_t n);  // any weight or cache type to F32
    void (*store)(void *out, enum dtype dtype, const float *x, size_t n); // and back, to nearest even, NaN kept
    void (*add)(float *x, const void *y, enum dtype dtype, size_t n);     // x += y
    void (*scale)(float *x, float factor, size_t n);                      // x *= factor
    float (*sum)(const float *x, size_t n);
    float (*sum_squares)(const float *x, float shift, size_t n); // of x - shift
    void (*normalize)(float *out, const float *x, const struct normalization *how, size_t n);
    void (*activate)(float *out, const float *gate, const float *up, enum activation kind, size_t n); // up NULL: none
    void (*softcap)(float *x, float cap, size_t n);                // x = cap * tanh(x / cap)
    void (*rotate)(float *low, float *high, const float *cos, const float *sin, size_t n); // pairs (low[i], high[i])

    // Sampling. `highest` is -infinity when no element is finite or above; NaN and +infinity set *broken.
    float (*highest)(const float *x, size_t n, bool *broken);
    size_t (*find)(const float *x, float value, size_t n);         // first i with x[i] == value; n when there is none
    size_t (*find_above)(const float *x, float bound, size_t from, size_t n); // first i >= from with x[i] > bound; or n
    size_t (*rank)(const float *x, size_t id, size_t n); // of x[id], 1 = highest; ties by lower id
    double (*sum_exp)(const float *x, float shift, size_t n);      // of e^(x - shift)
    void (*exps)(float *out, const float *x, size_t n);            // e^x
    void (*temper)(float *out, const float *x, float shift, float divisor, size_t n); // out = (x - shift) / divisor
    // argmax of x[id] + g(id), the Gumbel noise of struct sample_row; -infinity never wins; ties to the lower id
    int32_t (*gumbel_argmax)(const float *x, size_t n, uint64_t seed, int32_t position, int32_t choice);
};

extern const struct simd_vector simd_vector_generic;
#ifdef __x86_64__
extern const struct simd_vector simd_vector_avx2, simd_vector_avx512, simd_vector_avx512bf16;
#endif

#endif
