/* attention_prefill_hopper.cuh: what attention_prefill_hopper.cu works on: tiles, rings in shared memory, and the two warps that
 * find the tiles and fill the rings.
 *
 * One warp finds the block's next tile and describes it. Another runs ahead of those who compute: it has Q and, for every step, K
 * and V of 128 keys (64 at head_dim 256) copied, by one box for each page and column of 64, through the block table as through
 * dense rows. K of a step comes before V of the step before, for that is the order in which they are used.
 */
#ifndef GPTD_KERNELS_CUDA_ATTENTION_PREFILL_HOPPER_CUH
#define GPTD_KERNELS_CUDA_ATTENTION_PREFILL_HOPPER_CUH

#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/hopper.cuh"

namespace {

enum {
    N_COUNTERS = 256,
    N_FOUND = 4,     // tiles that may be found ahead
    STEPS_AHEAD = 3, // a tile is asked for when at most so many steps are left to be fetched
};

// Places that were given out, of launches that may run at the same time; zero between launches.
__device__ int32_t place_counters[N_COUNTERS];

struct hopper_args {
    CUtensorMap q, k, v;
    struct flash_attention_params p;
    struct scoring scoring;
    tile_order order;
    int32_t group;      // q heads per KV head
    int32_t n_packs;    // that these are cut into, of n_packed heads each but the last
    int32_t n_packed;
    int32_t n_queries;  // of a tile: its row r is query r / n_packed, head r % n_packed
    uint32_t pack_part; // 2^32 / n_packed, rounded up; 0 for 1
    int32_t box_tokens; // that one copy brings
    int32_t block_shift; // log2 of the block size
    int32_t counter;    // which of place_counters
};

template <int DIM> struct hopper_shape {
    static constexpr int D = DIM;
    static constexpr int WARPGROUPS = 2;             // that compute, 64 rows each
    static constexpr int ROWS = WARPGROUPS * 64;
    static constexpr int KEYS = D == 256 ? 64 : 128; // of a step; steps start at multiples of it, whatever the batch
    static constexpr int COMPUTE_THREADS = WARPGROUPS * WARPGROUP;
    static constexpr int THREADS = COMPUTE_THREADS + WARPGROUP; // one warp finds, one fetches; registers are dealt out by warpgroups
    static constexpr int COLUMNS = D / 64;
    static constexpr int Q_BUFFERS = D == 256 ? 1 : 2;
    static constexpr int Q_BYTES = COLUMNS * ROWS * ROW_BYTES;
    static constexpr int SLOT = COLUMNS * KEYS * ROW_BYTES; // bytes: K or V of a step
    static constexpr int SLOTS = D == 64 ? 8 : 5;
    static constexpr bool TAKES_TURNS = D == 128;
    static constexpr bool WAITS_EARLY = D == 128;  // for the slots of the next step, beside the products of this one
    static constexpr int EARLY = KEYS * 3 / 8;     // weights of a lane's that are there before the values are waited for
    static constexpr bool RELEASES_EARLY = D > 64; // the keys, before the exponentials of their step: ptxas would move them after
    static constexpr int FETCH_REGISTERS = D == 256 ? 24 : 40;
    static constexpr int COMPUTE_REGISTERS = D == 256 ? 240 : 232;
    static constexpr int LAUNCH_REGISTERS = 65536 / THREADS / 8 * 8; // of a thread; they are dealt out in eights
    static_assert(KEYS % 64 == 0, "whole pages");
    static_assert(FETCH_REGISTERS + COMPUTE_REGISTERS * WARPGROUPS <= LAUNCH_REGISTERS * (WARPGROUPS + 1),
                  "dealt out anew, they are no more than the block has: else those who grow wait for ever");
};

// Rows of q and out, and q heads.
struct hopper_rows {
    int32_t query_row, n_queries;
    int32_t first_head, n_heads;
};

// The work of one tile, as those who compute need it.
struct hopper_tile {
    hopper_rows rows;             // no heads: there is no more work
    int32_t first_step, end_step; // that hold the keys which any row sees
    int32_t position;             // of its first query
    int32_t length;               // of the context
    int32_t context;              // its row of the block table; dense: row of k and v that it begins with
};

// What the fetching warp needs beside that.
struct fetch_tile {
    int32_t kv_head, pack;
    int32_t first_token;        // dense: row of k and v that the sequence begins with
    int32_t first_key, end_key; // seen by any row of the tile
    const int32_t *pages;       // its row of the block table; NULL: dense
};

struct found_tile {
    hopper_tile tile;
    fetch_tile fetch;
};

template <typename shape> struct hopper_smem {
    union {
        float2 parts[shape::COMPUTE_THREADS];          // written alone: see soften
        uint4 key_numbers[shape::COMPUTE_THREADS / 2]; // of a step, where there is ALiBi: see bias_operand
    };
    alignas(1024) unsigned char q[shape::Q_BUFFERS][shape::Q_BYTES];
    unsigned char slots[shape::SLOTS][shape::SLOT];
    uint64_t q_full[shape::Q_BUFFERS], q_empty[shape::Q_BUFFERS], full[shape::SLOTS], empty[shape::SLOTS];
    hopper_tile tiles[shape::Q_BUFFERS];
    found_tile found[N_FOUND];
    uint64_t found_full[N_FOUND], found_empty[N_FOUND];
    int32_t n_fetched; // steps
};

// A place in a ring of N, and the parity of the round: those who fill wait for the round before, those who empty for this one.
template <int N> struct ring_place {
    int32_t at = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance()
    {
        if (++at == N) {
            at = 0;
            parity ^= 1;
        }
    }
};

// Row of a tile to query.
__device__ __forceinline__ int32_t query_of(const hopper_args &a, int32_t row)
{
    return a.pack_part ? (int32_t)__umulhi((uint32_t)row, a.pack_part) : row;
}

// ---- finding tiles --------------------------------------------------------------------------------------------------

template <typename shape>
__device__ __forceinline__ void describe_tile(const hopper_args &a, const tile_place &place, hopper_tile *t, fetch_tile *f)
{
    constexpr int KEYS = shape::KEYS;
    const struct flash_attention_params &p = a.p;
    f->kv_head = place.head / a.n_packs;
    f->pack = place.head - f->kv_head * a.n_packs;
    t->rows.first_head = f->kv_head * a.group + f->pack * a.n_packed;
    t->rows.n_heads = min(a.group - f->pack * a.n_packed, a.n_packed);
    const int32_t before = place.tile * a.n_queries, length = place.sequence.n_keys;
    t->rows.query_row = place.sequence.query_row + before;
    t->rows.n_queries = min(a.n_queries, place.sequence.n_queries - before);
    t->length = length;
    t->context = p.block_table ? place.seq : place.sequence.first_token;
    t->position = length - place.sequence.n_queries + before;
    f->first_token = place.sequence.first_token;
    f->first_key = max(t->position - a.scoring.left, 0);
    f->end_key = min(t->position + t->rows.n_queries + a.scoring.right, length);
    f->pages = p.block_table ? p.block_table + (size_t)place.seq * (size_t)p.max_blocks : nullptr;
    t->first_step = f->first_key / KEYS;
    t->end_step = f->end_key > f->first_key ? (f->end_key + KEYS - 1) / KEYS : t->first_step;
}

// One warp finds the block's tiles and describes them, for that takes as long as some steps. A tile is asked for late: who is
// slow shall get less.
template <typename shape> __device__ __forceinline__ void find_tiles(const hopper_args &a, hopper_smem<shape> *smem)
{
    const int lane = (int)threadIdx.x % 32;
    ring_place<N_FOUND> at;
    tile_search search = {};
    int32_t place = (int32_t)blockIdx.x, n_steps = 0;
    for (;;) {
        tile_place found;
        found_tile t = {};
        const bool is_tile = find_tile(a.p, a.order, place, &search, &found);
        if (is_tile) describe_tile<shape>(a, found, &t.tile, &t.fetch);
        mbarrier_wait(shared_address(smem->found_empty + at.at), at.parity ^ 1);
        if (lane == 0) {
            smem->found[at.at] = t;
            mbarrier_arrive(shared_address(smem->found_full + at.at));
        }
        at.advance();
        if (!is_tile) break;
        n_steps += t.tile.end_step - t.tile.first_step;
        while (n_steps - atomicAdd(&smem->n_fetched, 0) > STEPS_AHEAD) __nanosleep(100);
        int32_t next = lane == 0 ? atomicAdd(place_counters + a.counter, 1) : 0;
        place = (int32_t)gridDim.x + __shfl_sync(0xffffffffu, next, 0);
    }
    // All tiles but the first of a block were asked for, and by every block that had one, one more.
    if (lane == 0 && place - search.before == (int32_t)gridDim.x - 1) place_counters[a.counter] = 0;
}

// ---- fetching -------------------------------------------------------------------------------------------------------

// The tiles of K and V come in parts of box_tokens keys: lane i knows where part i of a step is.
template <typename shape> struct kv_feed {
    int32_t window, entry; // lane i has entry window + i of the block table

    // Block and token of the lane's part; what no row of the tile sees is outside the tensor.
    __device__ __forceinline__ int2 find(const hopper_args &a, const fetch_tile &f, int32_t step)
    {
        const int lane = (int)threadIdx.x % 32;
        int32_t first = step * shape::KEYS + lane * a.box_tokens;
        if (!f.pages) return make_int2(0, f.first_token + first);
        int32_t last = (min((step + 1) * shape::KEYS, f.end_key) - 1) >> a.block_shift;
        if (last >= window + 32 || step * shape::KEYS >> a.block_shift < window) {
            window = max(last - 31, 0);
            entry = (window + lane) << a.block_shift < f.end_key ? f.pages[window + lane] : -1;
        }
        int32_t block = first >> a.block_shift, id = __shfl_sync(0xffffffffu, entry, (block - window) & 31);
        bool seen = first < f.end_key && first + a.box_tokens > f.first_key;
        return make_int2(seen ? id : -1, first - (block << a.block_shift));
    }
};

template <typename shape> __device__ __forceinline__ void fetch(const hopper_args &a, hopper_smem<shape> *smem)
{
    const int lane = (int)threadIdx.x % 32;
    if (lane == 0) {
        prefetch_map(&a.q);
        prefetch_map(&a.k);
        prefetch_map(&a.v);
    }
    const uint32_t slots = shared_address(smem->slots), full = shared_address(smem->full), empty = shared_address(smem->empty);
    const uint32_t q = shared_address(smem->q), q_full = shared_address(smem->q_full), q_empty = shared_address(smem->q_empty);
    ring_place<shape::SLOTS> slot;
    ring_place<shape::Q_BUFFERS> buffer;
    kv_feed<shape> feed = {};
    const int32_t n_parts = shape::KEYS / a.box_tokens;
    auto bring = [&](const CUtensorMap *map, int32_t kv_head, int2 from) { // K or V of a step
        const uint32_t at = (uint32_t)uniform(slot.at), barrier = full + at * 8;
        mbarrier_wait(empty + at * 8, slot.parity ^ 1);
        if (lane == 0) mbarrier_arrive_expect(barrier, shape::SLOT);
        const int32_t head = uniform(kv_head);
        for (int32_t part = 0; part < n_parts; part++) {
            const int32_t block = __shfl_sync(0xffffffffu, from.x, part), token = __shfl_sync(0xffffffffu, from.y, part);
            const uint32_t to = slots + at * shape::SLOT + (uint32_t)(part * a.box_tokens) * ROW_BYTES;
            if (!elect_lane()) continue;
#pragma unroll
            for (int column = 0; column < shape::COLUMNS; column++)
                copy_box(to + column * (shape::KEYS * ROW_BYTES), map, token, column, head, block, barrier);
        }
        slot.advance();
    };
    ring_place<N_FOUND> place;
    for (;; place.advance()) {
        mbarrier_wait(shared_address(smem->found_full + place.at), place.parity);
        const hopper_tile t = smem->found[place.at].tile;
        const fetch_tile f = smem->found[place.at].fetch;
        const bool is_tile = uniform(t.rows.n_heads) > 0;
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared_address(smem->found_empty + place.at));
        mbarrier_wait(q_empty + (uint32_t)buffer.at * 8, buffer.parity ^ 1);
        uint32_t barrier = q_full + (uint32_t)buffer.at * 8;
        if (lane == 0) {
            smem->tiles[buffer.at] = t;
            if (is_tile) mbarrier_arrive_expect(barrier, (uint32_t)(shape::COLUMNS * a.n_queries * a.n_packed * ROW_BYTES));
            else mbarrier_arrive(barrier);
        }
        __syncwarp();
        if (!is_tile) break;
        if (lane < shape::COLUMNS)
            copy_box(q + (uint32_t)(buffer.at * shape::Q_BYTES + lane * shape::ROWS * ROW_BYTES), &a.q, f.pack * a.n_packed,
                     lane, f.kv_head, t.rows.query_row, barrier);
        buffer.advance();
        feed.window = -64;
        const int32_t first_step = uniform(t.first_step), end_step = uniform(t.end_step);
        int2 last = {}; // where the values are that are still to be brought
        for (int32_t step = end_step - 1; step >= first_step; step--) {
            int2 from = feed.find(a, f, step);
            bring(&a.k, f.kv_head, from);
            if (lane == 0) atomicAdd(&smem->n_fetched, 1);
            if (step < end_step - 1) bring(&a.v, f.kv_head, last);
            last = from;
        }
        if (end_step > first_step) bring(&a.v, f.kv_head, last);
    }
}

} // namespace

#endif
