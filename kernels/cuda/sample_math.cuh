/* sample_math.cuh: the numbers of sampling: order of floats as integers, exp, log, Philox and Gumbel noise.
 *
 * exp_of, log_of and gumbel are the CPU's (kernels/cpu/simd/vec.h, vector.c) operation for operation, so that with the
 * same logits both draw the same id wherever the CPU has fused multiply-add.
 */
#ifndef GPTD_KERNELS_CUDA_SAMPLE_MATH_CUH
#define GPTD_KERNELS_CUDA_SAMPLE_MATH_CUH

#include <math.h>
#include <stdint.h>

#include <cuda_runtime.h>

static const uint32_t KEY_INFINITE = 0x7f800000; // key_of -infinity: left out
static const float MAX_GUMBEL = 22.9f;           // above every gumbel(): -log(2^-33) is 22.87

// A candidate in order: the greater value first, then the lower id. 0: -infinity, none. BROKEN: NaN or +infinity.
static const unsigned long long BROKEN = ~0ull;

// Floats in order as unsigned integers; -0 and 0 are one.
__device__ __forceinline__ uint32_t ordered(float x)
{
    uint32_t u = __float_as_uint(__fadd_rn(x, 0.0f));
    return u ^ ((uint32_t)((int32_t)u >> 31) | 0x80000000u);
}

__device__ __forceinline__ unsigned long long candidate(float x, int32_t id)
{
    if (!(x < INFINITY)) return BROKEN;
    if (x == -INFINITY) return 0;
    return (unsigned long long)ordered(x) << 32 | (uint32_t)~id;
}

__device__ __forceinline__ int32_t id_of(unsigned long long candidate)
{
    return (int32_t)~(uint32_t)candidate;
}

__device__ __forceinline__ float value_of(unsigned long long candidate)
{
    uint32_t u = (uint32_t)(candidate >> 32);
    return __uint_as_float(u & 0x80000000u ? u ^ 0x80000000u : ~u);
}

// Tempered logits are <= 0: their magnitudes' bits order them, the likeliest lowest.
__device__ __forceinline__ uint32_t key_of(float tempered)
{
    return __float_as_uint(tempered) & 0x7fffffffu;
}

__device__ __forceinline__ float temper(float x, float highest, float temperature, float lowest)
{
    float t = __fdiv_rn(__fsub_rn(x, highest), temperature);
    return t < lowest ? -INFINITY : t;
}

// e^x to about 1 ulp for x <= 88; 0 below -87. Polynomial: Cephes expf.
__device__ __forceinline__ float exp_of(float x)
{
    const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    float y = -87.0f > x ? -87.0f : x;
    float shifted = __fmaf_rn(y, 1.44269504088896341f, magic), n = __fsub_rn(shifted, magic);
    float r = __fmaf_rn(n, -0.693359375f, y);
    r = __fmaf_rn(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = __fmaf_rn(p, r, 1.3981999507e-3f);
    p = __fmaf_rn(p, r, 8.3334519073e-3f);
    p = __fmaf_rn(p, r, 4.1665795894e-2f);
    p = __fmaf_rn(p, r, 1.6666665459e-1f);
    p = __fmaf_rn(p, r, 5.0000001201e-1f);
    p = __fadd_rn(__fmaf_rn(p, __fmul_rn(r, r), r), 1.0f);
    p = __fmul_rn(p, __uint_as_float((__float_as_uint(shifted) + 127u) << 23));
    return x < -87.0f ? 0.0f : p;
}

// Natural logarithm of a positive normal number to about 1 ulp. Polynomial: Cephes logf.
__device__ __forceinline__ float log_of(float x)
{
    int32_t bits = (int32_t)(__float_as_uint(x) - 0x3f3504f3u);
    float n = __int2float_rn(bits >> 23);
    float f = __fsub_rn(__uint_as_float((uint32_t)(bits & 0x007fffff) + 0x3f3504f3u), 1.0f), z = __fmul_rn(f, f);
    float p = 7.0376836292e-2f;
    p = __fmaf_rn(p, f, -1.1514610310e-1f);
    p = __fmaf_rn(p, f, 1.1676998740e-1f);
    p = __fmaf_rn(p, f, -1.2420140846e-1f);
    p = __fmaf_rn(p, f, 1.4249322787e-1f);
    p = __fmaf_rn(p, f, -1.6668057665e-1f);
    p = __fmaf_rn(p, f, 2.0000714765e-1f);
    p = __fmaf_rn(p, f, -2.4999993993e-1f);
    p = __fmaf_rn(p, f, 3.3333331174e-1f);
    float y = __fmul_rn(__fmul_rn(p, f), z);
    y = __fmaf_rn(n, -2.12194440e-4f, y);
    y = __fmaf_rn(z, -0.5f, y);
    return __fmaf_rn(n, 0.693359375f, __fadd_rn(f, y));
}

// Philox4x32-10 (Salmon et al., SC 2011; kernels/cpu/philox.h): the words of ids 4 * quad .. 4 * quad + 3.
__device__ __forceinline__ uint4 philox(uint32_t quad, uint64_t seed, int32_t position, int32_t choice)
{
    uint32_t c0 = quad, c1 = (uint32_t)position, c2 = (uint32_t)choice, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint32_t high0 = __umulhi(0xd2511f53u, c0), low0 = 0xd2511f53u * c0;
        uint32_t high1 = __umulhi(0xcd9e8d57u, c2), low1 = 0xcd9e8d57u * c2;
        c0 = high1 ^ c1 ^ k0, c2 = high0 ^ c3 ^ k1;
        c1 = low1, c3 = low0;
        k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

// 1 - u of the draw, in (0, 1).
__device__ __forceinline__ float uniform(uint32_t word)
{
    float w = __fmaf_rn(__uint2float_rn(word), 0x1p-32f, 0x1p-33f);
    return w > 0x1.fffffep-1f ? 0x1.fffffep-1f : w;
}

// -log(-log(1 - w)): the least w, which win, have the finest steps.
__device__ __forceinline__ float gumbel(float w)
{
    float u = __fsub_rn(1.0f, w), lost = __fsub_rn(__fsub_rn(1.0f, u), w); // log1p(-w) = log(u + lost)
    return -log_of(-__fadd_rn(log_of(u), __fdiv_rn(lost, u)));
}

// The better of `best` and the id's tempered logit + noise. What surely stays below `bound`, which some id reaches, is
// dropped at the price of a fast logarithm: gumbel(w) <= -log(w).
__device__ __forceinline__ unsigned long long draw_one(unsigned long long best, float tempered, uint32_t word,
                                                       int32_t id, float bound)
{
    float w = uniform(word);
    if (!(tempered - __logf(w) + 0.01f >= bound)) return best;
    unsigned long long c = candidate(__fadd_rn(tempered, gumbel(w)), id);
    return c > best ? c : best;
}

#endif
