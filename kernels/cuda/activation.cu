/* activation.cu: GELU (erf and tanh), SiLU, ReLU; alone or gating a second half. The soft cap of logits.
 *
 * Grid: (columns / 1,024, rows), 128 threads of 8 columns; of the cap, elements / 1,024, 256 threads of 4. Bytes: x once, out
 * once: bound by the memory.
 */
#include "kernels/cuda/activate.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/types.cuh"

enum { THREADS = 128, COLUMNS = 8, CAP_THREADS = 256, CAP_ELEMENTS = 4 };

// out [T, m]; x [T, m], or [T, 2 m] when gated.
template <typename T>
__global__ void __launch_bounds__(THREADS)
activation_kernel(T *out, const T *x, size_t m, enum activation kind, bool gated)
{
    next_kernel_allow();
    previous_kernel_wait();
    const T *gate = x + (size_t)blockIdx.y * (gated ? 2 * m : m), *up = gate + m;
    out += (size_t)blockIdx.y * m;
    size_t first = ((size_t)blockIdx.x * THREADS + threadIdx.x) * COLUMNS;
    if (sizeof(T) == 2 && m % COLUMNS == 0 && first < m) {
        union { uint4 bits; T element[COLUMNS]; } g, u, o;
        g.bits = *(const uint4 *)(gate + first);
        if (gated) u.bits = *(const uint4 *)(up + first);
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            float value = activate(to_float(g.element[i]), kind);
            o.element[i] = from_float<T>(gated ? value * to_float(u.element[i]) : value);
        }
        *(uint4 *)(out + first) = o.bits;
        return;
    }
    for (size_t i = first; i < first + COLUMNS && i < m; i++) {
        float value = activate(to_float(gate[i]), kind);
        out[i] = from_float<T>(gated ? value * to_float(up[i]) : value);
    }
}

int cuda_activation(struct device *d, const struct activation_params *p, struct error *e)
{
    size_t T = p->out.shape[0], m = p->out.shape[1];
    if (p->out.n_dims != 2 || p->x.n_dims != 2 || T < 1 || m < 1 || p->x.shape[0] != T || p->x.dtype != p->out.dtype ||
        p->x.shape[1] != (p->gated ? 2 * m : m) || (p->gated && p->out.data == p->x.data))
        return error_set(e, ERR_INVALID, "activation: shapes do not fit");
    dim3 grid((unsigned)((m + THREADS * COLUMNS - 1) / (THREADS * COLUMNS)), 1);
    const size_t most = 65535; // rows of a grid
    for (size_t first = 0; first < T; first += most) {
        grid.y = (unsigned)(T - first < most ? T - first : most);
        cudaError_t status;
        FOR_ACTIVATION_TYPE(p->out.dtype, T_, status = launch_early(
            d, activation_kernel<T_>, grid, THREADS, 0, (T_ *)p->out.data + first * m,
            (const T_ *)p->x.data + first * p->x.shape[1], m, p->kind, p->gated));
        if (cuda_check(status, "activation", e)) return ERR_DEVICE;
    }
    return 0;
}

// ---- softcap --------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(CAP_THREADS) softcap_kernel(float *x, size_t n, float cap, bool vectors)
{
    next_kernel_allow();
    previous_kernel_wait();
    size_t first = ((size_t)blockIdx.x * CAP_THREADS + threadIdx.x) * CAP_ELEMENTS;
    if (vectors && first + CAP_ELEMENTS <= n) {
        float4 v = *(float4 *)(x + first);
        v.x = cap * tanhf(v.x / cap), v.y = cap * tanhf(v.y / cap), v.z = cap * tanhf(v.z / cap), v.w = cap * tanhf(v.w / cap);
        *(float4 *)(x + first) = v;
        return;
    }
    for (size_t i = first; i < first + CAP_ELEMENTS && i < n; i++) x[i] = cap * tanhf(x[i] / cap);
}

int cuda_softcap(struct device *d, const struct softcap_params *p, struct error *e)
{
    size_t n = p->x.shape[0] * p->x.shape[1], per_block = CAP_THREADS * CAP_ELEMENTS;
    if (p->x.n_dims != 2 || p->x.dtype != DTYPE_F32 || n < 1 || !(p->cap > 0))
        return error_set(e, ERR_INVALID, "softcap: [%zu, %zu] %s, cap %g", p->x.shape[0], p->x.shape[1],
                         dtype_name(p->x.dtype), (double)p->cap);
    dim3 grid((unsigned)((n + per_block - 1) / per_block));
    return cuda_check(launch_early(d, softcap_kernel, grid, CAP_THREADS, 0, (float *)p->x.data, n, p->cap,
                                   is_aligned(p->x.data)), "softcap", e);
}
