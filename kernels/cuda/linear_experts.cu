/* linear_experts.cu: out[i] = W_e x[row of pair i]: the products of a mixture of experts, with the pairs sorted by expert.
 *
 * An element is one chain of mma.sync m16n8k16 over k ascending, in F32, from zero, rounded once (w as A [16 rows of w, 16 k],
 * x as B [16 k, 8 pairs]), in every kernel here: a pair's bits are the same alone and in any batch. What the chain is for other
 * products, linear_chain.cu says. The grid depends on the numbers of tokens and experts alone; blocks find in the plan's offsets
 * what is theirs, and return where there is nothing.
 *
 * Up to 8 tokens, so that no expert has more pairs: a block a multiprocessor, whose warps take tiles of 16 rows of w of any
 * expert in turns, each through a ring of its own (the rings of few_rows.cuh: 64 columns a step). Bound by reading once the
 * weights of experts that have pairs: N K 2 bytes each.
 * More: tiles in shared memory, of rows of w times pairs of one expert, 64 columns a stage, a block each; tiles of one expert
 * and the same rows of w come one after the other, so that w is read from memory once. 128 x 64 while experts have few pairs
 * (bound by reading w), else 256 x 128, 64 x 64 a warp, of which the fragments of the next 16 columns are fetched while the
 * present are multiplied (2 P N K FLOPs: bound by mma.sync). Out goes through shared memory, so that its rows are written
 * whole.
 *
 * Measured (H200, 2026-11-28, bench_cuda_experts, Mixtral 8x7B): 4.15 to 4.33 TB/s of weights up to 64 tokens (4.57 is what reading
 * gives there); 8,192 tokens 363 and 292 TFLOP/s for gate+up and down, 0.45 and 0.37 of cuBLASLt's for a dense product.
 */
#include "kernels/cuda/few_rows.cuh"

namespace {

struct experts_args {
    const void *w[2];  // of expert 0: [rows of the part, K]
    size_t apart[2];   // elements from an expert to the next
    int32_t end, N, K; // rows of the first part, of all
    const void *x;     // [T or P, K]
    void *out;         // [P, N]
    const int32_t *tokens, *offsets; // tokens NULL: x is in the plan's order
    int32_t E, P;
};

// ---- up to 8 tokens -------------------------------------------------------------------------------------------------

enum { FEW_PAIRS = FEW_ROWS * MAX_CHOSEN_EXPERTS, MAX_FEW_WARPS = 8 };

// The experts that have pairs, and which rows of x those are; -1: none.
struct few_list {
    int32_t expert[FEW_PAIRS], first[FEW_PAIRS + 1]; // of its pairs, the first
    int32_t x_row[FEW_PAIRS][FEW_ROWS];
    int32_t n_experts;
};

template <int X_ROWS, int N_WARPS> struct few_tiles {
    static constexpr int STAGE_BYTES = (TILE_ROWS + X_ROWS) * ROW_BYTES;
    static constexpr int STAGES = (FEW_SMEM - (int)sizeof(few_list)) / STAGE_BYTES / N_WARPS;
    static constexpr int RING_BYTES = STAGES * STAGE_BYTES;
    static constexpr int SMEM = RING_BYTES * N_WARPS + (int)sizeof(few_list);
};

// By the whole block.
__device__ __forceinline__ void list_experts(const experts_args &a, few_list &list)
{
    if (threadIdx.x < 32) {
        const int32_t lane = (int32_t)threadIdx.x;
        int32_t n = 0;
        for (int32_t e = lane; e - lane < a.E; e += 32) {
            const int32_t first = e < a.E ? a.offsets[e] : 0, end = e < a.E ? a.offsets[e + 1] : 0;
            const uint32_t used = __ballot_sync(~0u, end > first);
            const int32_t at = n + __popc(used & ((1u << lane) - 1));
            if (end > first) list.expert[at] = e, list.first[at] = first;
            n += __popc(used);
        }
        if (lane == 0) list.n_experts = n, list.first[n] = a.P; // pairs of experts lie one after the other
    }
    __syncthreads();
    for (int32_t i = (int32_t)threadIdx.x; i < list.n_experts * FEW_ROWS; i += (int32_t)blockDim.x) {
        const int32_t entry = i / FEW_ROWS, row = i % FEW_ROWS, pair = list.first[entry] + row;
        const bool there = pair < list.first[entry + 1];
        list.x_row[entry][row] = !there ? -1 : a.tokens ? a.tokens[pair] : pair;
    }
    __syncthreads();
}

// A warp's place in its list of steps: what the lane fetches next. Unit: a tile of an expert that has pairs.
template <typename T, int X_ROWS> struct experts_cursor {
    static constexpr int N_X = (X_ROWS + 3) / 4;
    const T *w[TILE_ROWS / 4], *x[N_X]; // from `column` on; x NULL: no pair
    int32_t unit, column;
};

// What one block's warps need to go from unit to unit.
struct few_units {
    const few_list *list;
    int32_t n_tiles, n, apart;
};

template <typename T, int X_ROWS>
__device__ __forceinline__ void to_unit(const experts_args &a, const few_units &units, experts_cursor<T, X_ROWS> &c, int32_t unit)
{
    const int32_t lane = (int32_t)threadIdx.x % 32, entry = min(unit, units.n - 1) / units.n_tiles;
    const int32_t tile = unit % units.n_tiles, expert = units.list->expert[entry];
    c.unit = unit, c.column = lane % STEP_VECTORS * VECTOR;
#pragma unroll
    for (int i = 0; i < TILE_ROWS / 4; i++) {
        const int32_t row = min(tile * TILE_ROWS + lane / STEP_VECTORS + 4 * i, a.N - 1), part = row >= a.end;
        c.w[i] = (const T *)a.w[part] + (size_t)expert * a.apart[part] + (size_t)(row - part * a.end) * a.K + c.column;
    }
#pragma unroll
    for (int i = 0; i < c.N_X; i++) {
        const int32_t row = lane / STEP_VECTORS + 4 * i, x_row = row < X_ROWS ? units.list->x_row[entry][row] : -1;
        c.x[i] = x_row < 0 ? NULL : (const T *)a.x + (size_t)x_row * a.K + c.column;
    }
}

template <typename T, int X_ROWS>
__device__ __forceinline__ void fetch_step(const experts_args &a, const few_units &units, experts_cursor<T, X_ROWS> &c,
                                           uint32_t stage)
{
    const int32_t lane = (int32_t)threadIdx.x % 32;
    if (c.unit >= units.n) return;
#pragma unroll
    for (int i = 0; i < TILE_ROWS / 4; i++)
        cp_async_16_once(stage + place_of(lane / STEP_VECTORS + 4 * i, lane % STEP_VECTORS), c.w[i], c.column < a.K ? 16 : 0);
#pragma unroll
    for (int i = 0; i < c.N_X; i++) {
        const int32_t row = lane / STEP_VECTORS + 4 * i;
        if (row < X_ROWS)
            cp_async_16(stage + place_of(TILE_ROWS + row, lane % STEP_VECTORS), c.x[i] ? c.x[i] : (const T *)a.x,
                        c.x[i] && c.column < a.K ? 16 : 0);
    }
    c.column += STEP;
#pragma unroll
    for (int i = 0; i < TILE_ROWS / 4; i++) c.w[i] += STEP;
#pragma unroll
    for (int i = 0; i < c.N_X; i++)
        if (c.x[i]) c.x[i] += STEP;
    if (c.column - lane % STEP_VECTORS * VECTOR >= a.K) to_unit(a, units, c, c.unit + units.apart);
}

struct experts_step {
    uint32_t w[STEP / 16][4], x[2][4];
};

__device__ __forceinline__ void load_step(experts_step &s, const lane_places &places, uint32_t stage, int i)
{
    ldmatrix(s.w[i], (stage + places.w) ^ (uint32_t)(i * 32));
    if (i < 2) ldmatrix(s.x[i], (stage + places.x) ^ (uint32_t)(i * 64));
}

template <typename T>
__device__ __forceinline__ void store_unit(const experts_args &a, const few_units &units, int32_t unit, const float (&sum)[4])
{
    const int32_t lane = (int32_t)threadIdx.x % 32, entry = unit / units.n_tiles, tile = unit % units.n_tiles;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int32_t row = tile * TILE_ROWS + lane / 4 + i / 2 * 8, pair = units.list->first[entry] + lane % 4 * 2 + i % 2;
        if (row < a.N && pair < units.list->first[entry + 1])
            ((T *)a.out)[(size_t)pair * a.N + row] = from_float<T>(sum[i]);
    }
}

template <typename T, int X_ROWS, int N_WARPS>
__global__ void __launch_bounds__(N_WARPS * 32, 1) experts_few_kernel(const __grid_constant__ experts_args a)
{
    using shape = few_tiles<X_ROWS, N_WARPS>;
    extern __shared__ __align__(128) unsigned char smem[];
    few_list &list = *(few_list *)(smem + shape::RING_BYTES * N_WARPS);
    const int32_t warp = (int32_t)threadIdx.x / 32, n_steps = (a.K + STEP - 1) / STEP;
    const uint32_t ring = shared_address(smem) + (uint32_t)(warp * shape::RING_BYTES), ring_end = ring + shape::RING_BYTES;
    const lane_places places = places_of<X_ROWS>((int32_t)threadIdx.x % 32);
    next_kernel_allow();
    previous_kernel_wait();
    list_experts(a, list);
    const int32_t n_tiles = (a.N + TILE_ROWS - 1) / TILE_ROWS;
    const few_units units = {&list, n_tiles, list.n_experts * n_tiles, (int32_t)gridDim.x * N_WARPS};
    int32_t unit = (int32_t)blockIdx.x + warp * (int32_t)gridDim.x, left = n_steps;
    if (unit >= units.n) return;
    experts_cursor<T, X_ROWS> ahead;
    to_unit(a, units, ahead, unit);
    auto after = [&](uint32_t at) {
        at = at + shape::STAGE_BYTES == ring_end ? ring : at + shape::STAGE_BYTES;
        asm volatile("" : "+r"(at)); // as linear_chain.cu says
        return at;
    };
    uint32_t stage = ring;
#pragma unroll 1
    for (int i = 0; i < shape::STAGES; i++, stage = after(stage)) {
        fetch_step(a, units, ahead, stage);
        cp_async_commit();
    }
    experts_step step[2]; // stage: of the one whose operands are in registers
    cp_async_wait<shape::STAGES - 1>();
    __syncwarp(); // every lane's part
#pragma unroll
    for (int i = 0; i < STEP / 16; i++) load_step(step[0], places, stage, i);
    float sum[4] = {};
    // One step: its products, the next one's operands, and what its stage holds next.
    auto go = [&](const experts_step &now, experts_step &next) {
        const uint32_t freed = stage;
        stage = after(stage);
        cp_async_wait<shape::STAGES - 2>();
        __syncwarp(); // every lane's part; all lanes have read what is freed
        mma<T>(sum, now.w[0], now.x[0][0], now.x[0][1]);
        load_step(next, places, stage, 0);
        load_step(next, places, stage, 1);
        mma<T>(sum, now.w[1], now.x[0][2], now.x[0][3]);
        load_step(next, places, stage, 2);
        load_step(next, places, stage, 3);
        mma<T>(sum, now.w[2], now.x[1][0], now.x[1][1]);
        fetch_step(a, units, ahead, freed);
        cp_async_commit();
        mma<T>(sum, now.w[3], now.x[1][2], now.x[1][3]);
        if (--left > 0) return;
        store_unit<T>(a, units, unit, sum);
        unit += units.apart, left = n_steps;
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = 0;
    };
    while (unit < units.n) {
        go(step[0], step[1]);
        if (unit >= units.n) break;
        go(step[1], step[0]);
    }
}

// ---- more -----------------------------------------------------------------------------------------------------------

// A block's tile: rows of w and pairs, divided among W_WARPS x X_WARPS warps.
template <int W, int X, int W_WARPS_, int X_WARPS_, int STAGES_, int BLOCKS_> struct tile_shape {
    static constexpr int W_ROWS = W, X_ROWS = X, W_WARPS = W_WARPS_, X_WARPS = X_WARPS_, STAGES = STAGES_, BLOCKS = BLOCKS_;
    static constexpr int THREADS = W_WARPS * X_WARPS * 32;
    static constexpr int WARP_W = W_ROWS / W_WARPS, WARP_X = X_ROWS / X_WARPS; // of a warp
    static constexpr int STAGE_BYTES = (W_ROWS + X_ROWS) * ROW_BYTES;
    static constexpr int OUT_STRIDE = W_ROWS + VECTOR; // elements of a row of out in shared memory: no bank twice
    static constexpr int SMEM = STAGES * STAGE_BYTES;
    static_assert(X_ROWS * OUT_STRIDE * 2 <= SMEM && SMEM <= MAX_BLOCK_SMEM, "out takes the place of the stages");
    static_assert(WARP_W % 16 == 0 && WARP_X % 16 == 0 && W_ROWS * STEP_VECTORS % THREADS == 0 &&
                  X_ROWS * STEP_VECTORS % THREADS == 0, "whole fragments, whole rounds of loads");
};

using narrow_tile = tile_shape<128, 64, 4, 2, 4, 2>;
using wide_tile = tile_shape<256, 128, 4, 2, 3, 1>;

struct tile_work {
    int32_t expert;           // -1: none
    int32_t first, n;         // its pairs in this tile
    int32_t part, w_first;    // row of the part
};

// Tile `block` of all there are: experts in order, their rows of w in order, then their pairs. By one warp; one lane writes it.
template <typename S> __device__ __forceinline__ void find_work(const experts_args &a, int32_t block, tile_work &work)
{
    const int32_t lane = (int32_t)threadIdx.x, per_lane = (a.E + 31) / 32, begin = lane * per_lane;
    const int32_t tiles_0 = (a.end + S::W_ROWS - 1) / S::W_ROWS;
    const int32_t w_tiles = tiles_0 + (a.N - a.end + S::W_ROWS - 1) / S::W_ROWS;
    int32_t sum = 0;
    for (int32_t e = begin; e < begin + per_lane && e < a.E; e++)
        sum += (a.offsets[e + 1] - a.offsets[e] + S::X_ROWS - 1) / S::X_ROWS;
    int32_t at = sum;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        int32_t below = __shfl_up_sync(~0u, at, i);
        if (lane >= i) at += below;
    }
    if (lane == 31 && block >= at * w_tiles) work.expert = -1;
    at -= sum;
    if (block < at * w_tiles || block >= (at + sum) * w_tiles) return;
    int32_t e = begin, n_tiles = 0;
    for (block -= at * w_tiles;; e++, block -= n_tiles * w_tiles) {
        n_tiles = (a.offsets[e + 1] - a.offsets[e] + S::X_ROWS - 1) / S::X_ROWS;
        if (block < n_tiles * w_tiles) break;
    }
    const int32_t w_tile = block / n_tiles;
    work.expert = e, work.first = a.offsets[e] + block % n_tiles * S::X_ROWS;
    work.n = min(S::X_ROWS, a.offsets[e + 1] - work.first);
    work.part = w_tile >= tiles_0, work.w_first = (w_tile - (work.part ? tiles_0 : 0)) * S::W_ROWS;
}

// What a thread fetches of a stage: a vector of every THREADS / 8 rows.
template <typename T, typename S> struct tile_source {
    static constexpr int ROWS_APART = S::THREADS / STEP_VECTORS, N_W = S::W_ROWS / ROWS_APART, N_X = S::X_ROWS / ROWS_APART;
    const T *w, *x[N_X]; // at the thread's column; x NULL: no pair
    int32_t w_row, last_w_row;
};

template <typename T, typename S>
__device__ __forceinline__ tile_source<T, S> source_of(const experts_args &a, const tile_work &work)
{
    tile_source<T, S> s;
    const int32_t column = (int32_t)threadIdx.x % STEP_VECTORS * VECTOR, row = (int32_t)threadIdx.x / STEP_VECTORS;
    s.w = (const T *)a.w[work.part] + (size_t)work.expert * a.apart[work.part] + column;
    s.w_row = work.w_first + row, s.last_w_row = (work.part ? a.N - a.end : a.end) - 1;
#pragma unroll
    for (int i = 0; i < s.N_X; i++) {
        const int32_t local = row + i * s.ROWS_APART, pair = work.first + local;
        s.x[i] = local >= work.n ? NULL : (const T *)a.x + (size_t)(a.tokens ? a.tokens[pair] : pair) * a.K + column;
    }
    return s;
}

// Columns step * 64 .. of the tile's rows; zeros beyond K and for pairs that are not there. Rows of w beyond the last are it.
template <typename T, typename S>
__device__ __forceinline__ void fetch_stage(const experts_args &a, const tile_source<T, S> &s, int32_t step, uint32_t stage)
{
    const int32_t row = (int32_t)threadIdx.x / STEP_VECTORS, vector = (int32_t)threadIdx.x % STEP_VECTORS;
    const bool there = step * STEP + vector * VECTOR < a.K;
    const int32_t column = there ? step * STEP : 0;
#pragma unroll
    for (int i = 0; i < s.N_W; i++)
        cp_async_16(stage + place_of(row + i * s.ROWS_APART, vector),
                    s.w + (size_t)min(s.w_row + i * s.ROWS_APART, s.last_w_row) * a.K + column, there ? 16 : 0);
#pragma unroll
    for (int i = 0; i < s.N_X; i++)
        cp_async_16(stage + place_of(S::W_ROWS + row + i * s.ROWS_APART, vector), s.x[i] ? s.x[i] + column : (const T *)a.x,
                    there && s.x[i] ? 16 : 0);
}

// Of 16 columns: a warp's rows of w as A, its pairs as B, two tiles of 8 in each.
template <typename S> struct tile_fragments {
    uint32_t w[S::WARP_W / 16][4], x[S::WARP_X / 16][4];
};

template <typename S>
__device__ __forceinline__ void load_fragments(tile_fragments<S> &f, uint32_t w, uint32_t x, int k)
{
#pragma unroll
    for (int i = 0; i < S::WARP_W / 16; i++) ldmatrix(f.w[i], (w + i * 16 * ROW_BYTES) ^ (uint32_t)(k * 32));
#pragma unroll
    for (int i = 0; i < S::WARP_X / 16; i++) ldmatrix(f.x[i], (x + i * 16 * ROW_BYTES) ^ (uint32_t)(k * 32));
}

template <typename S> struct tile_sums {
    float sum[S::WARP_W / 16][S::WARP_X / 8][4];
};

template <typename T, typename S>
__device__ __forceinline__ void multiply_fragments(tile_sums<S> &sums, const tile_fragments<S> &f)
{
#pragma unroll
    for (int i = 0; i < S::WARP_W / 16; i++) {
#pragma unroll
        for (int j = 0; j < S::WARP_X / 8; j++) mma<T>(sums.sum[i][j], f.w[i], f.x[j / 2][j % 2 * 2], f.x[j / 2][j % 2 * 2 + 1]);
    }
}

// The sums to shared memory as rows of out, then those that are there to memory, a vector a thread and turn.
template <typename T, typename S>
__device__ __forceinline__ void store_tile(const experts_args &a, const tile_work &work, const tile_sums<S> &sums, T *rows,
                                           int32_t warp_w, int32_t warp_x)
{
    const int32_t lane = (int32_t)threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < S::WARP_W / 16; i++) {
#pragma unroll
        for (int j = 0; j < S::WARP_X / 8; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++)
                rows[(warp_x + j * 8 + lane % 4 * 2 + k % 2) * S::OUT_STRIDE + warp_w + i * 16 + lane / 4 + k / 2 * 8] =
                    from_float<T>(sums.sum[i][j][k]);
        }
    }
    __syncthreads();
    constexpr int VECTORS = S::W_ROWS / VECTOR;
    const int32_t n_rows = work.part ? a.N - a.end : a.end;
    T *out = (T *)a.out + (size_t)work.first * a.N + (work.part ? a.end : 0) + work.w_first;
    for (int32_t i = (int32_t)threadIdx.x; i < work.n * VECTORS; i += S::THREADS) {
        const int32_t pair = i / VECTORS, column = i % VECTORS * VECTOR;
        if (work.w_first + column < n_rows)
            *(uint4 *)(out + (size_t)pair * a.N + column) = *(const uint4 *)(rows + pair * S::OUT_STRIDE + column);
    }
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) experts_tile_kernel(const __grid_constant__ experts_args a)
{
    extern __shared__ __align__(128) unsigned char smem[];
    __shared__ tile_work work;
    const int32_t lane = (int32_t)threadIdx.x % 32, warp = (int32_t)threadIdx.x / 32, n_steps = (a.K + STEP - 1) / STEP;
    const int32_t warp_w = warp % S::W_WARPS * S::WARP_W, warp_x = warp / S::W_WARPS * S::WARP_X;
    const uint32_t ring = shared_address(smem);
    next_kernel_allow();
    previous_kernel_wait();
    if (warp == 0) find_work<S>(a, (int32_t)blockIdx.x, work);
    __syncthreads();
    if (work.expert < 0) return;
    const tile_source<T, S> source = source_of<T, S>(a, work);
#pragma unroll
    for (int i = 0; i < S::STAGES - 1; i++) {
        if (i < n_steps) fetch_stage<T, S>(a, source, i, ring + i * S::STAGE_BYTES);
        cp_async_commit();
    }
    const uint32_t w = place_of(warp_w + lane % 16, lane / 16);
    const uint32_t x = place_of(S::W_ROWS + warp_x + lane % 8 + lane / 16 * 8, lane / 8 & 1);
    const bool has_pairs = warp_x < work.n;
    tile_sums<S> sums = {};
    uint32_t stage = ring, freed = ring + (S::STAGES - 1) * S::STAGE_BYTES;
#pragma unroll 1
    for (int32_t step = 0; step < n_steps; step++) {
        tile_fragments<S> f[2];
        cp_async_wait<S::STAGES - 2>();
        __syncthreads(); // all threads' parts are there; all have read what is freed
        if (has_pairs) load_fragments<S>(f[0], stage + w, stage + x, 0);
        if (step + S::STAGES - 1 < n_steps) fetch_stage<T, S>(a, source, step + S::STAGES - 1, freed);
        cp_async_commit();
        if (has_pairs) {
#pragma unroll
            for (int k = 0; k < STEP / 16; k++) {
                if (k + 1 < STEP / 16) load_fragments<S>(f[(k + 1) % 2], stage + w, stage + x, k + 1);
                multiply_fragments<T, S>(sums, f[k % 2]);
            }
        }
        freed = stage;
        stage = stage + S::STAGE_BYTES == ring + S::SMEM ? ring : stage + S::STAGE_BYTES;
    }
    cp_async_wait<0>();
    __syncthreads(); // all have read the stages
    store_tile<T, S>(a, work, sums, (T *)smem, warp_w, warp_x);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

template <typename Kernel> cudaError_t launch(const struct device *d, Kernel kernel, int32_t n_blocks, int n_threads, int smem,
                                              const experts_args &a)
{
    cudaError_t status = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (status != cudaSuccess) return status;
    return launch_early(d, kernel, dim3((unsigned)n_blocks), (unsigned)n_threads, (size_t)smem, a);
}

template <typename T, int X_ROWS, int N_WARPS> cudaError_t launch_few(const struct device *d, const experts_args &a)
{
    return launch(d, experts_few_kernel<T, X_ROWS, N_WARPS>, d->n_sms, N_WARPS * 32, few_tiles<X_ROWS, N_WARPS>::SMEM, a);
}

// Where tiles are few, a block has fewer warps with longer rings.
template <typename T, int X_ROWS> cudaError_t launch_few_rows(const struct device *d, const experts_args &a)
{
    const int64_t n_units = (int64_t)(a.N + TILE_ROWS - 1) / TILE_ROWS * (a.P < a.E ? a.P : a.E);
    if (n_units <= 2 * d->n_sms) return launch_few<T, X_ROWS, 2>(d, a);
    if (n_units <= 4 * d->n_sms) return launch_few<T, X_ROWS, 4>(d, a);
    return launch_few<T, X_ROWS, MAX_FEW_WARPS>(d, a);
}

template <typename T, typename S> cudaError_t launch_tiles(const struct device *d, const experts_args &a, int32_t n_tokens)
{
    // Of pairs: as many as there are when each expert's last is next to empty, or when each has a pair of every token.
    const int32_t n_used = a.P < a.E ? a.P : a.E, by_pairs = a.P / S::X_ROWS + n_used;
    const int32_t by_tokens = n_used * ((n_tokens + S::X_ROWS - 1) / S::X_ROWS);
    const int32_t x_tiles = by_pairs < by_tokens ? by_pairs : by_tokens;
    const int32_t w_tiles = (a.end + S::W_ROWS - 1) / S::W_ROWS + (a.N - a.end + S::W_ROWS - 1) / S::W_ROWS;
    return launch(d, experts_tile_kernel<T, S>, x_tiles * w_tiles, S::THREADS, S::SMEM, a);
}

template <typename T> cudaError_t launch_type(const struct device *d, const experts_args &a, int32_t n_tokens)
{
    if (n_tokens == 1) return launch_few_rows<T, 1>(d, a);
    if (n_tokens <= 4) return launch_few_rows<T, 4>(d, a);
    if (n_tokens <= FEW_ROWS) return launch_few_rows<T, FEW_ROWS>(d, a);
    if (a.P < a.E * narrow_tile::X_ROWS) return launch_tiles<T, narrow_tile>(d, a, n_tokens);
    return launch_tiles<T, wide_tile>(d, a, n_tokens);
}

// The parts of expert 0, and how far those of the next lie.
int place_weights(const struct linear_experts_params *p, experts_args *a, struct error *e)
{
    const struct weight *w = p->weights;
    const size_t size = dtype_size(p->x.dtype);
    if (w->n_parts < 1 || w->n_parts > 2) return error_set(e, ERR_UNSUPPORTED, "linear_experts: %d parts", w->n_parts);
    for (int32_t i = 0; i < p->plan.n_experts; i++) {
        if (w[i].n_parts != w->n_parts || w[i].n_cols != w->n_cols)
            return error_set(e, ERR_INVALID, "linear_experts: expert %d is not as the first", i);
        for (int32_t j = 0; j < w->n_parts; j++) {
            const struct weight_part *part = &w[i].part[j], *first = &w->part[j];
            if (part->n_rows != first->n_rows) return error_set(e, ERR_INVALID, "linear_experts: expert %d is not as the first", i);
            if (part->dtype != p->x.dtype || part->scales || part->bias.data || part->n_rows % VECTOR || !is_aligned(part->data))
                return error_set(e, ERR_UNSUPPORTED, "linear_experts: part %d of expert %d: %zu rows of %s%s%s", j, i, part->n_rows,
                                 dtype_name(part->dtype), part->scales ? ", scales" : "", part->bias.data ? ", bias" : "");
            const uintptr_t apart = i > 0 ? (uintptr_t)part->data - (uintptr_t)w[i - 1].part[j].data : 0;
            if (i == 1) a->apart[j] = apart / size;
            if (i > 0 && apart != a->apart[j] * size)
                return error_set(e, ERR_UNSUPPORTED, "linear_experts: experts are not at one distance from each other");
        }
    }
    for (int32_t j = 0; j < w->n_parts; j++) a->w[j] = w->part[j].data;
    a->end = (int32_t)w->part[0].n_rows, a->K = (int32_t)w->n_cols;
    a->N = a->end + (w->n_parts > 1 ? (int32_t)w->part[1].n_rows : 0);
    return 0;
}

} // namespace

int cuda_linear_experts(struct device *d, const struct linear_experts_params *p, struct error *e)
{
    const struct expert_plan *plan = &p->plan;
    const size_t P = p->out.shape[0], K = (size_t)plan->n_chosen;
    experts_args a = {};
    if (p->x.dtype != DTYPE_BF16 && p->x.dtype != DTYPE_F16)
        return error_set(e, ERR_UNSUPPORTED, "linear_experts: %s rows: only BF16 and F16 here", dtype_name(p->x.dtype));
    if (plan->n_experts < 1 || plan->n_experts > MAX_EXPERTS || plan->n_chosen < 1 || plan->n_chosen > MAX_CHOSEN_EXPERTS ||
        plan->n_chosen > plan->n_experts)
        return error_set(e, ERR_INVALID, "linear_experts: %d of %d experts", plan->n_chosen, plan->n_experts);
    int rc = place_weights(p, &a, e);
    if (rc) return rc;
    if (p->out.n_dims != 2 || p->x.n_dims != 2 || p->out.dtype != p->x.dtype || P < 1 || P % K || P > INT32_MAX || a.K < 1 ||
        p->out.shape[1] != (size_t)a.N || p->x.shape[1] != (size_t)a.K || p->x.shape[0] != (p->by_token ? P / K : P))
        return error_set(e, ERR_INVALID, "linear_experts: x [%zu, %zu], weight [%d, %d], out [%zu, %zu]", p->x.shape[0],
                         p->x.shape[1], a.N, a.K, P, p->out.shape[1]);
    if (a.K % VECTOR || !is_aligned(p->x.data) || !is_aligned(p->out.data))
        return error_set(e, ERR_UNSUPPORTED, "linear_experts: rows of %d elements are no whole vectors", a.K);
    a.x = p->x.data, a.out = p->out.data, a.tokens = p->by_token ? plan->tokens : NULL, a.offsets = plan->offsets;
    a.E = plan->n_experts, a.P = (int32_t)P;
    cudaError_t status = p->x.dtype == DTYPE_BF16 ? launch_type<__nv_bfloat16>(d, a, (int32_t)(P / K))
                                                  : launch_type<__half>(d, a, (int32_t)(P / K));
    return cuda_check(status, "linear_experts", e);
}
