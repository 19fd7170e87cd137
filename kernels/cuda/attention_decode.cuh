/* attention_decode.cuh: how the work of attention_decode.cu is shared: the list of splits, and each warp's part of it.
 *
 * The list has, in order of (sequence, head group, split), the stripes of keys that a head group sees: up to 8 columns, each a q
 * head of one KV head for one query. All warps find their shares in context_lens by themselves.
 * Of a sequence with several queries, those whose keys are cut into splits at the same places (a run) share head groups: so the
 * splits of a query are the same as if it came alone. There are three runs at most, for stripes begin and splits grow at most once
 * in 8 lengths.
 */
#ifndef GPTD_KERNELS_CUDA_ATTENTION_DECODE_CUH
#define GPTD_KERNELS_CUDA_ATTENTION_DECODE_CUH

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/linear_few.cuh"

namespace {

enum {
    MAX_WARPS = 8,
    FEW_WARPS = 4, // of a block where the sequences are few
    MAX_SLOTS = 8,
    GROUP_HEADS = 8,
    MAX_QUERIES = 8, // of a sequence
    MAX_RUNS = 3,
    MAX_TICKETS = 1 << 16,
    // Of a multiprocessor of sm_90, beside a block of the product with few rows that follows; a block takes 1 KB more than
    // it asks for.
    ROOM_BESIDE = (227 - 2) * 1024 - FEW_SMEM,
};

struct decode_args {
    struct flash_attention_params p;
    struct scoring scoring;
    int32_t group;         // q heads per KV head
    int32_t groups_per_kv; // head groups per KV head, of one query
    int32_t max_queries;   // of a sequence
    int32_t max_groups;    // head groups of any sequence
    int32_t max_splits;    // of any row
    int32_t block_shift;   // log2 of the block size
    bool has_whole_rows;   // K and V of a block's tokens lie one after the other
    uint32_t share_step;   // 2^32 / warps of the grid
    bool few;              // up to FEW_ROWS sequences: the next kernel's blocks find room beside this one's
    float *partial;        // [S, max_queries, H, max_splits, D + 4]: result, maximum (in units of log2(e)), sum, nothing
    int32_t *tickets;      // [S, max_groups]
};

// MANY: sequences may have several queries. Where none has, what that costs is left out.
template <bool MANY> struct decode_batch : decode_args {
};

// Columns of a head group: column i is number first + i of the run's, of which query q and q head h of the KV head are number
// q * group + h.
struct group_columns {
    int32_t first, n;
    int32_t first_query, first_head; // of the run, of the KV head
};

struct column_place {
    int32_t query, head;
};

template <bool MANY>
__device__ __forceinline__ column_place place_of(const decode_batch<MANY> &a, const group_columns &columns, int32_t i)
{
    const int32_t number = columns.first + i, query = MANY ? number / a.group : 0;
    return {columns.first_query + query, columns.first_head + number - query * a.group};
}

// A head group whose last split a warp of the block has brought.
struct decode_job {
    int32_t s, n_splits; // to be added up, 0: none
    int32_t before;      // so many lie before them in scratch, added to the first of them
    group_columns columns;
};

enum { WARP_JOBS = 2 }; // a share cuts the row that it begins in, and the one that it ends in

template <int D> struct decode_shape {
    static constexpr int STRIPE = D > 128 ? 16 : 32;            // keys of a step
    static constexpr int SLOT = STRIPE * tile_layout<D>::STRIDE; // bytes: K or V of a stripe
    // Of a block. A stripe of short heads is few bytes and hardly fewer instructions: four warps would wait for these.
    static constexpr int WARPS = D > 96 ? 4 : MAX_WARPS;
    static constexpr int fitting(int room, int n_warps)
    {
        int n = (room - 1024) / (n_warps * SLOT);
        return n < MAX_SLOTS ? n : MAX_SLOTS;
    }
    static constexpr int SLOTS = fitting(MAX_BLOCK_SMEM, WARPS); // of a warp's ring
    static constexpr int FEW_SLOTS = fitting(ROOM_BESIDE, FEW_WARPS);
    static constexpr int RING_BYTES = WARPS * SLOTS * SLOT, FEW_RING_BYTES = FEW_WARPS * FEW_SLOTS * SLOT; // all of a block's
    static constexpr int JOB_BYTES = MAX_WARPS * WARP_JOBS * (int)sizeof(decode_job);
    static constexpr int MAX_SPLITS = D > 128 ? 32 : 64; // of a row
    static constexpr int PARTIAL = D + 4;                // floats of a split
    static constexpr int AT_ONCE = D > 128 ? 16 : 32;    // splits that are added up at once
    static constexpr int MOST_SMEM = (RING_BYTES > FEW_RING_BYTES ? RING_BYTES : FEW_RING_BYTES) + JOB_BYTES;
    static_assert(MOST_SMEM <= MAX_BLOCK_SMEM, "fits sm_80");
    static_assert(FEW_RING_BYTES + JOB_BYTES <= ROOM_BESIDE, "the next kernel's block finds room");
    static_assert(AT_ONCE * PARTIAL * 4 <= FEW_SLOTS * SLOT && AT_ONCE * PARTIAL * 4 <= SLOTS * SLOT,
                  "they fit where a ring was");
};

// ---- the list of work -----------------------------------------------------------------------------------------------

// What a sequence asks for. Lengths and tables come from L2: they may be read before the kernel before is over.
struct decode_sequence {
    int32_t length;    // of its context, new tokens included
    int32_t n_queries; // 0: nothing to do
};

// A run of its queries.
struct decode_row {
    int32_t length;       // seen by the last of them
    int32_t first_key;    // that the first sees
    int32_t first_stripe; // that holds it
    int32_t n_stripes;
    int32_t split_shift;  // log2 of the stripes of a split
    int32_t first_query, n_queries;
};

__device__ __forceinline__ int32_t queries_of(const decode_args &a, int32_t s)
{
    return a.p.cu_seqlens_q ? __ldcg(a.p.cu_seqlens_q + s + 1) - __ldcg(a.p.cu_seqlens_q + s) : 1;
}

template <bool MANY> __device__ __forceinline__ decode_sequence sequence_of(const decode_batch<MANY> &a, int32_t s)
{
    decode_sequence x = {};
    if (s >= a.p.n_seqs) return x;
    const int32_t n = queries_of(a, s), length = min(max(__ldcg(a.p.context_lens + s), 0), a.p.max_context);
    if (n >= 1 && n <= (MANY ? a.max_queries : 1) && length > 0) x = {length, n};
    return x;
}

__device__ __forceinline__ int32_t first_key(const decode_args &a, int32_t length)
{
    return max(length - 1 - a.scoring.left, 0);
}

template <int D> __device__ __forceinline__ int32_t stripes_of(const decode_args &a, int32_t length)
{
    constexpr int STRIPE = decode_shape<D>::STRIPE;
    return (length + STRIPE - 1) / STRIPE - first_key(a, length) / STRIPE;
}

__device__ __forceinline__ int32_t log2_up(uint32_t x) { return 32 - __clz((int)(x - 1)); }

__device__ __forceinline__ int32_t splits_of(const decode_row &row, int32_t n_stripes) // rounded up
{
    return (n_stripes + (1 << row.split_shift) - 1) >> row.split_shift;
}

// Of one query that sees `length` keys, or fewer, in a window.
template <int D> __device__ __forceinline__ decode_row row_of(const decode_args &a, int32_t length)
{
    constexpr int STRIPE = decode_shape<D>::STRIPE, MAX_SPLITS = decode_shape<D>::MAX_SPLITS;
    decode_row row;
    row.length = length;
    row.first_key = first_key(a, length);
    row.first_stripe = row.first_key / STRIPE;
    row.n_stripes = stripes_of<D>(a, length);
    // Short enough that a single sequence is spread over the machine, long enough that parts are few beside the keys.
    int32_t keys = row.n_stripes * STRIPE, split_keys = keys <= 1024 ? 64 : keys <= 4096 ? 128 : 256;
    row.split_shift = log2_up((uint32_t)max((row.n_stripes + MAX_SPLITS - 1) / MAX_SPLITS, split_keys / STRIPE));
    row.first_query = 0;
    row.n_queries = 1;
    return row;
}

// The run that begins with a query.
template <int D> __device__ __forceinline__ decode_row run_from(const decode_args &a, const decode_sequence &x, int32_t query)
{
    decode_row run = row_of<D>(a, x.length - x.n_queries + query + 1);
    run.first_query = query;
    for (; query + run.n_queries < x.n_queries; run.n_queries++) {
        const decode_row next = row_of<D>(a, run.length + 1);
        if (next.first_stripe != run.first_stripe || next.split_shift != run.split_shift) break;
        run.length = next.length;
        run.n_stripes = next.n_stripes;
    }
    return run;
}

// Queries before the context's begin see nothing.
__device__ __forceinline__ int32_t first_query(const decode_sequence &x) { return max(x.n_queries - x.length, 0); }

__device__ __forceinline__ int32_t groups_of(const decode_args &a, const decode_row &run) // per KV head
{
    return run.n_queries == 1 ? a.groups_per_kv : (run.n_queries * a.group + GROUP_HEADS - 1) / GROUP_HEADS;
}

// Head groups of one KV head, and their stripes.
struct sequence_work {
    int32_t n_groups, n_stripes;
};

template <int D, bool MANY> __device__ __forceinline__ sequence_work work_of(const decode_batch<MANY> &a, const decode_sequence &x)
{
    if (!MANY || x.n_queries <= 1) return {x.n_queries * a.groups_per_kv, stripes_of<D>(a, x.length) * a.groups_per_kv};
    sequence_work work = {};
    for (int32_t query = first_query(x); query < x.n_queries;) {
        const decode_row run = run_from<D>(a, x, query);
        work.n_groups += groups_of(a, run);
        work.n_stripes += groups_of(a, run) * run.n_stripes;
        query += run.n_queries;
    }
    return work;
}

// A place in the list: a stripe of a split.
struct cursor {
    decode_sequence sequence;
    decode_row row;
    int32_t s, group;
    int32_t per_kv;  // head groups of a KV head
    int32_t in_run;  // number of the head group in its run
    int32_t stripe; // from 0 to row.n_stripes - 1
    int32_t left;   // stripes of the split from this one on; 0: the share is done
    uint32_t unit;  // of this stripe, in stripes of the whole list
    uint32_t end;   // the share: splits that begin before it
};

__device__ __forceinline__ bool done(const cursor &c) { return c.left == 0; }

// A sequence, from its first head group on.
template <int D, bool MANY>
__device__ __forceinline__ void begin_sequence(const decode_batch<MANY> &a, cursor &c, int32_t s, const decode_sequence &sequence)
{
    c.s = s;
    c.sequence = sequence;
    c.group = c.in_run = 0;
    if (!MANY) c.sequence.n_queries = 1; // or none, and nothing to see
    c.row = c.sequence.n_queries > 1 ? run_from<D>(a, c.sequence, first_query(c.sequence)) : row_of<D>(a, c.sequence.length);
    c.per_kv = c.sequence.n_queries > 1 ? work_of<D>(a, c.sequence).n_groups : a.groups_per_kv;
}

// The next head group of the sequence; false: there is none.
template <int D, bool MANY> __device__ __forceinline__ bool next_group(const decode_batch<MANY> &a, cursor &c)
{
    c.in_run++;
    if (++c.group == c.per_kv * a.p.n_kv_heads) return false;
    if (c.in_run < (MANY ? groups_of(a, c.row) : a.groups_per_kv)) return true;
    c.in_run = 0; // another run, or the first of the next KV head
    if (!MANY || c.sequence.n_queries == 1) return true;
    const int32_t query = c.row.first_query + c.row.n_queries;
    c.row = run_from<D>(a, c.sequence, query < c.sequence.n_queries ? query : first_query(c.sequence));
    return true;
}

// To the first split of the row at or after c.stripe, or of a later row; c.unit is that of c.stripe.
template <int D, bool MANY> __device__ __forceinline__ void settle(const decode_batch<MANY> &a, cursor &c)
{
    c.left = 0;
    if (c.unit >= c.end) return;
    while (c.stripe >= c.row.n_stripes) {
        c.stripe = 0;
        if (c.row.n_stripes > 0 && next_group<D>(a, c)) continue;
        if (c.s + 1 >= a.p.n_seqs) return;
        begin_sequence<D>(a, c, c.s + 1, sequence_of(a, c.s + 1));
    }
    c.left = min(1 << c.row.split_shift, c.row.n_stripes - c.stripe);
}

template <int D, bool MANY> __device__ __forceinline__ void advance(const decode_batch<MANY> &a, cursor &c)
{
    c.stripe++;
    c.unit++;
    if (--c.left == 0) settle<D>(a, c);
}

// To the next split.
template <int D, bool MANY> __device__ __forceinline__ void leave_split(const decode_batch<MANY> &a, cursor &c)
{
    c.stripe += c.left;
    c.unit += (uint32_t)c.left;
    settle<D>(a, c);
}

// Where a warp's share of the list begins and ends, in stripes: equal shares, but for rounding. Where the rows divide
// among nearly all warps, or nearly all warps among the rows, some warps get none, for rows that are alike are then not
// cut, or only where a share ends, and the others read as fast as all. Where a row has 2 or 4 pieces, warps of one block
// have them, which adds them up in the end.
__device__ __forceinline__ void find_ends(const decode_args &a, uint32_t n_units, uint32_t n_rows, uint32_t *begin,
                                          uint32_t *end)
{
    uint32_t n_warps = blockDim.x / 32, n_shares = gridDim.x * n_warps, warp = threadIdx.x / 32;
    uint32_t share = blockIdx.x * n_warps + warp;
    uint32_t pieces = n_rows * 16 > n_shares ? max(n_shares / n_rows, 1) : 1; // of a row; few rows: latency is what counts
    uint32_t used = n_rows < n_shares ? n_rows * pieces : n_rows / ((n_rows + n_shares - 1) / n_shares);
    bool even = pieces > 1 ? used * 10 >= n_shares * 9 : used * 10 >= n_shares * 7 && n_rows % used == 0;
    if (even) {
        uint32_t each = n_units / used, rest = n_units % used;
        share = min(pieces > 1 ? share : warp * gridDim.x + blockIdx.x, used); // whole rows: over all blocks
        *begin = each * share + rest * share / used;
        share = min(share + 1, used);
        *end = each * share + rest * share / used;
    } else {
        *begin = __umulhi(n_units, share * a.share_step);
        *end = share + 1 == n_shares ? n_units : __umulhi(n_units, (share + 1) * a.share_step);
    }
}

// The warp's first split: the first that begins in its share of the list's stripes.
template <int D, bool MANY> __device__ __forceinline__ cursor find_share(const decode_batch<MANY> &a)
{
    const int32_t lane = (int32_t)threadIdx.x % 32;
    int32_t first = 0;
    decode_sequence x = sequence_of(a, lane); // number first + lane
    sequence_work work = work_of<D>(a, x);
    uint32_t sum = (uint32_t)work.n_stripes, rows = (uint32_t)work.n_groups;
    for (int32_t s = lane + 32; s < a.p.n_seqs; s += 32) {
        sequence_work other = work_of<D>(a, sequence_of(a, s));
        sum += (uint32_t)other.n_stripes;
        rows += (uint32_t)other.n_groups;
    }
    const uint32_t n_kv_heads = (uint32_t)a.p.n_kv_heads;
    sum = __reduce_add_sync(0xffffffffu, sum) * n_kv_heads;
    rows = __reduce_add_sync(0xffffffffu, rows) * n_kv_heads;
    uint32_t begin;
    cursor c = {};
    c.per_kv = 1; // a divisor, also where there is no work
    find_ends(a, sum, rows, &begin, &c.end);
    if (begin >= c.end) return c;
    uint32_t before = 0, mine, upto; // units of the sequences before `first`; stripes of the lane's, with those before
    for (;; first += 32, x = sequence_of(a, first + lane), work = work_of<D>(a, x)) { // begin < n_units: it is found
        mine = (uint32_t)work.n_stripes;
        uint32_t units = __reduce_add_sync(0xffffffffu, mine) * n_kv_heads;
        if (begin < before + units) break;
        before += units;
    }
    upto = mine;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        uint32_t other = __shfl_up_sync(0xffffffffu, upto, d);
        if (lane >= d) upto += other;
    }
    int32_t winner = __ffs((int)__ballot_sync(0xffffffffu, begin < before + upto * n_kv_heads)) - 1;
    before += __shfl_sync(0xffffffffu, upto - mine, winner) * n_kv_heads;
    begin_sequence<D>(a, c, first + winner,
                      {__shfl_sync(0xffffffffu, x.length, winner), __shfl_sync(0xffffffffu, x.n_queries, winner)});
    int32_t stripe = (int32_t)(begin - before); // of the sequence's; then of the head group's
    if (MANY && c.sequence.n_queries > 1) {
        const int32_t of_head = (int32_t)__shfl_sync(0xffffffffu, mine, winner), kv_head = stripe / of_head;
        stripe -= kv_head * of_head;
        for (int32_t n; stripe >= (n = groups_of(a, c.row) * c.row.n_stripes);) {
            stripe -= n;
            c.group += groups_of(a, c.row);
            c.row = run_from<D>(a, c.sequence, c.row.first_query + c.row.n_queries);
        }
        c.in_run = stripe / c.row.n_stripes;
        c.group += kv_head * c.per_kv + c.in_run;
        stripe -= c.in_run * c.row.n_stripes;
    } else {
        c.group = stripe / c.row.n_stripes;
        stripe -= c.group * c.row.n_stripes;
        c.in_run = c.per_kv == 1 ? 0 : c.group % c.per_kv;
    }
    c.stripe = min(splits_of(c.row, stripe) << c.row.split_shift, c.row.n_stripes);
    c.unit = begin + (uint32_t)(c.stripe - stripe);
    settle<D>(a, c);
    return c;
}

__device__ __forceinline__ int32_t kv_head_of(const cursor &c)
{
    return c.per_kv == 1 ? c.group : c.group / c.per_kv;
}

template <bool MANY> __device__ __forceinline__ group_columns columns_of(const decode_batch<MANY> &a, const cursor &c)
{
    const int32_t first = c.in_run * GROUP_HEADS;
    const int32_t n = (MANY ? c.row.n_queries : 1) * a.group - first;
    return {first, min(n, GROUP_HEADS), MANY ? c.row.first_query : 0, kv_head_of(c) * a.group};
}

// The splits of one row that are in the share.
struct decode_run {
    int32_t n_splits; // of the row
    int32_t split;    // the one at hand
    int32_t first, n;
    group_columns columns;
};

template <bool MANY> __device__ __forceinline__ decode_run run_of(const decode_batch<MANY> &a, const cursor &c)
{
    decode_run run;
    run.n_splits = splits_of(c.row, c.row.n_stripes);
    run.first = run.split = c.stripe >> c.row.split_shift;
    run.n = min(splits_of(c.row, (int32_t)(c.end - c.unit)), run.n_splits - run.first);
    run.columns = columns_of(a, c);
    return run;
}

} // namespace

#endif
