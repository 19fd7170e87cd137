/* attention_decode.cuh: how the work of attention_decode.cu is shared: the list of splits, and each warp's part of it.
 *
 * The list has, in order of (sequence, head group, split), the stripes of keys that a row of q heads sees. All warps find
 * their shares in context_lens by themselves.
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
    MAX_TICKETS = 1 << 16,
    // Of a multiprocessor of sm_90, beside a block of the product with few rows that follows; a block takes 1 KB more than
    // it asks for.
    ROOM_BESIDE = (227 - 2) * 1024 - FEW_SMEM,
};

struct decode_args {
    struct flash_attention_params p;
    struct scoring scoring;
    int32_t group;         // q heads per KV head
    int32_t groups_per_kv; // head groups per KV head
    int32_t n_groups;      // head groups: KV * groups_per_kv
    int32_t max_splits;    // of any row
    int32_t block_shift;   // log2 of the block size
    uint32_t share_step;   // 2^32 / warps of the grid
    bool few;              // up to FEW_ROWS sequences: the next kernel's blocks find room beside this one's
    float *partial;        // [S, H, max_splits, D + 4]: result, maximum (in units of log2(e)), sum, nothing
    int32_t *tickets;      // [S, n_groups]
};

// A row whose last split a warp of the block has brought.
struct decode_job {
    int32_t s, first_head, n_heads, n_splits; // n_splits 0: none
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
    static_assert(AT_ONCE * PARTIAL * 4 <= FEW_SLOTS * SLOT && AT_ONCE * PARTIAL * 4 <= SLOTS * SLOT,
                  "they fit where a ring was");
};

// ---- the list of work -----------------------------------------------------------------------------------------------

// What a sequence asks for. Lengths and tables come from L2: they may be read before the kernel before is over.
struct decode_row {
    int32_t length;       // of its context; 0: nothing to do
    int32_t first_key;    // that it sees
    int32_t first_stripe; // that holds it
    int32_t n_stripes;
    int32_t split_shift;  // log2 of the stripes of a split
};

__device__ __forceinline__ bool is_decode(const decode_args &a, int32_t s)
{
    return !a.p.cu_seqlens_q || __ldcg(a.p.cu_seqlens_q + s + 1) - __ldcg(a.p.cu_seqlens_q + s) == 1;
}

__device__ __forceinline__ int32_t length_of(const decode_args &a, int32_t s)
{
    return s < a.p.n_seqs && is_decode(a, s) ? min(max(__ldcg(a.p.context_lens + s), 0), a.p.max_context) : 0;
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
    return row;
}

// A place in the list: a stripe of a split.
struct cursor {
    decode_row row;
    int32_t s, group;
    int32_t stripe; // from 0 to row.n_stripes - 1
    int32_t left;   // stripes of the split from this one on; 0: the share is done
    uint32_t unit;  // of this stripe, in stripes of the whole list
    uint32_t end;   // the share: splits that begin before it
};

__device__ __forceinline__ bool done(const cursor &c) { return c.left == 0; }

// To the first split of the row at or after c.stripe, or of a later row; c.unit is that of c.stripe.
template <int D> __device__ __forceinline__ void settle(const decode_args &a, cursor &c)
{
    c.left = 0;
    if (c.unit >= c.end) return;
    while (c.stripe >= c.row.n_stripes) {
        c.stripe = 0;
        if (c.row.n_stripes == 0 || ++c.group == a.n_groups) {
            c.group = 0;
            if (++c.s >= a.p.n_seqs) return;
            c.row = row_of<D>(a, length_of(a, c.s));
        }
    }
    c.left = min(1 << c.row.split_shift, c.row.n_stripes - c.stripe);
}

template <int D> __device__ __forceinline__ void advance(const decode_args &a, cursor &c)
{
    c.stripe++;
    c.unit++;
    if (--c.left == 0) settle<D>(a, c);
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
template <int D> __device__ __forceinline__ cursor find_share(const decode_args &a)
{
    const int32_t lane = (int32_t)threadIdx.x % 32;
    int32_t first = 0, length = length_of(a, lane); // of sequence first + lane
    uint32_t sum = (uint32_t)stripes_of<D>(a, length), rows = length > 0;
    for (int32_t s = lane + 32; s < a.p.n_seqs; s += 32) {
        int32_t other = length_of(a, s);
        sum += (uint32_t)stripes_of<D>(a, other);
        rows += other > 0;
    }
    sum = __reduce_add_sync(0xffffffffu, sum) * (uint32_t)a.n_groups;
    rows = __reduce_add_sync(0xffffffffu, rows) * (uint32_t)a.n_groups;
    uint32_t begin;
    cursor c = {};
    find_ends(a, sum, rows, &begin, &c.end);
    if (begin >= c.end) return c;
    uint32_t before = 0, mine, upto; // units of the sequences before `first`; stripes of the lane's, with those before
    for (;; first += 32, length = length_of(a, first + lane)) { // begin < n_units: it is found
        mine = (uint32_t)stripes_of<D>(a, length);
        uint32_t units = __reduce_add_sync(0xffffffffu, mine) * (uint32_t)a.n_groups;
        if (begin < before + units) break;
        before += units;
    }
    upto = mine;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        uint32_t other = __shfl_up_sync(0xffffffffu, upto, d);
        if (lane >= d) upto += other;
    }
    int32_t winner = __ffs((int)__ballot_sync(0xffffffffu, begin < before + upto * (uint32_t)a.n_groups)) - 1;
    before += __shfl_sync(0xffffffffu, upto - mine, winner) * (uint32_t)a.n_groups;
    c.s = first + winner;
    c.row = row_of<D>(a, __shfl_sync(0xffffffffu, length, winner));
    int32_t offset = (int32_t)(begin - before);
    c.group = offset / c.row.n_stripes;
    int32_t stripe = offset - c.group * c.row.n_stripes;
    c.stripe = min(splits_of(c.row, stripe) << c.row.split_shift, c.row.n_stripes);
    c.unit = begin + (uint32_t)(c.stripe - stripe);
    settle<D>(a, c);
    return c;
}

__device__ __forceinline__ int32_t kv_head_of(const decode_args &a, int32_t group)
{
    return a.groups_per_kv == 1 ? group : group / a.groups_per_kv;
}

// q heads of a head group.
struct group_heads {
    int32_t first, n;
};

__device__ __forceinline__ group_heads heads_of(const decode_args &a, int32_t group)
{
    int32_t kv_head = kv_head_of(a, group), before = (group - kv_head * a.groups_per_kv) * GROUP_HEADS;
    return {kv_head * a.group + before, min(a.group - before, GROUP_HEADS)};
}

// The splits of one row that are in the share.
struct decode_run {
    int32_t n_splits; // of the row
    int32_t split;    // the one at hand
    int32_t first, n;
    group_heads heads;
};

__device__ __forceinline__ decode_run run_of(const decode_args &a, const cursor &c)
{
    decode_run run;
    run.n_splits = splits_of(c.row, c.row.n_stripes);
    run.first = run.split = c.stripe >> c.row.split_shift;
    run.n = min(splits_of(c.row, (int32_t)(c.end - c.unit)), run.n_splits - run.first);
    run.heads = heads_of(a, c.group);
    return run;
}

} // namespace

#endif
