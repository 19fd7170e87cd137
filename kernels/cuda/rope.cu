/* rope.cu: norms of q and k, rotary positions, and the write of K and V into the paged cache.
 *
 * rope_table: one thread an angle. rope_kv_write: one block a token; a thread rotates 8 dims and their 8 partners, or moves 8
 * dims that are not rotated to the cache. Bytes: q and k read and written, v read, k and v written to the cache: one pass over
 * qkv, bound by the memory. With norms of q and k: a warp a head, whose lanes have 8 dims each in registers (head_dim <= 256);
 * partners come by a shuffle; blocks so small that they find room beside the product before and the attention after (launch.cuh:
 * with twice the warps Qwen3-8B's decode at batch 1 was 11 % slower). Dims that are no multiples of 8: grid (tokens, heads of q,
 * k and v), a thread a dim.
 * What is normed is rounded before it is rotated, as transformers does it.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/types.cuh"

enum { THREADS = 64, VECTOR_THREADS = 256, TABLE_THREADS = 128, HEADS_PER_BLOCK = 4, NORMED_THREADS = HEADS_PER_BLOCK * 32 };

__global__ void __launch_bounds__(TABLE_THREADS)
rope_table_kernel(float *cos_sin, const int32_t *positions, const float *inv_freq, size_t n, int32_t half, float factor)
{
    size_t i = (size_t)blockIdx.x * TABLE_THREADS + threadIdx.x;
    next_kernel_allow();
    previous_kernel_wait();
    if (i >= n) return;
    size_t t = i / half, j = i % half;
    float angle = (float)positions[t] * inv_freq[j], sine, cosine;
    sincosf(angle, &sine, &cosine);
    cos_sin[t * 2 * half + j] = cosine * factor;
    cos_sin[t * 2 * half + half + j] = sine * factor;
}

int cuda_rope_table(struct device *d, const struct rope_table_params *p, struct error *e)
{
    size_t T = p->cos_sin.shape[0], half = p->cos_sin.shape[1] / 2, n = T * half;
    if (p->cos_sin.n_dims != 2 || p->cos_sin.dtype != DTYPE_F32 || n < 1 || p->cos_sin.shape[1] % 2)
        return error_set(e, ERR_INVALID, "rope_table: shapes do not fit");
    const int32_t *positions = (const int32_t *)device_array(d, p->positions, T * sizeof(int32_t), e);
    if (!positions) return ERR_DEVICE;
    dim3 grid((unsigned)((n + TABLE_THREADS - 1) / TABLE_THREADS));
    return cuda_check(launch_early(d, rope_table_kernel, grid, TABLE_THREADS, 0, (float *)p->cos_sin.data, positions,
                                   p->inv_freq, n, (int32_t)half, p->attention_factor), "rope_table", e);
}

struct rope_args {
    void *qkv;                   // [T, (H + 2 KV) * D]
    const float *cos_sin;        // [T, rope_dim]; NULL: no rotation
    void *k_cache, *v_cache;     // [n_blocks, KV, block_size, D]
    const int32_t *slots;        // [T]
    int32_t n_heads, n_kv_heads, head_dim, rope_dim, block_size;
    const void *q_norm, *k_norm; // [D]; NULL, both: none
    enum dtype q_norm_dtype, k_norm_dtype;
    float norm_eps, norm_weight_offset;
};

// The token's k or v of `head` (counted through q, k and v) in the cache; NULL: q, or the token is not kept.
template <typename T> __device__ __forceinline__ T *place_of(const struct rope_args &a, size_t t, int32_t head)
{
    if (head < a.n_heads || a.slots[t] < 0) return NULL;
    size_t slot = a.slots[t], kv_head = (head - a.n_heads) % a.n_kv_heads;
    size_t row = (slot / a.block_size * a.n_kv_heads + kv_head) * a.block_size + slot % a.block_size;
    return (T *)(head < a.n_heads + a.n_kv_heads ? a.k_cache : a.v_cache) + row * a.head_dim;
}

__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

// A head of q or k, by the whole block.
template <typename T> __device__ void norm_head(const struct rope_args &a, T *x, bool is_q)
{
    __shared__ float sums[THREADS / 32];
    const void *weight = is_q ? a.q_norm : a.k_norm;
    const enum dtype dtype = is_q ? a.q_norm_dtype : a.k_norm_dtype;
    float sum = 0;
    for (int32_t i = threadIdx.x; i < a.head_dim; i += THREADS) sum += to_float(x[i]) * to_float(x[i]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float scale = 1.0f / sqrtf((sums[0] + sums[1]) / a.head_dim + a.norm_eps);
    for (int32_t i = threadIdx.x; i < a.head_dim; i += THREADS)
        x[i] = from_float<T>(to_float(x[i]) * scale * (load_as_float(weight, dtype, i) + a.norm_weight_offset));
    __syncthreads(); // others rotate it
}

template <typename T> __global__ void __launch_bounds__(THREADS) rope_kv_write_kernel(const struct rope_args a)
{
    next_kernel_allow();
    previous_kernel_wait();
    size_t t = blockIdx.x, n_all = (size_t)a.n_heads + 2 * a.n_kv_heads;
    int32_t head = blockIdx.y, half = a.rope_dim / 2;
    T *x = (T *)a.qkv + (t * n_all + head) * a.head_dim;
    bool is_v = head >= a.n_heads + a.n_kv_heads, rotates = a.cos_sin && !is_v;
    T *cache = place_of<T>(a, t, head);
    if (a.q_norm && !is_v) norm_head(a, x, head < a.n_heads);
    const float *cos_row = a.cos_sin + t * a.rope_dim, *sin_row = cos_row + half;
    for (int32_t i = threadIdx.x; rotates && i < half; i += THREADS) {
        float low = to_float(x[i]), high = to_float(x[i + half]), c = cos_row[i], s = sin_row[i];
        T new_low = from_float<T>(low * c - high * s), new_high = from_float<T>(high * c + low * s);
        x[i] = new_low, x[i + half] = new_high;
        if (cache) cache[i] = new_low, cache[i + half] = new_high;
    }
    for (int32_t i = threadIdx.x + (rotates ? a.rope_dim : 0); cache && i < a.head_dim; i += THREADS) cache[i] = x[i];
}

// Vectors i and i + half of a head.
template <typename T>
__device__ __forceinline__ void rotate_vector(T *x, T *cache, const float *cosines, int32_t half, int32_t i)
{
    float low[VECTOR], high[VECTOR], new_low[VECTOR], new_high[VECTOR];
    load_vector(low, x + i), load_vector(high, x + i + half);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) {
        float c = cosines[i + j], s = cosines[half + i + j];
        new_low[j] = low[j] * c - high[j] * s, new_high[j] = high[j] * c + low[j] * s;
    }
    store_vector(x + i, new_low), store_vector(x + i + half, new_high);
    if (!cache) return;
    store_vector(cache + i, new_low), store_vector(cache + i + half, new_high);
}

template <typename T> __global__ void __launch_bounds__(VECTOR_THREADS) rope_kv_write_vectors_kernel(const struct rope_args a)
{
    next_kernel_allow();
    previous_kernel_wait();
    size_t t = blockIdx.x, n_all = (size_t)a.n_heads + 2 * a.n_kv_heads;
    T *row = (T *)a.qkv + t * n_all * a.head_dim;
    int32_t half = a.rope_dim / 2, per_head = half / VECTOR, n_turned = (a.n_heads + a.n_kv_heads) * per_head;
    for (int32_t i = threadIdx.x; i < n_turned; i += VECTOR_THREADS) {
        int32_t head = i / per_head;
        rotate_vector(row + (size_t)head * a.head_dim, place_of<T>(a, t, head), a.cos_sin + t * a.rope_dim, half,
                      i % per_head * VECTOR);
    }
    // What is only moved: the rest of each k, all of each v.
    int32_t k_rest = (a.head_dim - a.rope_dim) / VECTOR, v_all = a.head_dim / VECTOR, n_k = a.n_kv_heads * k_rest;
    for (int32_t i = threadIdx.x; i < n_k + a.n_kv_heads * v_all; i += VECTOR_THREADS) {
        bool is_k = i < n_k;
        int32_t j = is_k ? i : i - n_k, n = is_k ? k_rest : v_all, head = a.n_heads + (is_k ? 0 : a.n_kv_heads) + j / n;
        int32_t at = (is_k ? a.rope_dim : 0) + j % n * VECTOR;
        T *cache = place_of<T>(a, t, head);
        if (cache) *(uint4 *)(cache + at) = *(const uint4 *)(row + (size_t)head * a.head_dim + at);
    }
}

// The lane's vector of a head: normed, and rounded.
template <typename T>
__device__ __forceinline__ void norm_vector(const struct rope_args &a, float (&x)[VECTOR], const float (&weight)[VECTOR])
{
    float sum = 0;
#pragma unroll
    for (int j = 0; j < VECTOR; j++) sum += x[j] * x[j];
    float scale = 1.0f / sqrtf(warp_sum(sum) / a.head_dim + a.norm_eps);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) x[j] = to_float(from_float<T>(x[j] * scale * (weight[j] + a.norm_weight_offset)));
}

// Rotates it: its partner is in another lane.
__device__ __forceinline__ void turn_vector(float (&x)[VECTOR], const float *cosines, int32_t half)
{
    const int32_t at = (int32_t)threadIdx.x % 32 * VECTOR;
    const bool is_low = at < half, turns = at < 2 * half;
    const int32_t from = turns ? (is_low ? at + half : at - half) / VECTOR : 0;
    cosines += turns ? (is_low ? at : at - half) : 0;
#pragma unroll
    for (int j = 0; j < VECTOR; j++) {
        float other = __shfl_sync(~0u, x[j], from), c = cosines[j], s = cosines[half + j];
        if (turns) x[j] = is_low ? x[j] * c - other * s : x[j] * c + other * s;
    }
}

template <typename T> __global__ void __launch_bounds__(NORMED_THREADS) rope_kv_write_normed_kernel(const struct rope_args a)
{
    const int32_t head = (int32_t)(blockIdx.y * HEADS_PER_BLOCK + threadIdx.x / 32), at = (int32_t)threadIdx.x % 32 * VECTOR;
    const size_t t = blockIdx.x, n_all = (size_t)a.n_heads + 2 * a.n_kv_heads;
    const bool is_q = head < a.n_heads, is_v = head >= a.n_heads + a.n_kv_heads, is_there = at < a.head_dim;
    float x[VECTOR] = {}, weight[VECTOR] = {};
    next_kernel_allow();
    if (is_there && !is_v)
        load_vector_as_float<T>(weight, is_q ? a.q_norm : a.k_norm, is_q ? a.q_norm_dtype : a.k_norm_dtype, (size_t)at);
    previous_kernel_wait(); // it writes no weights
    if (head >= (int32_t)n_all) return;
    T *row = (T *)a.qkv + (t * n_all + head) * a.head_dim, *cache = place_of<T>(a, t, head);
    if (is_there) load_vector(x, row + at);
    if (!is_v) {
        norm_vector<T>(a, x, weight);
        if (a.rope_dim > 0) turn_vector(x, a.cos_sin + t * a.rope_dim, a.rope_dim / 2);
        if (is_there) store_vector(row + at, x);
    }
    if (cache && is_there) store_vector(cache + at, x);
}

static int check_cache(struct device *d, const struct rope_kv_write_params *p, struct error *e)
{
    const struct tensor *k = &p->cache.k, *v = &p->cache.v;
    bool same = k->dtype == v->dtype && k->dtype == p->qkv.dtype;
    for (int i = 0; i < 4; i++) same = same && k->shape[i] == v->shape[i];
    if (!k->data || !v->data || !same || k->n_dims != 4 || k->shape[1] != (size_t)p->n_kv_heads ||
        k->shape[3] != (size_t)p->head_dim)
        return error_set(e, ERR_INVALID, "rope_kv_write: the cache's shape does not fit");
    int64_t n_slots = (int64_t)(k->shape[0] * k->shape[2]);
    if (array_is_checked(d, p->slot_mapping)) return 0;
    for (size_t t = 0; t < p->qkv.shape[0]; t++)
        if (p->slot_mapping[t] < -1 || p->slot_mapping[t] >= n_slots)
            return error_set(e, ERR_INVALID, "rope_kv_write: slot %d of %lld", p->slot_mapping[t], (long long)n_slots);
    return 0;
}

int rope_kv_write_check(struct device *d, const struct rope_kv_write_params *p, struct error *e)
{
    size_t n_all = (size_t)(p->n_heads + 2 * p->n_kv_heads);
    if (p->n_kv_heads < 1 || p->n_heads < 1 || p->n_heads % p->n_kv_heads || p->head_dim < 1 || p->qkv.shape[0] < 1 ||
        p->qkv.n_dims != 2 || p->qkv.shape[1] != n_all * (size_t)p->head_dim ||
        (p->cos_sin.data && (p->rope_dim < 0 || p->rope_dim > p->head_dim || p->rope_dim % 2 ||
                             p->cos_sin.dtype != DTYPE_F32 || p->cos_sin.shape[1] != (size_t)p->rope_dim)))
        return error_set(e, ERR_INVALID, "rope_kv_write: shapes do not fit");
    const struct tensor *q = &p->q_norm, *k = &p->k_norm;
    if (!q->data != !k->data || (q->data && (q->shape[0] != (size_t)p->head_dim || k->shape[0] != (size_t)p->head_dim)))
        return error_set(e, ERR_INVALID, "rope_kv_write: norms of q and k are not [%d] both", p->head_dim);
    return check_cache(d, p, e);
}

template <typename T>
static cudaError_t launch_vectors(const struct device *d, unsigned n_tokens, unsigned n_all, const struct rope_args &a)
{
    dim3 grid(n_tokens, (n_all + HEADS_PER_BLOCK - 1) / HEADS_PER_BLOCK);
    if (a.q_norm) return launch_early(d, rope_kv_write_normed_kernel<T>, grid, NORMED_THREADS, 0, a);
    return launch_early(d, rope_kv_write_vectors_kernel<T>, dim3(n_tokens), VECTOR_THREADS, 0, a);
}

int cuda_rope_kv_write(struct device *d, const struct rope_kv_write_params *p, struct error *e)
{
    size_t T = p->qkv.shape[0], n_all = (size_t)(p->n_heads + 2 * p->n_kv_heads);
    int rc = rope_kv_write_check(d, p, e);
    if (rc) return rc;
    struct rope_args a = {};
    a.qkv = p->qkv.data, a.cos_sin = (const float *)p->cos_sin.data;
    a.k_cache = p->cache.k.data, a.v_cache = p->cache.v.data;
    a.slots = (const int32_t *)device_array(d, p->slot_mapping, T * sizeof(int32_t), e);
    if (!a.slots) return ERR_DEVICE;
    a.n_heads = p->n_heads, a.n_kv_heads = p->n_kv_heads, a.head_dim = p->head_dim;
    a.rope_dim = a.cos_sin ? p->rope_dim : 0, a.block_size = (int32_t)p->cache.k.shape[2];
    a.q_norm = p->q_norm.data, a.q_norm_dtype = p->q_norm.dtype, a.k_norm = p->k_norm.data, a.k_norm_dtype = p->k_norm.dtype;
    a.norm_eps = p->norm_eps, a.norm_weight_offset = p->norm_weight_offset;
    bool vectors = p->qkv.dtype != DTYPE_F32 && a.head_dim % VECTOR == 0 && a.rope_dim / 2 % VECTOR == 0;
    if (a.q_norm) vectors = vectors && a.head_dim <= 32 * VECTOR && is_aligned(a.q_norm) && is_aligned(a.k_norm);
    cudaError_t status;
    if (!vectors)
        FOR_ACTIVATION_TYPE(p->qkv.dtype, T_, status = launch_early(d, rope_kv_write_kernel<T_>,
                                                                    dim3((unsigned)T, (unsigned)n_all), THREADS, 0, a));
    else if (p->qkv.dtype == DTYPE_BF16)
        status = launch_vectors<__nv_bfloat16>(d, (unsigned)T, (unsigned)n_all, a);
    else
        status = launch_vectors<__half>(d, (unsigned)T, (unsigned)n_all, a);
    return cuda_check(status, "rope_kv_write", e);
}
