/* vec.h: a vector of floats as wide as the instruction set that it is compiled for, and its elementary functions.
 *
 * Included by simd/ *.c only. Arithmetic is the compiler's own on vector types; what needs an instruction by name (FMA,
 * conversions) is here once per set. Every lane goes through the same code, so a result never depends on its lane.
 */
#ifndef GPTD_KERNELS_CPU_SIMD_VEC_H
#define GPTD_KERNELS_CPU_SIMD_VEC_H

#include <math.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "kernels/cpu/convert.h"

#if defined(__AVX512F__)
enum { VEC_LANES = 16 };
#elif defined(__AVX2__)
enum { VEC_LANES = 8 };
#else
enum { VEC_LANES = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * VEC_LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * VEC_LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * VEC_LANES)));
typedef float vec_memory __attribute__((vector_size(4 * VEC_LANES), aligned(1), may_alias)); // at any address

static inline vec vec_set(float x)
{
    return x - (vec){0};
}

static inline vec vec_load(const float *p)
{
    return *(const vec_memory *)p;
}

static inline void vec_store(float *p, vec x)
{
    *(vec_memory *)p = x;
}

// The first n < VEC_LANES elements; the others are 0, and are not touched in memory.
static inline vec vec_load_n(const float *p, size_t n)
{
    vec x = {0};
    memcpy(&x, p, 4 * n);
    return x;
}

static inline void vec_store_n(float *p, vec x, size_t n)
{
    memcpy(p, &x, 4 * n);
}

static inline vec vec_load_bf16(const void *p)
{
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16);
#else
    uint16_t h[4];
    memcpy(h, p, sizeof(h));
    return (vec){bf16_to_f32(h[0]), bf16_to_f32(h[1]), bf16_to_f32(h[2]), bf16_to_f32(h[3])};
#endif
}

static inline vec vec_load_f16(const void *p)
{
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128(p));
#else
    uint16_t h[4];
    memcpy(h, p, sizeof(h));
    return (vec){f16_to_f32(h[0]), f16_to_f32(h[1]), f16_to_f32(h[2]), f16_to_f32(h[3])};
#endif
}

// VEC_LANES elements from element i of an array of `dtype`.
static inline __attribute__((always_inline)) vec vec_load_any(const void *array, enum dtype dtype, size_t i)
{
    const char *p = array;
    if (dtype == DTYPE_BF16) return vec_load_bf16(p + 2 * i);
    if (dtype == DTYPE_F16) return vec_load_f16(p + 2 * i);
    return *(const vec_memory *)(p + 4 * i);
}

static inline vec vec_load_any_n(const void *array, enum dtype dtype, size_t i, size_t n)
{
    float x[VEC_LANES];
    for (size_t j = 0; j < n; j++) x[j] = element_get(array, dtype, i + j);
    return vec_load_n(x, n);
}

static inline vec vec_fma(vec a, vec b, vec c) // a * b + c
{
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

static inline vec vec_select(ivec mask, vec a, vec b) // mask ? a : b
{
    return (vec)((mask & (ivec)a) | (~mask & (ivec)b));
}

static inline vec vec_max(vec a, vec b) // a > b ? a : b; so b where either is NaN
{
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return vec_select(a > b, a, b);
#endif
}

static inline float vec_sum(vec x) // by halves
{
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float t[VEC_LANES];
    vec_store(t, x);
    for (int w = VEC_LANES / 2; w > 0; w /= 2)
        for (int i = 0; i < w; i++) t[i] += t[i + w];
    return t[0];
#endif
}

static inline float vec_highest(vec x) // any number where a lane is NaN
{
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float highest = -INFINITY;
    for (int i = 0; i < VEC_LANES; i++)
        if (x[i] > highest) highest = x[i];
    return highest;
#endif
}

// The high and low halves of x * m, element by element.
static inline void vec_multiply_wide(uvec x, uint32_t m, uvec *high, uvec *low)
{
    *low = x * m;
#if defined(__AVX512F__)
    __m512i factor = _mm512_set1_epi32((int)m), even = _mm512_mul_epu32((__m512i)x, factor);
    __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), factor);
    *high = (uvec)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
#elif defined(__AVX2__)
    __m256i factor = _mm256_set1_epi32((int)m), even = _mm256_mul_epu32((__m256i)x, factor);
    __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), factor);
    *high = (uvec)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
    for (int j = 0; j < VEC_LANES; j++) (*high)[j] = (uint32_t)((uint64_t)x[j] * m >> 32);
#endif
}

// e^x to about 1 ulp; 0 below -87 (results would be subnormal), infinity above 88.37. Polynomial: Cephes expf.
static inline vec vec_exp(vec x)
{
    vec low = vec_set(-87.0f), high = vec_set(88.37f), magic = vec_set(0x1.8p23f); // adding it rounds to an integer
    vec y = vec_max(low, x);
    y = vec_select(y > high, high, y);
    vec shifted = vec_fma(y, vec_set(1.44269504088896341f), magic), n = shifted - magic;
    vec r = vec_fma(n, vec_set(-0.693359375f), y);
    r = vec_fma(n, vec_set(2.12194440e-4f), r);
    vec p = vec_set(1.9875691500e-4f);
    p = vec_fma(p, r, vec_set(1.3981999507e-3f));
    p = vec_fma(p, r, vec_set(8.3334519073e-3f));
    p = vec_fma(p, r, vec_set(4.1665795894e-2f));
    p = vec_fma(p, r, vec_set(1.6666665459e-1f));
    p = vec_fma(p, r, vec_set(5.0000001201e-1f));
    p = vec_fma(p, r * r, r) + 1.0f;
    p = p * (vec)(((uvec)shifted + 127) << 23); // 2^n: n stands in the last bits of `shifted`
    p = vec_select(x < low, vec_set(0), p);
    return vec_select(x > high, vec_set(INFINITY), p);
}

// Natural logarithm of a positive normal number to about 1 ulp. Polynomial: Cephes logf.
static inline vec vec_log(vec x)
{
    // Mantissa in [sqrt(1/2), sqrt(2)): the offset moves the exponent's step there.
    ivec bits = (ivec)x - 0x3f3504f3;
    vec n = __builtin_convertvector(bits >> 23, vec);
    vec f = (vec)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f, z = f * f;
    vec p = vec_set(7.0376836292e-2f);
    p = vec_fma(p, f, vec_set(-1.1514610310e-1f));
    p = vec_fma(p, f, vec_set(1.1676998740e-1f));
    p = vec_fma(p, f, vec_set(-1.2420140846e-1f));
    p = vec_fma(p, f, vec_set(1.4249322787e-1f));
    p = vec_fma(p, f, vec_set(-1.6668057665e-1f));
    p = vec_fma(p, f, vec_set(2.0000714765e-1f));
    p = vec_fma(p, f, vec_set(-2.4999993993e-1f));
    p = vec_fma(p, f, vec_set(3.3333331174e-1f));
    vec y = p * f * z;
    y = vec_fma(n, vec_set(-2.12194440e-4f), y);
    y = vec_fma(z, vec_set(-0.5f), y);
    return vec_fma(n, vec_set(0.693359375f), f + y);
}

// Hyperbolic tangent to about 2 ulp: a polynomial near 0 (Cephes tanhf), 1 - 2 / (e^2|x| + 1) beyond.
static inline vec vec_tanh(vec x)
{
    ivec sign = (ivec)x & (int32_t)0x80000000;
    vec a = (vec)((ivec)x ^ sign), z = x * x;
    vec p = vec_set(-5.70498872745e-3f);
    p = vec_fma(p, z, vec_set(2.06390887954e-2f));
    p = vec_fma(p, z, vec_set(-5.37397155531e-2f));
    p = vec_fma(p, z, vec_set(1.33314422036e-1f));
    p = vec_fma(p, z, vec_set(-3.33332819422e-1f));
    vec near = vec_fma(p * z, x, x);
    vec far = 1.0f - 2.0f / (vec_exp(a + a) + 1.0f);
    return vec_select(a < 0.625f, near, (vec)((ivec)far | sign));
}

#endif
