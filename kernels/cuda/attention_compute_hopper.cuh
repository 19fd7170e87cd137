/* attention_compute_hopper.cuh: the warpgroups of attention_prefill_hopper.cu that compute: products, softmax, results.
 *
 * The softmax is online, but for no step are maxima looked for: what is subtracted from a row's scores is the maximum of the first
 * ones that it sees, and stays so until a lane's weights of a step add up to more than MOST_WEIGHTS; then it moves, by a power of
 * two (move_maxima). Sums and results are divided by each other in the end: it does not matter what was subtracted. Weights that
 * were infinite are computed once more, alone, from memory (redo_row). Whether a maximum moves depends on the row's scores in the
 * step alone: bits do not depend on the rows beside it.
 */
#ifndef GPTD_KERNELS_CUDA_ATTENTION_COMPUTE_HOPPER_CUH
#define GPTD_KERNELS_CUDA_ATTENTION_COMPUTE_HOPPER_CUH

#include "kernels/cuda/attention_prefill_hopper.cuh"

namespace {

// Of a lane's weights of a row: where they are more, the row's maximum moves. Below, all weights are numbers in the type, and values
// times weights far from a float's range.
template <typename T> __device__ constexpr float MOST_WEIGHTS = 0x1p32f;
template <> __device__ constexpr float MOST_WEIGHTS<__half> = 0x1p15f;

enum {
    MAX_CHAINS = 4,  // of maxima of a row that a lane keeps: they do not wait for each other
    KEPT_SLOPES = 2, // a lane's, of heads 32 apart
};

// ---- one step -------------------------------------------------------------------------------------------------------

// What becomes of a score. CAPPED: softcap, and ALiBi, if there are slopes.
enum scoring_kind { PLAIN, ALIBI, CAPPED };

// What a lane knows of one of its two rows.
struct hopper_row {
    int32_t position;
    int32_t last;     // key that it sees
    float slope;      // ALiBi's, in units of log2(e)
    uint32_t operand; // what it is in scores, as the tensor cores take it
};

// Index in an accumulator of element i of the lane's, of one of its rows.
__device__ __forceinline__ constexpr int element_of(int half, int i) { return i / 2 * 4 + 2 * half + i % 2; }

// Softcap, and ALiBi's bias of key first + 8 i + j, the part of 8 i + j.
template <int N>
__device__ __forceinline__ void adjust_row(float (&s)[N / 2], int half, const hopper_row &row, const struct scoring &scoring)
{
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        float &x = s[element_of(half, i)];
        x = __fmaf_rn(row.slope, (float)(i / 2 * 8 + i % 2), cap_score(x, scoring));
    }
}

// ALiBi's bias grows along a step's keys by the same for each: the tensor cores add it to the scores, as one more product [64, 8] x
// [8, keys]: what it grows by, in three parts that bf16 can hold, times the key's number, 0 to KEYS - 1, which it can.
template <typename shape> __device__ __forceinline__ void write_key_numbers(hopper_smem<shape> *smem)
{
    static_assert(shape::KEYS <= 256, "exact in bf16");
    for (int i = (int)threadIdx.x; i < shape::KEYS; i += shape::THREADS)
        smem->key_numbers[i] = make_uint4(pack<__nv_bfloat16>((float)i, (float)i), pack<__nv_bfloat16>((float)i, 0), 0, 0);
    async_proxy_fence();
}

// A lane's elements of the first operand.
__device__ __forceinline__ uint32_t bias_operand(float per_key, int lane)
{
    const float high = to_float(from_float<__nv_bfloat16>(per_key)), rest = __fsub_rn(per_key, high);
    const float middle = to_float(from_float<__nv_bfloat16>(rest)), low = __fsub_rn(rest, middle);
    return lane % 4 == 0 ? pack<__nv_bfloat16>(high, middle) : lane % 4 == 1 ? pack<__nv_bfloat16>(low, 0) : 0;
}

// Of a row's elements of a lane's, how many are of keys before `key`, from that of the first on: they come in pairs, 8 keys apart.
__device__ __forceinline__ int32_t elements_before(int32_t keys)
{
    return keys <= 0 ? 0 : keys / 8 * 2 + min(keys % 8, 2);
}

// -infinity for elements that are not in `seen`. (ptxas makes predicates of seven bits at a time.)
template <int N> __device__ __forceinline__ void mask_row(float (&s)[N / 2], int half, uint32_t seen)
{
    static_assert(N <= 128, "a bit for each");
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        if (!(seen >> i & 1)) s[element_of(half, i)] = -CUDART_INF_F;
    }
}

// Bits from `from` on, and before `end`.
__device__ __forceinline__ uint32_t bits_between(int32_t from, int32_t end)
{
    const uint32_t below = end >= 32 ? 0xffffffffu : (1u << end) - 1;
    return from >= 32 ? 0 : below >> from << from;
}

// ---- computing ------------------------------------------------------------------------------------------------------

template <typename T, typename shape, enum scoring_kind KIND> struct computer {
    static constexpr int D = shape::D, N = shape::KEYS, SYNC = 1 + shape::WARPGROUPS; // named barriers: 1 and on are turns
    const hopper_args &a;
    hopper_smem<shape> *smem;
    const int lane, warpgroup;
    ring_place<shape::SLOTS> slot;         // that comes next
    ring_place<shape::SLOTS> keys, values; // of the products at hand
    ring_place<shape::Q_BUFFERS> q_at, q_next;
    hopper_rows rows;
    int32_t context;              // see hopper_tile
    int32_t step, first_step;     // of the tile: at hand, its last
    int32_t n_valid;              // keys of the step's that are in the context
    int32_t full_first, full_end; // keys that all rows of the warpgroup see
    int32_t last_full;            // step of which they see all
    int32_t n_skipped;            // steps from the tile's first on of which they see nothing
    bool has_values;              // values of a skipped step are in the ring, after the next keys
    hopper_row row[2];
    float o[D / 2], s[N / 2];
    uint32_t p[N / 4];
    float max[2], sum[2], shift[2], bias[2];
    const float multiplier;
    float slopes[KEPT_SLOPES]; // ALiBi's, in units of log2(e): lane i has those of heads i, i + 32

    __device__ __forceinline__ computer(const hopper_args &a, hopper_smem<shape> *smem)
        : a(a), smem(smem), lane((int)threadIdx.x % 32), warpgroup(uniform((int)threadIdx.x / WARPGROUP)),
          multiplier(KIND == CAPPED ? 1.0f : a.scoring.raw_scale)
    {
#pragma unroll
        for (int i = 0; i < KEPT_SLOPES; i++) slopes[i] = KIND == PLAIN ? 0 : slope_of(lane + 32 * i);
    }

    __device__ __forceinline__ float slope_of(int32_t head)
    {
        return a.scoring.slopes && head < a.p.n_heads ? __fmul_rn(a.scoring.slopes[head], CUDART_L2E_F) : 0;
    }

    __device__ __forceinline__ void wait_slot(const ring_place<shape::SLOTS> &at)
    {
        mbarrier_wait(shared_address(smem->full + at.at), at.parity);
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

    __device__ __forceinline__ uint32_t describe_key_numbers() { return narrow_descriptor(shared_address(smem->key_numbers)); }

    // s = what ALiBi adds along the step: before the scores' turn, for it needs no keys.
    __device__ __forceinline__ void begin_bias()
    {
        if (KIND != ALIBI) return;
        hold_registers(s);
        wgmma_fence();
        wgmma<T, N>::narrow(s, row[0].operand, row[1].operand, describe_key_numbers());
    }

    // s = Q K', or, with ALiBi, s += Q K'
    __device__ __forceinline__ void begin_scores(uint32_t q, uint32_t k)
    {
        if (KIND != ALIBI) hold_registers(s);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            wgmma<T, N>::rows(s, q + i / 4 * (shape::ROWS * ROW_BYTES >> 4) + i % 4 * 2,
                              k + i / 4 * (N * ROW_BYTES >> 4) + i % 4 * 2, KIND == ALIBI || i > 0);
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

    // The key whose bias is the same for all of the lane's elements of a row: those of others are in the scores.
    __device__ __forceinline__ int32_t bias_key() { return step * N + (KIND == CAPPED ? lane % 4 * 2 : 0); }

    // Softcap, ALiBi, -infinity for what a row does not see.
    __device__ __forceinline__ void adjust_scores(bool masked)
    {
        const int32_t first = step * N + lane % 4 * 2;
        if (KIND == CAPPED) {
            adjust_row<N>(s, 0, row[0], a.scoring);
            adjust_row<N>(s, 1, row[1], a.scoring);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) bias[i] = KIND == PLAIN ? 0 : __fmul_rn(row[i].slope, (float)(bias_key() - row[i].position));
        if (!masked || ((step + 1) * N <= full_end && step * N >= full_first)) return;
#pragma unroll
        for (int half = 0; half < 2; half++)
            mask_row<N>(s, half, bits_between(elements_before(row[half].position - a.scoring.left - first),
                                              elements_before(row[half].last + 1 - first)));
    }

    // Rows that begin to see: what is subtracted from their scores is the maximum of these first ones, until their weights get too
    // large (see move_maxima). So no maximum is looked for in the other steps.
    __device__ __forceinline__ void begin_rows()
    {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most[MAX_CHAINS];
#pragma unroll
            for (int i = 0; i < N / 4; i++) {
                float x = s[element_of(half, i)], &of = most[i % MAX_CHAINS];
                of = i < MAX_CHAINS ? x : fmaxf(of, x);
            }
            float found = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
            found = quad_max(__fmaf_rn(found, multiplier, bias[half]));
            if (max[half] == -CUDART_INF_F) max[half] = found;
        }
    }

    __device__ __forceinline__ void find_shifts()
    {
        shift[0] = __fsub_rn(bias[0], finite_max(max[0]));
        shift[1] = __fsub_rn(bias[1], finite_max(max[1]));
    }

    // Scores to weights, elements FIRST to END - 1, and their sums.
    template <int FIRST, int END> __device__ __forceinline__ void exponentiate(float (&part)[4])
    {
#pragma unroll
        for (int i = FIRST; i < END; i++) {
            s[i] = exp2_approx(__fmaf_rn(s[i], multiplier, shift[i / 2 % 2]));
            part[i % 4] = __fadd_rn(part[i % 4], s[i]);
        }
    }

    __device__ __forceinline__ void pack_weights()
    {
#pragma unroll
        for (int i = 0; i < N / 4; i++) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
    }

    // The score of one query row and key, from memory.
    __device__ __forceinline__ float find_score(int32_t token, int32_t head, int32_t key)
    {
        const struct flash_attention_params &p = a.p;
        const T *q = (const T *)p.q + ((size_t)token * p.q_stride + (size_t)head * p.q_head_stride);
        const T *k = (const T *)p.k + (size_t)(head / a.group) * p.kv_head_stride;
        if (p.block_table) {
            const int32_t *pages = p.block_table + (size_t)context * (size_t)p.max_blocks;
            k += (size_t)pages[key >> a.block_shift] * p.kv_block_stride + (size_t)(key & (p.block_size - 1)) * p.kv_stride;
        } else {
            k += (size_t)(context + key) * p.kv_stride;
        }
        float x = 0;
#pragma unroll 1
        for (int i = 0; i < D; i++) x = __fmaf_rn(to_float(q[i]), to_float(k[i]), x);
        return x;
    }

    // Weights of a row once more, from the scores, for they were infinite: the maximum becomes these scores'. Returns the factor of
    // what went before. All lanes come along; where the row is another, or none of the tile's, nothing changes.
    __device__ __forceinline__ float redo_row(int half, bool is_it, float *added)
    {
        float t[N / 4], most = -CUDART_INF_F;
        int32_t token, head;
        is_it &= find_output(rows, half, &token, &head);
#pragma unroll 1
        for (int i = 0; i < N / 4; i++) {
            const int32_t key = step * N + i / 2 * 8 + i % 2 + lane % 4 * 2;
            const bool is_seen = is_it && key >= ::max(row[half].position - a.scoring.left, 0) && key <= row[half].last;
            float x = is_seen ? find_score(token, head, key) : 0;
            if (KIND == CAPPED) x = cap_score(x, a.scoring);
            if (KIND != PLAIN) x = __fmaf_rn(in_score(row[half].slope), (float)(key - bias_key()), x);
            t[i] = is_seen ? x : -CUDART_INF_F;
            most = fmaxf(most, t[i]);
        }
        const float new_max = quad_max(__fmaf_rn(most, multiplier, bias[half]));
        if (!is_it) return 1;
        const float factor = exp2_approx(__fsub_rn(max[half], new_max));
        max[half] = new_max;
        *added = 0;
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            float &weight = s[element_of(half, i)];
            weight = exp2_approx(__fmaf_rn(t[i], multiplier, __fsub_rn(bias[half], new_max)));
            *added = __fadd_rn(*added, weight);
        }
        return factor;
    }

    // The maximum of rows whose weights are large, as their sums (added) tell, moves: the largest sum of a lane's comes to be from 1
    // to 2, by a power of two, which is exact. (Never in a tile's first step: weights are at most 1.)
    __device__ __forceinline__ void move_maxima(float (&added)[2])
    {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float most = quad_max(added[half]);
            const bool is_lost = most == CUDART_INF_F;
            factor[half] = 1;
            if (__any_sync(0xffffffffu, is_lost)) factor[half] = redo_row(half, is_lost, added + half);
            if (most > MOST_WEIGHTS<T> && !is_lost) {
                int32_t power = min((__float_as_int(most) >> 23) - 127, 126);
                factor[half] = __int_as_float((127 - power) << 23);
                max[half] = __fadd_rn(max[half], (float)power);
                added[half] = __fmul_rn(added[half], factor[half]);
#pragma unroll
                for (int i = 0; i < N / 4; i++) s[element_of(half, i)] = __fmul_rn(s[element_of(half, i)], factor[half]);
            }
            sum[half] = __fmul_rn(sum[half], factor[half]);
        }
        pack_weights();
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = __fmul_rn(o[i], factor[i / 2 % 2]);
    }

    __device__ __forceinline__ void add_sums(const float (&added)[2])
    {
        sum[0] = __fadd_rn(sum[0], added[0]);
        sum[1] = __fadd_rn(sum[1], added[1]);
    }

    // From the scores of `step` to weights; the values of the weights before are added meanwhile: when they are, the registers of
    // those weights are free, and their slot. (ptxas moves the wait up, to where it is first possible, but not over a store.)
    __device__ __forceinline__ void soften(bool masked)
    {
        float part[4] = {0, 0, 0, 0};
        if (masked) begin_rows();
        find_shifts();
        exponentiate<0, shape::EARLY>(part);
        if (KIND == ALIBI) store_volatile(shared_address(smem->key_numbers) + threadIdx.x / 2 * 16 + 8 + threadIdx.x % 2 * 4,
                                          fminf(fminf(fminf(part[0], part[1]), fminf(part[2], part[3])), 0)); // a zero, as was there
        else store_volatile(shared_address(smem->parts + threadIdx.x), part[1], part[3]);
        wgmma_wait<0>();
        hold_registers(o);
        release_slot(values);
        exponentiate<shape::EARLY, N / 2>(part);
        pack_weights();
        float added[2] = {__fadd_rn(part[0], part[1]), __fadd_rn(part[2], part[3])};
        if (__builtin_expect(__any_sync(0xffffffffu, fmaxf(added[0], added[1]) > MOST_WEIGHTS<T>), 0)) move_maxima(added);
        add_sums(added);
    }

    // The same where all rows begin: their weights are at most 1.
    __device__ __forceinline__ void soften_first()
    {
        float part[4] = {0, 0, 0, 0};
        begin_rows();
        find_shifts();
        exponentiate<0, N / 2>(part);
        pack_weights();
        add_sums({__fadd_rn(part[0], part[1]), __fadd_rn(part[2], part[3])});
    }

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

    __device__ __forceinline__ float find_slope(int32_t head)
    {
        if (a.p.n_heads > 32 * KEPT_SLOPES) return slope_of(head);
        const float first = __shfl_sync(0xffffffffu, slopes[0], head & 31), second = __shfl_sync(0xffffffffu, slopes[1], head & 31);
        return head < 32 ? first : second;
    }

    // What is multiplied by the scale later.
    __device__ __forceinline__ float in_score(float slope) { return KIND == ALIBI ? __fdividef(slope, a.scoring.raw_scale) : slope; }

    __device__ __forceinline__ void find_row(int32_t r, int32_t position, int32_t length, hopper_row *row)
    {
        int32_t query = query_of(a, r), head = rows.first_head + r - query * a.n_packed;
        row->position = position + query;
        row->last = min(row->position + a.scoring.right, length - 1);
        if (KIND == PLAIN) return;
        row->slope = find_slope(head);
        if (KIND == ALIBI) row->operand = bias_operand(in_score(row->slope), lane);
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
            hopper_tile tile = {};
            if (lane == 0) tile = smem->tiles[q_at.at];
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
            context = uniform(tile.context);
            const int32_t position = uniform(tile.position), length = uniform(tile.length), first_row = warpgroup * 64;
            const int32_t r = first_row + (int)threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
            find_row(r, position, length, row);
            find_row(r + 8, position, length, row + 1);
            const int32_t last = position + min(query_of(a, first_row + 63), rows.n_queries - 1);
            const int32_t own_end = query_of(a, first_row) >= rows.n_queries
                                        ? first_step : (min(last + a.scoring.right + 1, length) + N - 1) / N;
            n_skipped = step + 1 - ::max(own_end, first_step);
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
    __device__ __forceinline__ void end_scores()
    {
        hold_registers(s);
        release_slot(keys);
        if (step > first_step) return;
        if (shape::RELEASES_EARLY) keep_branch();
        release_q();
    }

    // The last values of a tile, alone and out of turn; they are added while the next tile begins.
    __device__ __forceinline__ void begin_last_values()
    {
        take_slot(&values);
        wait_slot(values);
        if (n_valid < N) clear_values(values, n_valid);
        begin_values(uniform(describe_slot(values)));
    }

    // They are there, where one group of products has begun since: the results go to memory.
    __device__ __forceinline__ void end_last_values(const hopper_rows &of)
    {
        wgmma_wait<1>();
        hold_registers(o);
        release_slot(values);
        store_tile(of);
    }

    // Values that nothing is made of.
    __device__ __forceinline__ void drop_values()
    {
        if (!has_values) return;
        wait_slot(slot);
        release_slot(slot);
        slot.advance();
        has_values = false;
    }

    // A step of which the warpgroup sees nothing.
    __device__ __forceinline__ void skip_step()
    {
        take_slot(&keys);
        wait_slot(keys);
        if (has_values) wait_slot(slot);
        take_turn();
        pass_turn();
        release_slot(keys);
        drop_values();
        has_values = true;
    }

    // Whether it has to see for itself that slots are full: the others' turns come after.
    __device__ __forceinline__ bool fetches_first() { return !shape::TAKES_TURNS || warpgroup == 0; }

    __device__ __forceinline__ void take_slot(ring_place<shape::SLOTS> *at)
    {
        *at = slot;
        slot.advance();
    }

    __device__ __forceinline__ void wait_next_slots()
    {
        ring_place<shape::SLOTS> at = slot;
        wait_slot(at);
        at.advance();
        wait_slot(at);
    }

    // Scores of `step`, and beside them the values of the step before, of which n_values are valid, from the two slots that come
    // next. Returns when the scores are there.
    __device__ __forceinline__ void multiply(int32_t n_values)
    {
        if (fetches_first()) wait_next_slots();
        take_slot(&keys);
        take_slot(&values);
        const uint32_t q = uniform(describe_q()), k = uniform(describe_slot(keys)), v = uniform(describe_slot(values));
        if (n_values < N) {
            wait_slot(values);
            clear_values(values, n_values);
        }
        begin_bias();
        take_turn();
        begin_scores(q, k);
        begin_values(v);
        pass_turn();
        wgmma_wait<1>();
        end_scores();
    }

    // Steps until last_full: no row of the warpgroup sees less than all keys, nor did in the step before.
    __device__ __forceinline__ void run_full()
    {
        if (shape::WAITS_EARLY && fetches_first()) wait_next_slots();
        while (step > last_full) {
            step--;
            if (!shape::WAITS_EARLY && fetches_first()) wait_next_slots();
            take_slot(&keys);
            take_slot(&values);
            const uint32_t q = uniform(describe_q()), k = uniform(describe_slot(keys)), v = uniform(describe_slot(values));
            begin_bias();
            take_turn();
            begin_scores(q, k);
            if (shape::WAITS_EARLY && fetches_first() && step > last_full) wait_next_slots();
            begin_values(v);
            pass_turn();
            wgmma_wait<1>();
            end_scores();
            adjust_scores(false);
            soften(false);
        }
    }

    // The first scores of a tile; of anything, where none begins, for ptxas wants no condition on products.
    __device__ __forceinline__ void begin_first_scores(bool begins)
    {
        if (begins) {
            take_slot(&keys);
            wait_slot(keys);
        }
        const uint32_t q = uniform(describe_q()), k = uniform(describe_slot(keys));
        begin_bias();
        if (begins) take_turn();
        begin_scores(q, k);
        if (has_values) wait_slot(slot); // the others take turns after this one
        if (begins) pass_turn();
    }

    // They are there, and o is cleared for what comes.
    __device__ __forceinline__ void end_first_scores()
    {
        clear_result();
        reset_rows();
        wgmma_wait<0>();
    }

    // From the first step's scores to the last step's weights. Then the last values are being added.
    __device__ __forceinline__ void run_tile()
    {
        end_scores();
        adjust_scores(true);
        soften_first();
        for (;;) {
            if (n_valid == N && step * N < full_end && step > last_full) run_full();
            if (step == first_step) break;
            const int32_t n_values = n_valid;
            n_valid = N;
            step--;
            multiply(n_values);
            adjust_scores(true);
            soften(true);
        }
        begin_last_values();
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
    __device__ __forceinline__ void store_tile(const hopper_rows &t)
    {
        const bool odd = lane % 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int32_t token, head;
            const bool is_row = find_output(t, half, &token, &head);
            const float total = quad_sum(sum[half]), scale = total == 0 ? 0.0f : reciprocal_approx(total);
            uint16_t *to = output_of(token, head) + lane % 4 / 2 * 4 + (odd ? 8 : 0);
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                uint32_t low = pack<T>(__fmul_rn(o[8 * i + 2 * half], scale), __fmul_rn(o[8 * i + 2 * half + 1], scale));
                uint32_t high = pack<T>(__fmul_rn(o[8 * i + 4 + 2 * half], scale), __fmul_rn(o[8 * i + 5 + 2 * half], scale));
                uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
                if (is_row) *(uint2 *)(to + 16 * i) = odd ? make_uint2(other, high) : make_uint2(low, other);
            }
            if (a.p.lse && is_row) store_lse(token, head, log_sum(max[half], total));
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

    __device__ __forceinline__ void run()
    {
        if (shape::TAKES_TURNS && warpgroup == shape::WARPGROUPS - 1) named_barrier_arrive(1, 2 * WARPGROUP); // the first's turn
        has_values = false;
        for (bool is_found = false; is_found || begin_tile();) {
            for (; n_skipped > 0; n_skipped--, step--) skip_step();
            if (step < first_step) {
                drop_values();
                store_nothing(rows); // those there are, if any, see no key
                release_q();
                is_found = false;
                continue;
            }
            begin_first_scores(true);
            drop_values();
            end_first_scores();
            bool follows;
            do { // each tile begins while the results of the one before go to memory
                run_tile();
                const hopper_rows of = rows;
                is_found = begin_tile();
                follows = is_found && n_skipped == 0;
                begin_first_scores(follows);
                end_last_values(of);
                end_first_scores();
            } while (follows);
            if (!is_found) return;
        }
    }
};

} // namespace

#endif
