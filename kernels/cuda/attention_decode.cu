/* attention_decode.cu: Flash Attention of one query per sequence, or a few, over the paged cache, the context split over the
 * machine (Dao et al., "Flash-Decoding", 2023), for sm_80 and newer: mma.sync, ldmatrix, cp.async.
 *
 * Shapes: q, out [T, H, D], K, V [n_blocks, KV, block_size, D] (kernels/flash_attention.h). A head group is up to 8 columns: q
 * heads of one KV head, each for one query of the sequence. Scores and results are computed transposed: K [16 keys, D] x Q' [D, 8
 * columns] and V' [D, 16 keys] x P' [16 keys, 8 columns], so that few q heads leave little of the products' tiles empty.
 * The keys that a row sees, in stripes of 32 (16 beyond head_dim 128), are cut into splits of a length that depends on how
 * many they are, whatever else is in the batch (row_of). A split's result does not depend on who computes it, and a row's
 * is the sum over its splits in order (add_split), so that it has the same bits however the work is shared.
 * Grid: one block of 4 or 8 warps per multiprocessor, whatever the lengths. Every warp works alone, on a contiguous share of
 * the list of splits, in order of (sequence, head group, split), which it finds from context_lens: one launch serves every
 * length. K and V come through a ring of the warp's own, which runs on over the ends of splits.
 * A row that is all in one share is added up in registers, as are the first splits of one that is cut. The others (fp32, with
 * maximum and sum) go to scratch; the block of the warp that is last to bring its part adds them in the end.
 * Of sequences with several queries those whose splits are the same come together: attention_decode.cuh.
 *
 * FLOPs: 4 D per (q head, key seen). Bytes: K and V of what is seen, once per head group, + 8 (D + 4) per (q head, split)
 * beyond a row's first share: of all from 13 % (64 keys a split, contexts up to 1k) to 3 % (256 keys, beyond 4k) at 4 q heads
 * of a KV head, most of it to L2 alone. Bound by memory: a multiprocessor has 160 KB in flight (head_dim 128). Bound by
 * latency where there is little work: hence few instructions before the first fetch, and no barrier before the end.
 * Of up to 8 sequences the rings are smaller, so that the next kernel's blocks, which hold weights, come beside this one's.
 * Keys of earlier steps are on their way while the kernel before still runs, if the caller says that they are there: a block's
 * as soon as one of that kernel's makes room.
 * A warp's work on a stripe is a chain of some 400 (head_dim 64) to 600 instructions (128) that hardly overlap, about 1 us at 128:
 * what one sequence of some thousand tokens takes is this, not memory (as long where all is in L2). At 64, four
 * warps were too slow for an H200 (3.3 TB/s), eight are not (4.3). At 128 eight are not faster where rows are not cut (+1 to
 * +2 %), and slower by a tenth where they make two pieces of a row (64 sequences).
 * Keys and values leave L2 first and partial results last: else these go to memory and back (8 % at 16 sequences of 8k).
 * Measured on an H200 (tests/bench/results/2026-11-29-attention-h200.md): 92 to 98 % of the read bandwidth from 512 MB on, 90 to
 * 94 % from 256 MB, 1.05 to 2.08 times FlashAttention-3; one sequence of 1k, 4k, 8k, 32k: 5.6, 8.7, 12.5, 36 us.
 * Tried, no better: a row's pieces on several multiprocessors; rings so small that two calls' blocks fit one; stripes by bulk
 * tensor copies (fewer instructions, but longer on their way: +0 to +10 %; -8 % of bandwidth where they promote to 256 bytes in
 * L2); splits from scratch by one bulk copy (+0.3 us); half the warps with rings twice as long (+10 to +50 %); splits added up
 * in spans of 256 keys first (+20 % for one sequence); shorter splits (64 keys up to 2k: -17 % for one sequence, +5 to +20 % for
 * 4 to 16; up to 4k +10 %; 128 up to 8k +2 %: what they save goes into adding them up). What did help: one loop over the stripes
 * of a split (-11 % at 8k), constant offsets from a block's first row, K and V each in code of its own, L2 policies as numbers
 * (-7 %).
 */
#include "kernels/cuda/attention_decode.cuh"

namespace {

// Counts finished splits of a (sequence, head group); zero between launches.
__device__ int32_t library_tickets[MAX_TICKETS];

// Asks for what the list of work is read from, as far as one line for each warp goes; it may still be written to.
__device__ __forceinline__ void prefetch_tables(const decode_args &a)
{
    size_t at = ((size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * 32;
    size_t end = (size_t)a.p.n_seqs * (size_t)a.p.max_blocks;
    if (threadIdx.x % 32 == 0 && at < end) prefetch(a.p.block_table + at);
    if (threadIdx.x % 32 == 1 && at < (size_t)a.p.n_seqs) prefetch(a.p.context_lens + at);
}

// ---- fetching -------------------------------------------------------------------------------------------------------

// A part of a sequence's row of the block table: lane i has entry first + i.
struct page_window {
    int32_t s, first, entry;
};

__device__ __forceinline__ void move_window(const decode_args &a, const cursor &c, int32_t block, page_window &w)
{
    int32_t lane = (int32_t)threadIdx.x % 32, last = (c.sequence.length - 1) >> a.block_shift;
    w.s = c.s;
    w.first = block;
    w.entry = __ldcg(a.p.block_table + (size_t)c.s * (size_t)a.p.max_blocks + (size_t)min(block + lane, last));
}

// Block of the cache that holds a key of the row at c.
__device__ __forceinline__ int32_t page_of(const decode_args &a, const cursor &c, int32_t key, page_window &w)
{
    int32_t block = key >> a.block_shift;
    if (c.s != w.s || (uint32_t)(block - w.first) >= 32) move_window(a, c, block, w);
    return __shfl_sync(0xffffffffu, w.entry, block - w.first);
}

// 16 rows of K or V, all of them, which lie one after the other.
template <int D> __device__ __forceinline__ void fetch_all_keys(const uint16_t *from, uint32_t to)
{
    constexpr int CHUNKS = tile_layout<D>::CHUNKS;
    static_assert(16 * CHUNKS % 32 == 0, "whole rounds");
    const int lane = (int)threadIdx.x % 32;
    if constexpr (tile_layout<D>::SWIZZLED && 32 % CHUNKS == 0) { // rounds of whole rows
        constexpr int ROWS = 32 / CHUNKS;
        to += tile_layout<D>::offset(lane / CHUNKS, lane % CHUNKS);
#pragma unroll
        for (int row = 0; row < 16; row += ROWS)
            cp_async_16_once((to ^ (uint32_t)((row & 7) * 16)) + (uint32_t)(row * tile_layout<D>::STRIDE),
                             from + lane * 8 + row * D);
    } else {
#pragma unroll
        for (int i = 0; i < CHUNKS / 2; i++) {
            const int number = lane + i * 32;
            cp_async_16_once(to + tile_layout<D>::offset(number / CHUNKS, number % CHUNKS), from + number * 8);
        }
    }
}

// Of the rows from begin to end - 1: the others become zeros and are not read, as what is beyond head_dim.
template <int D>
__device__ void fetch_some_keys(const decode_args &a, const uint16_t *from, int32_t begin, int32_t end,
                                                uint32_t to)
{
    constexpr int CHUNKS = tile_layout<D>::CHUNKS;
#pragma unroll 1
    for (int index = (int)threadIdx.x % 32; index < 16 * CHUNKS; index += 32) {
        int row = index / CHUNKS, chunk = index % CHUNKS;
        bool seen = row >= begin && row < end && chunk * 8 < a.p.head_dim;
        const uint16_t *source = from + ((uint32_t)row * (uint32_t)a.p.kv_stride + (uint32_t)chunk * 8);
        cp_async_16_once(to + tile_layout<D>::offset(row, chunk), seen ? source : (const uint16_t *)a.p.k, seen ? 16 : 0);
    }
}

// Whether the stripe at c has a key that is written in this step.
template <int D> __device__ __forceinline__ bool has_new_key(const cursor &c)
{
    return (c.row.first_stripe + c.stripe + 1) * decode_shape<D>::STRIPE > c.sequence.length - c.sequence.n_queries;
}

// What a warp fetches next: K of the stripe at `at`, or then its V.
struct decode_feed {
    cursor at;
    page_window window;
    size_t head_offset;    // elements to the KV head of `at`
    size_t first, further; // to the stripe's first 16 keys, and to the others, if it has others
};

__device__ __forceinline__ size_t head_offset(const decode_args &a, const cursor &c)
{
    return (size_t)kv_head_of(c) * a.p.kv_head_stride;
}

// Where the stripe at f.at is.
template <int D> __device__ __forceinline__ void find_stripe(const decode_args &a, decode_feed &f, int32_t key)
{
    f.first = f.head_offset + (size_t)(uint32_t)page_of(a, f.at, key, f.window) * a.p.kv_block_stride +
              (uint32_t)(key & (a.p.block_size - 1)) * (uint32_t)a.p.kv_stride;
    f.further = f.first + 16 * (uint32_t)a.p.kv_stride;
    if (decode_shape<D>::STRIPE == 32 && a.p.block_size == 16)
        f.further = f.head_offset + (size_t)(uint32_t)page_of(a, f.at, key + 16, f.window) * a.p.kv_block_stride;
}

template <int D, bool MANY>
__device__ __forceinline__ void fetch_next(const decode_batch<MANY> &a, decode_feed &f, bool values, uint32_t slot)
{
    constexpr int STRIPE = decode_shape<D>::STRIPE, HALF = 16 * tile_layout<D>::STRIDE;
    const int32_t key = (f.at.row.first_stripe + f.at.stripe) * STRIPE;
    if (!values) find_stripe<D>(a, f, key);
    const uint16_t *base = (const uint16_t *)(values ? a.p.v : a.p.k);
    if (key >= f.at.row.first_key && key + STRIPE <= f.at.row.length && a.has_whole_rows) {
        fetch_all_keys<D>(base + f.first, slot);
        if (STRIPE == 32) fetch_all_keys<D>(base + f.further, slot + HALF);
    } else {
        int32_t begin = f.at.row.first_key - key, end = f.at.row.length - key;
        fetch_some_keys<D>(a, base + f.first, begin, end, slot);
        if (STRIPE == 32) fetch_some_keys<D>(a, base + f.further, begin - 16, end - 16, slot + HALF);
    }
    if (!values) return;
    advance<D>(a, f.at);
    if (f.at.stripe == 0) f.head_offset = head_offset(a, f.at);
}

__device__ __forceinline__ size_t query_row(const decode_args &a, int32_t s)
{
    return a.p.cu_seqlens_q ? (size_t)a.p.cu_seqlens_q[s] : (size_t)s;
}

// Where a lane's elements of Q' begin; NULL: its column is beyond the group's.
template <bool MANY>
__device__ __forceinline__ const uint16_t *queries_at(const decode_batch<MANY> &a, int32_t s, const decode_run &run)
{
    const int lane = (int)threadIdx.x % 32;
    if (lane / 4 >= run.columns.n) return nullptr;
    const column_place place = place_of(a, run.columns, lane / 4);
    return (const uint16_t *)a.p.q + (query_row(a, s) + (size_t)place.query) * a.p.q_stride +
           (size_t)place.head * a.p.q_head_stride + lane % 4 * 2;
}

// Q' of a head group as B operands [16, 8]. Columns beyond the group's are zero.
template <int D>
__device__ __forceinline__ void load_queries(const decode_args &a, const uint16_t *from, uint32_t (&q)[D / 16][2])
{
#pragma unroll
    for (int i = 0; i < D / 8; i++) q[i / 2][i % 2] = from && i * 8 < a.p.head_dim ? *(const uint32_t *)(from + i * 8) : 0;
}

// ---- one step -------------------------------------------------------------------------------------------------------

// What a warp has of some keys: of head lane % 4 * 2 + i: o[m][i + 2 j] is element m * 16 + lane / 4 + 8 j of the result,
// max[i] the maximum (in units of log2(e)), sum[i] the sum.
template <int D> struct decode_state {
    float o[D / 16][4], max[2], sum[2];
};

template <int D> __device__ __forceinline__ void clear(decode_state<D> &state)
{
#pragma unroll
    for (int i = 0; i < D / 4; i++) state.o[i / 4][i % 4] = 0;
    state.max[0] = state.max[1] = -CUDART_INF_F;
    state.sum[0] = state.sum[1] = 0;
}

// Over the eight lanes that share a column of an accumulator.
__device__ __forceinline__ float column_max(float x)
{
#pragma unroll
    for (int d = 4; d < 32; d *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

__device__ __forceinline__ float column_sum(float x)
{
#pragma unroll
    for (int d = 4; d < 32; d *= 2) x = __fadd_rn(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

// s [16 M keys, 8 heads] = K x Q'. Even and odd k steps in sums of their own: half the chain.
template <typename T, int D, int M>
__device__ __forceinline__ void multiply_keys(float (&s)[M][4], const uint32_t (&q)[D / 16][2], uint32_t k)
{
    float part[2][M][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
#pragma unroll
        for (int m = 0; m < M; m++) {
            uint32_t key[4];
            ldmatrix(key, tile_layout<D>::further(k, 16 * m, 2 * step));
            mma<T>(part[step % 2][m], key, q[step][0], q[step][1]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4 * M; i++) s[i / 4][i % 4] = __fadd_rn(part[0][i / 4][i % 4], part[1][i / 4][i % 4]);
}

// Softcap, ALiBi, -infinity for keys that are not seen. first: key of the first row.
template <int M, bool MANY>
__device__ __forceinline__ void adjust_stripe(float (&s)[M][4], const decode_batch<MANY> &a, const decode_row &row,
                                              const decode_run &run, int32_t first)
{
    const int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int column = 0; column < 2; column++) {
        const column_place place = place_of(a, run.columns, lane % 4 * 2 + column);
        const bool is_column = lane % 4 * 2 + column < run.columns.n;
        const int32_t further = MANY ? place.query - row.first_query - row.n_queries + 1 : 0; // than the last query, 0 or less
        const int32_t end = row.length + further; // of the keys it may see
        const int32_t begin = first_key(a, end);
        const float slope = a.scoring.slopes && is_column ? __fmul_rn(a.scoring.slopes[place.head], CUDART_L2E_F) : 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * M; i++) {
            int32_t key = first + i * 8 + lane / 4;
            float &x = s[i / 2][column + i % 2 * 2];
            if (a.scoring.softcap_in != 0) x = cap_score(x, a.scoring);
            if (a.scoring.slopes) x = bias_score(x, slope, key - (end - 1), a.scoring);
            if (key < begin || key >= end) x = -CUDART_INF_F;
        }
    }
}

// The online softmax over the keys of s, which becomes exp2(s * multiplier - max), rounded, as B operands [16, 8]; what
// there is of the result is scaled to the new maximum. Sums are a lane's own part.
template <typename T, int D, int M>
__device__ __forceinline__ void soften(float (&s)[M][4], decode_state<D> &state, uint32_t (&p)[M][2],
                                       float multiplier)
{
    float factor[2];
    bool moved = false;
#pragma unroll
    for (int column = 0; column < 2; column++) {
        float x = fmaxf(s[0][column], s[0][column + 2]), added = 0;
#pragma unroll
        for (int m = 1; m < M; m++) x = fmaxf(x, fmaxf(s[m][column], s[m][column + 2]));
        float &max = state.max[column], &sum = state.sum[column];
        float new_max = fmaxf(max, __fmul_rn(column_max(x), multiplier)), shift = finite_max(new_max);
        factor[column] = exp2_approx(__fsub_rn(max, shift));
        moved |= factor[column] != 1;
        max = new_max;
#pragma unroll
        for (int i = 0; i < 2 * M; i++) {
            float &y = s[i / 2][column + i % 2 * 2];
            y = exp2_approx(__fmaf_rn(y, multiplier, -shift));
            added = __fadd_rn(added, y);
        }
        sum = __fmaf_rn(sum, factor[column], added);
    }
#pragma unroll
    for (int i = 0; i < 2 * M; i++) p[i / 2][i % 2] = transpose(pack<T>(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]));
    if (!__any_sync(0xffffffffu, moved)) return; // all factors are 1
#pragma unroll
    for (int i = 0; i < D / 4; i++) state.o[i / 4][i % 4] = __fmul_rn(state.o[i / 4][i % 4], factor[i % 2]);
}

// o [D, 8 heads] += V' x P'.
template <typename T, int D, int M>
__device__ __forceinline__ void add_values(decode_state<D> &state, const uint32_t (&p)[M][2], uint32_t v)
{
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            uint32_t value[4];
            ldmatrix_trans(value, tile_layout<D>::further(v, 16 * m, 2 * i));
            mma<T>(state.o[i], value, p[m][0], p[m][1]);
        }
    }
}

// ---- the end of a split ---------------------------------------------------------------------------------------------

// What earlier parts (x) and the next (y) are to be multiplied by when they are added; max: of both.
__device__ __forceinline__ float2 part_factors(float before_max, float part_max, float max)
{
    float shift = finite_max(max);
    return make_float2(exp2_approx(__fsub_rn(before_max, shift)), exp2_approx(__fsub_rn(part_max, shift)));
}

__device__ __forceinline__ float add_scaled(float x, float part, float2 factor)
{
    return __fmaf_rn(part, factor.y, __fmul_rn(x, factor.x));
}

// Adds a split to those before it.
template <int D>
__device__ __forceinline__ void add_split(decode_state<D> &row, const decode_state<D> &part)
{
    float2 factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float before = row.max[i];
        row.max[i] = fmaxf(before, part.max[i]);
        factor[i] = part_factors(before, part.max[i], row.max[i]);
        row.sum[i] = add_scaled(row.sum[i], part.sum[i], factor[i]);
    }
#pragma unroll
    for (int i = 0; i < D / 4; i++) row.o[i / 4][i % 4] = add_scaled(row.o[i / 4][i % 4], part.o[i / 4][i % 4], factor[i % 2]);
}

template <typename T> __device__ __forceinline__ T *result_of(const decode_args &a, int32_t s, const column_place &place)
{
    return (T *)a.p.out + (query_row(a, s) + (size_t)place.query) * a.p.out_stride + (size_t)place.head * a.p.out_head_stride;
}

__device__ __forceinline__ void store_lse(const decode_args &a, int32_t s, const column_place &place, float max, float sum)
{
    if (!a.p.lse) return;
    a.p.lse[(query_row(a, s) + (size_t)place.query) * (size_t)a.p.n_heads + (size_t)place.head] = log_sum(max, sum);
}

template <typename T, int D, bool MANY>
__device__ __forceinline__ void store_row(const decode_batch<MANY> &a, int32_t s, const decode_run &run,
                                          const decode_state<D> &row)
{
    int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (lane % 4 * 2 + i >= run.columns.n) continue;
        const column_place place = place_of(a, run.columns, lane % 4 * 2 + i);
        float factor = inverse(row.sum[i]);
        T *to = result_of<T>(a, s, place) + lane / 4;
#pragma unroll
        for (int m = 0; m < D / 8; m++)
            if (m * 8 < a.p.head_dim) to[m * 8] = from_float<T>(__fmul_rn(row.o[m / 2][i + m % 2 * 2], factor));
        if (lane < 4) store_lse(a, s, place, row.max[i], row.sum[i]);
    }
}

// The first of a row's splits in scratch.
template <int D> __device__ __forceinline__ float *partials_of(const decode_args &a, int32_t s, const column_place &place)
{
    size_t row = ((size_t)s * (size_t)a.max_queries + (size_t)place.query) * (size_t)a.p.n_heads + (size_t)place.head;
    return a.partial + row * (size_t)a.max_splits * decode_shape<D>::PARTIAL;
}

// Elements lie in the order in which lanes have them: see element_at.
template <int D, bool MANY>
__device__ __forceinline__ void store_partial(const decode_batch<MANY> &a, int32_t s, const decode_run &run,
                                              const decode_state<D> &part)
{
    constexpr int N = D / 8; // of a lane's, of a column
    int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (lane % 4 * 2 + i >= run.columns.n) continue;
        float *to = partials_of<D>(a, s, place_of(a, run.columns, lane % 4 * 2 + i)) + run.split * decode_shape<D>::PARTIAL;
        float *elements = to + lane / 4 * N;
        auto element = [&](int m) { return part.o[m / 2][i + m % 2 * 2]; };
#pragma unroll
        for (int m = 0; m < N; m += N % 4 ? 2 : 4) {
            if constexpr (N % 4 != 0) store_kept(elements + m, make_float2(element(m), element(m + 1)));
            else store_kept(elements + m, make_float4(element(m), element(m + 1), element(m + 2), element(m + 3)));
        }
        if (lane < 4) *(float2 *)(to + D) = make_float2(part.max[i], part.sum[i]);
    }
}

// The element of the result that lies so far on in a partial one.
template <int D> __device__ __forceinline__ int element_at(int i) { return i % (D / 8) * 8 + i / (D / 8); }

// How many splits the row's first run has added up, if this run is the last to come, else 0; what others stored is then visible:
// to lane 0, and to whoever meets it at a barrier.
__device__ __forceinline__ int32_t finish_run(const decode_args &a, const cursor &c, const decode_run &run)
{
    int32_t upto = run.first == 0 ? run.n << 16 | run.n : run.n;
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        int32_t *ticket = (a.tickets ? a.tickets : library_tickets) + (size_t)c.s * (size_t)a.max_groups + c.group;
        upto += add_acq_rel(ticket, upto);
        if ((upto & 0xffff) == run.n_splits) *ticket = 0;
    }
    upto = __shfl_sync(0xffffffffu, upto, 0);
    return (upto & 0xffff) == run.n_splits ? upto >> 16 : 0;
}

// The end of the split at c: `part`; `row`: what the run has so far, if it is the row's first, which is stored as its last split.
template <typename T, int D, bool MANY>
__device__ __forceinline__ void finish_split(const decode_batch<MANY> &a, const cursor &c, decode_run &run,
                                             decode_state<D> &part, decode_state<D> &row, decode_job *job)
{
    part.sum[0] = column_sum(part.sum[0]);
    part.sum[1] = column_sum(part.sum[1]);
    const bool ends = run.split == run.first + run.n - 1, is_cut = run.n < run.n_splits;
    const bool adds_up = run.first == 0 && (run.n > 1 || !is_cut);
    if (adds_up) {
        add_split<D>(row, part);
        if (ends) part = row;
    }
    if (ends && !is_cut) store_row<T, D>(a, c.s, run, part);
    if (is_cut && (ends || !adds_up)) store_partial<D>(a, c.s, run, part);
    run.split++;
    if (!ends || !is_cut) return;
    const int32_t n_added = finish_run(a, c, run);
    if (n_added > 0 && threadIdx.x % 32 == 0) // two at most: see WARP_JOBS
        job[run.first == 0] = {c.s, run.n_splits - n_added + 1, n_added - 1, run.columns};
}

// ---- rows that were in several shares --------------------------------------------------------------------------------

// Some splits of one q head's row, from `first` on.
struct combine_item {
    int32_t s, n_splits, before, first; // before: these, in scratch
    column_place place;
};

template <int D> __device__ __forceinline__ int32_t splits_in(const combine_item &item)
{
    return min(item.n_splits - item.first, decode_shape<D>::AT_ONCE);
}

template <int D>
__device__ __forceinline__ void fetch_splits(const decode_args &a, const combine_item &item, uint32_t to)
{
    const float *from = partials_of<D>(a, item.s, item.place) + (item.before + item.first) * decode_shape<D>::PARTIAL;
    for (int i = (int)threadIdx.x % 32; i < splits_in<D>(item) * (decode_shape<D>::PARTIAL / 4); i += 32)
        cp_async_16(to + (uint32_t)i * 16, from + i * 4);
}

// What a warp has of a row: a lane of what lies from round * 128 + lane * 4 on.
template <int D> struct combine_state {
    float max, sum;
    float4 x[(D + 127) / 128];
};

// Adds splits as add_split does, from shared memory; the row's last ones: stores the result.
template <typename T, int D>
__device__ __forceinline__ void combine_splits(const decode_args &a, const combine_item &item, float *splits,
                                               combine_state<D> &row)
{
    constexpr int PARTIAL = decode_shape<D>::PARTIAL;
    const int lane = (int)threadIdx.x % 32, n = splits_in<D>(item);
    const bool is_last = item.first + n == item.n_splits;
    if (item.first == 0) row = {-CUDART_INF_F};
    float *mine = splits + lane * PARTIAL + D; // the factors go to where two floats are free
    float part_max = lane < n ? mine[0] : -CUDART_INF_F, upto = fmaxf(row.max, part_max);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        float other = __shfl_up_sync(0xffffffffu, upto, d);
        if (lane >= d) upto = fmaxf(upto, other);
    }
    float before = __shfl_up_sync(0xffffffffu, upto, 1);
    float2 factors = part_factors(lane == 0 ? row.max : before, part_max, upto);
    if (lane < n) *(float2 *)(mine + 2) = factors;
    row.max = __shfl_sync(0xffffffffu, upto, 31);
    __syncwarp();
#pragma unroll
    for (int round = 0; round < (D + 127) / 128; round++) {
        int column = round * 128 + lane * 4; // in a partial result's order
        if (column >= D) continue;
        float4 x = row.x[round];
#pragma unroll 8
        for (int i = 0; i < n; i++) {
            float4 part = *(const float4 *)(splits + i * PARTIAL + column);
            float4 about = *(const float4 *)(splits + i * PARTIAL + D);
            float2 factor = make_float2(about.z, about.w);
            if (round == 0) row.sum = add_scaled(row.sum, about.y, factor);
            x.x = add_scaled(x.x, part.x, factor);
            x.y = add_scaled(x.y, part.y, factor);
            x.z = add_scaled(x.z, part.z, factor);
            x.w = add_scaled(x.w, part.w, factor);
        }
        row.x[round] = x;
        if (!is_last) continue;
        const float factor = inverse(row.sum), result[4] = {x.x, x.y, x.z, x.w};
        T *to = result_of<T>(a, item.s, item.place);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int element = element_at<D>(column + i);
            if (element < a.p.head_dim) to[element] = from_float<T>(__fmul_rn(result[i], factor));
        }
        if (column == 0) store_lse(a, item.s, item.place, row.max, row.sum);
    }
}

// All rows of the block's jobs, in turn by the warps, each in the room of its ring: as many splits at a time as fit.
template <typename T, int D, bool MANY>
__device__ __forceinline__ void combine_jobs(const decode_batch<MANY> &a, const decode_job *jobs, float *room, int n_room)
{
    constexpr int PARTIAL = decode_shape<D>::PARTIAL, AT_ONCE = decode_shape<D>::AT_ONCE;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, n_warps = (int)blockDim.x / 32;
    combine_state<D> row = {};
    combine_item mine = {};   // lane i: the i-th that is fetched
    int n_fetched = 0, n_floats = 0, n_before = 0; // rows of the jobs before
    uint32_t left = __ballot_sync(0xffffffffu, lane < n_warps * WARP_JOBS && jobs[lane].n_splits > 0);
    auto add_fetched = [&] {
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp(); // every lane's part
        for (int i = 0, at = 0; i < n_fetched; i++) {
            combine_item item = {__shfl_sync(0xffffffffu, mine.s, i), __shfl_sync(0xffffffffu, mine.n_splits, i), 0,
                                 __shfl_sync(0xffffffffu, mine.first, i),
                                 {__shfl_sync(0xffffffffu, mine.place.query, i), __shfl_sync(0xffffffffu, mine.place.head, i)}};
            combine_splits<T, D>(a, item, room + at, row);
            at += splits_in<D>(item) * PARTIAL;
        }
        __syncwarp(); // all lanes have done with the room
        n_fetched = n_floats = 0;
    };
    for (; left != 0; left &= left - 1) {
        const decode_job job = jobs[__ffs((int)left) - 1];
        for (int h = (warp - n_before) & (n_warps - 1); h < job.columns.n; h += n_warps) {
            for (int32_t first = 0; first < job.n_splits; first += AT_ONCE) {
                combine_item item = {job.s, job.n_splits, job.before, first, place_of(a, job.columns, h)};
                int floats = splits_in<D>(item) * PARTIAL;
                if (n_fetched == 32 || n_floats + floats > n_room) add_fetched();
                fetch_splits<D>(a, item, shared_address(room + n_floats));
                if (lane == n_fetched) mine = item;
                n_fetched++;
                n_floats += floats;
            }
        }
        n_before += job.columns.n;
    }
    add_fetched();
}

// Rows without a key: zeros.
template <typename T> __device__ __forceinline__ void store_empty_rows(const decode_args &a)
{
    for (int32_t s = (int32_t)blockIdx.x; s < a.p.n_seqs; s += (int32_t)gridDim.x) {
        const int32_t n = queries_of(a, s), n_empty = min(n - a.p.context_lens[s], n); // the first see nothing
        if (n > a.max_queries) continue;
        for (int32_t i = (int32_t)threadIdx.x; i < n_empty * a.p.n_heads * a.p.head_dim; i += (int32_t)blockDim.x) {
            const int32_t row = i / a.p.head_dim, column = i - row * a.p.head_dim;
            const column_place place = {row / a.p.n_heads, row % a.p.n_heads};
            result_of<T>(a, s, place)[column] = from_float<T>(0);
            if (column == 0) store_lse(a, s, place, 0, 0);
        }
    }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, int D, bool MANY>
__global__ void __launch_bounds__(MAX_WARPS * 32, 1) attention_decode_kernel(const __grid_constant__ decode_batch<MANY> a)
{
    using shape = decode_shape<D>;
    constexpr int M = shape::STRIPE / 16;
    extern __shared__ __align__(1024) unsigned char smem[];
    const int n_slots = a.few ? shape::FEW_SLOTS : shape::SLOTS, ring_bytes = n_slots * shape::SLOT; // of a warp
    const bool alternates = n_slots % 2; // in a slot: values after keys (known to the compiler, but at head_dim 96)
    const uint32_t warp = threadIdx.x / 32, ring = shared_address(smem) + warp * ring_bytes;
    const int lane = (int)threadIdx.x % 32;
    decode_job *jobs = (decode_job *)(smem + (a.few ? shape::FEW_RING_BYTES : shape::RING_BYTES));
    next_kernel_allow();
    if (lane == 0) jobs[warp * WARP_JOBS].n_splits = jobs[warp * WARP_JOBS + 1].n_splits = 0;
    if (!a.p.settled) {
        prefetch_tables(a);
        previous_kernel_wait();
    }

    cursor item = find_share<D>(a);
    decode_feed feed = {item, {-1, 0, 0}, head_offset(a, item), 0, 0};
    uint32_t q[D / 16][2], p[M][2], slot = ring;
    decode_state<D> part, row;
    decode_run run = {};
    const uint16_t *queries = nullptr;
    int n_sent = 0; // to a ring that was empty
    auto send = [&](bool values) {
        if (!done(feed.at)) fetch_next<D>(a, feed, values, slot);
        cp_async_commit();
        slot = slot + shape::SLOT == ring + ring_bytes ? ring : slot + shape::SLOT;
    };
    if (!done(item)) {
        move_window(a, item, (item.row.first_stripe + item.stripe) * shape::STRIPE >> a.block_shift, feed.window);
        run = run_of(a, item);
        queries = queries_at(a, item.s, run);
    }
    if (a.p.settled) {
        for (; n_sent < n_slots && !done(feed.at) && !has_new_key<D>(feed.at); n_sent++) send(n_sent % 2);
        previous_kernel_wait();
    }
    load_queries<D>(a, queries, q); // before the other keys: it would wait behind them
    for (; n_sent < n_slots; n_sent++) send(n_sent % 2);
    auto wait = [&] { // for what is oldest in the ring: `slot`
        if (a.few) cp_async_wait<shape::FEW_SLOTS - 1>();
        else cp_async_wait<shape::SLOTS - 1>();
        __syncwarp(); // every lane's part
    };
    auto refill = [&](bool values) {
        __syncwarp(); // all lanes have read the slot
        send(values);
    };
    clear<D>(row);
    while (!done(item)) { // a split
        clear<D>(part);
        int32_t first = (item.row.first_stripe + item.stripe) * shape::STRIPE; // key of the stripe
        const int32_t more = MANY ? item.row.n_queries - 1 : 0; // the last sees from so many keys further on
        const int32_t full_first = item.row.first_key + more, full_end = item.row.length - more; // keys that all see
#pragma unroll 1
        for (int32_t left = item.left; left > 0; left--, first += shape::STRIPE) {
            float s[M][4];
            wait();
            multiply_keys<T, D, M>(s, q, slot + lane_of_rows<D>(lane));
            refill(alternates);
            if (a.scoring.softcap_in != 0 || a.scoring.slopes || first < full_first || first + shape::STRIPE > full_end)
                adjust_stripe<M>(s, a, item.row, run, first);
            soften<T, D, M>(s, part, p, a.scoring.multiplier);
            wait();
            add_values<T, D, M>(part, p, slot + lane_of_keys<D>(lane));
            refill(!alternates);
        }
        finish_split<T, D>(a, item, run, part, row, jobs + warp * WARP_JOBS);
        leave_split<D>(a, item);
        if (run.split == run.first + run.n && !done(item)) {
            run = run_of(a, item);
            load_queries<D>(a, queries_at(a, item.s, run), q);
            clear<D>(row);
        }
    }
    store_empty_rows<T>(a);
    bool has_job = lane == 0 && jobs[warp * WARP_JOBS].n_splits + jobs[warp * WARP_JOBS + 1].n_splits > 0;
    if (__syncthreads_or(has_job)) combine_jobs<T, D>(a, jobs, (float *)(smem + warp * ring_bytes), ring_bytes / 4);
}

// ---- scratch, launcher ----------------------------------------------------------------------------------------------

struct decode_need {
    int32_t max_splits, padded_dim;
    size_t bytes; // of one sequence
};

int32_t padded_dim(int32_t dim)
{
    return dim <= 64 ? 64 : dim <= 80 ? 80 : dim <= 96 ? 96 : dim <= 128 ? 128 : 256;
}

int32_t most_queries(const struct flash_attention_params *p) { return p->max_queries > 1 ? p->max_queries : 1; }

decode_need need_of(const struct flash_attention_params *p)
{
    decode_need need;
    int32_t most = p->max_context / 128 + 2; // row_of; a window may begin and end amid a stripe
    if (most < 1024 / 64 + 2) most = 1024 / 64 + 2;
    need.padded_dim = padded_dim(p->head_dim);
    need.max_splits = need.padded_dim > 128 ? decode_shape<256>::MAX_SPLITS : decode_shape<128>::MAX_SPLITS;
    if (need.max_splits > most) need.max_splits = most;
    const size_t rows = (size_t)most_queries(p) * (size_t)p->n_heads;
    need.bytes = rows * (size_t)need.max_splits * (size_t)(need.padded_dim + 4) * sizeof(float);
    return need;
}

template <typename T, int D, bool MANY> cudaError_t launch_shape(decode_batch<MANY> a, cudaStream_t stream)
{
    int sm, n_sms;
    cudaError_t status = device_figures(&sm, &n_sms);
    if (status != cudaSuccess) return status;
    using shape = decode_shape<D>;
    a.few = a.p.n_seqs <= FEW_ROWS && sm >= 90;
    const int n_warps = a.few ? FEW_WARPS : shape::WARPS;
    const int smem = (a.few ? shape::FEW_RING_BYTES : shape::RING_BYTES) + shape::JOB_BYTES;
    a.share_step = (uint32_t)(((uint64_t)1 << 32) / (uint64_t)(n_sms * n_warps));
    return launch_kernel(attention_decode_kernel<T, D, MANY>, (unsigned)n_sms, n_warps * 32, smem, shape::MOST_SMEM, sm, stream, a);
}

template <typename T, bool MANY> cudaError_t launch_dim(const decode_batch<MANY> &a, cudaStream_t stream)
{
    switch (padded_dim(a.p.head_dim)) {
    case 64: return launch_shape<T, 64>(a, stream);
    case 80: return launch_shape<T, 80>(a, stream);
    case 96: return launch_shape<T, 96>(a, stream);
    case 128: return launch_shape<T, 128>(a, stream);
    default: return launch_shape<T, 256>(a, stream);
    }
}

template <typename T> cudaError_t launch_queries(const decode_args &a, cudaStream_t stream)
{
    return a.max_queries > 1 ? launch_dim<T>(decode_batch<true>{a}, stream) : launch_dim<T>(decode_batch<false>{a}, stream);
}

// Sequences first .. first + n - 1 of p, as a batch of their own.
struct flash_attention_params part_of(const struct flash_attention_params *p, int32_t first, int32_t n)
{
    struct flash_attention_params part = *p;
    part.n_seqs = n;
    part.context_lens += first;
    part.block_table += (size_t)first * (size_t)p->max_blocks;
    if (p->cu_seqlens_q) {
        part.cu_seqlens_q += first;
        return part;
    }
    part.q = (const uint16_t *)p->q + (size_t)first * p->q_stride;
    part.out = (uint16_t *)p->out + (size_t)first * p->out_stride;
    if (p->lse) part.lse += (size_t)first * (size_t)p->n_heads;
    return part;
}

} // namespace

size_t decode_scratch_bytes(const struct flash_attention_params *p)
{
    const size_t bound = (size_t)320 << 20; // 256 sequences, 32 heads of 128, contexts of 8k and more: 277 MB
    decode_need need = need_of(p);
    size_t all = need.bytes * (size_t)p->n_seqs;
    if (all <= bound) return all;
    return need.bytes > bound ? need.bytes : bound;
}

cudaError_t launch_decode(const struct flash_attention_params *p, cudaStream_t stream)
{
    decode_need need = need_of(p);
    decode_args a = {};
    a.scoring = scoring_of(p);
    a.group = p->n_heads / p->n_kv_heads;
    a.groups_per_kv = (a.group + GROUP_HEADS - 1) / GROUP_HEADS;
    a.max_queries = most_queries(p);
    a.max_groups = p->n_kv_heads * a.groups_per_kv;
    if (a.max_queries > 1) // a run's last head group may be small
        a.max_groups = p->n_kv_heads * ((a.max_queries * a.group + GROUP_HEADS - 1) / GROUP_HEADS + MAX_RUNS - 1);
    a.max_splits = need.max_splits;
    a.block_shift = p->block_size == 16 ? 4 : p->block_size == 32 ? 5 : 6;
    a.has_whole_rows = p->head_dim == need.padded_dim && p->kv_stride == (size_t)p->head_dim;
    a.partial = (float *)p->scratch;
    a.tickets = p->tickets;
    size_t at_once = p->scratch_bytes / need.bytes;
    if (!p->tickets && at_once > (size_t)(MAX_TICKETS / a.max_groups)) at_once = (size_t)(MAX_TICKETS / a.max_groups);
    if (at_once == 0) return cudaErrorInvalidValue;
    size_t n_launches = ((size_t)p->n_seqs + at_once - 1) / at_once;
    int32_t n_each = (int32_t)(((size_t)p->n_seqs + n_launches - 1) / n_launches); // alike, so that none is small
    for (int32_t first = 0; first < p->n_seqs;) {
        int32_t n = n_each < p->n_seqs - first ? n_each : p->n_seqs - first;
        a.p = part_of(p, first, n);
        cudaError_t status = p->dtype == FLASH_ATTENTION_BF16 ? launch_queries<__nv_bfloat16>(a, stream)
                                                              : launch_queries<__half>(a, stream);
        if (status != cudaSuccess) return status;
        first += n;
    }
    return cudaSuccess;
}
