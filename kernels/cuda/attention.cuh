/* attention.cuh: what the two attention kernels share: tiles in shared memory, what becomes of a score, the launch.
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
    MAX_HEAD_DIM = 256,
    UNLIMITED = 1 << 30,    // window without an end
};

// How a raw product q.k becomes a score in units of log2(e): see cap_score and bias_score.
struct scoring {
    float multiplier;       // of what they leave, at the softmax
    float raw_scale;        // of q.k where ALiBi adds to it
    float softcap_in, softcap_out; // tanh(x * in) * out; in 0: none
    const float *slopes;    // device [H]; NULL: none
    int32_t left, right;    // keys seen before and after the query's position
};

cudaError_t launch_prefill(const struct flash_attention_params *p, cudaStream_t stream);
// The same on sm_90, where prefill_fits_hopper says so.
cudaError_t launch_prefill_hopper(const struct flash_attention_params *p, int n_sms, cudaStream_t stream);
bool prefill_fits_hopper(const struct flash_attention_params *p);
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

// Where a lane points ldmatrix. By rows: matrices 0, 1 are rows 0-7, 8-15 of the first chunk, 2, 3 of the second: an A
// operand, or, transposed, B of which the rows are k. By keys: 0, 1 are the two chunks of rows 0-7, 2, 3 of rows 8-15: B of
// which the rows are columns, or, transposed, A.
template <int D> __device__ __forceinline__ uint32_t lane_of_rows(int lane)
{
    return tile_layout<D>::offset(lane & 15, lane >> 4);
}

template <int D> __device__ __forceinline__ uint32_t lane_of_keys(int lane)
{
    return tile_layout<D>::offset((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
}

// ---- scores ---------------------------------------------------------------------------------------------------------

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

// What is subtracted from a row's scores: its maximum, or 0 while it has seen nothing, so that exp2 gives 0, not NaN.
__device__ __forceinline__ float finite_max(float max) { return max == -CUDART_INF_F ? 0.0f : max; }

// What a row's result is to be multiplied by: nothing seen, nothing comes out.
__device__ __forceinline__ float inverse(float sum) { return sum == 0 ? 0.0f : __fdiv_rn(1.0f, sum); }

// Natural logarithm of the sum of exp(score).
__device__ __forceinline__ float log_sum(float max, float sum)
{
    return sum == 0 ? -CUDART_INF_F : __fmul_rn(__fadd_rn(max, log2f(sum)), CUDART_LN2_F);
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

// A kernel that calls previous_kernel_wait, launched while the one before it ends; where the code that runs was made for sm_80
// it has no such wait, and is launched after that end. most_smem: of any launch of it, which may come from several threads at
// once.
template <typename Args>
static cudaError_t launch_kernel(void (*kernel)(Args), unsigned n_blocks, int n_threads, size_t smem, size_t most_smem,
                                 int sm, cudaStream_t stream, const Args &args)
{
    cudaFuncAttributes code;
    cudaError_t status = cudaFuncGetAttributes(&code, (const void *)kernel);
    if (status != cudaSuccess) return status;
    status = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)most_smem);
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
static inline cudaError_t device_figures(int *sm, int *n_sms)
{
    int ordinal, major, minor;
    cudaError_t s = cudaGetDevice(&ordinal);
    if (s == cudaSuccess) s = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
    if (s == cudaSuccess) s = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
    if (s == cudaSuccess) s = cudaDeviceGetAttribute(n_sms, cudaDevAttrMultiProcessorCount, ordinal);
    if (s == cudaSuccess) *sm = major * 10 + minor;
    return s;
}

#endif
