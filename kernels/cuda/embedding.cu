/* embedding.cu: rows in and out of the model: token and position embedding, gathering rows, the token history.
 *
 * Grid: one block a row, its threads over the columns. Bytes: each row read once and written once. Bound by latency where
 * rows are few: a thread of the embedding moves 16 bytes at once (element by element: 18 us of a step, 4,096 columns).
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/types.cuh"

enum { THREADS = 128, EMBEDDING_THREADS = 256 };

// ---- embedding ------------------------------------------------------------------------------------------------------

struct embedding_args {
    bool vectors;               // whole vectors, aligned
    void *out;                  // [T, dim]
    const void *token_table, *pos_table;
    enum dtype token_dtype, pos_dtype;
    const int32_t *tokens, *positions, *history_rows;
    const int32_t *history;     // [n_slots, max_len]
    int32_t max_len, vocab_size, n_positions;
    size_t dim;
    float scale;
};

// A row whose columns are whole vectors: 16 bytes a load.
template <typename T>
__device__ __forceinline__ void embed_vectors(const embedding_args &a, T *out, size_t row, bool has_position,
                                              size_t position_row)
{
    float x[VECTOR], other[VECTOR];
#pragma unroll 2
    for (size_t i = threadIdx.x * VECTOR; i < a.dim; i += EMBEDDING_THREADS * VECTOR) {
        load_vector_as_float<T>(x, a.token_table, a.token_dtype, row + i);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) x[j] *= a.scale;
        if (has_position) {
            load_vector_as_float<T>(other, a.pos_table, a.pos_dtype, position_row + i);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) x[j] += other[j];
        }
        store_vector(out + i, x);
    }
}

// A token that is not in the vocabulary cannot come from the engine; the first row stands in for it all the same, so that
// no address outside the table is read.
template <typename T> __global__ void __launch_bounds__(EMBEDDING_THREADS) embedding_kernel(const struct embedding_args a)
{
    size_t t = blockIdx.x;
    previous_kernel_wait();
    next_kernel_allow(); // not before: what begins after this finds the step's arrays there
    int32_t position = a.positions[t], token = a.tokens[t];
    if (token < 0) token = a.history[(size_t)a.history_rows[t] * (size_t)a.max_len + (size_t)position];
    if (token < 0 || token >= a.vocab_size) token = 0;
    T *out = (T *)a.out + t * a.dim;
    const bool has_position = a.pos_table && position < a.n_positions;
    const size_t row = (size_t)token * a.dim, position_row = (size_t)position * a.dim;
    if constexpr (sizeof(T) == 2) {
        if (a.vectors) {
            embed_vectors(a, out, row, has_position, position_row);
            return;
        }
    }
    for (size_t i = threadIdx.x; i < a.dim; i += EMBEDDING_THREADS) {
        float x = a.scale * load_as_float(a.token_table, a.token_dtype, row + i);
        if (has_position) x += load_as_float(a.pos_table, a.pos_dtype, position_row + i);
        out[i] = from_float<T>(x);
    }
}

int cuda_embedding(struct device *d, const struct embedding_params *p, struct error *e)
{
    size_t T = p->out.shape[0], dim = p->out.shape[1], bytes = T * sizeof(int32_t);
    if (p->out.n_dims != 2 || p->token_table.n_dims != 2 || p->token_table.shape[1] != dim || T < 1 ||
        (p->pos_table.data && p->pos_table.shape[1] != dim))
        return error_set(e, ERR_INVALID, "embedding: shapes do not fit");
    struct embedding_args a = {};
    a.out = p->out.data;
    a.token_table = p->token_table.data, a.token_dtype = p->token_table.dtype;
    a.pos_table = p->pos_table.data, a.pos_dtype = p->pos_table.dtype;
    a.tokens = (const int32_t *)device_array(d, p->tokens, bytes, e);
    if (a.tokens) a.positions = (const int32_t *)device_array(d, p->positions, bytes, e);
    if (a.positions) a.history_rows = (const int32_t *)device_array(d, p->history_rows, bytes, e);
    if (!a.history_rows) return ERR_DEVICE;
    a.history = p->history.tokens, a.max_len = p->history.max_len;
    a.vocab_size = (int32_t)p->token_table.shape[0], a.n_positions = (int32_t)p->pos_table.shape[0];
    a.dim = dim, a.scale = p->scale;
    a.vectors = dim % VECTOR == 0 && is_aligned(a.out) && is_aligned(a.token_table) && is_aligned(a.pos_table);
    cudaError_t status;
    FOR_ACTIVATION_TYPE(p->out.dtype, T_,
                        status = launch_early(d, embedding_kernel<T_>, dim3((unsigned)T), EMBEDDING_THREADS, 0, a));
    return cuda_check(status, "embedding", e);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(THREADS)
gather_rows_kernel(char *out, const char *x, const int32_t *rows, size_t row_bytes)
{
    next_kernel_allow();
    previous_kernel_wait();
    const char *from = x + (size_t)rows[blockIdx.x] * row_bytes;
    char *to = out + blockIdx.x * row_bytes;
    for (size_t i = threadIdx.x * 2; i < row_bytes; i += THREADS * 2) *(uint16_t *)(to + i) = *(const uint16_t *)(from + i);
}

int cuda_gather_rows(struct device *d, const struct gather_rows_params *p, struct error *e)
{
    if (p->n < 1 || p->out.dtype != p->x.dtype || p->out.shape[0] != (size_t)p->n || p->out.shape[1] != p->x.shape[1])
        return error_set(e, ERR_INVALID, "gather_rows: shapes do not fit");
    for (int32_t i = 0; i < p->n; i++)
        if (p->rows[i] < 0 || (size_t)p->rows[i] >= p->x.shape[0])
            return error_set(e, ERR_INVALID, "gather_rows: row %d is %d", i, p->rows[i]);
    const int32_t *rows = (const int32_t *)device_array(d, p->rows, (size_t)p->n * sizeof(int32_t), e);
    if (!rows) return ERR_DEVICE;
    return cuda_check(launch_early(d, gather_rows_kernel, dim3((unsigned)p->n), THREADS, 0, (char *)p->out.data,
                                   (const char *)p->x.data, rows, p->x.shape[1] * dtype_size(p->x.dtype)),
                      "gather_rows", e);
}

// ---- history --------------------------------------------------------------------------------------------------------

int cuda_history_write(struct device *d, struct history history, int32_t row, int32_t position, const int32_t *tokens,
                       int32_t n, struct error *e)
{
    enum { PIECE = 1 << 18 }; // tokens at once: pieces of a loose array's size
    if (row < 0 || row >= history.n_slots || position < 0 || n < 0 || n > history.max_len - position)
        return error_set(e, ERR_INVALID, "history_write: row %d, %d tokens at %d", row, n, position);
    int32_t *to = history.tokens + (size_t)row * (size_t)history.max_len + position;
    for (int32_t i = 0; i < n; i += PIECE) {
        size_t bytes = (size_t)(n - i < PIECE ? n - i : PIECE) * sizeof(int32_t);
        const void *from = device_array(d, tokens + i, bytes, e);
        if (!from) return ERR_DEVICE;
        if (cuda_check(cudaMemcpyAsync(to + i, from, bytes, cudaMemcpyDeviceToDevice, d->stream), "history_write", e))
            return ERR_DEVICE;
    }
    return 0;
}

// ---- whole blocks ---------------------------------------------------------------------------------------------------

// One block a pair and cache; 16 bytes a thread and turn.
__global__ void __launch_bounds__(THREADS)
copy_blocks_kernel(char *k, char *v, const int32_t *from, const int32_t *to, size_t block_bytes)
{
    char *cache = blockIdx.y ? v : k;
    const char *source = cache + (size_t)from[blockIdx.x] * block_bytes;
    char *target = cache + (size_t)to[blockIdx.x] * block_bytes;
    for (size_t i = threadIdx.x * 16; i < block_bytes; i += THREADS * 16)
        *(uint4 *)(target + i) = *(const uint4 *)(source + i);
}

int cuda_copy_blocks(struct device *d, struct kv_layer cache, const int32_t *from, const int32_t *to, int32_t n,
                     struct error *e)
{
    if (n == 0) return 0;
    size_t bytes = cache.k.shape[1] * cache.k.shape[2] * cache.k.shape[3] * dtype_size(cache.k.dtype);
    for (int32_t i = 0; i < n; i++)
        if (from[i] < 0 || to[i] < 0 || (size_t)from[i] >= cache.k.shape[0] || (size_t)to[i] >= cache.k.shape[0])
            return error_set(e, ERR_INVALID, "copy_blocks: %d to %d of %zu", from[i], to[i], cache.k.shape[0]);
    const int32_t *a = (const int32_t *)device_array(d, from, (size_t)n * sizeof(int32_t), e);
    const int32_t *b = a ? (const int32_t *)device_array(d, to, (size_t)n * sizeof(int32_t), e) : NULL;
    if (!b) return ERR_DEVICE;
    copy_blocks_kernel<<<dim3((unsigned)n, 2), THREADS, 0, d->stream>>>((char *)cache.k.data, (char *)cache.v.data, a, b,
                                                                        bytes);
    return launch_check("copy_blocks", e);
}
