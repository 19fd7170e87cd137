/* mma.cuh: instructions of sm_80 and newer that CUDA C has no words for: cp.async, ldmatrix, mma, fast exp2. */
#ifndef GPTD_KERNELS_CUDA_MMA_CUH
#define GPTD_KERNELS_CUDA_MMA_CUH

#include "kernels/cuda/types.cuh"

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory, past the registers.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void *from)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same; n_bytes 0 reads nothing and stores zeros.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void *from, int n_bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(from), "r"(n_bytes)
                 : "memory");
}

// What is read once goes from L2 before the rest; what is soon read again, after it. On sm_90 what createpolicy gives, as a number:
// uniform registers hold that, while ptxas would copy the other into some for each access.
__device__ __forceinline__ uint64_t evict_first()
{
#if __CUDA_ARCH__ == 900
    return 0x12F0000000000000;
#else
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
#endif
}

__device__ __forceinline__ uint64_t evict_last()
{
#if __CUDA_ARCH__ == 900
    return 0x14F0000000000000;
#else
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
#endif
}

__device__ __forceinline__ void cp_async_16_once(uint32_t to, const void *from)
{
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(from), "l"(evict_first())
                 : "memory");
}

__device__ __forceinline__ void cp_async_16_once(uint32_t to, const void *from, int n_bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;"
                 ::"r"(to), "l"(from), "r"(n_bytes), "l"(evict_first())
                 : "memory");
}

__device__ __forceinline__ void store_kept(float *to, const float2 &x)
{
    asm volatile("st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(to), "f"(x.x), "f"(x.y), "l"(evict_last()) : "memory");
}

__device__ __forceinline__ void store_kept(float *to, const float4 &x)
{
    asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;"
                 ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "l"(evict_last())
                 : "memory");
}

__device__ __forceinline__ void cp_async_4(uint32_t to, const void *from, int n_bytes)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(n_bytes) : "memory");
}

// To L2.
__device__ __forceinline__ void prefetch(const void *from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups are still on their way.
template <int N> __device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices; lane i gives the address of row i % 8 of matrix i / 8 and gets of each matrix the elements
// (row i / 4, columns 2 (i % 4) and the next).
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// The same of the transposed matrices: lane i gets (rows 2 (i % 4) and the next, column i / 4).
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// An 8x8 matrix, of which lane i holds (row i / 4, columns 2 (i % 4) and the next): its transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t x)
{
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// c [16, 8] += a [16, 16] x b [16, 8]. With g = lane / 4, t = lane % 4: c holds (g, 2t), (g, 2t+1), (g+8, 2t),
// (g+8, 2t+1); a the pairs of columns from 2t: (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8); b the pairs of rows from 2t
// of column g: (2t, g), (2t+8, g).
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values rounded to T, `low` in the lower half: the one of the lower column.
template <typename T> __device__ __forceinline__ uint32_t pack(float low, float high);

template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high)
{
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

template <> __device__ __forceinline__ uint32_t pack<__half>(float low, float high)
{
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Adds and returns what was there, after all that the thread knows to be written, before all that it reads later.
__device__ __forceinline__ int32_t add_acq_rel(int32_t *to, int32_t x)
{
    int32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(x) : "memory");
    return before;
}

__device__ __forceinline__ float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approx(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x)
{
    x = __fadd_rn(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return __fadd_rn(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

#endif
