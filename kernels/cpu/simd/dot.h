/* simd/dot.h: one vector of F32 lanes in the instruction set simd/linear.c is compiled for, and what it does with it.
 *
 * A plain C fallback (GCC vector extensions, lowered to what the machine has) stands for every other instruction set.
 */
#ifndef GPTD_KERNELS_CPU_SIMD_DOT_H
#define GPTD_KERNELS_CPU_SIMD_DOT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/cpu/convert.h"

#define INLINE static inline __attribute__((always_inline))

typedef float vec4 __attribute__((vector_size(16)));

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)

enum { LANES = 16 };
typedef __m512 vec;

INLINE vec vec_zero(void) { return _mm512_setzero_ps(); }
INLINE vec vec_load(const void *p) { return _mm512_loadu_ps(p); }
INLINE vec vec_load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE vec vec_load_bf16(const void *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
INLINE void vec_store(float *p, vec a) { _mm512_storeu_ps(p, a); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }

// The sum of each vector's lanes: l + 8, then neighbours, pairs, and halves of what is left.
INLINE vec4 vec_sum4(vec a, vec b, vec c, vec d)
{
#define HALF_SUM(v) _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))
    __m256 a8 = HALF_SUM(a), b8 = HALF_SUM(b), c8 = HALF_SUM(c), d8 = HALF_SUM(d);
    __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a8, b8), _mm256_hadd_ps(c8, d8));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

#elif defined(__AVX2__)

enum { LANES = 8 };
typedef __m256 vec;

INLINE vec vec_zero(void) { return _mm256_setzero_ps(); }
INLINE vec vec_load(const void *p) { return _mm256_loadu_ps(p); }
INLINE vec vec_load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
INLINE vec vec_load_bf16(const void *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
INLINE void vec_store(float *p, vec a) { _mm256_storeu_ps(p, a); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }

// The sum of each vector's lanes: neighbours, pairs, then halves.
INLINE vec4 vec_sum4(vec a, vec b, vec c, vec d)
{
    __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

#else

enum { LANES = 4 };
typedef vec4 vec;

INLINE vec vec_zero(void) { return (vec){0}; }
INLINE vec vec_load(const void *p)
{
    vec a;
    memcpy(&a, p, sizeof a);
    return a;
}
INLINE vec vec_load_f16(const void *p)
{
    uint16_t h[LANES];
    memcpy(h, p, sizeof h);
    return (vec){f16_to_f32(h[0]), f16_to_f32(h[1]), f16_to_f32(h[2]), f16_to_f32(h[3])};
}
INLINE vec vec_load_bf16(const void *p)
{
    uint16_t h[LANES];
    memcpy(h, p, sizeof h);
    return (vec){bf16_to_f32(h[0]), bf16_to_f32(h[1]), bf16_to_f32(h[2]), bf16_to_f32(h[3])};
}
INLINE void vec_store(float *p, vec a) { memcpy(p, &a, sizeof a); }
INLINE vec vec_fma(vec a, vec b, vec c) { return a * b + c; }
INLINE vec4 vec_sum4(vec a, vec b, vec c, vec d)
{
    vec4 s;
    const vec v[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) s[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
    return s;
}

#endif
#endif
