/* few_rows.cuh: reading the weights of a product with few rows of x: what the kernels of linear_few.cu and linear_chain.cu
 * share. Tiles of 16 rows of w, in steps of 64 columns, each warp through a ring of its own in shared memory.
 */
#ifndef GPTD_KERNELS_CUDA_FEW_ROWS_CUH
#define GPTD_KERNELS_CUDA_FEW_ROWS_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear_few.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/types.cuh"

namespace {

enum {
    TILE_ROWS = 16,
    STEP = 64,               // columns of a warp's step: 128 bytes of a row
    STEP_VECTORS = STEP / VECTOR,
    ROW_BYTES = STEP * 2,
};

enum ending { STORE, GATED, ROPE };

struct few_args {
    const void *w[MAX_WEIGHT_PARTS], *bias[MAX_WEIGHT_PARTS]; // [end[i] - end[i - 1], K]
    enum dtype bias_dtype[MAX_WEIGHT_PARTS];
    int32_t end[MAX_WEIGHT_PARTS]; // rows of the parts up to this one
    const void *x;                 // [T, K]
    const void *norm;              // [K] of x's type
    float eps;
    bool add_1;                    // to norm
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

// Row i of a tile, as the weight has them.
template <enum ending ENDING> __device__ __forceinline__ int32_t row_of(const few_args &a, int32_t tile, int32_t i)
{
    const int32_t pair = TILE_ROWS / 2;
    if (ENDING == STORE) return tile * TILE_ROWS + i;
    if (ENDING == GATED) return (i < pair ? 0 : a.N / 2) + tile * pair + i % pair;
    int32_t per_head = a.head_dim / TILE_ROWS, head = tile / per_head, j = tile % per_head, half = a.rope_dim / 2;
    bool rotates = head < a.n_heads + a.n_kv_heads && j < half / pair;
    return head * a.head_dim + (rotates ? j * pair + i % pair + (i < pair ? 0 : half) : j * TILE_ROWS + i);
}

template <typename T> __device__ __forceinline__ const T *address_of(const few_args &a, int32_t row)
{
    row = min(row, a.N - 1);
    const T *w = (const T *)a.w[0];
    if (a.end[0] < a.N) { // more than one part
        int32_t begin = 0;
#pragma unroll
        for (int i = 1; i < MAX_WEIGHT_PARTS; i++)
            if (row >= a.end[i - 1]) w = (const T *)a.w[i], begin = a.end[i - 1];
        row -= begin;
    }
    return w + (uint64_t)(uint32_t)row * (uint32_t)a.K;
}

__device__ __forceinline__ float bias_of(const few_args &a, int32_t row)
{
    int32_t part = 0, begin = 0;
#pragma unroll
    for (int i = 1; i < MAX_WEIGHT_PARTS; i++)
        if (row >= a.end[i - 1]) part = i, begin = a.end[i - 1];
    return a.bias[part] ? load_as_float(a.bias[part], a.bias_dtype[part], row - begin) : 0.0f;
}

// ---- the ring -------------------------------------------------------------------------------------------------------

// A warp's place in its list of steps of 64 columns. APART: columns from a step to the next. STEP: the warp has a tile to
// itself; a multiple of it: as many warps share the block's tiles, each with columns of its own.
template <typename T> struct few_cursor {
    const T *row[TILE_ROWS / 4]; // rows of w that the lane fetches of, from `column` on
    int32_t tile, column;        // the lane's first column
};

template <int APART> __device__ __forceinline__ int32_t first_column()
{
    return (int32_t)(threadIdx.x / 32 * STEP % APART);
}

template <int APART> __device__ __forceinline__ int32_t first_tile()
{
    return (int32_t)(blockIdx.x + (APART == STEP ? threadIdx.x / 32 * gridDim.x : 0));
}

template <int APART> __device__ __forceinline__ int32_t tiles_apart()
{
    return (int32_t)(gridDim.x * (APART == STEP ? blockDim.x / 32 : 1));
}

template <typename T, enum ending ENDING, int APART>
__device__ __forceinline__ void to_tile(const few_args &a, few_cursor<T> &c, int32_t tile)
{
    int32_t lane = (int32_t)threadIdx.x % 32;
    c.tile = tile, c.column = first_column<APART>() + lane % STEP_VECTORS * VECTOR;
#pragma unroll
    for (int i = 0; i < TILE_ROWS / 4; i++)
        c.row[i] = address_of<T>(a, row_of<ENDING>(a, tile, lane / STEP_VECTORS + 4 * i)) + c.column;
}

template <typename T, enum ending ENDING, int APART>
__device__ __forceinline__ void advance(const few_args &a, few_cursor<T> &c)
{
    c.column += APART;
#pragma unroll
    for (int i = 0; i < TILE_ROWS / 4; i++) c.row[i] += APART;
    if (c.column - (int32_t)threadIdx.x % STEP_VECTORS * VECTOR - first_column<APART>() >= a.K)
        to_tile<T, ENDING, APART>(a, c, c.tile + tiles_apart<APART>());
}

// Vector `vector` of row `row` of a stage: turned, so that ldmatrix, which reads a vector of eight rows, meets every bank once.
__device__ __forceinline__ uint32_t place_of(int32_t row, int32_t vector)
{
    return (uint32_t)(row * ROW_BYTES + (vector ^ (row & 7)) * 16);
}

template <typename T>
__device__ __forceinline__ void fetch_weights(const few_args &a, const few_cursor<T> &c, int32_t n_tiles, uint32_t stage)
{
    int32_t lane = (int32_t)threadIdx.x % 32;
    bool there = c.tile < n_tiles && c.column < a.K;
#pragma unroll
    for (int i = 0; i < TILE_ROWS / 4; i++)
        cp_async_16_once(stage + place_of(lane / STEP_VECTORS + 4 * i, lane % STEP_VECTORS), c.row[i], there ? 16 : 0);
}

// Rows of x that the lane fetches of, the norm's weight the last; NULL: none.
template <typename T, bool NORMED, int X_ROWS> struct x_rows {
    static constexpr int N = (X_ROWS + NORMED + 3) / 4;
    const T *row[N];
};

template <typename T, bool NORMED, int X_ROWS>
__device__ __forceinline__ x_rows<T, NORMED, X_ROWS> rows_of_x(const few_args &a)
{
    x_rows<T, NORMED, X_ROWS> x;
#pragma unroll
    for (int i = 0; i < x_rows<T, NORMED, X_ROWS>::N; i++) {
        int32_t row = (int32_t)threadIdx.x % 32 / STEP_VECTORS + 4 * i;
        x.row[i] = row < a.T ? (const T *)a.x + (size_t)row * a.K : NORMED && row == X_ROWS ? (const T *)a.norm : NULL;
    }
    return x;
}

template <typename T, bool NORMED, int X_ROWS>
__device__ __forceinline__ void fetch_x(const few_args &a, const few_cursor<T> &c, const x_rows<T, NORMED, X_ROWS> &x,
                                        int32_t n_tiles, uint32_t stage)
{
    int32_t lane = (int32_t)threadIdx.x % 32;
    bool there = c.tile < n_tiles && c.column < a.K;
#pragma unroll
    for (int i = 0; i < x_rows<T, NORMED, X_ROWS>::N; i++) {
        int32_t row = lane / STEP_VECTORS + 4 * i;
        const T *from = x.row[i] ? x.row[i] : (const T *)a.x;
        if (row < X_ROWS + NORMED)
            cp_async_16(stage + place_of(TILE_ROWS + row, lane % STEP_VECTORS), from + (there ? c.column : 0),
                        there && x.row[i] ? 16 : 0);
    }
}

// Where in a stage a lane's rows for ldmatrix begin: further vectors are at what a vector's bits are turned in.
struct lane_places {
    uint32_t w, x, norm;
};

template <int X_ROWS> __device__ __forceinline__ lane_places places_of(int32_t lane)
{
    return {place_of(lane % 8 + (lane / 8 & 1) * 8, lane / 16), place_of(TILE_ROWS + min(lane % 8, X_ROWS - 1), lane / 8),
            place_of(TILE_ROWS + X_ROWS, lane / 8)};
}

} // namespace

#endif
