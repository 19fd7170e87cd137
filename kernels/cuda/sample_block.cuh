/* sample_block.cuh: what sampling's kernels share: what they are given, and reductions over a block.
 *
 * A row of V logits is cut into parts of PART_IDS ids, one block each; the last block of a row to finish combines the
 * parts. Maxima and sums of integers are the same in any order; the one sum of floats is taken in a fixed order. So a
 * row's result depends on that row alone.
 */
#ifndef GPTD_KERNELS_CUDA_SAMPLE_BLOCK_CUH
#define GPTD_KERNELS_CUDA_SAMPLE_BLOCK_CUH

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/sample_math.cuh"

enum {
    THREADS = 512,               // of every block
    WARPS = THREADS / 32,
    IDS_PER_THREAD = 8,          // two runs of four
    PART_IDS = THREADS * IDS_PER_THREAD,
    MAX_PARTS = PART_IDS / MAX_LOGPROBS, // so that the tops of all parts fit one block: V up to 835,584
    BUCKETS_PER_THREAD = 4,
    N_BUCKETS = THREADS * BUCKETS_PER_THREAD, // of a key's 11 highest bits
    BUCKET_SHIFT = 20,           // key >> 20 is its bucket
    MAX_LISTED = 8192,           // candidates of the filters that are listed; beyond, the row is read again
};

typedef unsigned long long wide; // what CUDA's 64-bit atomics take

// One sample_row as kernels see it. Offsets are into the pool that follows the rows, -1: none.
struct device_row {
    struct sample_result *result; // host memory that the device writes
    uint64_t seed;
    int32_t logits_row, history_row, position, n_prompt, target, n_logprobs, choice, top_k;
    float temperature, top_p, lowest; // lowest: the log of min_p, least tempered logit that stays
    float repetition_penalty, frequency_penalty, presence_penalty;
    int32_t slot;                 // of processed logits, histogram and list; -1: needs none
    int32_t processed, filtered, penalized; // whether
    int32_t mask, allowed, n_allowed, banned, n_banned;
    int32_t bias, bias_runs, n_bias_runs;   // {id, bias} pairs, and where each run of unlike ids ends
    int32_t words, word_offsets, n_words;
};

// What is known of a row between kernels.
struct row_state {
    wide best;          // of what is drawn from: the likeliest
    wide total;         // mass of all ids, where there is top_p
    double log_sum;     // of exp of the raw logits
    float highest;      // value of `best`
    float bound;        // its draw's value: the winner reaches that at least
    int32_t open;       // nothing is sampled yet
    int32_t valid;      // neither invalid nor barred
    int32_t id;
    int32_t top_k;      // 0 where no more than that are left
    uint32_t cut;       // candidates of the filters are the keys in buckets up to this one
    uint32_t n_listed;
    wide top[MAX_LOGPROBS]; // likeliest raw logits in order; 0: none
};

// What one block found in its part.
struct part {
    wide raw, processed, drawn; // best candidates
    double sum;                 // of exp(raw - the part's highest)
    uint32_t n_before;          // ids ranked before the row's
    wide top[MAX_LOGPROBS];
};

struct histogram {
    wide mass[N_BUCKETS];
    uint32_t count[N_BUCKETS];
};

enum { NEAR_ROWS = 16 };

// Argument of every kernel. Grid: (n_parts, n_rows).
struct sampling {
    const float *logits;         // [n_logits_rows, V]
    int32_t vocab_size, n_parts;
    int32_t *history;            // [n_slots, max_len]
    int32_t max_len;
    const struct device_row *rows; // NULL: near
    struct device_row near[NEAR_ROWS]; // few rows come with the launch: no copy is waited for
    const int32_t *pool;
    uint32_t *arrived;           // [n_rows] blocks of the row that have finished; 0 between kernels
    struct row_state *states;    // [n_rows]
    struct part *parts;          // [n_rows, n_parts]
    struct histogram *histograms; // [slots]
    wide *lists;                 // [slots, MAX_LISTED]
    float *work;                 // [slots, work_stride] processed logits
    size_t work_stride;
};

// ---- reductions -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ wide warp_max(wide x)
{
    uint32_t high = __reduce_max_sync(~0u, (uint32_t)(x >> 32));
    uint32_t low = __reduce_max_sync(~0u, (uint32_t)(x >> 32) == high ? (uint32_t)x : 0);
    return (wide)high << 32 | low;
}

// To every thread.
__device__ __forceinline__ wide block_max(wide x)
{
    __shared__ wide of_warp[WARPS];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_max(of_warp[threadIdx.x % WARPS]);
}

// To every thread, always in the same order.
template <typename Number> __device__ __forceinline__ Number block_sum(Number x)
{
    __shared__ Number of_warp[WARPS];
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < WARPS; warp++) x += of_warp[warp];
    return x;
}

// Sum over the threads before this one.
__device__ __forceinline__ wide block_sum_before(wide x)
{
    __shared__ wide of_warp[WARPS];
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    wide upto = x;
    for (uint32_t step = 1; step < 32; step *= 2) {
        wide other = __shfl_up_sync(~0u, upto, step);
        if (lane >= step) upto += other;
    }
    __syncthreads();
    if (lane == 31) of_warp[warp] = upto;
    __syncthreads();
    wide before = upto - x;
    for (uint32_t w = 0; w < warp; w++) before += of_warp[w];
    return before;
}

// The n highest of all threads' candidates to out, in order, 0 after the last. Candidates other than 0 are distinct.
template <int N> __device__ void block_top(wide (&mine)[N], int32_t n, wide *out)
{
    __shared__ wide of_warp[2][WARPS];
    wide best = 0;
    for (int i = 0; i < N; i++) best = mine[i] > best ? mine[i] : best;
    __syncthreads();
    for (int32_t round = 0; round < n; round++) {
        wide x = warp_max(best);
        if (threadIdx.x % 32 == 0) of_warp[round % 2][threadIdx.x / 32] = x;
        __syncthreads();
        x = warp_max(of_warp[round % 2][threadIdx.x % WARPS]);
        if (threadIdx.x == 0) out[round] = x;
        if (x == 0 || best != x) continue;
        best = 0;
        for (int i = 0; i < N; i++) {
            if (mine[i] == x) mine[i] = 0;
            best = mine[i] > best ? mine[i] : best;
        }
    }
}

// True in the block of a row that finishes last: it sees (through __ldcg) what the others wrote.
__device__ __forceinline__ bool is_last_of_row(const struct sampling &s)
{
    __shared__ uint32_t n_before;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) n_before = atomicInc(&s.arrived[blockIdx.y], (uint32_t)s.n_parts - 1);
    __syncthreads();
    bool last = n_before == (uint32_t)s.n_parts - 1;
    if (last) __threadfence();
    return last;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ const struct device_row &row_of(const struct sampling &s)
{
    return s.rows ? s.rows[blockIdx.y] : s.near[blockIdx.y];
}

__device__ __forceinline__ struct part *part_of(const struct sampling &s, int32_t part)
{
    return &s.parts[(size_t)blockIdx.y * (size_t)s.n_parts + (size_t)part];
}

__device__ __forceinline__ const float *raw_of(const struct sampling &s, const struct device_row &row)
{
    return s.logits + (size_t)row.logits_row * (size_t)s.vocab_size;
}

// What is drawn from: processed logits where there are processors.
__device__ __forceinline__ const float *source_of(const struct sampling &s, const struct device_row &row)
{
    return row.processed ? s.work + (size_t)row.slot * s.work_stride : raw_of(s, row);
}

// First id of this thread's run of four in its block's part.
__device__ __forceinline__ int32_t run_first(int run)
{
    return ((int32_t)blockIdx.x * (IDS_PER_THREAD / 4) + run) * THREADS * 4 + (int32_t)threadIdx.x * 4;
}

// x[0..3] of ids first .. first + 3; -infinity beyond the row.
__device__ __forceinline__ void load_run(float *out, const float *x, int32_t first, int32_t n)
{
    if (first + 4 <= n && ((size_t)(x + first) & 15) == 0) {
        float4 four = *(const float4 *)(x + first);
        out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
        return;
    }
    for (int i = 0; i < 4; i++) out[i] = first + i < n ? x[first + i] : -INFINITY;
}

// Both runs of this thread in its block's part.
__device__ __forceinline__ void load_ids(float (&out)[IDS_PER_THREAD], const float *x, int32_t n)
{
#pragma unroll
    for (int run = 0; run < IDS_PER_THREAD / 4; run++) load_run(out + 4 * run, x, run_first(run), n);
}

__device__ __forceinline__ int32_t id_at(int i)
{
    return run_first(i / 4) + i % 4;
}

// The row has its answer: to the host, to the history, and to the kernels that follow.
__device__ __forceinline__ void finish_row(const struct sampling &s, const struct device_row &row,
                                           struct row_state *state, int32_t id, bool invalid, bool barred)
{
    struct sample_result *r = row.result;
    r->id = id, r->rank = 0, r->logprob = 0, r->n_top = 0;
    r->invalid = invalid, r->barred = barred;
    state->id = id, state->valid = !invalid && !barred, state->open = 0;
    if (row.target < 0 && row.position < s.max_len)
        s.history[(size_t)row.history_row * (size_t)s.max_len + (size_t)row.position] = id;
}

// The same for what a draw left: nothing is invalid.
__device__ __forceinline__ void finish_draw(const struct sampling &s, const struct device_row &row,
                                            struct row_state *state, wide drawn)
{
    finish_row(s, row, state, drawn ? id_of(drawn) : 0, drawn == 0, false);
}

#endif
