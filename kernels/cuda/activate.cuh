/* activate.cuh: the activation functions, for kernels that end with one. */
#ifndef GPTD_KERNELS_CUDA_ACTIVATE_CUH
#define GPTD_KERNELS_CUDA_ACTIVATE_CUH

#include "kernels/kernels.h"

__device__ __forceinline__ float activate(float x, enum activation kind)
{
    switch (kind) {
    case ACT_GELU_ERF: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    // 0.5 x (1 + tanh(u)) = x / (1 + e^-2u), without its cancellation
    case ACT_GELU_TANH: return x / (1.0f + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
    case ACT_SILU: return x / (1.0f + __expf(-x));
    default: return fmaxf(x, 0.0f);
    }
}

#endif
