/* attention.cuh: what the two attention kernels share: tiles in shared memory, the products Q K' and P V on fragments,
 * scores and the online softmax.
 *
 * Every float operation whose rounding matters is written with its intrinsic, so that all kernels and tile shapes round
 * alike: a row's result must not depend on the instance that computed it.
 */
#ifndef GPTD_KERNELS_CUDA_ATTENTION_CUH
#define GPTD_KERNELS_CUDA_ATTENTION_CUH

#include <math_constants.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/types.cuh"
#include "kernels/flash_attention.h"

enum {
    KV_TILE = 64,           // keys of one step; tiles start at multiples of it, whatever the batch
    MAX_HEAD_DIM = 256,
    UNLIMITED = 1 << 30,    // window without an end
};

// How a raw product q.k becomes a score in units of log2(e): see adjust_scores.
struct scoring {
    float multiplier;       // of what adjust_scores leaves, at the softmax
    float raw_scale;        // of q.k where ALiBi adds to it
    float softcap_in, softcap_out; // tanh(x * in) * out; in 0: none
    const float *slopes;    // device [H]; NULL: none
    int32_t left, right;    // keys seen before and after the query's position
};

cudaError_t launch_prefill(const struct flash_attention_params *p, cudaStream_t stream);
cudaError_t launch_decode(const struct flash_attention_params *p, cudaStream_t stream);
size_t decode_scratch_bytes(const struct flash_attention_params *p);

// ---- tiles in shared memory -----------------------------------------------------------------------------------------

// Rows of D 16-bit elements in chunks of 16 bytes, laid out so that 8 rows at the same chunk lie in 8 different groups
// of banks, for cp.async as for ldmatrix. Rows of whole 128 bytes: chunk XOR row % 8; others: an odd number of chunks.
// A tile starts at a multiple of 128 bytes.
template <int D> struct tile_layout {
    static constexpr int CHUNKS = D / 8;
    static constexpr bool SWIZZLED = CHUNKS % 8 == 0;
    static constexpr int STRIDE = SWIZZLED ? CHUNKS * 16 : (CHUNKS + 1) * 16; // bytes
    static_assert(D % 16 == 0, "whole k steps");

    static __device__ __forceinline__ uint32_t offset(int row, int chunk)
    {
        return (uint32_t)(row * STRIDE + (SWIZZLED ? chunk ^ (row & 7) : chunk) * 16);
    }

    // Address `row` (a multiple of 8) and `chunk` (an even number) further than `lane`, which is the address of any row
    // at chunk 0 or 1: with constants, one XOR with one of four values, the rest in the instruction.
    static __device__ __forceinline__ uint32_t further(uint32_t lane, int row, int chunk)
    {
        if (SWIZZLED) return (lane ^ (uint32_t)((chunk & 7) * 16)) + (uint32_t)((chunk >> 3) * 128 + row * STRIDE);
        return lane + (uint32_t)(chunk * 16 + row * STRIDE);
    }
};

// Where a lane points ldmatrix: A from rows of queries, and V (transposed) from rows of keys: matrices 0, 1 are rows
// 0-7, 8-15 of the first chunk, 2, 3 of the second. K: matrices 0, 1 are the two chunks of keys 0-7, 2, 3 of keys 8-15.
template <int D> __device__ __forceinline__ uint32_t lane_of_rows(int lane)
{
    return tile_layout<D>::offset(lane & 15, lane >> 4);
}

template <int D> __device__ __forceinline__ uint32_t lane_of_keys(int lane)
{
    return tile_layout<D>::offset((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
}

// o [MT * 16, D] += p [MT * 16, NT * 8] x v [NT * 8, D], v in shared memory.
template <typename T, int D, int MT, int NT>
__device__ __forceinline__ void add_values(float (&o)[MT][D / 8][4], const uint32_t (&p)[MT][NT / 2][4], uint32_t v)
{
#pragma unroll
    for (int k = 0; k < NT / 2; k++) {
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            ldmatrix_trans(b, tile_layout<D>::further(v, 16 * k, 2 * n));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma<T>(o[m][2 * n], p[m][k], b[0], b[1]);
                mma<T>(o[m][2 * n + 1], p[m][k], b[2], b[3]);
            }
        }
    }
}

// ---- scores ---------------------------------------------------------------------------------------------------------

// What a lane needs to know of one of its rows.
struct score_row {
    int32_t first, last; // keys it sees
    int32_t position;
    float slope;         // in units of log2(e)
};

// tanh by two approximations that are good to 1e-7 of 1: a hardware tanh, good to 5e-4, times a cap of 50 would not do.
__device__ __forceinline__ float tanh_exp(float x)
{
    float e = exp2_approx(__fmul_rn(x, 2 * CUDART_L2E_F));
    return __fmaf_rn(-2.0f, reciprocal_approx(__fadd_rn(e, 1.0f)), 1.0f);
}

__device__ __forceinline__ float cap_score(float x, const struct scoring &scoring)
{
    return __fmul_rn(tanh_exp(__fmul_rn(x, scoring.softcap_in)), scoring.softcap_out);
}

// ALiBi; distance: of the key from the query, at most 0 where attention is causal.
__device__ __forceinline__ float bias_score(float x, float slope, int32_t distance, const struct scoring &scoring)
{
    return __fmaf_rn(slope, (float)distance, __fmul_rn(x, scoring.softcap_in != 0 ? 1.0f : scoring.raw_scale));
}

// Softcap, ALiBi, -infinity where the row does not see the key, for the elements that a lane holds of one row:
// half 0 is row lane / 4, half 1 is 8 further. first_key: that of the lane's first element.
template <int NT>
__device__ __forceinline__ void adjust_scores(float (&s)[NT][4], int half, int32_t first_key,
                                              const struct score_row &row, const struct scoring &scoring)
{
    if (scoring.softcap_in != 0) {
#pragma unroll
        for (int i = 0; i < 2 * NT; i++) s[i / 2][2 * half + i % 2] = cap_score(s[i / 2][2 * half + i % 2], scoring);
    }
    if (scoring.slopes) {
#pragma unroll
        for (int i = 0; i < 2 * NT; i++) {
            float &x = s[i / 2][2 * half + i % 2];
            x = bias_score(x, row.slope, first_key + i / 2 * 8 + i % 2 - row.position, scoring);
        }
    }
#pragma unroll
    for (int i = 0; i < 2 * NT; i++) {
        int32_t key = first_key + i / 2 * 8 + i % 2;
        if (key < row.first || key > row.last) s[i / 2][2 * half + i % 2] = -CUDART_INF_F;
    }
}

// What is subtracted from a row's scores: its maximum, or 0 while it has seen nothing, so that exp2 gives 0, not NaN.
__device__ __forceinline__ float finite_max(float max) { return max == -CUDART_INF_F ? 0.0f : max; }

// What a row's result is to be multiplied by: nothing seen, nothing comes out.
__device__ __forceinline__ float inverse(float sum) { return sum == 0 ? 0.0f : __fdiv_rn(1.0f, sum); }

// Natural logarithm of the sum of exp(score).
__device__ __forceinline__ float log_sum(float max, float sum)
{
    return sum == 0 ? -CUDART_INF_F : __fmul_rn(__fadd_rn(max, log2f(sum)), CUDART_LN2_F);
}

// One step of the online softmax, for rows of a quad: s becomes exp2(s * multiplier - max), max and sum (a lane's own
// part) move on, factor is what earlier results are to be multiplied by. A step of which a row sees nothing changes
// nothing of that row, bit for bit: factor 1, all of s 0. max is kept in units of log2(e).
template <int NT>
__device__ __forceinline__ void softmax_step(float (&s)[NT][4], float (&max)[2], float (&sum)[2], float (&factor)[2],
                                             float multiplier)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float x = s[0][2 * half];
#pragma unroll
        for (int i = 1; i < 2 * NT; i++) x = fmaxf(x, s[i / 2][2 * half + i % 2]);
        float new_max = fmaxf(max[half], __fmul_rn(quad_max(x), multiplier));
        float shift = finite_max(new_max), part = 0;
        factor[half] = exp2_approx(__fsub_rn(max[half], shift));
        max[half] = new_max;
#pragma unroll
        for (int i = 0; i < 2 * NT; i++) {
            float &y = s[i / 2][2 * half + i % 2];
            y = exp2_approx(__fmaf_rn(y, multiplier, -shift));
            part = __fadd_rn(part, y);
        }
        sum[half] = __fmaf_rn(sum[half], factor[half], part);
    }
}

// Rounds the accumulator of [16, NT * 8] to the A operand of a product over its columns.
template <typename T, int NT>
__device__ __forceinline__ void pack_rows(uint32_t (&p)[NT / 2][4], const float (&s)[NT][4])
{
#pragma unroll
    for (int i = 0; i < NT / 2; i++) {
        p[i][0] = pack<T>(s[2 * i][0], s[2 * i][1]);
        p[i][1] = pack<T>(s[2 * i][2], s[2 * i][3]);
        p[i][2] = pack<T>(s[2 * i + 1][0], s[2 * i + 1][1]);
        p[i][3] = pack<T>(s[2 * i + 1][2], s[2 * i + 1][3]);
    }
}

template <int D> __device__ __forceinline__ void scale_rows(float (&o)[D / 8][4], const float (&factor)[2])
{
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) o[n][i] = __fmul_rn(o[n][i], factor[i / 2]);
    }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

static inline struct scoring scoring_of(const struct flash_attention_params *p)
{
    const float log2e = CUDART_L2E_F;
    struct scoring s = {};
    bool adjusted = p->softcap > 0 || p->alibi_slopes;
    s.raw_scale = p->scale * log2e;
    s.multiplier = adjusted ? 1.0f : s.raw_scale;
    s.softcap_in = p->softcap > 0 ? p->scale / p->softcap : 0.0f;
    s.softcap_out = p->softcap * log2e;
    s.slopes = p->alibi_slopes;
    s.left = p->window_left < 0 || p->window_left > UNLIMITED ? UNLIMITED : p->window_left;
    s.right = p->window_right < 0 || p->window_right > UNLIMITED ? UNLIMITED : p->window_right;
    if (p->causal) s.right = 0;
    return s;
}

// A kernel that begins with previous_kernel_wait, launched while the one before it ends; where the code that runs
// was made for sm_80 it has no such wait, and is launched after that end.
template <typename Args>
static cudaError_t launch_kernel(void (*kernel)(Args), unsigned n_blocks, int n_threads, size_t smem, int sm,
                                 cudaStream_t stream, const Args &args)
{
    cudaFuncAttributes code;
    cudaError_t status = cudaFuncGetAttributes(&code, (const void *)kernel);
    if (status != cudaSuccess) return status;
    status = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);
    if (status == cudaSuccess) status = prefer_shared_memory((const void *)kernel);
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(n_blocks);
    config.blockDim = dim3((unsigned)n_threads);
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = sm >= 90 && code.ptxVersion >= 90 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}

// Of the current device: sm is 80, 90, ...
static inline cudaError_t device_figures(int *sm, int *n_sms, int *smem_per_sm)
{
    int ordinal, major, minor;
    cudaError_t s = cudaGetDevice(&ordinal);
    if (s == cudaSuccess) s = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
    if (s == cudaSuccess) s = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
    if (s == cudaSuccess) s = cudaDeviceGetAttribute(n_sms, cudaDevAttrMultiProcessorCount, ordinal);
    if (s == cudaSuccess) s = cudaDeviceGetAttribute(smem_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, ordinal);
    if (s == cudaSuccess) *sm = major * 10 + minor;
    return s;
}

#endif
