/* attention_prefill_hopper.cu: Flash Attention of many query rows on Hopper (Shah et al., "FlashAttention-3", 2024): wgmma, bulk
 * tensor copies straight from the pages, warp specialisation. head_dim 64, 128, 256; the rest is attention_prefill.cu's.
 *
 * Shapes: q, out [T, H, D], k, v by strides (kernels/flash_attention.h). A tile is 64 rows for each of two warpgroups (three at
 * head_dim 64, where sequences are long): as many q heads of one KV head as fit, of some queries.
 * Grid: one block a multiprocessor, which asks a counter for tiles, in the order of attention_tiles.cuh, until there are none; one
 * warpgroup fetches (attention_prefill_hopper.cuh), the others compute, each on its own rows.
 * Shared memory: Q of two tiles (of one at head_dim 256), a ring of 4 to 8 slots for K or V of a step.
 * FLOPs: 4 D per (query row, key seen). Bytes: q and out once, K and V once per tile (mostly from L2).
 * Bound by the tensor cores, and at head_dim 64 by the exponentials: 16 a cycle. Measured on an H200 (2026-11-28), causal, bf16,
 * against FlashAttention-3 in the same run: 0.92 to 0.97 at head_dim 128 from 2k tokens on, 1.13 to 1.20 over pages of 64; the
 * tensor cores are at work 82 % of the cycles at 16k tokens (FlashAttention-3: 88).
 *
 * A step: scores of this step and values of the one before are begun together; the softmax of the scores runs while the values are
 * added. At head_dim 128 the warpgroups take turns to begin (named barriers): one's softmax falls into the other's products.
 * From tile to tile it goes on so: the first scores of the next tile are begun with the last values of this one.
 * The same bits for a row in any batch, chunk or shape: steps begin at multiples of KEYS and are taken in descending order; of a
 * step of which a row sees nothing all weights are 0, and its maximum, sum and result stay as they are.
 *
 * Tried, and of no use: fewer scores where a tile's first step is half masked (short sequences got 1 to 4 % slower: the code
 * grows; products of another width beside those in flight are serialised by ptxas); two blocks a multiprocessor at head_dim 64
 * (112 registers do not do); turns at head_dim 64 (-2 to -4 %) and 256 (no difference); asking for the next tile at the begin
 * of this one (one multiprocessor worked 13 % longer than another). What did: descriptors from uniform registers (+5 %),
 * scaling the result only where a maximum has moved far (+2 %), waiting for values when the maxima are known (+3 %), one
 * elected lane that asks for copies (over pages +7 %).
 */
#include <atomic>

#include "kernels/cuda/attention_prefill_hopper.cuh"

namespace {

// Weights are at most 2^LATE times what they would be, in fp16, too, far from the largest number.
__device__ constexpr float LATE = 8;

enum {
    LONG_SEQUENCE = 1536, // queries, on average
    MAX_CHAINS = 4,       // of maxima of a row that a lane keeps: they do not wait for each other
};

// ---- one step -------------------------------------------------------------------------------------------------------

// What a lane knows of one of its two rows.
struct hopper_row {
    int32_t first, last; // keys it sees
    int32_t position;
    float slope;         // ALiBi, in units of log2(e)
};

// Index in an accumulator of element i of the lane's, of one of its rows.
__device__ __forceinline__ constexpr int element_of(int half, int i) { return i / 2 * 4 + 2 * half + i % 2; }

// Softcap, ALiBi: of the bias of key first + 8 i + j, the part of 8 i + j is added; the rest, the same for all of the lane's
// elements of the row, is the result.
template <int N>
__device__ __forceinline__ float adjust_row(float (&s)[N / 2], int half, int32_t first, const hopper_row &row,
                                            const struct scoring &scoring)
{
    if (scoring.softcap_in != 0) {
#pragma unroll
        for (int i = 0; i < N / 4; i++) s[element_of(half, i)] = cap_score(s[element_of(half, i)], scoring);
    }
    if (!scoring.slopes) return 0;
    float per_key = scoring.softcap_in != 0 ? row.slope : __fdividef(row.slope, scoring.raw_scale);
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        float &x = s[element_of(half, i)];
        x = __fmaf_rn(per_key, (float)(i / 2 * 8 + i % 2), x);
    }
    return __fmul_rn(row.slope, (float)(first - row.position));
}

// -infinity for keys before `first`, or after `last`, of a row; key: that of the lane's first element.
template <int N> __device__ __forceinline__ void mask_before(float (&s)[N / 2], int half, int32_t key, int32_t first)
{
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        if (i / 2 * 8 + i % 2 < first - key) s[element_of(half, i)] = -CUDART_INF_F;
    }
}

template <int N> __device__ __forceinline__ void mask_after(float (&s)[N / 2], int half, int32_t key, int32_t last)
{
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        if (i / 2 * 8 + i % 2 > last - key) s[element_of(half, i)] = -CUDART_INF_F;
    }
}

// ---- computing ------------------------------------------------------------------------------------------------------

template <typename T, typename shape> struct computer {
    static constexpr int D = shape::D, N = shape::KEYS, SYNC = 1 + shape::WARPGROUPS; // named barriers: 1 and on are turns
    const hopper_args &a;
    hopper_smem<shape> *smem;
    const int lane, warpgroup;
    ring_place<shape::SLOTS> slot;       // that comes next
    ring_place<shape::SLOTS> value_slot; // and the one after it: see look_ahead
    uint32_t q_descriptor, k_descriptor, v_descriptor;
    ring_place<shape::Q_BUFFERS> q_at, q_next;
    hopper_rows rows;
    int32_t step, first_step;     // of the tile: at hand, its last
    int32_t n_valid;              // keys of the step's that are in the context
    int32_t full_first, full_end; // keys that all rows of the warpgroup see
    int32_t last_full;            // step of which they see all
    int32_t n_skipped;            // steps from the tile's first on of which they see nothing
    bool is_pending;              // p holds weights of values that are still to be added
    bool has_values;              // such values are in the ring, after the next keys
    hopper_row row[2];
    float o[D / 2], s[N / 2];
    uint32_t p[N / 4];
    float max[2], sum[2], factor[2], shift[2], bias[2];
    const float multiplier;
    bool are_full;                // the slots that come next; false: not known to be

    __device__ __forceinline__ computer(const hopper_args &a, hopper_smem<shape> *smem)
        : a(a), smem(smem), lane((int)threadIdx.x % 32), warpgroup(uniform((int)threadIdx.x / WARPGROUP)),
          multiplier(a.scoring.slopes && a.scoring.softcap_in == 0 ? a.scoring.raw_scale : a.scoring.multiplier)
    {
    }

    __device__ __forceinline__ void wait_slot(const ring_place<shape::SLOTS> &at)
    {
        mbarrier_wait(shared_address(smem->full + at.at), at.parity);
    }

    // Whether the two slots that come next are full, asked early, too.
    __device__ __forceinline__ void ask_slots()
    {
        are_full = mbarrier_test(shared_address(smem->full + slot.at), slot.parity);
        are_full &= mbarrier_test(shared_address(smem->full + value_slot.at), value_slot.parity);
    }

    __device__ __forceinline__ void release_slot(const ring_place<shape::SLOTS> &at)
    {
        if (lane == 0) mbarrier_arrive(shared_address(smem->empty + at.at));
    }

    __device__ __forceinline__ uint32_t describe_q()
    {
        return matrix_descriptor(shared_address(smem->q[q_at.at]) + (uint32_t)(warpgroup * 64 * ROW_BYTES), shape::ROWS);
    }

    __device__ __forceinline__ uint32_t describe_slot(const ring_place<shape::SLOTS> &at)
    {
        return matrix_descriptor(shared_address(smem->slots[at.at]), N);
    }

    // Of the two slots that come next, early, for what follows from `slot` takes a while.
    __device__ __forceinline__ void look_ahead()
    {
        value_slot = slot;
        value_slot.advance();
        q_descriptor = describe_q();
        k_descriptor = describe_slot(slot);
        v_descriptor = describe_slot(value_slot);
    }

    // s = Q K'
    __device__ __forceinline__ void begin_scores(uint32_t q, uint32_t k)
    {
        hold_registers(s);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            wgmma<T, N>::rows(s, q + i / 4 * (shape::ROWS * ROW_BYTES >> 4) + i % 4 * 2,
                              k + i / 4 * (N * ROW_BYTES >> 4) + i % 4 * 2, i > 0);
        wgmma_commit();
    }

    // o += P V
    __device__ __forceinline__ void begin_values(uint32_t v)
    {
        hold_registers(o);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < N / 16; i++)
            wgmma<T, D>::columns(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], v + i * (16 * ROW_BYTES >> 4));
        wgmma_commit();
    }

    // Softcap, ALiBi, -infinity for what a row does not see.
    __device__ __forceinline__ void adjust_scores(bool masked, bool adjusted)
    {
        const int32_t first = step * N + lane % 4 * 2;
        bias[0] = bias[1] = 0;
        if (adjusted) {
            bias[0] = adjust_row<N>(s, 0, first, row[0], a.scoring);
            bias[1] = adjust_row<N>(s, 1, first, row[1], a.scoring);
        }
        if (masked && (step + 1) * N > full_end) {
            mask_after<N>(s, 0, first, row[0].last);
            mask_after<N>(s, 1, first, row[1].last);
        }
        if (masked && step * N < full_first) {
            mask_before<N>(s, 0, first, row[0].first);
            mask_before<N>(s, 1, first, row[1].first);
        }
    }

    // The online softmax as softmax_step of attention_prefill.cu has it, but that the maximum that is subtracted stays behind the
    // row's until it is more than 2^LATE times too small: what goes before is hardly ever scaled. (Dao, "FlashAttention-4", 2025.)
    // most: of the lane's scores of the row.
    __device__ __forceinline__ void move_max(int half, float most)
    {
        float new_max = fmaxf(max[half], quad_max(__fmaf_rn(most, multiplier, bias[half])));
        factor[half] = 1;
        if (__fsub_rn(new_max, max[half]) > LATE) { // false where both are -infinity
            factor[half] = exp2_approx(__fsub_rn(max[half], new_max));
            max[half] = new_max;
        }
        shift[half] = __fsub_rn(bias[half], finite_max(max[half]));
    }

    __device__ __forceinline__ void move_maxima()
    {
        float most[2][MAX_CHAINS];
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < N / 4; i++) {
                float x = s[element_of(half, i)], &of = most[half][i % MAX_CHAINS];
                of = i < MAX_CHAINS ? x : fmaxf(of, x);
            }
            move_max(half, fmaxf(fmaxf(most[half][0], most[half][1]), fmaxf(most[half][2], most[half][3])));
        }
    }

    // Scores to weights, their sums, and their rounding for the product over them.
    __device__ __forceinline__ void exponentiate()
    {
        float part[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            s[i] = exp2_approx(__fmaf_rn(s[i], multiplier, shift[i / 2 % 2]));
            part[i % 4] = __fadd_rn(part[i % 4], s[i]);
            if (i % 2) p[i / 2] = pack<T>(s[i - 1], s[i]);
        }
        sum[0] = __fmaf_rn(sum[0], factor[0], __fadd_rn(part[0], part[1]));
        sum[1] = __fmaf_rn(sum[1], factor[1], __fadd_rn(part[2], part[3]));
    }

    __device__ __forceinline__ void scale_result()
    {
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = __fmul_rn(o[i], factor[i / 2 % 2]);
    }

    // From the scores of `step` to weights; the values of the weights before are added meanwhile, which is waited for when the
    // maxima are known: the registers of those weights are free then, to be written as the exponentials come. (ptxas moves the
    // wait up, to where it is first possible, but not over a store.)
    __device__ __forceinline__ void soften()
    {
        move_maxima();
        store_volatile(shared_address(smem->maxima + threadIdx.x), max[0], max[1]);
        wgmma_wait<0>();
        hold_registers(o);
        release_slot(slot);
        slot.advance();
        look_ahead();
        ask_slots();
        exponentiate();
    }

    __device__ __forceinline__ bool has_moved() { return __any_sync(0xffffffffu, factor[0] != 1 || factor[1] != 1); }

    // Values of keys beyond the context's end may be anything: zeros, for their weights are.
    __device__ __forceinline__ void clear_values(const ring_place<shape::SLOTS> &at, int32_t n_keys)
    {
        uint4 *slot = (uint4 *)smem->slots[at.at];
        for (int i = n_keys * 8 + (int)threadIdx.x % WARPGROUP; i < N * 8; i += WARPGROUP) {
#pragma unroll
            for (int column = 0; column < shape::COLUMNS; column++) slot[column * N * 8 + i] = make_uint4(0, 0, 0, 0);
        }
        async_proxy_fence();
        named_barrier_sync(SYNC + warpgroup, WARPGROUP);
    }

    __device__ __forceinline__ void take_turn()
    {
        if (shape::TAKES_TURNS) named_barrier_sync(1 + warpgroup, 2 * WARPGROUP);
    }

    __device__ __forceinline__ void pass_turn()
    {
        if (shape::TAKES_TURNS)
            named_barrier_arrive(1 + (warpgroup + 1 == shape::WARPGROUPS ? 0 : warpgroup + 1), 2 * WARPGROUP);
    }

    __device__ __forceinline__ void find_row(int32_t r, int32_t position, int32_t length, hopper_row *row)
    {
        int32_t query = query_of(a, r), head = rows.first_head + r - query * a.n_packed;
        row->position = position + query;
        row->first = row->position - a.scoring.left;
        row->last = min(row->position + a.scoring.right, length - 1);
        row->slope = a.scoring.slopes && head < a.p.n_heads ? __fmul_rn(a.scoring.slopes[head], CUDART_L2E_F) : 0;
    }

    __device__ __forceinline__ void reset_rows()
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            max[i] = -CUDART_INF_F;
            sum[i] = 0;
        }
    }

    __device__ __forceinline__ void clear_result()
    {
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0;
    }

    // The next tile in which there are keys; false: there is none. What decides on loops comes from one lane: see uniform.
    __device__ __forceinline__ bool begin_tile()
    {
        for (;; release_q()) {
            q_at = q_next;
            mbarrier_wait(shared_address(smem->q_full + q_at.at), q_at.parity);
            q_next.advance();
            const hopper_tile &tile = smem->tiles[q_at.at];
            hopper_rows found = {uniform(tile.rows.query_row), uniform(tile.rows.n_queries), uniform(tile.rows.first_head),
                                 uniform(tile.rows.n_heads)};
            if (found.n_heads == 0) return false;
            first_step = uniform(tile.first_step);
            step = uniform(tile.end_step) - 1;
            if (step < first_step) {
                store_nothing(found);
                continue;
            }
            rows = found;
            const int32_t position = uniform(tile.position), length = uniform(tile.length), first_row = warpgroup * 64;
            const int32_t r = first_row + (int)threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
            find_row(r, position, length, row);
            find_row(r + 8, position, length, row + 1);
            const int32_t last = position + min(query_of(a, first_row + 63), rows.n_queries - 1);
            const int32_t own_end = query_of(a, first_row) >= rows.n_queries
                                        ? first_step : (min(last + a.scoring.right + 1, length) + N - 1) / N;
            n_skipped = shape::RUNS_ON ? step + 1 - ::max(own_end, first_step) : 0;
            full_first = last - a.scoring.left;
            full_end = min(position + query_of(a, first_row) + a.scoring.right + 1, length);
            last_full = ::max(first_step, (full_first + N - 1) / N); // rounded down where negative: first_step counts
            n_valid = min(length - (step - n_skipped) * N, N);
            return true;
        }
    }

    __device__ __forceinline__ void release_q()
    {
        if (lane == 0) mbarrier_arrive(shared_address(smem->q_empty + q_at.at));
    }

    // The scores of a step are there: its keys are no longer needed, nor, after the last, the queries.
    __device__ __forceinline__ void end_scores(const ring_place<shape::SLOTS> &at)
    {
        hold_registers(s);
        release_slot(at);
        if (step == first_step) release_q();
    }

    __device__ __forceinline__ void add_values(const ring_place<shape::SLOTS> &at, int32_t n_values)
    {
        if (n_values < N) clear_values(at, n_values);
        begin_values(uniform(describe_slot(at)));
        wgmma_wait<0>();
        hold_registers(o);
    }

    // The last values of a tile, alone.
    __device__ __forceinline__ void finish_tile(const hopper_rows &of)
    {
        wait_slot(slot);
        add_values(slot, n_valid);
        release_slot(slot);
        slot.advance();
        store_tile(of, max, sum);
    }

    // The first scores of a tile, alone.
    __device__ __forceinline__ void start_tile(bool adjusted)
    {
        clear_result();
        reset_rows();
        wait_slot(slot);
        begin_scores(uniform(describe_q()), uniform(describe_slot(slot)));
        wgmma_wait<0>();
        end_scores(slot);
        slot.advance();
        adjust_scores(true, adjusted);
        are_full = false;
        move_maxima();
        exponentiate();
        look_ahead();
        is_pending = true;
    }

    // A step of which the warpgroup sees nothing: the values that are still to be added, if there are any, are.
    __device__ __forceinline__ void skip_step(const hopper_rows &of, int32_t n_values)
    {
        const ring_place<shape::SLOTS> k = slot;
        slot.advance();
        wait_slot(k);
        if (has_values) wait_slot(slot);
        take_turn();
        if (is_pending) {
            add_values(slot, n_values);
            store_tile(of, max, sum);
        }
        pass_turn();
        release_slot(k);
        if (has_values) {
            release_slot(slot);
            slot.advance();
        }
        is_pending = are_full = false;
        has_values = true;
    }

    // Whether it has to see for itself that slots are full: the others' turns come after.
    __device__ __forceinline__ bool fetches_first() { return !shape::TAKES_TURNS || warpgroup == 0; }

    // Scores of `step`, from the slot at hand, and beside them the values of the step before, of which n_values are valid, from
    // the slot after it. Returns when the scores are there.
    __device__ __forceinline__ void multiply(int32_t n_values)
    {
        const uint32_t q = uniform(q_descriptor), k = uniform(k_descriptor), v = uniform(v_descriptor);
        if (fetches_first() && !are_full) {
            wait_slot(slot);
            wait_slot(value_slot);
        }
        if (n_values < N) {
            wait_slot(value_slot);
            clear_values(value_slot, n_values);
        }
        take_turn();
        begin_scores(q, k);
        begin_values(v);
        pass_turn();
        wgmma_wait<1>();
        end_scores(slot);
        slot = value_slot;
    }

    // The same where no values are to be added, though the slot may be there.
    __device__ __forceinline__ void multiply_keys()
    {
        const ring_place<shape::SLOTS> at = slot;
        const uint32_t q = uniform(describe_q()), k = uniform(describe_slot(at));
        wait_slot(at);
        take_turn();
        begin_scores(q, k);
        slot.advance();
        if (has_values) wait_slot(slot);
        pass_turn();
        wgmma_wait<0>();
        end_scores(at);
        if (has_values) {
            release_slot(slot);
            slot.advance();
        }
        has_values = true;
        are_full = false;
    }

    // Rows of out that the lane has of a tile: half 0 or 1. False: beyond the tile's.
    __device__ __forceinline__ bool find_output(const hopper_rows &t, int half, int32_t *token, int32_t *head)
    {
        int32_t r = warpgroup * 64 + (int)threadIdx.x % WARPGROUP / 32 * 16 + lane / 4 + 8 * half, query = query_of(a, r);
        *token = t.query_row + query;
        *head = t.first_head + r - query * a.n_packed;
        return query < t.n_queries && *head < t.first_head + t.n_heads;
    }

    __device__ __forceinline__ uint16_t *output_of(int32_t token, int32_t head)
    {
        return (uint16_t *)a.p.out + ((size_t)(uint32_t)token * (uint32_t)a.p.out_stride +
                                      (size_t)(uint32_t)head * (uint32_t)a.p.out_head_stride);
    }

    __device__ __forceinline__ void store_lse(int32_t token, int32_t head, float x)
    {
        if (lane % 4 == 0) a.p.lse[(size_t)token * (size_t)a.p.n_heads + (size_t)head] = x;
    }

    // Divides by the sums and stores. Two lanes exchange half of what they have, so that a quad writes 32 bytes together.
    __device__ __forceinline__ void store_tile(const hopper_rows &t, const float (&row_max)[2], const float (&row_sum)[2])
    {
        const bool odd = lane % 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int32_t token, head;
            const bool is_row = find_output(t, half, &token, &head);
            const float total = quad_sum(row_sum[half]), scale = total == 0 ? 0.0f : reciprocal_approx(total);
            uint16_t *to = output_of(token, head) + lane % 4 / 2 * 4 + (odd ? 8 : 0);
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                uint32_t low = pack<T>(__fmul_rn(o[8 * i + 2 * half], scale), __fmul_rn(o[8 * i + 2 * half + 1], scale));
                uint32_t high = pack<T>(__fmul_rn(o[8 * i + 4 + 2 * half], scale), __fmul_rn(o[8 * i + 5 + 2 * half], scale));
                uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
                if (is_row) *(uint2 *)(to + 16 * i) = odd ? make_uint2(other, high) : make_uint2(low, other);
            }
            if (a.p.lse && is_row) store_lse(token, head, log_sum(row_max[half], total));
        }
    }

    // The rows of a tile that sees no key.
    __device__ __forceinline__ void store_nothing(const hopper_rows &of)
    {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int32_t token, head;
            if (!find_output(of, half, &token, &head)) continue;
            for (int i = 0; i < D / 16; i++)
                *(uint2 *)(output_of(token, head) + 16 * i + lane % 4 * 4) = make_uint2(0, 0);
            if (a.p.lse) store_lse(token, head, -CUDART_INF_F);
        }
    }

    __device__ __forceinline__ void run(bool adjusted)
    {
        if (shape::TAKES_TURNS && warpgroup == shape::WARPGROUPS - 1) named_barrier_arrive(1, 2 * WARPGROUP); // the first's turn
        is_pending = has_values = are_full = false;
        for (;;) { // is_pending: p holds the weights of `step`
            if (is_pending && n_valid == N && step * N <= full_end) {
                while (step > last_full) {
                    step--;
                    multiply(N);
                    adjust_scores(false, adjusted);
                    soften();
                    if (__builtin_expect(has_moved(), 0)) scale_result();
                }
            }
            const bool ends = !is_pending || step == first_step;
            const hopper_rows of = rows;
            const int32_t n_values = n_valid;
            if (!ends) {
                step--;
                n_valid = N;
            } else {
                if (!shape::RUNS_ON && is_pending) finish_tile(of);
                if (!begin_tile()) {
                    if (shape::RUNS_ON && is_pending) finish_tile(of);
                    return;
                }
                if constexpr (!shape::RUNS_ON) {
                    start_tile(adjusted);
                    continue;
                } else {
                    for (; n_skipped > 0; n_skipped--, step--) skip_step(of, n_values);
                    if (step < first_step) {
                        store_nothing(rows); // those there are, if any, see no key
                        release_q();
                        continue;
                    }
                }
            }
            const bool stores = ends && is_pending;
            const float last_max[2] = {max[0], max[1]}, last_sum[2] = {sum[0], sum[1]};
            if (ends) reset_rows();
            if (!is_pending) {
                clear_result();
                multiply_keys();
                adjust_scores(true, adjusted);
                move_maxima();
                exponentiate();
                look_ahead();
                is_pending = true;
                continue;
            }
            if (ends) look_ahead();
            multiply(n_values);
            adjust_scores(true, adjusted);
            soften();
            if (stores) {
                store_tile(of, last_max, last_sum);
                clear_result();
            } else if (__builtin_expect(has_moved(), 0)) {
                scale_result();
            }
        }
    }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, typename shape, bool ADJUSTED>
__global__ void __launch_bounds__(shape::THREADS, 1)
attention_prefill_hopper_kernel(const __grid_constant__ hopper_args a)
{
    extern __shared__ __align__(1024) unsigned char raw[];
    hopper_smem<shape> *smem = (hopper_smem<shape> *)raw;
    if (threadIdx.x == 0) {
        for (int i = 0; i < shape::Q_BUFFERS; i++) {
            mbarrier_init(shared_address(smem->q_full + i), 1);
            mbarrier_init(shared_address(smem->q_empty + i), shape::WARPGROUPS * 4);
        }
        for (int i = 0; i < shape::SLOTS; i++) {
            mbarrier_init(shared_address(smem->full + i), 1);
            mbarrier_init(shared_address(smem->empty + i), shape::WARPGROUPS * 4);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    previous_kernel_wait();
    next_kernel_allow();
    if (threadIdx.x >= shape::COMPUTE_THREADS) {
        registers_shrink<shape::FETCH_REGISTERS>();
        if (threadIdx.x < shape::COMPUTE_THREADS + 32) fetch<shape>(a, smem);
    } else {
        registers_grow<shape::COMPUTE_REGISTERS>();
        computer<T, shape>(a, smem).run(ADJUSTED);
    }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

// As many q heads of a KV head to a tile as leave the fewest of its rows empty, and the most heads of these.
void choose_pack(hopper_args *a, int32_t rows)
{
    int32_t best = 0;
    for (int32_t n = 1; n <= a->group; n++) {
        int32_t packed = (a->group + n - 1) / n, queries = rows / packed;
        if (packed > rows || queries > 256) continue;
        int32_t used = queries * a->group * 1024 / n; // rows of n tiles, times 1024
        if (used <= best) continue;
        best = used;
        a->n_packs = n;
        a->n_packed = packed;
        a->n_queries = queries;
    }
    a->pack_part = a->n_packed > 1 ? (uint32_t)((((uint64_t)1 << 32) + (uint64_t)a->n_packed - 1) / (uint64_t)a->n_packed) : 0;
}

cudaError_t make_maps(hopper_args *a, int32_t keys)
{
    const struct flash_attention_params *p = &a->p;
    const uint64_t columns = (uint64_t)p->head_dim / 64, kv_heads = (uint64_t)p->n_kv_heads, n_kv = p->n_kv ? (uint64_t)p->n_kv : 1;
    const bool is_bf16 = p->dtype == FLASH_ATTENTION_BF16;
    struct tensor_view q = {p->q,
                            {(uint64_t)a->group, columns, kv_heads, (uint64_t)p->n_tokens},
                            {p->q_head_stride, 64, (uint64_t)a->group * p->q_head_stride, p->q_stride},
                            {(uint32_t)a->n_packed, (uint32_t)a->n_queries}};
    a->box_tokens = !p->block_table ? keys : keys % p->block_size == 0 ? p->block_size : 16;
    struct tensor_view k = {p->k,
                            {p->block_table ? (uint64_t)p->block_size : n_kv, columns, kv_heads, p->block_table ? n_kv : 1},
                            {p->kv_stride, 64, p->kv_head_stride, p->block_table ? p->kv_block_stride : 8},
                            {(uint32_t)a->box_tokens, 1}};
    struct tensor_view v = k;
    v.base = p->v;
    cudaError_t status = make_tensor_map(&a->q, &q, is_bf16);
    if (status == cudaSuccess) status = make_tensor_map(&a->k, &k, is_bf16);
    if (status == cudaSuccess) status = make_tensor_map(&a->v, &v, is_bf16);
    return status;
}

std::atomic<uint32_t> n_launches; // of all shapes: which counter is next

template <typename T, typename shape, bool ADJUSTED> cudaError_t launch_shape(hopper_args a, int n_sms, cudaStream_t stream)
{
    static_assert(sizeof(hopper_smem<shape>) <= 227 * 1024, "fits sm_90");
    choose_pack(&a, shape::ROWS);
    cudaError_t status = make_maps(&a, shape::KEYS);
    if (status != cudaSuccess) return status;
    a.order.n_heads = a.p.n_kv_heads * a.n_packs;
    a.order.rows = 1;
    a.order.divisor = a.n_queries;
    a.order.keys_at_once = KEYS_AT_ONCE / shape::D;
    size_t n_tiles = ((size_t)a.p.n_tokens / (size_t)a.n_queries + (size_t)a.p.n_seqs) * (size_t)a.order.n_heads;
    if (n_tiles > INT32_MAX / 2) return cudaErrorInvalidValue;
    uint64_t section = (uint64_t)(4 * n_sms / a.order.n_heads);
    if (section < 2) section = 2;
    a.order.section_part = (uint32_t)((((uint64_t)1 << 32) + section - 1) / section);
    a.counter = (int32_t)(n_launches++ % N_COUNTERS);
    unsigned n_blocks = n_tiles < (size_t)n_sms ? (unsigned)n_tiles : (unsigned)n_sms;
    return launch_kernel(attention_prefill_hopper_kernel<T, shape, ADJUSTED>, n_blocks, shape::THREADS,
                         sizeof(hopper_smem<shape>), sizeof(hopper_smem<shape>), 90, stream, a);
}

template <typename T, typename shape> cudaError_t launch_scoring(const hopper_args &a, int n_sms, cudaStream_t stream)
{
    if (a.scoring.softcap_in != 0 || a.scoring.slopes) return launch_shape<T, shape, true>(a, n_sms, stream);
    return launch_shape<T, shape, false>(a, n_sms, stream);
}

template <typename T> cudaError_t launch_dim(const hopper_args &a, int n_sms, cudaStream_t stream)
{
    if (a.p.head_dim == 128) return launch_scoring<T, hopper_shape<128, 2>>(a, n_sms, stream);
    if (a.p.head_dim == 256) return launch_scoring<T, hopper_shape<256, 2>>(a, n_sms, stream);
    // Of short sequences tiles of 192 rows leave too much empty.
    if (a.p.n_tokens / a.p.n_seqs < LONG_SEQUENCE) return launch_scoring<T, hopper_shape<64, 2>>(a, n_sms, stream);
    return launch_scoring<T, hopper_shape<64, 3>>(a, n_sms, stream);
}

} // namespace

// The driver may be made to run PTX alone, of which this kernel has none.
static bool has_code()
{
    cudaFuncAttributes code;
    const void *kernel = (const void *)attention_prefill_hopper_kernel<__half, hopper_shape<128, 2>, false>;
    if (cudaFuncGetAttributes(&code, kernel) == cudaSuccess) return true;
    (void)cudaGetLastError();
    return false;
}

bool prefill_fits_hopper(const struct flash_attention_params *p)
{
    static const bool has = has_code();
    const size_t most = (size_t)1 << 38; // of a stride: a map's end at 2^40 bytes
    return has && (p->head_dim == 64 || p->head_dim == 128 || p->head_dim == 256) && p->kv_head_stride < most &&
           (size_t)(p->n_heads / p->n_kv_heads) * p->q_head_stride < most;
}

cudaError_t launch_prefill_hopper(const struct flash_attention_params *p, int n_sms, cudaStream_t stream)
{
    hopper_args a = {};
    a.p = *p;
    a.scoring = scoring_of(p);
    a.group = p->n_heads / p->n_kv_heads;
    a.block_shift = p->block_size == 16 ? 4 : p->block_size == 32 ? 5 : 6;
    return p->dtype == FLASH_ATTENTION_BF16 ? launch_dim<__nv_bfloat16>(a, n_sms, stream) : launch_dim<__half>(a, n_sms, stream);
}
