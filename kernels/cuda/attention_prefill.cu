/* attention_prefill.cu: Flash Attention of many query rows over dense or paged keys and values (Dao,
 * "FlashAttention-2", 2023), for sm_80 and newer: mma.sync, ldmatrix, cp.async.
 *
 * Shapes: q, out [T, H, D], k, v by strides (kernels/flash_attention.h). The q heads of one KV head are packed into the
 * rows: packed row r of a sequence is query r / group, head r % group of the KV head, so that one pass over K and V
 * serves all of them and short chunks fill their tiles.
 * Grid: one block per tile of WARPS * MT * 16 packed rows and KV head, in the order of attention_tiles.cuh. WARPS warps a block,
 * each with MT * 16 rows. Blocks beyond the last tile (the host knows only a bound) end at once.
 * Shared memory: Q (ROWS, D), a ring of three KV tiles (64, D): K0 V0 K1 V1 K2 ..., each fetched two products ahead.
 * FLOPs: 4 D per (query row, key seen). Bytes: q and out once, K and V once per tile of rows (mostly from L2).
 * Bound by mma.sync (on Hopper about 0.6 of what wgmma does); at 32 rows a warp, reading K and V from shared memory
 * takes 0.6 of the products' time, at 16 rows more than all of it: hence MT = 2 wherever registers allow.
 *
 * The same bits for a row in any batch, chunk or tile shape: every instance takes the keys in the same steps of 64, at
 * multiples of 64, ascending; what a row does not see leaves it as it was (softmax_step), so that a warp whose rows see
 * nothing of a step may skip it; masked and other steps run the same code but for adjust_scores, which is skipped where
 * all rows of the tile see all keys of the step.
 */
#include "kernels/cuda/attention_tiles.cuh"

namespace {

enum { RING = 3, KV_TILE = 64 /* keys of a step; tiles start at multiples of it, whatever the batch */ };

struct prefill_args {
    struct flash_attention_params p;
    struct scoring scoring;
    int32_t group;         // q heads per KV head
    uint32_t group_part;   // 2^32 / group, rounded up: see query_of; 0 for a group of 1
    tile_order order;
};

// The work of one block.
struct prefill_tile {
    int32_t kv_head;
    int32_t first_row, n_rows;     // of the sequence's packed rows: where the tile begins, how many there are in all
    int32_t first_query;           // of the sequence: that of the tile's first row
    int32_t query_row;             // row of q that the sequence begins with
    int32_t first_position;        // of its first query
    int32_t first_key, end_key;    // seen by any row of the tile
    int32_t first_step, end_step;  // that hold them
    int32_t full_first, full_end;  // seen by every row, and the scores are the products as they are
    const int32_t *pages;          // its row of the block table; NULL: dense
    size_t kv_offset;              // elements to its first key in k, v (dense), its KV head included
};

// Shared memory beside the tiles. The tile's description is here, too: registers are what is scarce.
struct prefill_rows {
    prefill_tile tile;
    __align__(16) int32_t pages[2][4]; // of the keys 0-15, 16-31, 32-47, 48-63 of a step; even and odd steps
};

template <int D, int MT, int WARPS> struct prefill_shape {
    static constexpr int ROWS = WARPS * MT * 16;
    static constexpr int THREADS = WARPS * 32;
    static constexpr int Q_BYTES = ROWS * tile_layout<D>::STRIDE;
    static constexpr int KV_BYTES = KV_TILE * tile_layout<D>::STRIDE;
    static constexpr int SMEM = Q_BYTES + RING * KV_BYTES + (int)sizeof(prefill_rows);
    static_assert(SMEM <= MAX_BLOCK_SMEM, "fits sm_80");
    static_assert(D > 128 || 2 * (SMEM + 1024) <= 164 * 1024, "two blocks fit a multiprocessor of sm_80");
};

// Query that a packed row belongs to: row / group, exactly, while row * group is less than 2^32.
__device__ __forceinline__ int32_t query_of(const prefill_args &a, int32_t row)
{
    return a.group_part ? (int32_t)__umulhi((uint32_t)row, a.group_part) : row;
}

// ---- which tile -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ prefill_tile describe_tile(const prefill_args &a, const tile_place &place, int32_t rows)
{
    const struct flash_attention_params &p = a.p;
    const int32_t n_queries = place.sequence.n_queries, length = place.sequence.n_keys;
    prefill_tile t;
    t.kv_head = place.head;
    t.query_row = place.sequence.query_row;
    t.first_row = place.tile * rows;
    t.first_query = query_of(a, t.first_row);
    t.n_rows = n_queries * a.group;
    t.first_position = length - n_queries;
    int32_t first = t.first_position + t.first_query;
    int32_t last = t.first_position + query_of(a, min(t.first_row + rows - 1, t.n_rows - 1));
    t.first_key = max(first - a.scoring.left, 0);
    t.end_key = min(last + a.scoring.right + 1, length);
    t.first_step = t.first_key / KV_TILE;
    t.end_step = (t.end_key + KV_TILE - 1) / KV_TILE;
    t.full_first = a.scoring.softcap_in != 0 || a.scoring.slopes ? UNLIMITED : last - a.scoring.left;
    t.full_end = min(first + a.scoring.right + 1, length);
    t.pages = p.block_table ? p.block_table + (size_t)place.seq * (size_t)p.max_blocks : nullptr;
    t.kv_offset = (size_t)place.head * p.kv_head_stride + (size_t)place.sequence.first_token * p.kv_stride;
    return t;
}

// ---- fetching -------------------------------------------------------------------------------------------------------

// Entry of the block table for keys 16 * part .. of `step`, by threads 0-3; what no row of the tile sees is not read.
__device__ __forceinline__ bool page_seen(const prefill_tile &t, int32_t step, int part)
{
    int32_t key = step * KV_TILE + part * 16;
    return key < t.end_key && key + 15 >= t.first_key;
}

__device__ __forceinline__ void fetch_pages(const prefill_args &a, const prefill_tile &t, int32_t step, uint32_t to)
{
    int part = (int)threadIdx.x;
    if (part >= 4 || !t.pages) return;
    bool seen = page_seen(t, step, part);
    const int32_t *from = t.pages + (seen ? (step * KV_TILE + part * 16) / a.p.block_size : 0);
    cp_async_4(to + (uint32_t)((step & 1) * 16 + part * 4), from, seen ? 4 : 0);
}

// Where the keys of one step lie. Dense keys are pages of 16 one after the other.
struct key_source {
    const uint16_t *base;
    uint32_t page_mask, page_stride, stride; // keys in a page - 1; elements
};

__device__ __forceinline__ key_source source_of(const prefill_args &a, const prefill_tile &t, const void *base)
{
    const uint16_t *from = (const uint16_t *)base + t.kv_offset;
    if (!t.pages) return {from, 15, (uint32_t)a.p.kv_stride * 16, (uint32_t)a.p.kv_stride};
    return {from, (uint32_t)a.p.block_size - 1, (uint32_t)a.p.kv_block_stride, (uint32_t)a.p.kv_stride};
}

// Keys (or values) of a step of which the tile sees only some, or of a padded head_dim: what is not seen becomes zeros
// and is not read.
template <int D, int THREADS>
__device__ __forceinline__ void fetch_some_keys(const prefill_args &a, const prefill_tile &t, const key_source &source,
                                                int32_t step, const int32_t *pages, uint32_t to)
{
    constexpr int CHUNKS = tile_layout<D>::CHUNKS;
#pragma unroll 1
    for (int index = (int)threadIdx.x; index < KV_TILE * CHUNKS; index += THREADS) {
        int row = index / CHUNKS, chunk = index % CHUNKS;
        int32_t key = step * KV_TILE + row;
        bool seen = key >= t.first_key && key < t.end_key && chunk * 8 < a.p.head_dim;
        uint32_t page = t.pages ? (uint32_t)pages[row / 16] : (uint32_t)(step * 4 + row / 16);
        size_t offset = (size_t)page * source.page_stride + (((uint32_t)row & source.page_mask) * source.stride);
        cp_async_16(to + tile_layout<D>::offset(row, chunk), source.base + (seen ? offset + (size_t)chunk * 8 : 0),
                    seen ? 16 : 0);
    }
}

// Keys (or values) of one step, all of which the tile sees. pages: of the step.
template <int D, int THREADS>
__device__ __forceinline__ void fetch_all_keys(const prefill_tile &t, const key_source &source, int32_t step,
                                               const int32_t *pages, uint32_t to)
{
    constexpr int CHUNKS = tile_layout<D>::CHUNKS;
    static_assert(KV_TILE * CHUNKS % THREADS == 0, "whole rounds");
    int4 page = make_int4(step * 4, step * 4 + 1, step * 4 + 2, step * 4 + 3);
    if (t.pages) page = *(const int4 *)pages;
    const uint16_t *part[4];
    part[0] = source.base + (size_t)(uint32_t)page.x * source.page_stride;
    part[1] = source.base + (size_t)(uint32_t)page.y * source.page_stride + (16 & source.page_mask) * source.stride;
    part[2] = source.base + (size_t)(uint32_t)page.z * source.page_stride + (32 & source.page_mask) * source.stride;
    part[3] = source.base + (size_t)(uint32_t)page.w * source.page_stride + (48 & source.page_mask) * source.stride;
    if constexpr (THREADS % CHUNKS == 0 && 16 * CHUNKS % THREADS == 0) { // every part of 16 keys in whole rounds
        constexpr int ROWS = THREADS / CHUNKS, ROUNDS = 16 / ROWS;
        int row = (int)threadIdx.x / CHUNKS, chunk = (int)threadIdx.x % CHUNKS;
        uint32_t offset = (uint32_t)row * source.stride + (uint32_t)chunk * 8;
#pragma unroll
        for (int i = 0; i < 4 * ROUNDS; i++)
            cp_async_16(to + tile_layout<D>::offset(row + i * ROWS, chunk),
                        part[i / ROUNDS] + (offset + (uint32_t)(i % ROUNDS * ROWS) * source.stride));
    } else {
#pragma unroll
        for (int i = 0; i < KV_TILE * CHUNKS / THREADS; i++) {
            int index = (int)threadIdx.x + i * THREADS, row = index / CHUNKS, chunk = index % CHUNKS;
            int first = i * THREADS / CHUNKS / 16, last = ((i + 1) * THREADS - 1) / CHUNKS / 16; // parts of this round
            const uint16_t *low = part[first], *high = part[last], *from = row / 16 == first ? low : high;
            cp_async_16(to + tile_layout<D>::offset(row, chunk),
                        from + ((uint32_t)(row % 16) * source.stride + (uint32_t)chunk * 8));
        }
    }
}

template <int D, int THREADS>
__device__ __forceinline__ void fetch_keys(const prefill_args &a, const prefill_tile &t, const void *base, int32_t step,
                                           const int32_t *pages, uint32_t to)
{
    key_source source = source_of(a, t, base);
    if (step * KV_TILE >= t.first_key && (step + 1) * KV_TILE <= t.end_key && a.p.head_dim == D)
        fetch_all_keys<D, THREADS>(t, source, step, pages, to);
    else
        fetch_some_keys<D, THREADS>(a, t, source, step, pages, to);
}

// Query of the sequence, and q head, of the tile's row r, which may lie beyond the sequence's last.
struct row_name {
    int32_t query, head;
};

__device__ __forceinline__ row_name name_of(const prefill_args &a, int32_t first_row, int32_t kv_head, int32_t r)
{
    int32_t row = first_row + r, query = query_of(a, row);
    return {query, kv_head * a.group + (row - query * a.group)};
}

// Elements to a row of q or out.
__device__ __forceinline__ size_t offset_of(const row_name &name, int32_t query_row, size_t stride, size_t head_stride)
{
    return (size_t)(uint32_t)(query_row + name.query) * (uint32_t)stride + (size_t)(uint32_t)name.head * (uint32_t)head_stride;
}

template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void fetch_queries(const prefill_args &a, const prefill_tile &t, uint32_t to)
{
    constexpr int CHUNKS = tile_layout<D>::CHUNKS;
    const int32_t first_row = t.first_row, n_rows = t.n_rows, query_row = t.query_row, kv_head = t.kv_head;
#pragma unroll 8
    for (int index = (int)threadIdx.x; index < ROWS * CHUNKS; index += THREADS) {
        int row = index / CHUNKS, chunk = index % CHUNKS;
        bool seen = first_row + row < n_rows && chunk * 8 < a.p.head_dim;
        size_t offset = offset_of(name_of(a, first_row, kv_head, row), query_row, a.p.q_stride, a.p.q_head_stride);
        cp_async_16(to + tile_layout<D>::offset(row, chunk),
                    (const uint16_t *)a.p.q + (seen ? offset + (size_t)chunk * 8 : 0), seen ? 16 : 0);
    }
}

// ---- one step -------------------------------------------------------------------------------------------------------

// What a lane needs to know of one of its rows.
struct score_row {
    int32_t first, last; // keys it sees
    int32_t position;
    float slope;         // in units of log2(e)
};

// Softcap, ALiBi, -infinity where the row does not see the key, for the elements that a lane holds of one row:
// half 0 is row lane / 4, half 1 is 8 further. first_key: that of the lane's first element.
template <int NT>
__device__ __forceinline__ void adjust_scores(float (&s)[NT][4], int half, int32_t first_key,
                                              const struct score_row &row, const struct scoring &scoring)
{
    if (scoring.softcap_in != 0) {
#pragma unroll
        for (int i = 0; i < 2 * NT; i++) s[i / 2][2 * half + i % 2] = cap_score(s[i / 2][2 * half + i % 2], scoring);
    }
    if (scoring.slopes) {
#pragma unroll
        for (int i = 0; i < 2 * NT; i++) {
            float &x = s[i / 2][2 * half + i % 2];
            x = bias_score(x, row.slope, first_key + i / 2 * 8 + i % 2 - row.position, scoring);
        }
    }
#pragma unroll
    for (int i = 0; i < 2 * NT; i++) {
        int32_t key = first_key + i / 2 * 8 + i % 2;
        if (key < row.first || key > row.last) s[i / 2][2 * half + i % 2] = -CUDART_INF_F;
    }
}

// One step of the online softmax, for rows of a quad: s becomes exp2(s * multiplier - max), max and sum (a lane's own
// part) move on, factor is what earlier results are to be multiplied by. A step of which a row sees nothing changes
// nothing of that row, bit for bit: factor 1, all of s 0. max is kept in units of log2(e).
template <int NT>
__device__ __forceinline__ void softmax_step(float (&s)[NT][4], float (&max)[2], float (&sum)[2], float (&factor)[2],
                                             float multiplier)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float x = s[0][2 * half];
#pragma unroll
        for (int i = 1; i < 2 * NT; i++) x = fmaxf(x, s[i / 2][2 * half + i % 2]);
        float new_max = fmaxf(max[half], __fmul_rn(quad_max(x), multiplier));
        float shift = finite_max(new_max), part = 0;
        factor[half] = exp2_approx(__fsub_rn(max[half], shift));
        max[half] = new_max;
#pragma unroll
        for (int i = 0; i < 2 * NT; i++) {
            float &y = s[i / 2][2 * half + i % 2];
            y = exp2_approx(__fmaf_rn(y, multiplier, -shift));
            part = __fadd_rn(part, y);
        }
        sum[half] = __fmaf_rn(sum[half], factor[half], part);
    }
}

// Rounds the accumulator of [16, NT * 8] to the A operand of a product over its columns.
template <typename T, int NT>
__device__ __forceinline__ void pack_rows(uint32_t (&p)[NT / 2][4], const float (&s)[NT][4])
{
#pragma unroll
    for (int i = 0; i < NT / 2; i++) {
        p[i][0] = pack<T>(s[2 * i][0], s[2 * i][1]);
        p[i][1] = pack<T>(s[2 * i][2], s[2 * i][3]);
        p[i][2] = pack<T>(s[2 * i + 1][0], s[2 * i + 1][1]);
        p[i][3] = pack<T>(s[2 * i + 1][2], s[2 * i + 1][3]);
    }
}

template <int D> __device__ __forceinline__ void scale_rows(float (&o)[D / 8][4], const float (&factor)[2])
{
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) o[n][i] = __fmul_rn(o[n][i], factor[i / 2]);
    }
}

// o [MT * 16, D] += p [MT * 16, NT * 8] x v [NT * 8, D], v in shared memory.
template <typename T, int D, int MT, int NT>
__device__ __forceinline__ void add_values(float (&o)[MT][D / 8][4], const uint32_t (&p)[MT][NT / 2][4], uint32_t v)
{
#pragma unroll
    for (int k = 0; k < NT / 2; k++) {
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            ldmatrix_trans(b, tile_layout<D>::further(v, 16 * k, 2 * n));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma<T>(o[m][2 * n], p[m][k], b[0], b[1]);
                mma<T>(o[m][2 * n + 1], p[m][k], b[2], b[3]);
            }
        }
    }
}

// s [MT * 16, 64] = Q x K'.
template <typename T, int D, int MT>
__device__ __forceinline__ void multiply_keys(float (&s)[MT][KV_TILE / 8][4], uint32_t q, uint32_t k)
{
#pragma unroll
    for (int i = 0; i < MT * KV_TILE / 2; i++) s[i / (KV_TILE / 2)][i / 4 % (KV_TILE / 8)][i % 4] = 0;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        uint32_t query[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) ldmatrix(query[m], tile_layout<D>::further(q, 16 * m, 2 * step));
#pragma unroll
        for (int n = 0; n < KV_TILE / 16; n++) {
            uint32_t key[4];
            ldmatrix(key, tile_layout<D>::further(k, 16 * n, 2 * step));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma<T>(s[m][2 * n], query[m], key[0], key[1]);
                mma<T>(s[m][2 * n + 1], query[m], key[2], key[3]);
            }
        }
    }
}

template <int MT>
__device__ __forceinline__ void adjust_tile(float (&s)[MT][KV_TILE / 8][4], const prefill_args &a,
                                            const prefill_tile &t, int32_t step)
{
    int thread = (int)threadIdx.x, lane = thread % 32, first = thread / 32 * MT * 16 + lane / 4;
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            row_name name = name_of(a, t.first_row, t.kv_head, first + 16 * m + 8 * half);
            struct score_row row;
            row.position = t.first_position + name.query;
            row.first = row.position - a.scoring.left;
            row.last = min(row.position + a.scoring.right, t.end_key - 1);
            row.slope = a.scoring.slopes ? __fmul_rn(a.scoring.slopes[name.head], CUDART_L2E_F) : 0;
            adjust_scores(s[m], half, step * KV_TILE + lane % 4 * 2, row, a.scoring);
        }
    }
}

// The weights p of a step's keys, and what went before scaled to the rows' new maxima.
template <typename T, int D, int MT>
__device__ __forceinline__ void weigh_keys(float (&o)[MT][D / 8][4], float (&max)[MT][2], float (&sum)[MT][2],
                                           uint32_t (&p)[MT][KV_TILE / 16][4], const prefill_args &a,
                                           const prefill_tile &t, int32_t step, uint32_t q, uint32_t k)
{
    const int lane = (int)threadIdx.x % 32;
    float s[MT][KV_TILE / 8][4], factor[MT][2];
    multiply_keys<T, D, MT>(s, q + lane_of_rows<D>(lane), k + lane_of_keys<D>(lane));
    if (step * KV_TILE < t.full_first || (step + 1) * KV_TILE > t.full_end) adjust_tile<MT>(s, a, t, step);
    bool moved = false;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        softmax_step(s[m], max[m], sum[m], factor[m], a.scoring.multiplier);
        pack_rows<T>(p[m], s[m]);
        moved |= factor[m][0] != 1 || factor[m][1] != 1;
    }
    if (!__any_sync(0xffffffffu, moved)) return; // all factors are 1
#pragma unroll
    for (int m = 0; m < MT; m++) scale_rows<D>(o[m], factor[m]);
}

// Keys that any of a warp's rows of the tile sees, from .x to .y - 1.
template <int MT> __device__ __forceinline__ int2 keys_of_warp(const prefill_args &a, const prefill_tile &t)
{
    int32_t first = t.first_row + (int32_t)threadIdx.x / 32 * MT * 16, last = min(first + MT * 16, t.n_rows) - 1;
    if (last < first) return make_int2(0, 0);
    return make_int2(t.first_position + query_of(a, first) - a.scoring.left,
                     min(t.first_position + query_of(a, last) + a.scoring.right + 1, t.end_key));
}

// ---- output ---------------------------------------------------------------------------------------------------------

// Divides by the sums and stores; through the warp's own rows of Q in shared memory, so that whole chunks are written.
template <typename T, int D, int MT>
__device__ __forceinline__ void store_tile(float (&o)[MT][D / 8][4], float (&max)[MT][2], float (&sum)[MT][2],
                                           const prefill_args &a, const prefill_tile &t, unsigned char *q)
{
    constexpr int CHUNKS = tile_layout<D>::CHUNKS;
    const int lane = (int)threadIdx.x % 32, first = (int)threadIdx.x / 32 * MT * 16;
    const int32_t first_row = t.first_row, n_rows = t.n_rows, query_row = t.query_row, kv_head = t.kv_head;
    __syncwarp(); // all lanes have read their last of Q
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = first + 16 * m + 8 * half + lane / 4;
            float total = quad_sum(sum[m][half]), factor = inverse(total);
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                uint32_t pair = pack<T>(__fmul_rn(o[m][n][2 * half], factor), __fmul_rn(o[m][n][2 * half + 1], factor));
                *(uint32_t *)(q + tile_layout<D>::offset(r, n) + lane % 4 * 4) = pair;
            }
            if (!a.p.lse || lane % 4 != 0 || first_row + r >= n_rows) continue;
            row_name name = name_of(a, first_row, kv_head, r);
            a.p.lse[(size_t)(query_row + name.query) * (size_t)a.p.n_heads + (size_t)name.head] =
                log_sum(max[m][half], total);
        }
    }
    __syncwarp();
#pragma unroll 8
    for (int index = lane; index < MT * 16 * CHUNKS; index += 32) {
        int r = first + index / CHUNKS, chunk = index % CHUNKS;
        uint4 x = *(const uint4 *)(q + tile_layout<D>::offset(r, chunk));
        size_t offset = offset_of(name_of(a, first_row, kv_head, r), query_row, a.p.out_stride, a.p.out_head_stride);
        if (first_row + r < n_rows && chunk * 8 < a.p.head_dim)
            *(uint4 *)((uint16_t *)a.p.out + offset + (size_t)chunk * 8) = x;
    }
}

// Offset of the tile n further in the ring.
template <int KV_BYTES> __device__ __forceinline__ uint32_t further(uint32_t place, int n)
{
    uint32_t next = place + (uint32_t)(n * KV_BYTES);
    return next >= RING * KV_BYTES ? next - RING * KV_BYTES : next;
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, int D, int MT, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) attention_prefill_kernel(const __grid_constant__ prefill_args a)
{
    using shape = prefill_shape<D, MT, WARPS>;
    constexpr int ROWS = shape::ROWS, THREADS = shape::THREADS;
    constexpr bool SKIPS = D == 128; // steps that none of a warp's rows sees: elsewhere it costs more than it saves
    extern __shared__ __align__(1024) unsigned char smem[];
    previous_kernel_wait();

    tile_search search = {};
    tile_place work;
    if (!find_tile(a.p, a.order, (int32_t)blockIdx.x, &search, &work)) return;
    prefill_rows *rows = (prefill_rows *)(smem + shape::Q_BYTES + RING * shape::KV_BYTES);
    if (threadIdx.x == 0) rows->tile = describe_tile(a, work, ROWS);
    __syncthreads();
    const prefill_tile &t = rows->tile;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const uint32_t q = shared_address(smem), ring = q + shape::Q_BYTES, pages = shared_address(rows->pages);
    uint32_t place = 0; // in the ring: K of the step; V is one further, the free tile two

    float o[MT][D / 8][4], max[MT][2], sum[MT][2];
#pragma unroll
    for (int i = 0; i < MT * D / 2; i++) o[i / (D / 2)][i / 4 % (D / 8)][i % 4] = 0;
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        max[i / 2][i % 2] = -CUDART_INF_F;
        sum[i / 2][i % 2] = 0;
    }

    if (t.first_step < t.end_step) {
        const int32_t first_step = t.first_step;
        fetch_pages(a, t, first_step, pages);
        fetch_pages(a, t, first_step + 1, pages);
        cp_async_commit();
        fetch_queries<D, ROWS, THREADS>(a, t, q);
        if (t.pages) {
            cp_async_wait<0>(); // the pages
            __syncthreads();
        }
        fetch_keys<D, THREADS>(a, t, a.p.k, first_step, rows->pages[first_step & 1], ring);
        cp_async_commit();
        fetch_keys<D, THREADS>(a, t, a.p.v, first_step, rows->pages[first_step & 1], ring + shape::KV_BYTES);
        cp_async_commit();
    }
    const int2 seen = keys_of_warp<MT>(a, t);
    for (int32_t step = t.first_step; step < t.end_step; step++) {
        cp_async_wait<1>(); // K of this step, and the pages of the next
        __syncthreads();    // everyone's part of it; and all have done with V of the step before
        if (step + 1 < t.end_step) {
            fetch_keys<D, THREADS>(a, t, a.p.k, step + 1, rows->pages[(step + 1) & 1],
                                    ring + further<shape::KV_BYTES>(place, 2));
            fetch_pages(a, t, step + 2, pages);
        }
        cp_async_commit();
        const bool sees = !SKIPS || (step * KV_TILE < seen.y && (step + 1) * KV_TILE > seen.x); // the warp, anything
        uint32_t p[MT][KV_TILE / 16][4];
        if (sees)
            weigh_keys<T, D, MT>(o, max, sum, p, a, t, step, q + (uint32_t)(warp * MT * 16 * tile_layout<D>::STRIDE),
                                 ring + place);
        cp_async_wait<1>(); // V of this step
        __syncthreads();    // and all have done with K
        if (step + 1 < t.end_step)
            fetch_keys<D, THREADS>(a, t, a.p.v, step + 1, rows->pages[(step + 1) & 1], ring + place);
        cp_async_commit();
        if (sees) add_values<T, D, MT, KV_TILE / 8>(o, p, ring + further<shape::KV_BYTES>(place, 1) + lane_of_rows<D>(lane));
        place = further<shape::KV_BYTES>(place, 2);
    }
    store_tile<T, D, MT>(o, max, sum, a, t, smem);
}

// ---- tile choice, launcher ------------------------------------------------------------------------------------------

template <typename T, int D, int MT, int WARPS, int BLOCKS>
cudaError_t launch_shape(prefill_args a, size_t n_tiles, int sm, int n_sms, cudaStream_t stream)
{
    using shape = prefill_shape<D, MT, WARPS>;
    size_t n_blocks = n_tiles * (size_t)a.p.n_kv_heads;
    if (n_blocks > INT32_MAX) return cudaErrorInvalidValue;
    unsigned section_tiles = (unsigned)(n_sms * BLOCKS / a.p.n_kv_heads);
    if (section_tiles < 2) section_tiles = 2;
    a.order = {a.p.n_kv_heads, a.group, shape::ROWS, (uint32_t)((((uint64_t)1 << 32) + section_tiles - 1) / section_tiles),
               KEYS_AT_ONCE / D};
    return launch_kernel(attention_prefill_kernel<T, D, MT, WARPS, BLOCKS>, (unsigned)n_blocks, shape::THREADS,
                         shape::SMEM, shape::SMEM, sm, stream, a);
}

// At most so many tiles: every sequence may end with a part of one.
size_t tiles_at_most(const prefill_args &a, size_t rows)
{
    return (size_t)a.p.n_tokens * (size_t)a.group / rows + (size_t)a.p.n_seqs;
}

// Tiles of 128 rows, unless they leave multiprocessors without a second block: then of 64.
template <typename T, int D, int MT, int WARPS, int BLOCKS, int SMALL_BLOCKS>
cudaError_t launch_rows(const prefill_args &a, int sm, int n_sms, cudaStream_t stream)
{
    size_t n_tiles = tiles_at_most(a, 128);
    if (n_tiles * (size_t)a.p.n_kv_heads < 2 * (size_t)n_sms)
        return launch_shape<T, D, 1, 4, SMALL_BLOCKS>(a, tiles_at_most(a, 64), sm, n_sms, stream);
    return launch_shape<T, D, MT, WARPS, BLOCKS>(a, n_tiles, sm, n_sms, stream);
}

template <typename T> cudaError_t launch_dim(const prefill_args &a, int sm, int n_sms, cudaStream_t stream)
{
    int32_t dim = a.p.head_dim;
    if (dim <= 64) return launch_rows<T, 64, 2, 4, 3, 4>(a, sm, n_sms, stream);
    if (dim <= 80) return launch_rows<T, 80, 2, 4, 2, 3>(a, sm, n_sms, stream);
    if (dim <= 96) return launch_rows<T, 96, 2, 4, 2, 3>(a, sm, n_sms, stream);
    if (dim <= 128) return launch_rows<T, 128, 2, 4, 2, 3>(a, sm, n_sms, stream);
    return launch_rows<T, 256, 1, 8, 1, 1>(a, sm, n_sms, stream);
}

} // namespace

cudaError_t launch_prefill(const struct flash_attention_params *p, cudaStream_t stream)
{
    int sm, n_sms;
    cudaError_t status = device_figures(&sm, &n_sms);
    if (status != cudaSuccess) return status;
    prefill_args a = {};
    a.p = *p;
    a.scoring = scoring_of(p);
    a.group = p->n_heads / p->n_kv_heads;
    if ((uint64_t)p->n_tokens * (uint64_t)a.group * (uint64_t)a.group >> 32) return cudaErrorInvalidValue; // query_of
    if (sm == 90 && prefill_fits_hopper(p)) return launch_prefill_hopper(p, n_sms, stream);
    if (a.group > 1) a.group_part = (uint32_t)((((uint64_t)1 << 32) + (uint64_t)a.group - 1) / (uint64_t)a.group);
    if (p->dtype == FLASH_ATTENTION_BF16) return launch_dim<__nv_bfloat16>(a, sm, n_sms, stream);
    return launch_dim<__half>(a, sm, n_sms, stream);
}
