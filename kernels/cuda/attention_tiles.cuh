/* attention_tiles.cuh: in which order prefill works on the tiles of queries.
 *
 * A tile is some consecutive queries of one sequence and some q heads of one KV head. Neighbouring sequences make sections, one
 * after the other; in a section the heads come in groups, so many that what their keys and values take stays in L2. Within that,
 * tiles are counted in rounds, round r holding tile r of every sequence that has one; the last round comes first, because late
 * queries see the most keys: what is left for the end is short.
 */
#ifndef GPTD_KERNELS_CUDA_ATTENTION_TILES_CUH
#define GPTD_KERNELS_CUDA_ATTENTION_TILES_CUH

#include "kernels/cuda/attention.cuh"

enum { KEYS_AT_ONCE = 4 << 20 /* times head_dim 1: keys and values of 16 MB */ };

struct tile_order {
    int32_t n_heads;           // that each sequence's queries are worked on for: tiles of q heads in all
    int32_t rows, divisor;     // n queries make n * rows / divisor tiles, rounded up
    uint32_t section_part;     // 2^32 / tiles of a section (of one head), rounded up
    int32_t keys_at_once;      // of all heads of a group and all sequences of a section, if that leaves a head
};

// How far find_tile has counted: places may only be asked for in ascending order.
struct tile_search {
    int32_t first;  // sequence
    int32_t before; // places of the sequences before it
};

// A sequence of the batch.
struct tile_sequence {
    int32_t query_row, n_queries;  // of q
    int32_t first_token, n_keys;   // its context: row of k and v that it begins with (dense), tokens
};

struct tile_place {
    tile_sequence sequence;
    int32_t seq, tile, head;
};

static __device__ __forceinline__ tile_sequence sequence_of(const struct flash_attention_params &p, int32_t s)
{
    tile_sequence x = {};
    if (s >= p.n_seqs) return x;
    const int32_t *keys = p.block_table ? p.context_lens + s : p.cu_seqlens_k + s;
    int32_t from = *keys, end = p.block_table ? 0 : keys[1];
    x.query_row = p.cu_seqlens_q[s];
    x.n_queries = p.cu_seqlens_q[s + 1] - x.query_row;
    x.first_token = p.block_table ? 0 : from;
    x.n_keys = p.block_table ? from : end - from;
    return x;
}

static __device__ __forceinline__ int32_t tiles_of(const struct flash_attention_params &p, const tile_order &order,
                                                   const tile_sequence &x)
{
    return x.n_queries <= p.skip_queries ? 0 : (x.n_queries * order.rows + order.divisor - 1) / order.divisor;
}

// Sum over the warp's lanes of min(their tiles, limit).
static __device__ __forceinline__ int32_t count_tiles(int32_t mine, int32_t limit)
{
    return (int32_t)__reduce_add_sync(0xffffffffu, (uint32_t)min(mine, limit));
}

// Number `index` of a section's tiles of one head, of which a lane's sequence has `mine`: its round, and the lane.
static __device__ __forceinline__ int32_t find_round(int32_t mine, int32_t index, int32_t *winner)
{
    const int32_t lane = (int32_t)threadIdx.x % 32;
    float n = (float)__popc(__ballot_sync(0xffffffffu, mine > 0));
    int32_t low = (int32_t)__fdividef((float)index + 0.5f, n), high = index;
    if (count_tiles(mine, low) > index) low = 0; // rounded up: never, while there are less than a million tiles
    if (count_tiles(mine, low + 1) > index) high = low; // sequences of one length
    while (low < high) { // tiles before round `low` are at most index, before round high + 1 more
        int32_t middle = low + (high - low + 1) / 2;
        if (count_tiles(mine, middle) <= index) low = middle;
        else high = middle - 1;
    }
    uint32_t has = __ballot_sync(0xffffffffu, mine > low);
    int32_t nth = index - count_tiles(mine, low);
    bool is_it = mine > low && __popc(has & ((1u << lane) - 1)) == nth;
    *winner = __ffs((int)__ballot_sync(0xffffffffu, is_it)) - 1;
    return low;
}

// The tile of a place in the order of work, by a whole warp. Beyond the last: false, and search->before tells how many there are.
static __device__ __forceinline__ bool find_tile(const struct flash_attention_params &p, const tile_order &order, int32_t place,
                                                 tile_search *search, tile_place *found)
{
    const int32_t lane = (int32_t)threadIdx.x % 32;
    tile_sequence x; // first + lane
    int32_t mine;    // tiles of one head of it
    for (;; search->first += 32) {
        if (search->first >= p.n_seqs) return false;
        x = sequence_of(p, search->first + lane);
        mine = tiles_of(p, order, x);
        int32_t n = count_tiles(mine, INT32_MAX) * order.n_heads;
        if (place - search->before < n) break;
        search->before += n;
    }
    int32_t upto = mine; // with those of the lanes before
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        int32_t other = __shfl_up_sync(0xffffffffu, upto, d);
        if (lane >= d) upto += other;
    }
    int32_t index = place - search->before;
    int32_t section = (int32_t)__umulhi((uint32_t)(upto - mine), order.section_part);
    uint32_t after = __ballot_sync(0xffffffffu, index < upto * order.n_heads);
    int32_t there = __shfl_sync(0xffffffffu, section, __ffs((int)after) - 1);
    int32_t begin = __ffs((int)__ballot_sync(0xffffffffu, section == there)) - 1;
    index -= __shfl_sync(0xffffffffu, upto - mine, begin) * order.n_heads;
    if (section != there) mine = 0;
    int32_t n = count_tiles(mine, INT32_MAX), n_heads = order.n_heads, first_head = 0;
    if (n_heads > 1) {
        int32_t n_keys = count_tiles(mine > 0 ? x.n_keys : 0, INT32_MAX);
        int32_t at_once = min(max(order.keys_at_once / max(n_keys, 1), 1), n_heads);
        first_head = index / (n * at_once) * at_once;
        index -= first_head * n;
        n_heads = min(at_once, n_heads - first_head);
    }
    int32_t winner;
    found->tile = find_round(mine, n - 1 - index / n_heads, &winner);
    found->head = first_head + index % n_heads;
    found->seq = search->first + winner;
    found->sequence = {__shfl_sync(0xffffffffu, x.query_row, winner), __shfl_sync(0xffffffffu, x.n_queries, winner),
                       __shfl_sync(0xffffffffu, x.first_token, winner), __shfl_sync(0xffffffffu, x.n_keys, winner)};
    return true;
}

#endif
