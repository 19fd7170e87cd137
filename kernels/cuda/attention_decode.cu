/* attention_decode.cu: Flash Attention of one query per sequence over the paged cache, the context split over the
 * machine (Dao et al., "Flash-Decoding", 2023), for sm_80 and newer: mma.sync, ldmatrix, cp.async.
 *
 * Shapes: q, out [S, H, D], K, V [n_blocks, KV, block_size, D] (kernels/flash_attention.h). A head group is up to 16 q
 * heads of one KV head: the rows of one m16 tile. The keys of a row that it sees, from the first tile of 64 on, are cut
 * into splits of steps_per_split(its own context) tiles: at most 64 splits, whatever else is in the batch.
 * Grid: as many blocks as the device holds at once, whatever the lengths; each takes a contiguous share of the work, in
 * order of (sequence, head group, split), which it finds from context_lens: one launch serves every length.
 * Block: 4 warps. Warp w takes keys 16 w .. 16 w + 15 of every tile, through a ring of its own, so that nothing waits
 * for other warps but the end of a split, where the four are added. The ring runs on over the ends of splits.
 * Partial results (fp32, with their maximum and sum) go to scratch; the block that finishes the last split of a head
 * group adds them, in order of the splits, and writes the result.
 *
 * FLOPs: 4 D per (q head, key seen). Bytes: K and V of what is seen, once per head group, + 8 (D + 2) per (q head,
 * split): 6 % at most at 4 q heads of a KV head, half of it to L2 alone. Bound by memory: per multiprocessor two blocks
 * of 4 warps hold 128 KB in flight (head_dim 128).
 */
#include "kernels/cuda/attention.cuh"

namespace {

enum { WARPS = 4, THREADS = 128, STRIPE = 16 /* keys of a warp's step */, MAX_ROWS = 16, MAX_TICKETS = 1 << 16 };

// Counts finished splits of a (sequence, head group); zero between launches.
__device__ int32_t library_tickets[MAX_TICKETS];

struct decode_args {
    struct flash_attention_params p;
    struct scoring scoring;
    int32_t group;         // q heads per KV head
    int32_t groups_per_kv; // head groups per KV head
    int32_t n_groups;      // head groups: KV * groups_per_kv
    int32_t max_splits;    // of any row: partials are [S, H, max_splits, D]
    int32_t min_steps;     // of a split
    int32_t blocks_per_sm; // of the grid
    float *partial;        // [S, H, max_splits, D]
    float2 *partial_sum;   // [S, H, max_splits]: maximum (in units of log2(e)) and sum
    int32_t *tickets;      // [S, n_groups]
};

// Shared memory beside the rings and Q.
struct decode_shared {
    float max[WARPS][MAX_ROWS], sum[WARPS][MAX_ROWS];
    float weight[MAX_ROWS][MAX_SPLITS];
    int32_t is_last;
};

template <int D> struct decode_shape {
    static constexpr int STAGES = D > 128 ? 2 : 3;
    static constexpr int HALF_BYTES = STRIPE * tile_layout<D>::STRIDE; // K or V of a stage
    static constexpr int RING_BYTES = WARPS * STAGES * 2 * HALF_BYTES;
    static constexpr bool KEEPS_Q = D <= 128; // in registers; else in shared memory
    static constexpr int Q_BYTES = KEEPS_Q ? 0 : MAX_ROWS * D * 2;
    static constexpr int SMEM = RING_BYTES + Q_BYTES + (int)sizeof(decode_shared);
    static constexpr int BLOCKS = D > 128 ? 1 : D > 80 ? 2 : 3; // per multiprocessor, where memory allows
    static_assert(2 * HALF_BYTES >= MAX_ROWS * D * 4, "a warp's result fits its stage");
    static_assert(SMEM <= MAX_BLOCK_SMEM, "fits sm_80");
};

// ---- the list of work -----------------------------------------------------------------------------------------------

// What a sequence asks for.
struct decode_row {
    int32_t length;     // of its context; 0: nothing to do
    int32_t first_step; // tile of 64 keys that holds the first key it sees
    int32_t n_steps;
    int32_t split_steps;
};

__host__ __device__ __forceinline__ int32_t steps_per_split(int32_t n_steps, int32_t min_steps)
{
    int32_t steps = (n_steps + MAX_SPLITS - 1) / MAX_SPLITS;
    return steps > min_steps ? steps : min_steps;
}

__device__ __forceinline__ bool is_decode(const decode_args &a, int32_t s)
{
    return !a.p.cu_seqlens_q || a.p.cu_seqlens_q[s + 1] - a.p.cu_seqlens_q[s] == 1;
}

__device__ __forceinline__ int32_t first_key(const decode_args &a, int32_t length)
{
    return max(length - 1 - a.scoring.left, 0);
}

__device__ __forceinline__ decode_row row_of(const decode_args &a, int32_t s)
{
    decode_row row;
    row.length = is_decode(a, s) ? min(max(a.p.context_lens[s], 0), a.p.max_context) : 0;
    row.first_step = row.length > 0 ? first_key(a, row.length) / KV_TILE : 0;
    row.n_steps = (row.length + KV_TILE - 1) / KV_TILE - row.first_step;
    row.split_steps = steps_per_split(row.n_steps, a.min_steps);
    return row;
}

// A place in the list: a step of a split.
struct cursor {
    decode_row row;
    int32_t s, group;
    int32_t step;      // from 0 to row.n_steps - 1
    int32_t left;      // steps of the split from this one on
    uint32_t unit;     // where the split begins, in steps of the whole list
    uint32_t end;      // the block's share: splits that begin before it
};

__device__ __forceinline__ bool done(const cursor &c) { return c.unit >= c.end; }

// To the first split of the row at or after c.step, or of a later row; c.unit is that of c.step.
__device__ __forceinline__ void settle(const decode_args &a, cursor &c)
{
    while (c.step >= c.row.n_steps) {
        c.step = 0;
        if (c.row.n_steps == 0 || ++c.group == a.n_groups) {
            c.group = 0;
            if (++c.s >= a.p.n_seqs) {
                c.unit = c.end;
                return;
            }
            c.row = row_of(a, c.s);
        }
    }
    c.left = min(c.row.split_steps, c.row.n_steps - c.step);
}

__device__ __forceinline__ void advance(const decode_args &a, cursor &c)
{
    c.step++;
    if (--c.left > 0) return;
    c.unit += (uint32_t)((c.step - 1) % c.row.split_steps + 1);
    if (!done(c)) settle(a, c);
}

// This block's first split, by a whole warp: the first that begins in its share of the list's steps.
__device__ __forceinline__ cursor find_share(const decode_args &a)
{
    int32_t lane = (int32_t)threadIdx.x % 32;
    uint32_t sum = 0;
    for (int32_t s = lane; s < a.p.n_seqs; s += 32) sum += (uint32_t)row_of(a, s).n_steps;
    uint32_t n_units = __reduce_add_sync(0xffffffffu, sum) * (uint32_t)a.n_groups;
    // Blocks come to multiprocessors in turn: those of one take neighbouring shares, so that little work is spread out.
    uint32_t per_sm = (uint32_t)a.blocks_per_sm, n_sms = gridDim.x / per_sm;
    uint32_t share = blockIdx.x % n_sms * per_sm + blockIdx.x / n_sms;
    uint32_t begin = (uint32_t)((uint64_t)n_units * share / gridDim.x);
    cursor c = {};
    c.end = (uint32_t)((uint64_t)n_units * (share + 1) / gridDim.x);
    if (begin >= c.end) {
        c.unit = c.end;
        return c;
    }
    uint32_t before = 0, mine; // units of the sequences before c.s; steps of this lane's
    int32_t first = 0;
    for (;; first += 32) { // begin < n_units: it is found
        mine = first + lane < a.p.n_seqs ? (uint32_t)row_of(a, first + lane).n_steps : 0;
        uint32_t units = __reduce_add_sync(0xffffffffu, mine) * (uint32_t)a.n_groups;
        if (begin < before + units) break;
        before += units;
    }
    uint32_t upto = mine; // with those of the lanes before
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        uint32_t other = __shfl_up_sync(0xffffffffu, upto, d);
        if (lane >= d) upto += other;
    }
    int32_t winner = __ffs((int)__ballot_sync(0xffffffffu, begin < before + upto * (uint32_t)a.n_groups)) - 1;
    before += (__shfl_sync(0xffffffffu, upto, winner) - __shfl_sync(0xffffffffu, mine, winner)) * (uint32_t)a.n_groups;
    c.s = first + winner;
    c.row = row_of(a, c.s);
    int32_t offset = (int32_t)(begin - before);
    c.group = offset / c.row.n_steps;
    int32_t step = offset % c.row.n_steps;
    c.step = min((step + c.row.split_steps - 1) / c.row.split_steps * c.row.split_steps, c.row.n_steps);
    c.unit = begin + (uint32_t)(c.step - step);
    if (!done(c)) settle(a, c);
    return c;
}

// ---- fetching -------------------------------------------------------------------------------------------------------

// Block of the cache that holds the warp's stripe at c; 0 where the stripe has no key to be seen.
__device__ __forceinline__ int32_t page_of(const decode_args &a, const cursor &c)
{
    int32_t key = (c.row.first_step + c.step) * KV_TILE + (int32_t)threadIdx.x / 32 * STRIPE;
    if (done(c) || key >= c.row.length || key + STRIPE <= first_key(a, c.row.length)) return 0;
    return a.p.block_table[(size_t)c.s * (size_t)a.p.max_blocks + (size_t)(key / a.p.block_size)];
}

// K and V of the warp's stripe; keys that are not seen become zeros and are not read.
template <int D>
__device__ __forceinline__ void fetch_stripe(const decode_args &a, const cursor &c, int32_t page, uint32_t to)
{
    constexpr int CHUNKS = tile_layout<D>::CHUNKS;
    static_assert(STRIPE * CHUNKS % 32 == 0, "whole rounds");
    int lane = (int)threadIdx.x % 32, stripe = (int)threadIdx.x / 32 * STRIPE;
    int32_t first = (c.row.first_step + c.step) * KV_TILE + stripe, begin = first_key(a, c.row.length);
    size_t base = (size_t)page * a.p.kv_block_stride + (size_t)(c.group / a.groups_per_kv) * a.p.kv_head_stride +
                  (size_t)(stripe & (a.p.block_size - 1)) * a.p.kv_stride;
    const uint16_t *k = (const uint16_t *)a.p.k + base, *v = (const uint16_t *)a.p.v + base;
#pragma unroll
    for (int i = 0; i < STRIPE * CHUNKS / 32; i++) {
        int index = lane + i * 32, row = index / CHUNKS, chunk = index % CHUNKS;
        bool seen = first + row >= begin && first + row < c.row.length && chunk * 8 < a.p.head_dim;
        uint32_t offset = seen ? (uint32_t)row * (uint32_t)a.p.kv_stride + (uint32_t)chunk * 8 : 0;
        cp_async_16(to + tile_layout<D>::offset(row, chunk), k + offset, seen ? 16 : 0);
        cp_async_16(to + decode_shape<D>::HALF_BYTES + tile_layout<D>::offset(row, chunk), v + offset, seen ? 16 : 0);
    }
}

__device__ __forceinline__ size_t query_row(const decode_args &a, int32_t s)
{
    return a.p.cu_seqlens_q ? (size_t)a.p.cu_seqlens_q[s] : (size_t)s;
}

__device__ __forceinline__ int32_t first_head(const decode_args &a, int32_t group)
{
    return group / a.groups_per_kv * a.group + group % a.groups_per_kv * MAX_ROWS;
}

__device__ __forceinline__ int32_t heads_of(const decode_args &a, int32_t group)
{
    return min(a.group - group % a.groups_per_kv * MAX_ROWS, (int32_t)MAX_ROWS);
}

// Q of a head group as A operands, one for each 16 columns, where a warp keeps them.
template <int D, bool KEEPS_Q = decode_shape<D>::KEEPS_Q> struct decode_queries {
    uint32_t operand[D / 16][4];
    __device__ __forceinline__ void put(int step, const uint32_t (&x)[4])
    {
#pragma unroll
        for (int i = 0; i < 4; i++) operand[step][i] = x[i];
    }
    __device__ __forceinline__ void get(int step, uint32_t (&x)[4]) const
    {
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = operand[step][i];
    }
};

// In shared memory, the same for all warps: each brings its part of the steps.
template <int D> struct decode_queries<D, false> {
    uint4 *operand; // [D / 16, 32 lanes]
    __device__ __forceinline__ void put(int step, const uint32_t (&x)[4])
    {
        uint4 *to = operand + step * 32 + threadIdx.x % 32;
        if (step % WARPS == (int)threadIdx.x / 32) *to = make_uint4(x[0], x[1], x[2], x[3]);
    }
    __device__ __forceinline__ void get(int step, uint32_t (&x)[4]) const
    {
        uint4 y = operand[step * 32 + (int)threadIdx.x % 32];
        x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
    }
};

// Rows beyond the group's heads are zero. All warps come here together.
template <int D>
__device__ __forceinline__ void load_queries(const decode_args &a, const cursor &c, decode_queries<D> &q)
{
    int lane = (int)threadIdx.x % 32, heads = heads_of(a, c.group);
    const uint16_t *from = (const uint16_t *)a.p.q + query_row(a, c.s) * a.p.q_stride +
                           (size_t)first_head(a, c.group) * a.p.q_head_stride;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + i % 2 * 8, column = step * 16 + i / 2 * 8 + lane % 4 * 2;
            bool there = row < heads && column < a.p.head_dim;
            x[i] = there ? *(const uint32_t *)(from + (size_t)row * a.p.q_head_stride + column) : 0;
        }
        q.put(step, x);
    }
    if (!decode_shape<D>::KEEPS_Q) __syncthreads();
}

// ---- one step -------------------------------------------------------------------------------------------------------

// What a warp has of a split.
template <int D> struct decode_state {
    float o[1][D / 8][4], max[2], sum[2];
};

template <int D> __device__ __forceinline__ void clear(decode_state<D> &state)
{
#pragma unroll
    for (int i = 0; i < D / 2; i++) state.o[0][i / 4][i % 4] = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        state.max[half] = -CUDART_INF_F;
        state.sum[half] = 0;
    }
}

// Even and odd k steps in sums of their own: half the chain.
template <typename T, int D>
__device__ __forceinline__ void multiply_stripe(float (&s)[2][4], const decode_queries<D> &q, uint32_t k)
{
    float part[2][2][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        uint32_t query[4], key[4];
        q.get(step, query);
        ldmatrix(key, tile_layout<D>::further(k, 0, 2 * step));
        mma<T>(part[step % 2][0], query, key[0], key[1]);
        mma<T>(part[step % 2][1], query, key[2], key[3]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) s[i / 4][i % 4] = __fadd_rn(part[0][i / 4][i % 4], part[1][i / 4][i % 4]);
}

__device__ __forceinline__ void adjust_stripe(float (&s)[2][4], const decode_args &a, const cursor &c)
{
    int lane = (int)threadIdx.x % 32;
    int32_t key = (c.row.first_step + c.step) * KV_TILE + (int32_t)threadIdx.x / 32 * STRIPE + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int r = lane / 4 + 8 * half;
        struct score_row row;
        row.first = first_key(a, c.row.length);
        row.last = c.row.length - 1;
        row.position = c.row.length - 1;
        row.slope = 0;
        if (a.scoring.slopes && r < heads_of(a, c.group))
            row.slope = __fmul_rn(a.scoring.slopes[first_head(a, c.group) + r], CUDART_L2E_F);
        adjust_scores(s, half, key, row, a.scoring);
    }
}

template <typename T, int D>
__device__ __forceinline__ void add_stripe(decode_state<D> &state, const decode_queries<D> &q, const decode_args &a,
                                           const cursor &c, uint32_t stage)
{
    int lane = (int)threadIdx.x % 32;
    int32_t first = (c.row.first_step + c.step) * KV_TILE, begin = first_key(a, c.row.length);
    float s[2][4], factor[2];
    multiply_stripe<T, D>(s, q, stage + lane_of_keys<D>(lane));
    if (a.scoring.softcap_in != 0 || a.scoring.slopes || first < begin || first + KV_TILE > c.row.length)
        adjust_stripe(s, a, c);
    softmax_step(s, state.max, state.sum, factor, a.scoring.multiplier);
    uint32_t p[1][1][4];
    pack_rows<T>(p[0], s);
    if (__any_sync(0xffffffffu, factor[0] != 1 || factor[1] != 1)) scale_rows<D>(state.o[0], factor);
    add_values<T, D, 1, 2>(state.o, p, stage + decode_shape<D>::HALF_BYTES + lane_of_rows<D>(lane));
}

// ---- the end of a split ---------------------------------------------------------------------------------------------

// A warp's result to its stage (float [16, D]), maximum and sum to shared memory.
template <int D>
__device__ __forceinline__ void leave_result(const decode_state<D> &state, int heads, float *stage,
                                             decode_shared *shared)
{
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = quad_sum(state.sum[half]);
        int r = lane / 4 + 8 * half;
        if (r >= heads) continue;
        if (lane % 4 == 0) {
            shared->max[warp][r] = state.max[half];
            shared->sum[warp][r] = sum;
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(float2 *)(stage + r * D + n * 8 + lane % 4 * 2) = make_float2(state.o[0][n][2 * half],
                                                                             state.o[0][n][2 * half + 1]);
    }
}

template <typename T>
__device__ __forceinline__ void store_result(const decode_args &a, int32_t s, int32_t head, int32_t column, float4 x,
                                             float factor)
{
    T *to = (T *)a.p.out + query_row(a, s) * a.p.out_stride + (size_t)head * a.p.out_head_stride + (size_t)column;
    uint2 packed = make_uint2(pack<T>(__fmul_rn(x.x, factor), __fmul_rn(x.y, factor)),
                              pack<T>(__fmul_rn(x.z, factor), __fmul_rn(x.w, factor)));
    if (column < a.p.head_dim) *(uint2 *)to = packed;
}

__device__ __forceinline__ void store_lse(const decode_args &a, int32_t s, int32_t head, float max, float sum)
{
    if (a.p.lse) a.p.lse[query_row(a, s) * (size_t)a.p.n_heads + (size_t)head] = log_sum(max, sum);
}

__device__ __forceinline__ void add_scaled(float4 &to, float4 x, float factor)
{
    to.x = __fmaf_rn(x.x, factor, to.x);
    to.y = __fmaf_rn(x.y, factor, to.y);
    to.z = __fmaf_rn(x.z, factor, to.z);
    to.w = __fmaf_rn(x.w, factor, to.w);
}

// Adds the four warps' results, in order, and stores them: as the result if the row has one split, else as a partial.
template <typename T, int D>
__device__ __forceinline__ void merge_warps(const decode_args &a, const cursor &c, const unsigned char *stage,
                                            const decode_shared *shared, int32_t n_splits)
{
    constexpr int WARP_BYTES = decode_shape<D>::STAGES * 2 * decode_shape<D>::HALF_BYTES, QUADS = D / 4;
    int heads = heads_of(a, c.group);
    for (int index = (int)threadIdx.x; index < heads * QUADS; index += THREADS) {
        int r = index / QUADS, column = index % QUADS * 4;
        float max = shared->max[0][r], sum = 0;
#pragma unroll
        for (int w = 1; w < WARPS; w++) max = fmaxf(max, shared->max[w][r]);
        float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float factor = exp2_approx(__fsub_rn(shared->max[w][r], finite_max(max)));
            sum = __fmaf_rn(shared->sum[w][r], factor, sum);
            add_scaled(x, *(const float4 *)(stage + w * WARP_BYTES + (r * D + column) * 4), factor);
        }
        int32_t head = first_head(a, c.group) + r;
        if (n_splits == 1) {
            store_result<T>(a, c.s, head, column, x, inverse(sum));
            if (column == 0) store_lse(a, c.s, head, max, sum);
        } else {
            size_t at = ((size_t)c.s * (size_t)a.p.n_heads + (size_t)head) * (size_t)a.max_splits +
                        (size_t)(c.step / c.row.split_steps);
            *(float4 *)(a.partial + at * D + column) = x;
            if (column == 0) a.partial_sum[at] = make_float2(max, sum);
        }
    }
}

// Whether this block is the last of the head group's to come here; what the others stored is then visible.
__device__ __forceinline__ bool is_last_split(const decode_args &a, const cursor &c, decode_shared *shared,
                                              int32_t n_splits)
{
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int32_t *ticket = (a.tickets ? a.tickets : library_tickets) + (size_t)c.s * (size_t)a.n_groups + c.group;
        shared->is_last = atomicAdd(ticket, 1) == n_splits - 1;
        if (shared->is_last) *ticket = 0;
    }
    __syncthreads();
    bool is_last = shared->is_last;
    if (is_last) __threadfence();
    return is_last;
}

// Weights of a row's splits in its result: exp2(max of the split - max of all) / sum of all. One warp per row.
__device__ __forceinline__ void weigh_splits(const decode_args &a, const cursor &c, decode_shared *shared,
                                             int32_t n_splits)
{
    int lane = (int)threadIdx.x % 32;
    for (int r = (int)threadIdx.x / 32; r < heads_of(a, c.group); r += WARPS) {
        int32_t head = first_head(a, c.group) + r;
        const float2 *from = a.partial_sum + ((size_t)c.s * (size_t)a.p.n_heads + (size_t)head) * (size_t)a.max_splits;
        float2 x[MAX_SPLITS / 32];
        float max = -CUDART_INF_F, sum = 0;
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / 32; i++) {
            x[i] = lane + 32 * i < n_splits ? __ldcg(from + lane + 32 * i) : make_float2(-CUDART_INF_F, 0.0f);
            max = fmaxf(max, x[i].x);
        }
#pragma unroll
        for (int d = 16; d > 0; d /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, d));
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / 32; i++) {
            x[i].x = exp2_approx(__fsub_rn(x[i].x, finite_max(max)));
            sum = __fmaf_rn(x[i].x, x[i].y, sum);
        }
#pragma unroll
        for (int d = 16; d > 0; d /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, d));
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / 32; i++) shared->weight[r][lane + 32 * i] = __fmul_rn(x[i].x, inverse(sum));
        if (lane == 0) store_lse(a, c.s, head, max, sum);
    }
}

template <typename T, int D>
__device__ __forceinline__ void combine_splits(const decode_args &a, const cursor &c, decode_shared *shared,
                                               int32_t n_splits)
{
    constexpr int QUADS = D / 4;
    weigh_splits(a, c, shared, n_splits);
    __syncthreads();
    for (int index = (int)threadIdx.x; index < heads_of(a, c.group) * QUADS; index += THREADS) {
        int r = index / QUADS, column = index % QUADS * 4;
        int32_t head = first_head(a, c.group) + r;
        size_t at = ((size_t)c.s * (size_t)a.p.n_heads + (size_t)head) * (size_t)a.max_splits;
        const float *from = a.partial + at * D + column;
        float4 x = make_float4(0, 0, 0, 0);
#pragma unroll 8
        for (int i = 0; i < n_splits; i++)
            add_scaled(x, __ldcg((const float4 *)(from + (size_t)i * D)), shared->weight[r][i]);
        store_result<T>(a, c.s, head, column, x, 1.0f);
    }
}

// All warps come here after the last step of a split, with the stage that they just read free for their results.
template <typename T, int D>
__device__ __forceinline__ void finish_split(const decode_state<D> &state, const decode_args &a, const cursor &c,
                                             unsigned char *stage, decode_shared *shared)
{
    constexpr int WARP_BYTES = decode_shape<D>::STAGES * 2 * decode_shape<D>::HALF_BYTES;
    int32_t n_splits = (c.row.n_steps + c.row.split_steps - 1) / c.row.split_steps;
    __syncwarp();
    leave_result<D>(state, heads_of(a, c.group), (float *)(stage + (int)threadIdx.x / 32 * WARP_BYTES), shared);
    __syncthreads();
    merge_warps<T, D>(a, c, stage, shared, n_splits);
    if (n_splits > 1 && is_last_split(a, c, shared, n_splits)) combine_splits<T, D>(a, c, shared, n_splits);
    __syncthreads(); // before stages and shared are written again
}

// Rows without a key: zeros.
template <typename T> __device__ __forceinline__ void store_empty_rows(const decode_args &a)
{
    for (int32_t s = (int32_t)blockIdx.x; s < a.p.n_seqs; s += (int32_t)gridDim.x) {
        if (!is_decode(a, s) || a.p.context_lens[s] > 0) continue;
        for (int32_t i = (int32_t)threadIdx.x; i < a.p.n_heads * (a.p.head_dim / 4); i += THREADS) {
            int32_t head = i / (a.p.head_dim / 4), column = i % (a.p.head_dim / 4) * 4;
            store_result<T>(a, s, head, column, make_float4(0, 0, 0, 0), 0);
            if (column == 0) store_lse(a, s, head, 0, 0);
        }
    }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, decode_shape<D>::BLOCKS)
    attention_decode_kernel(const __grid_constant__ decode_args a)
{
    using shape = decode_shape<D>;
    extern __shared__ __align__(1024) unsigned char smem[];
    decode_shared *shared = (decode_shared *)(smem + shape::RING_BYTES + shape::Q_BYTES);
    uint32_t ring = shared_address(smem) + threadIdx.x / 32 * shape::STAGES * 2 * shape::HALF_BYTES;
    previous_kernel_wait();

    cursor item = find_share(a), ahead = item; // `ahead` is STAGES steps before `item`
    int32_t page = page_of(a, ahead);          // of the step at `ahead`: read one step early
#pragma unroll
    for (int stage = 0; stage < shape::STAGES; stage++) {
        if (!done(ahead)) {
            fetch_stripe<D>(a, ahead, page, ring + stage * 2 * shape::HALF_BYTES);
            advance(a, ahead);
            page = page_of(a, ahead);
        }
        cp_async_commit();
    }
    store_empty_rows<T>(a);

    decode_queries<D> q;
    if constexpr (!shape::KEEPS_Q) q.operand = (uint4 *)(smem + shape::RING_BYTES);
    decode_state<D> state;
    int32_t q_s = -1, q_group = -1;
    int stage = 0;
    bool begins = true; // a split
    while (!done(item)) {
        if (begins) clear<D>(state);
        if (begins && (item.s != q_s || item.group != q_group)) {
            load_queries<D>(a, item, q);
            q_s = item.s;
            q_group = item.group;
        }
        cp_async_wait<shape::STAGES - 1>();
        __syncwarp(); // every lane's part
        add_stripe<T, D>(state, q, a, item, ring + (uint32_t)(stage * 2 * shape::HALF_BYTES));
        begins = item.left == 1;
        if (begins) finish_split<T, D>(state, a, item, smem + stage * 2 * shape::HALF_BYTES, shared);
        __syncwarp(); // all lanes have read the stage
        if (!done(ahead)) {
            fetch_stripe<D>(a, ahead, page, ring + (uint32_t)(stage * 2 * shape::HALF_BYTES));
            advance(a, ahead);
            page = page_of(a, ahead);
        }
        cp_async_commit();
        advance(a, item);
        stage = stage + 1 == shape::STAGES ? 0 : stage + 1;
    }
    // Not before: blocks without work end at once, and the few blocks of the next kernel would crowd where they were.
    next_kernel_allow();
}

// ---- scratch, launcher ----------------------------------------------------------------------------------------------

// Partials of one sequence; 16 bytes each row of sums keeps float4s aligned.
struct decode_need {
    int32_t max_splits, min_steps, padded_dim;
    size_t partial_bytes, sum_bytes; // of one sequence
};

int32_t padded_dim(int32_t dim)
{
    return dim <= 64 ? 64 : dim <= 80 ? 80 : dim <= 96 ? 96 : dim <= 128 ? 128 : 256;
}

// Splits of at least 128 keys; of 256 where more than 4 q heads share them, so that partials stay small beside them.
decode_need need_of(const struct flash_attention_params *p)
{
    decode_need need;
    need.min_steps = p->n_heads / p->n_kv_heads > 4 ? 4 : 2;
    int32_t n_steps = p->max_context / KV_TILE + 2; // a window may begin and end amid a step
    need.max_splits = (n_steps + need.min_steps - 1) / need.min_steps;
    if (need.max_splits > MAX_SPLITS) need.max_splits = MAX_SPLITS;
    need.max_splits = (need.max_splits + 1) / 2 * 2;
    need.padded_dim = padded_dim(p->head_dim);
    size_t rows = (size_t)p->n_heads * (size_t)need.max_splits;
    need.partial_bytes = rows * (size_t)need.padded_dim * sizeof(float);
    need.sum_bytes = rows * sizeof(float2);
    return need;
}

template <typename T, int D> cudaError_t launch_shape(const decode_args &args, cudaStream_t stream)
{
    using shape = decode_shape<D>;
    decode_args a = args;
    int sm, n_sms, smem_per_sm;
    cudaError_t status = device_figures(&sm, &n_sms, &smem_per_sm);
    if (status != cudaSuccess) return status;
    a.blocks_per_sm = smem_per_sm / (shape::SMEM + 1024); // a block's own 1 KB included
    if (a.blocks_per_sm > shape::BLOCKS) a.blocks_per_sm = shape::BLOCKS;
    if (a.blocks_per_sm < 1) a.blocks_per_sm = 1;
    return launch_kernel(attention_decode_kernel<T, D>, (unsigned)(n_sms * a.blocks_per_sm), THREADS, shape::SMEM, sm,
                         stream, a);
}

template <typename T> cudaError_t launch_dim(const decode_args &a, cudaStream_t stream)
{
    switch (padded_dim(a.p.head_dim)) {
    case 64: return launch_shape<T, 64>(a, stream);
    case 80: return launch_shape<T, 80>(a, stream);
    case 96: return launch_shape<T, 96>(a, stream);
    case 128: return launch_shape<T, 128>(a, stream);
    default: return launch_shape<T, 256>(a, stream);
    }
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
    const size_t bound = (size_t)320 << 20; // 256 sequences, 32 heads of 128, contexts of 8k and more: 272 MB
    decode_need need = need_of(p);
    size_t one = need.partial_bytes + need.sum_bytes, all = one * (size_t)p->n_seqs;
    if (all <= bound) return all;
    return one > bound ? one : bound;
}

cudaError_t launch_decode(const struct flash_attention_params *p, cudaStream_t stream)
{
    decode_need need = need_of(p);
    decode_args a = {};
    a.scoring = scoring_of(p);
    a.group = p->n_heads / p->n_kv_heads;
    a.groups_per_kv = (a.group + MAX_ROWS - 1) / MAX_ROWS;
    a.n_groups = p->n_kv_heads * a.groups_per_kv;
    a.max_splits = need.max_splits;
    a.min_steps = need.min_steps;
    a.tickets = p->tickets;
    size_t at_once = p->scratch_bytes / (need.partial_bytes + need.sum_bytes);
    if (!p->tickets && at_once > (size_t)(MAX_TICKETS / a.n_groups)) at_once = (size_t)(MAX_TICKETS / a.n_groups);
    if (at_once == 0) return cudaErrorInvalidValue;
    size_t n_launches = ((size_t)p->n_seqs + at_once - 1) / at_once;
    int32_t n_each = (int32_t)(((size_t)p->n_seqs + n_launches - 1) / n_launches); // alike, so that none is small
    for (int32_t first = 0; first < p->n_seqs;) {
        int32_t n = n_each < p->n_seqs - first ? n_each : p->n_seqs - first;
        a.p = part_of(p, first, n);
        a.partial = (float *)p->scratch;
        a.partial_sum = (float2 *)((char *)p->scratch + (size_t)n * need.partial_bytes);
        cudaError_t status = p->dtype == FLASH_ATTENTION_BF16 ? launch_dim<__nv_bfloat16>(a, stream)
                                                              : launch_dim<__half>(a, stream);
        if (status != cudaSuccess) return status;
        first += n;
    }
    return cudaSuccess;
}
