/* linear_few.cu: out[T, N] = x[T, K] w[N, K]^T for up to 8 rows of x (decode with few sequences), and what comes before and
 * after it in a layer: RMS norm before; rotation and the cache's write, or act(gate) * up, after.
 *
 * Bound by reading w once: N K 2 bytes, which at decode are nearly all bytes there are. Grid: one block for 8 rows of w;
 * 8 warps take 64 bytes of each row in turns. Products are mma.sync with x as A [8 (of 16) tokens, 16 k] and w as B
 * [16 k, 8 rows]: any T up to 8 costs the same. A lane's 16 bytes of w and of x are the same 8 columns, and the sum over
 * k has no order, so that loads are whole vectors and no shuffle is needed. The first weights are asked for before the
 * kernel that makes x is over. x comes from L1 and L2, once a block.
 * RMS norm: x times the norm's weight is rounded where the norm's own kernel rounds, the factor of the row, which needs the
 * sum of squares over all of it, is multiplied in at the end: BF16 alone, in F16 x could overflow.
 * Rows of a block: 8 in order; gated: 4 of gate and the same 4 of up; rotated heads: 4 and their 4 partners.
 * Sum of an element: a lane's columns ascending, then the lanes of a step, then the warps in order: the same bits for any T.
 */
#include "kernels/cuda/linear_few.cuh"

#include "kernels/cuda/activate.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/types.cuh"

namespace {

enum { WARPS = 8, THREADS = WARPS * 32, BLOCK_ROWS = 8, LOADS = 2, VECTOR = 8 /* elements of 16 bytes */ };

enum ending { STORE, GATED, ROPE };

struct few_args {
    const void *w[MAX_WEIGHT_PARTS], *bias[MAX_WEIGHT_PARTS]; // [end[i] - end[i - 1], K]
    enum dtype bias_dtype[MAX_WEIGHT_PARTS];
    int32_t end[MAX_WEIGHT_PARTS]; // rows of the parts up to this one
    const void *x;                 // [T, K]
    const void *norm;              // [K] of x's type
    float eps;
    void *out;                     // [T, ldo]
    int32_t T, N, K;
    size_t ldo;
    bool accumulate;
    enum activation kind;
    const float *cos_sin;          // [T, rope_dim]
    void *k_cache, *v_cache;       // [n_blocks, KV, block_size, D]
    const int32_t *slots;          // [T]
    int32_t n_heads, n_kv_heads, head_dim, rope_dim, block_size;
};

// Row i of the 8 of a block, as the weight has them.
template <enum ending ENDING> __device__ __forceinline__ int32_t row_of(const few_args &a, int32_t block, int32_t i)
{
    if (ENDING == STORE) return block * BLOCK_ROWS + i;
    if (ENDING == GATED) return (i < 4 ? 0 : a.N / 2) + block * 4 + i % 4;
    int32_t per_head = a.head_dim / BLOCK_ROWS, head = block / per_head, j = block % per_head, half = a.rope_dim / 2;
    bool rotates = head < a.n_heads + a.n_kv_heads && j < half / 4;
    return head * a.head_dim + (rotates ? j * 4 + i % 4 + (i < 4 ? 0 : half) : j * BLOCK_ROWS + i);
}

template <typename T> __device__ __forceinline__ const uint4 *address_of(const few_args &a, int32_t row)
{
    row = min(row, a.N - 1);
    const T *w = (const T *)a.w[0];
    int32_t begin = 0;
#pragma unroll
    for (int i = 1; i < MAX_WEIGHT_PARTS; i++)
        if (row >= a.end[i - 1]) w = (const T *)a.w[i], begin = a.end[i - 1];
    return (const uint4 *)(w + (size_t)(row - begin) * a.K);
}

__device__ __forceinline__ float bias_of(const few_args &a, int32_t row)
{
    int32_t part = 0, begin = 0;
#pragma unroll
    for (int i = 1; i < MAX_WEIGHT_PARTS; i++)
        if (row >= a.end[i - 1]) part = i, begin = a.end[i - 1];
    return a.bias[part] ? load_as_float(a.bias[part], a.bias_dtype[part], row - begin) : 0.0f;
}

__device__ __forceinline__ uint4 load_once(const uint4 *p)
{
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
    return r;
}

// x times the norm's weight, rounded; the squares of x go to `squares`.
template <typename T> __device__ __forceinline__ uint4 weigh(uint4 x, uint4 norm, float &squares)
{
    union { uint4 bits; T element[VECTOR]; } a, b;
    a.bits = x, b.bits = norm;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        float value = to_float(a.element[i]);
        squares = fmaf(value, value, squares);
        a.element[i] = from_float<T>(value * to_float(b.element[i]));
    }
    return a.bits;
}

// ---- the end of a block ---------------------------------------------------------------------------------------------

template <typename T> __device__ __forceinline__ void end_rope(const few_args &a, int32_t token, int32_t i, float value)
{
    float other = __shfl_xor_sync(~0u, value, 4);
    if (token >= a.T) return;
    int32_t row = row_of<ROPE>(a, (int32_t)blockIdx.x, i), head = row / a.head_dim, column = row % a.head_dim;
    int32_t half = a.rope_dim / 2;
    if (head < a.n_heads + a.n_kv_heads && column < a.rope_dim) {
        const float *angle = a.cos_sin + (size_t)token * a.rope_dim + column % half;
        value = value * angle[0] + (i < 4 ? -other : other) * angle[half];
    }
    if (head < a.n_heads) {
        ((T *)a.out)[token * a.ldo + row] = from_float<T>(value);
        return;
    }
    int32_t slot = a.slots[token], kv_head = (head - a.n_heads) % a.n_kv_heads;
    if (slot < 0) return;
    size_t at = ((size_t)(slot / a.block_size) * a.n_kv_heads + kv_head) * a.block_size + slot % a.block_size;
    T *cache = (T *)(head < a.n_heads + a.n_kv_heads ? a.k_cache : a.v_cache);
    cache[at * a.head_dim + column] = from_float<T>(value);
}

template <typename T, typename Out, enum ending ENDING>
__device__ __forceinline__ void end_block(const few_args &a, int32_t token, int32_t i, float value)
{
    int32_t row = row_of<ENDING>(a, (int32_t)blockIdx.x, i);
    if (row < a.N) value += bias_of(a, row);
    if (ENDING == ROPE) {
        end_rope<T>(a, token, i, value);
    } else if (ENDING == GATED) {
        float up = __shfl_xor_sync(~0u, value, 4);
        if (token < a.T && i < 4)
            ((Out *)a.out)[token * a.ldo + row] = from_float<Out>(activate(value, a.kind) * up);
    } else if (token < a.T && row < a.N) {
        Out *out = (Out *)a.out + token * a.ldo + row;
        *out = from_float<Out>(a.accumulate ? value + to_float(*out) : value);
    }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, typename Out, enum ending ENDING, bool NORMED>
__global__ void __launch_bounds__(THREADS, 5) linear_few_kernel(const __grid_constant__ few_args a)
{
    __shared__ float part[WARPS][FEW_ROWS][BLOCK_ROWS], part_squares[WARPS][FEW_ROWS];
    next_kernel_allow();
    // The lane's row of w is also its row of x.
    int32_t lane = (int32_t)threadIdx.x % 32, warp = (int32_t)threadIdx.x / 32, mine = lane / 4, n_vectors = a.K / VECTOR;
    const uint4 *w = address_of<T>(a, row_of<ENDING>(a, (int32_t)blockIdx.x, mine));
    const uint4 *x = (const uint4 *)((const T *)a.x + (size_t)mine * a.K), *norm = (const uint4 *)a.norm;
    float sum[4] = {}, squares = 0;
    uint4 weights[LOADS], next[LOADS];
    int32_t v = warp * 4 + lane % 4;
    const int32_t step = WARPS * 4;
#pragma unroll
    for (int l = 0; l < LOADS; l++)
        weights[l] = v + step * l < n_vectors ? load_once(w + v + step * l) : make_uint4(0, 0, 0, 0);
    previous_kernel_wait();
    for (; v - lane % 4 < n_vectors; v += step * LOADS) {
        uint4 rows[LOADS];
#pragma unroll
        for (int l = 0; l < LOADS; l++) {
            bool there = v + step * l < n_vectors && mine < a.T;
            rows[l] = there ? x[v + step * l] : make_uint4(0, 0, 0, 0);
            if (NORMED && there) rows[l] = weigh<T>(rows[l], __ldg(norm + v + step * l), squares);
        }
#pragma unroll
        for (int l = 0; l < LOADS; l++) {
            int32_t further = v + step * (LOADS + l);
            next[l] = further < n_vectors ? load_once(w + further) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int l = 0; l < LOADS; l++) {
            const uint32_t low[4] = {rows[l].x, 0, rows[l].y, 0}, high[4] = {rows[l].z, 0, rows[l].w, 0};
            mma<T>(sum, low, weights[l].x, weights[l].y);
            mma<T>(sum, high, weights[l].z, weights[l].w);
            weights[l] = next[l];
        }
    }
    part[warp][mine][lane % 4 * 2] = sum[0], part[warp][mine][lane % 4 * 2 + 1] = sum[1];
    if (NORMED) {
        squares = quad_sum(squares);
        if (lane % 4 == 0) part_squares[warp][mine] = squares;
    }
    __syncthreads();
    if (threadIdx.x >= FEW_ROWS * BLOCK_ROWS) return;
    int32_t token = (int32_t)threadIdx.x / BLOCK_ROWS, i = (int32_t)threadIdx.x % BLOCK_ROWS;
    float value = 0, all = 0;
#pragma unroll
    for (int j = 0; j < WARPS; j++) {
        value += part[j][token][i];
        if (NORMED) all += part_squares[j][token];
    }
    if (NORMED) value *= 1.0f / sqrtf(all / (float)a.K + a.eps);
    end_block<T, Out, ENDING>(a, token, i, value);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

bool is_aligned(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

few_args args_of(const struct linear_params *p)
{
    few_args a = {};
    int32_t n = 0;
    for (int32_t i = 0; i < MAX_WEIGHT_PARTS; i++) {
        a.end[i] = INT32_MAX; // of the last part and those that are not there
        if (i >= p->weight->n_parts) continue;
        const struct weight_part *part = &p->weight->part[i];
        n += (int32_t)part->n_rows;
        if (i + 1 < p->weight->n_parts) a.end[i] = n;
        a.w[i] = part->data, a.bias[i] = part->bias.data, a.bias_dtype[i] = part->bias.dtype;
    }
    a.x = p->x.data, a.out = p->out.data, a.ldo = p->out.shape[1], a.accumulate = p->accumulate;
    a.T = (int32_t)p->x.shape[0], a.N = n, a.K = (int32_t)p->weight->n_cols;
    return a;
}

template <typename T, typename Out, enum ending ENDING, bool NORMED>
cudaError_t launch(const struct device *d, const few_args &a)
{
    int32_t rows = ENDING == STORE ? (a.N + BLOCK_ROWS - 1) / BLOCK_ROWS : a.N / BLOCK_ROWS;
    return launch_early(d, linear_few_kernel<T, Out, ENDING, NORMED>, dim3((unsigned)rows), THREADS, 0, a);
}

template <enum ending ENDING> int launch_fused(struct device *d, enum dtype dtype, const few_args &a, struct error *e)
{
    cudaError_t status;
    if (dtype == DTYPE_F16) status = launch<__half, __half, ENDING, false>(d, a);
    else if (a.norm) status = launch<__nv_bfloat16, __nv_bfloat16, ENDING, true>(d, a);
    else status = launch<__nv_bfloat16, __nv_bfloat16, ENDING, false>(d, a);
    return cuda_check(status, "linear", e);
}

// The norm goes into the kernel, or is done before it.
int fuse_norm(struct device *d, const struct norm_params *norm, few_args *a, struct error *e)
{
    bool fits = norm->kind == NORM_RMS && !norm->residual.data && !norm->bias.data && norm->x.dtype == DTYPE_BF16 &&
                norm->weight.dtype == DTYPE_BF16 && is_aligned(norm->weight.data) && is_aligned(norm->x.data);
    if (!fits) return cuda_norm(d, norm, e);
    a->x = norm->x.data, a->norm = norm->weight.data, a->eps = norm->eps;
    return 0;
}

} // namespace

bool linear_is_few(const struct device *d, const struct linear_params *p)
{
    bool fits = !d->options.deterministic && p->x.shape[0] <= FEW_ROWS && p->x.dtype != DTYPE_F32 &&
                p->weight->n_cols % VECTOR == 0 && is_aligned(p->x.data);
    for (int32_t i = 0; i < p->weight->n_parts; i++) fits = fits && is_aligned(p->weight->part[i].data);
    return fits;
}

int linear_few(struct device *d, const struct linear_params *p, struct error *e)
{
    few_args a = args_of(p);
    bool wide = p->out.dtype == DTYPE_F32;
    cudaError_t status;
    if (p->x.dtype == DTYPE_BF16 && wide) status = launch<__nv_bfloat16, float, STORE, false>(d, a);
    else if (p->x.dtype == DTYPE_BF16) status = launch<__nv_bfloat16, __nv_bfloat16, STORE, false>(d, a);
    else if (wide) status = launch<__half, float, STORE, false>(d, a);
    else status = launch<__half, __half, STORE, false>(d, a);
    return cuda_check(status, "linear", e);
}

bool linear_few_rope_fits(const struct device *d, const struct norm_params *norm, const struct linear_params *p,
                          const struct rope_kv_write_params *rope)
{
    int32_t half = rope->cos_sin.data ? rope->rope_dim / 2 : 0;
    return linear_is_few(d, p) && !p->accumulate && p->out.dtype == p->x.dtype && norm->out.data == p->x.data &&
           rope->head_dim % BLOCK_ROWS == 0 && half % 4 == 0;
}

int linear_few_rope(struct device *d, const struct norm_params *norm, const struct linear_params *p,
                    const struct rope_kv_write_params *rope, struct error *e)
{
    few_args a = args_of(p);
    a.cos_sin = (const float *)rope->cos_sin.data, a.k_cache = rope->cache.k.data, a.v_cache = rope->cache.v.data;
    a.slots = (const int32_t *)device_array(d, rope->slot_mapping, (size_t)a.T * sizeof(int32_t), e);
    if (!a.slots || fuse_norm(d, norm, &a, e)) return e ? e->code : ERR_DEVICE;
    a.n_heads = rope->n_heads, a.n_kv_heads = rope->n_kv_heads, a.head_dim = rope->head_dim;
    a.rope_dim = a.cos_sin ? rope->rope_dim : 0, a.block_size = (int32_t)rope->cache.k.shape[2];
    return launch_fused<ROPE>(d, p->x.dtype, a, e);
}

bool linear_few_gated_fits(const struct device *d, const struct norm_params *norm, const struct linear_params *p,
                           const struct activation_params *activation)
{
    return linear_is_few(d, p) && !p->accumulate && p->out.dtype == p->x.dtype && norm->out.data == p->x.data &&
           activation->gated && activation->out.data != norm->x.data && activation->out.shape[1] % 4 == 0;
}

int linear_few_gated(struct device *d, const struct norm_params *norm, const struct linear_params *p,
                     const struct activation_params *activation, struct error *e)
{
    few_args a = args_of(p);
    int rc = fuse_norm(d, norm, &a, e);
    a.out = activation->out.data, a.ldo = activation->out.shape[1], a.kind = activation->kind;
    return rc ? rc : launch_fused<GATED>(d, p->x.dtype, a, e);
}
