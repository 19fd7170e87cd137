/* draw.cu: random weights, drawn where they are wanted.
 *
 * Grid: a block per multiprocessor, 1,024 threads, each with the whole table in its shared memory (128 KiB). A thread
 * stores 16 bytes, eight elements, of two draws. Bytes: 2 n written. Bound by the memory, or by bank conflicts: 32 random
 * words of shared memory take 3 to 4 turns.
 */
#include "kernels/cuda/cuda.h"

enum { THREADS = 1024, PER_THREAD = 8, TABLE_BYTES = DRAW_TABLE_SIZE * 2 };

__device__ __forceinline__ uint64_t mix(uint64_t z)
{
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

__global__ void __launch_bounds__(THREADS) draw_kernel(uint16_t *to, size_t n, uint64_t key, const uint4 *table)
{
    extern __shared__ uint4 shared[];
    for (int i = threadIdx.x; i < TABLE_BYTES / 16; i += THREADS) shared[i] = table[i];
    __syncthreads();
    const uint16_t *values = (const uint16_t *)shared;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i * PER_THREAD < n; i += (size_t)gridDim.x * THREADS) {
        union { uint4 bits; uint16_t element[PER_THREAD]; } out;
        uint64_t draw = 0;
#pragma unroll
        for (int j = 0; j < PER_THREAD; j++, draw >>= 16) {
            if (j % 4 == 0) draw = mix(key + (2 * i + j / 4) * 0x9E3779B97F4A7C15u);
            out.element[j] = values[draw & 0xFFFF];
        }
        size_t first = i * PER_THREAD;
        if (first + PER_THREAD <= n) *(uint4 *)(to + first) = out.bits;
        else for (int j = 0; first + j < n; j++) to[first + j] = out.element[j];
    }
}

int cuda_draw(struct device *d, const struct draw_params *p, struct error *e)
{
    if (!is_aligned(p->to)) return error_set(e, ERR_INVALID, "draw: its place is not aligned to 16 bytes");
    if (p->n == 0) return 0;
    const uint4 *table = (const uint4 *)device_array(d, p->table, TABLE_BYTES, e);
    if (!table) return ERR_DEVICE;
    cudaError_t status = cudaFuncSetAttribute(draw_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, TABLE_BYTES);
    if (cuda_check(status, "draw", e)) return ERR_DEVICE;
    draw_kernel<<<d->n_sms, THREADS, TABLE_BYTES, d->stream>>>((uint16_t *)p->to, p->n, p->key, table);
    return launch_check("draw", e);
}
