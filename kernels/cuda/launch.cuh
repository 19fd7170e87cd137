/* launch.cuh: launching a kernel while the one before it ends (programmatic dependent launch), on Hopper.
 *
 * Every kernel that is launched so calls `previous_kernel_wait` before it touches what kernels before it wrote or read,
 * and `next_kernel_allow` as early as it likes: the next kernel's blocks then come as room is found for them, and wait
 * there. All of them must wait: a kernel is only known to be over, with all before it, to those that waited for it.
 * Blocks that find no room where they should be crowd on other multiprocessors, and then so do the next kernels', to the end of
 * the step (0.84 of the bandwidth). So what decodes up to 8 tokens has a block a multiprocessor, and three kernels in a row fit
 * into one's shared memory and its 65,536 registers: attention 31,744 (head_dim 128), a product 22,528 to 28,672, 5,120 are left.
 * A step's arrays are the exception: the kernel that brings them (staging.cu) lets none in before its end, and the embedding,
 * the first of a step, none before it has waited for that; so the others find them there before they have waited.
 */
#ifndef GPTD_KERNELS_CUDA_LAUNCH_CUH
#define GPTD_KERNELS_CUDA_LAUNCH_CUH

#include <utility>

#include "kernels/cuda/cuda.h"

__device__ __forceinline__ void previous_kernel_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void next_kernel_allow()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A multiprocessor divides its L1 anew between kernels that want it otherwise, and must run dry first; until then blocks that
// need much of it crowd on the others. So all kernels of a decode step want the most shared memory there is.
static inline cudaError_t prefer_shared_memory(const void *kernel)
{
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// Only code made for sm_90 waits; what later devices run was made for sm_80.
template <typename... Params, typename... Args>
static cudaError_t launch_early(const struct device *d, void (*kernel)(Params...), dim3 grid, unsigned n_threads,
                                size_t shared_bytes, Args &&...args)
{
    cudaError_t status = prefer_shared_memory((const void *)kernel);
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(n_threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = d->stream;
    config.attrs = &attribute;
    config.numAttrs = d->kernels_wait ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

#endif
