/* norm.cu: RMS and layer norm, stored or added to what is there.
 *
 * Grid: one block a row, 256 threads; the row stays in shared memory as F32 between the passes (dim <= 32,768).
 * Bytes: x once, out once, or twice where it is added to: bound by the memory for many rows, by latency for few.
 * Sums: each thread its own columns in ascending order, then a fixed tree: the same bits whatever the batch.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/types.cuh"

enum { THREADS = 256, WARPS = THREADS / 32, MAX_DIM = 32768 };

struct norm_args {
    void *out;
    const void *x;
    const void *weight, *bias;  // bias NULL: none
    enum dtype weight_dtype, bias_dtype;
    int32_t dim;
    float eps, weight_offset;
    bool layer, accumulate;
};

// The sum over the block, in every thread.
__device__ __forceinline__ float block_sum(float x, float *warp_sums)
{
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) x += warp_sums[i];
    __syncthreads();
    return x;
}

// A row whose columns are whole vectors: 16 bytes a load.
template <typename T>
__device__ __forceinline__ void normalize_vectors(const struct norm_args &a, const T *x, T *out, float *row, float *warp_sums)
{
    float sum = 0, mean = 0, value[VECTOR], other[VECTOR];
    for (int32_t i = threadIdx.x * VECTOR; i < a.dim; i += THREADS * VECTOR) {
        load_vector(value, x + i);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            row[i + j] = value[j];
            sum += a.layer ? value[j] : value[j] * value[j];
        }
    }
    sum = block_sum(sum, warp_sums);
    if (a.layer) {
        mean = sum / a.dim, sum = 0;
        for (int32_t i = threadIdx.x * VECTOR; i < a.dim; i += THREADS * VECTOR) {
#pragma unroll
            for (int j = 0; j < VECTOR; j++) sum += (row[i + j] - mean) * (row[i + j] - mean);
        }
        sum = block_sum(sum, warp_sums);
    }
    float scale = 1.0f / sqrtf(sum / a.dim + a.eps);
    for (int32_t i = threadIdx.x * VECTOR; i < a.dim; i += THREADS * VECTOR) {
        load_vector_as_float<T>(value, a.weight, a.weight_dtype, (size_t)i);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) value[j] = (value[j] + a.weight_offset) * ((row[i + j] - mean) * scale);
        if (a.bias) {
            load_vector_as_float<T>(other, a.bias, a.bias_dtype, (size_t)i);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) value[j] += other[j];
        }
        if (a.accumulate) {
            load_vector(other, out + i);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) value[j] += other[j];
        }
        store_vector(out + i, value);
    }
}

template <typename T> __global__ void __launch_bounds__(THREADS) norm_kernel(const struct norm_args a)
{
    extern __shared__ __align__(16) float row[]; // [dim]
    __shared__ float warp_sums[WARPS];
    next_kernel_allow();
    previous_kernel_wait();
    const T *x = (const T *)a.x + (size_t)blockIdx.x * a.dim;
    T *out = (T *)a.out + (size_t)blockIdx.x * a.dim;
    float sum = 0;
    if (sizeof(T) == 2 && a.dim % VECTOR == 0) {
        normalize_vectors(a, x, out, row, warp_sums);
        return;
    }
    for (int32_t i = threadIdx.x; i < a.dim; i += THREADS) {
        float value = to_float(x[i]);
        row[i] = value;
        sum += a.layer ? value : value * value;
    }
    sum = block_sum(sum, warp_sums);
    float mean = 0, scale;
    if (a.layer) {
        mean = sum / a.dim, sum = 0;
        for (int32_t i = threadIdx.x; i < a.dim; i += THREADS) sum += (row[i] - mean) * (row[i] - mean);
        sum = block_sum(sum, warp_sums);
    }
    scale = 1.0f / sqrtf(sum / a.dim + a.eps);
    for (int32_t i = threadIdx.x; i < a.dim; i += THREADS) {
        float value = (row[i] - mean) * scale * (load_as_float(a.weight, a.weight_dtype, i) + a.weight_offset);
        if (a.bias) value += load_as_float(a.bias, a.bias_dtype, i);
        if (a.accumulate) value += to_float(out[i]);
        out[i] = from_float<T>(value);
    }
}

template <typename T> static cudaError_t launch(const struct device *d, unsigned n_rows, const struct norm_args *a)
{
    size_t shared = (size_t)a->dim * sizeof(float);
    cudaError_t status = cudaFuncSetAttribute(norm_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (status != cudaSuccess) return status;
    return launch_early(d, norm_kernel<T>, dim3(n_rows), THREADS, shared, *a);
}

int norm_check(const struct norm_params *p, struct error *e)
{
    size_t T = p->x.shape[0], dim = p->x.shape[1];
    if (p->x.n_dims != 2 || p->out.n_dims != 2 || T < 1 || dim < 1 || dim > MAX_DIM || p->out.dtype != p->x.dtype ||
        p->out.shape[0] != T || p->out.shape[1] != dim || p->weight.shape[0] != dim ||
        (p->bias.data && p->bias.shape[0] != dim))
        return error_set(e, ERR_INVALID, "norm: shapes do not fit");
    return 0;
}

int cuda_norm(struct device *d, const struct norm_params *p, struct error *e)
{
    int rc = norm_check(p, e);
    if (rc) return rc;
    struct norm_args a = {};
    a.out = p->out.data, a.x = p->x.data;
    a.weight = p->weight.data, a.weight_dtype = p->weight.dtype;
    a.bias = p->bias.data, a.bias_dtype = p->bias.dtype;
    a.dim = (int32_t)p->x.shape[1], a.eps = p->eps, a.weight_offset = p->weight_offset;
    a.layer = p->kind == NORM_LAYER, a.accumulate = p->accumulate;
    cudaError_t status;
    FOR_ACTIVATION_TYPE(p->x.dtype, T_, status = launch<T_>(d, (unsigned)p->x.shape[0], &a));
    return cuda_check(status, "norm", e);
}
