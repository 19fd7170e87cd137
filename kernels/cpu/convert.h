/* convert.h: single numbers between F32 and the two 16-bit types, by their bits; rounding to nearest, ties to even.
 *
 * For tails, tables and machines without conversion instructions; simd/vec.h has the vectors.
 */
#ifndef GPTD_KERNELS_CPU_CONVERT_H
#define GPTD_KERNELS_CPU_CONVERT_H

#include <stdint.h>
#include <string.h>

#include "kernels/kernels.h"

static inline uint32_t f32_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static inline float f32_from_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static inline float bf16_to_f32(uint16_t h)
{
    return f32_from_bits((uint32_t)h << 16);
}

static inline uint16_t f32_to_bf16(float x)
{
    uint32_t u = f32_bits(x);
    uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    uint32_t nan = u >> 16 | 0x40; // quiet, so that no payload rounds to infinity
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

static inline float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return f32_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13); // infinity, NaN
    // Exponent bias 127 - 15 = 112 by a product, which makes subnormals right too.
    return f32_from_bits(sign | f32_bits(f32_from_bits(magnitude << 13) * 0x1p112f));
}

static inline uint16_t f32_to_f16(float x)
{
    uint32_t u = f32_bits(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);  // NaN
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00); // rounds to 65536 or more
    if (magnitude < 0x38800000) // subnormal: adding 0.5 leaves multiples of 2^-24 in the last bits
        return (uint16_t)(sign | (f32_bits(f32_from_bits(magnitude) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// Element i of an array of any weight or cache type, at any address: a mapped checkpoint aligns nothing.
static inline float element_get(const void *array, enum dtype dtype, size_t i)
{
    float x;
    uint16_t half;
    if (dtype == DTYPE_F32) {
        memcpy(&x, (const char *)array + 4 * i, 4);
        return x;
    }
    memcpy(&half, (const char *)array + 2 * i, 2);
    return dtype == DTYPE_BF16 ? bf16_to_f32(half) : f16_to_f32(half);
}

#endif
