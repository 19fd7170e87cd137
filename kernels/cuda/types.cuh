/* types.cuh: the 16-bit types of activations and weights as kernels see them. */
#ifndef GPTD_KERNELS_CUDA_TYPES_CUH
#define GPTD_KERNELS_CUDA_TYPES_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/cuda.h"

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Element i of an array whose type is known at run time: weights of norms, biases, embeddings.
__device__ __forceinline__ float load_as_float(const void *p, enum dtype dtype, size_t i)
{
    if (dtype == DTYPE_F32) return ((const float *)p)[i];
    if (dtype == DTYPE_F16) return __half2float(((const __half *)p)[i]);
    return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}

template <typename T> __device__ __forceinline__ constexpr enum dtype type_of();
template <> __device__ __forceinline__ constexpr enum dtype type_of<float>() { return DTYPE_F32; }
template <> __device__ __forceinline__ constexpr enum dtype type_of<__half>() { return DTYPE_F16; }
template <> __device__ __forceinline__ constexpr enum dtype type_of<__nv_bfloat16>() { return DTYPE_BF16; }

// 8 elements of a 16-bit type: what one load moves.
enum { VECTOR = 8 };

template <typename T> __device__ __forceinline__ void load_vector(float (&x)[VECTOR], const T *from)
{
    union { uint4 bits; T element[VECTOR]; } v;
    v.bits = *(const uint4 *)from;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[i] = to_float(v.element[i]);
}

template <typename T> __device__ __forceinline__ void store_vector(T *to, const float (&x)[VECTOR])
{
    union { uint4 bits; T element[VECTOR]; } v;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) v.element[i] = from_float<T>(x[i]);
    *(uint4 *)to = v.bits;
}

// The same of an array whose type is known at run time: T, nearly always.
template <typename T>
__device__ __forceinline__ void load_vector_as_float(float (&x)[VECTOR], const void *from, enum dtype dtype, size_t at)
{
    if (dtype == type_of<T>()) {
        load_vector(x, (const T *)from + at);
        return;
    }
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[i] = load_as_float(from, dtype, at + i);
}

// Runs the statements with T as the activation type.
#define FOR_ACTIVATION_TYPE(dtype, T, ...)                                                                            \
    do {                                                                                                              \
        if ((dtype) == DTYPE_BF16) { using T = __nv_bfloat16; __VA_ARGS__; }                                          \
        else if ((dtype) == DTYPE_F16) { using T = __half; __VA_ARGS__; }                                             \
        else { using T = float; __VA_ARGS__; }                                                                        \
    } while (0)

#endif
