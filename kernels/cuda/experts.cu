/* experts.cu: which experts a token goes to, and the sum of what they made of it. The products between: linear_experts.cu.
 *
 * route: logits [T, E] to the plan. A warp a token: the E logits in registers, K times the highest of those left, which two
 * reductions find (value, then lowest id). Tokens go in chunks of 64, a block each; an expert's tokens of a chunk are 64 bits
 * in shared memory, so that counts, and a pair's place among its expert's, are numbers of set bits, whatever the order threads
 * come in. Up to 64 tokens are one chunk and one kernel: bound by latency. More: a kernel chooses and counts, chunk by chunk,
 * a second adds up the counts of all chunks (T / 64 E, each block all of them) and places its pairs.
 *
 * combine_experts: out [T, dim] += sum of K rows of x [T K, dim]. Grid: (tokens, columns / 1,024), 128 threads of 8 columns.
 * Bytes: (K + 2) T dim of the activations' type: bound by the memory.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/types.cuh"

enum {
    CHUNK = 64,          // tokens of a block
    MIN_WARPS = 4,
    MAX_WARPS = 32,
    MAX_PER_LANE = MAX_EXPERTS / 32,
    COMBINE_THREADS = 128,
};

// ---- route ----------------------------------------------------------------------------------------------------------

struct route_args {
    const float *logits;       // [T, E]
    float *weights;            // [T, K]
    int32_t *rows;             // [T, K]: between the two kernels, ids of experts
    int32_t *tokens, *offsets; // [T K], [E + 1]
    int32_t *counts;           // [chunks, E]: pairs of each expert in each chunk
    int32_t T, E, K;
    bool renormalize;
};

struct route_shared {
    uint64_t chosen_by[MAX_EXPERTS]; // bit t: token t of the chunk goes to the expert
    int32_t ids[CHUNK * MAX_CHOSEN_EXPERTS]; // as the plan has them: [CHUNK, K]
    int32_t count[MAX_EXPERTS];      // of the expert's pairs in all chunks
    int32_t before[MAX_EXPERTS];     // in those before this one; then, of the expert's pairs of this chunk, the first's place
};

// What compares as the float does, NaN below all; 0 is left for what cannot be chosen.
__device__ __forceinline__ uint32_t order_of(float x)
{
    uint32_t bits = __float_as_uint(x + 0.0f); // one zero
    if (x != x) return 1;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

// The experts of a token, as bits: bit l of [j] is expert j * 32 + l. order: of the lane's logits.
template <int PER_LANE>
__device__ __forceinline__ void choose(uint32_t (&order)[PER_LANE], int32_t K, uint32_t (&chosen)[PER_LANE])
{
    const uint32_t lane = threadIdx.x % 32;
    bool mine[PER_LANE] = {};
    for (int32_t k = 0; k < K; k++) {
        uint32_t highest = 0, id = UINT32_MAX;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) highest = max(highest, order[j]);
        highest = __reduce_max_sync(~0u, highest);
#pragma unroll
        for (int j = PER_LANE - 1; j >= 0; j--)
            if (order[j] == highest) id = (uint32_t)j * 32 + lane;
        id = __reduce_min_sync(~0u, id);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            if (id == (uint32_t)j * 32 + lane) mine[j] = true, order[j] = 0;
    }
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) chosen[j] = __ballot_sync(~0u, mine[j]);
}

// Token `local` of the chunk that begins at `first`, by a warp: its experts' ids in ascending order, and their weights.
template <int PER_LANE>
__device__ __forceinline__ void route_token(const route_args &a, route_shared &s, int32_t first, int32_t local)
{
    const int32_t lane = (int32_t)threadIdx.x % 32;
    const float *logits = a.logits + (size_t)(first + local) * a.E;
    float x[PER_LANE], highest = -INFINITY, all = 0, some = 0;
    uint32_t order[PER_LANE], chosen[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        bool there = j * 32 + lane < a.E;
        x[j] = there ? logits[j * 32 + lane] : -INFINITY;
        order[j] = there ? order_of(x[j]) : 0;
        if (x[j] != x[j]) x[j] = -INFINITY;
        highest = fmaxf(highest, x[j]);
    }
    choose(order, a.K, chosen);
#pragma unroll
    for (int i = 16; i > 0; i /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, i));
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        x[j] = expf(x[j] - highest);
        all += j * 32 + lane < a.E ? x[j] : 0;
    }
    all = warp_sum(all);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        x[j] /= all;
        if (chosen[j] >> lane & 1) some += x[j];
    }
    some = a.renormalize ? warp_sum(some) : 1.0f;
    int32_t rank = 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        if (chosen[j] >> lane & 1) {
            const int32_t mine = rank + __popc(chosen[j] & ((1u << lane) - 1));
            s.ids[local * a.K + mine] = j * 32 + lane;
            a.weights[(size_t)(first + local) * a.K + mine] = x[j] / some;
            atomicOr((unsigned long long *)&s.chosen_by[j * 32 + lane], 1ull << local);
        }
        rank += __popc(chosen[j]);
    }
}

// All tokens of the chunk; s holds its ids and bits when it returns.
template <int PER_LANE>
__device__ __forceinline__ void route_chunk(const route_args &a, route_shared &s, int32_t first, int32_t n)
{
    for (int32_t i = threadIdx.x; i < a.E; i += blockDim.x) s.chosen_by[i] = 0;
    __syncthreads();
    for (int32_t t = (int32_t)threadIdx.x / 32; t < n; t += (int32_t)blockDim.x / 32) route_token<PER_LANE>(a, s, first, t);
    __syncthreads();
}

// From counts of all pairs and of those before the chunk: where its pairs begin, and the plan's offsets. By a warp.
__device__ __forceinline__ void place_experts(const route_args &a, route_shared &s, bool write_offsets)
{
    const int32_t lane = (int32_t)threadIdx.x, per_lane = (a.E + 31) / 32, begin = lane * per_lane;
    int32_t sum = 0;
    for (int32_t i = begin; i < begin + per_lane && i < a.E; i++) sum += s.count[i];
    int32_t at = sum;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        int32_t below = __shfl_up_sync(~0u, at, i);
        if (lane >= i) at += below;
    }
    if (write_offsets && lane == 31) a.offsets[a.E] = at;
    at -= sum;
    for (int32_t i = begin; i < begin + per_lane && i < a.E; i++) {
        if (write_offsets) a.offsets[i] = at;
        s.before[i] += at;
        at += s.count[i];
    }
}

__device__ __forceinline__ void place_pairs(const route_args &a, const route_shared &s, int32_t first, int32_t n)
{
    for (int32_t i = threadIdx.x; i < n * a.K; i += blockDim.x) {
        const int32_t t = i / a.K, id = s.ids[i];
        const int32_t row = s.before[id] + __popcll(s.chosen_by[id] & ((1ull << t) - 1));
        a.rows[(size_t)first * a.K + i] = row;
        a.tokens[row] = first + t;
    }
}

// One chunk, all in one.
template <int PER_LANE> __global__ void __launch_bounds__(MAX_WARPS * 32) route_kernel(const struct route_args a)
{
    __shared__ route_shared s;
    next_kernel_allow();
    previous_kernel_wait();
    route_chunk<PER_LANE>(a, s, 0, a.T);
    for (int32_t i = threadIdx.x; i < a.E; i += blockDim.x) s.count[i] = __popcll(s.chosen_by[i]), s.before[i] = 0;
    __syncthreads();
    if (threadIdx.x < 32) place_experts(a, s, true);
    __syncthreads();
    place_pairs(a, s, 0, a.T);
}

// Of several chunks: choosing and counting.
template <int PER_LANE> __global__ void __launch_bounds__(MAX_WARPS * 32) route_chunks_kernel(const struct route_args a)
{
    __shared__ route_shared s;
    const int32_t first = (int32_t)blockIdx.x * CHUNK, n = min(CHUNK, a.T - first);
    next_kernel_allow();
    previous_kernel_wait();
    route_chunk<PER_LANE>(a, s, first, n);
    for (int32_t i = threadIdx.x; i < a.E; i += blockDim.x) a.counts[(size_t)blockIdx.x * a.E + i] = __popcll(s.chosen_by[i]);
    for (int32_t i = threadIdx.x; i < n * a.K; i += blockDim.x) a.rows[(size_t)first * a.K + i] = s.ids[i];
}

// Then the places of the pairs.
__global__ void __launch_bounds__(MAX_WARPS * 32) place_chunks_kernel(const struct route_args a)
{
    __shared__ route_shared s;
    const int32_t chunk = (int32_t)blockIdx.x, first = chunk * CHUNK, n = min(CHUNK, a.T - first);
    next_kernel_allow();
    previous_kernel_wait();
    for (int32_t i = threadIdx.x; i < a.E; i += blockDim.x) s.chosen_by[i] = 0, s.count[i] = 0, s.before[i] = 0;
    __syncthreads();
    for (int32_t i = threadIdx.x; i < n * a.K; i += blockDim.x) {
        const int32_t id = a.rows[(size_t)first * a.K + i];
        s.ids[i] = id;
        atomicOr((unsigned long long *)&s.chosen_by[id], 1ull << i / a.K);
    }
    for (int32_t i = threadIdx.x; i < (int32_t)gridDim.x * a.E; i += blockDim.x) {
        const int32_t count = a.counts[i];
        atomicAdd(&s.count[i % a.E], count);
        if (i / a.E < chunk) atomicAdd(&s.before[i % a.E], count);
    }
    __syncthreads();
    if (threadIdx.x < 32) place_experts(a, s, chunk == 0);
    __syncthreads();
    place_pairs(a, s, first, n);
}

static int32_t chunks_of(size_t T)
{
    return (int32_t)((T + CHUNK - 1) / CHUNK);
}

size_t cuda_route_scratch_bytes(const struct device *d)
{
    return (size_t)chunks_of((size_t)d->options.max_tokens) * MAX_EXPERTS * sizeof(int32_t);
}

template <int PER_LANE> static cudaError_t launch_route(const struct device *d, const struct route_args &a)
{
    const unsigned n_chunks = (unsigned)chunks_of((size_t)a.T);
    if (n_chunks == 1) {
        const int32_t n_warps = a.T < MIN_WARPS ? (int32_t)MIN_WARPS : a.T < MAX_WARPS ? a.T : (int32_t)MAX_WARPS;
        return launch_early(d, route_kernel<PER_LANE>, dim3(1), (unsigned)n_warps * 32, 0, a);
    }
    cudaError_t status = launch_early(d, route_chunks_kernel<PER_LANE>, dim3(n_chunks), MAX_WARPS * 32, 0, a);
    return status ? status : launch_early(d, place_chunks_kernel, dim3(n_chunks), MAX_WARPS * 32, 0, a);
}

int cuda_route(struct device *d, const struct route_params *p, struct error *e)
{
    const struct expert_plan *plan = &p->plan;
    const int32_t E = plan->n_experts, K = plan->n_chosen;
    if (p->logits.n_dims != 2 || p->logits.dtype != DTYPE_F32 || p->logits.shape[0] < 1 || p->logits.shape[1] != (size_t)E ||
        p->logits.shape[0] > (size_t)d->options.max_tokens || K < 1 || K > E)
        return error_set(e, ERR_INVALID, "route: logits [%zu, %zu], %d of %d experts", p->logits.shape[0], p->logits.shape[1],
                         K, E);
    if (E > MAX_EXPERTS || K > MAX_CHOSEN_EXPERTS)
        return error_set(e, ERR_UNSUPPORTED, "route: %d of %d experts, at most %d of %d", K, E, MAX_CHOSEN_EXPERTS, MAX_EXPERTS);
    const struct route_args a = {(const float *)p->logits.data, plan->weights, plan->rows, plan->tokens, plan->offsets,
                                 (int32_t *)d->scratch, (int32_t)p->logits.shape[0], E, K, p->renormalize};
    return cuda_check(E <= 32 ? launch_route<1>(d, a) : E <= 128 ? launch_route<4>(d, a) : launch_route<MAX_PER_LANE>(d, a),
                      "route", e);
}

// ---- combine --------------------------------------------------------------------------------------------------------

struct combine_args {
    void *out;            // [T, dim]
    const void *x;        // [T K, dim]
    const float *weights; // [T, K]
    const int32_t *rows;  // [T, K]
    int32_t K;
    size_t dim;
    bool vectors;         // whole vectors, aligned
};

template <typename T> __global__ void __launch_bounds__(COMBINE_THREADS) combine_experts_kernel(const struct combine_args a)
{
    next_kernel_allow();
    previous_kernel_wait();
    const size_t t = blockIdx.x, first = ((size_t)blockIdx.y * COMBINE_THREADS + threadIdx.x) * VECTOR;
    const float *weights = a.weights + t * a.K;
    const int32_t *rows = a.rows + t * a.K;
    T *out = (T *)a.out + t * a.dim;
    if constexpr (sizeof(T) == 2) {
        if (a.vectors) {
            float sum[VECTOR] = {}, x[VECTOR];
            if (first >= a.dim) return;
#pragma unroll 4
            for (int32_t k = 0; k < a.K; k++) {
                load_vector(x, (const T *)a.x + (size_t)rows[k] * a.dim + first);
#pragma unroll
                for (int j = 0; j < VECTOR; j++) sum[j] += weights[k] * x[j];
            }
            load_vector(x, out + first);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) x[j] += sum[j];
            store_vector(out + first, x);
            return;
        }
    }
    for (size_t i = first; i < first + VECTOR && i < a.dim; i++) {
        float sum = 0;
        for (int32_t k = 0; k < a.K; k++) sum += weights[k] * to_float(((const T *)a.x)[(size_t)rows[k] * a.dim + i]);
        out[i] = from_float<T>(to_float(out[i]) + sum);
    }
}

int cuda_combine_experts(struct device *d, const struct combine_experts_params *p, struct error *e)
{
    const size_t T = p->out.shape[0], dim = p->out.shape[1], per_block = COMBINE_THREADS * VECTOR;
    const int32_t K = p->plan.n_chosen;
    if (p->out.n_dims != 2 || p->x.n_dims != 2 || p->x.dtype != p->out.dtype || T < 1 || dim < 1 || K < 1 ||
        p->x.shape[0] != T * (size_t)K || p->x.shape[1] != dim)
        return error_set(e, ERR_INVALID, "combine_experts: x [%zu, %zu], out [%zu, %zu], %d experts a token", p->x.shape[0],
                         p->x.shape[1], T, dim, K);
    const struct combine_args a = {p->out.data, p->x.data, p->plan.weights, p->plan.rows, K, dim,
                                   dim % VECTOR == 0 && is_aligned(p->out.data) && is_aligned(p->x.data)};
    const dim3 grid((unsigned)T, (unsigned)((dim + per_block - 1) / per_block));
    cudaError_t status;
    FOR_ACTIVATION_TYPE(p->out.dtype, T_,
                        status = launch_early(d, combine_experts_kernel<T_>, grid, COMBINE_THREADS, 0, a));
    return cuda_check(status, "combine_experts", e);
}
