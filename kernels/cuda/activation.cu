/* activation.cu: GELU (erf and tanh), SiLU, ReLU; alone or gating a second half.
 *
 * Grid: (columns / 1,024, rows), 128 threads of 8 columns. Bytes: x once, out once: bound by the memory.
 */
#include "kernels/cuda/activate.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/types.cuh"

enum { THREADS = 128, COLUMNS = 8 };

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
