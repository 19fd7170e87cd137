/* sample_filter.cuh: top_k and top_p without a sort, by the radix of (key, id).
 *
 * A candidate's place is key << ID_BITS | id: likeliest first, then lowest id; no two are alike. Where to cut is found
 * digit by digit: a histogram of counts and masses over the digit, then the bucket in which the running sum reaches
 * the target. Masses are exp(tempered logit) in fixed point, so their sums are the same in any order.
 */
#ifndef GPTD_KERNELS_CUDA_SAMPLE_FILTER_CUH
#define GPTD_KERNELS_CUDA_SAMPLE_FILTER_CUH

#include "kernels/cuda/sample_block.cuh"

enum {
    ID_BITS = 20,
    PLACE_BITS = 51,  // a finite key has 31
    DIGIT_BITS = 10,  // the first digit has 11: a bucket of the row's histogram
};

// The fixed point of masses: 1, that of the likeliest id, is 2^42, so that a sum over 2^20 ids fits 64 bits.
__device__ __forceinline__ wide mass_of(uint32_t key)
{
    return __float2ull_rn(__fmul_rn(exp_of(-__uint_as_float(key)), 0x1p42f));
}

__device__ __forceinline__ wide place_of(uint32_t key, int32_t id)
{
    return (wide)key << ID_BITS | (uint32_t)id;
}

// A histogram in shared memory: 64-bit sums of two words each, since only 32-bit atomics are native there.
struct buckets {
    uint32_t count[N_BUCKETS], low[N_BUCKETS], high[N_BUCKETS];
};

__device__ __forceinline__ void buckets_clear(struct buckets &b)
{
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < N_BUCKETS; i += THREADS) b.count[i] = b.low[i] = b.high[i] = 0;
    __syncthreads();
}

__device__ __forceinline__ void buckets_add(struct buckets &b, uint32_t bucket, wide mass)
{
    atomicAdd(&b.count[bucket], 1u);
    if (mass == 0) return;
    uint32_t low = (uint32_t)mass, old = low ? atomicAdd(&b.low[bucket], low) : 0;
    uint32_t high = (uint32_t)(mass >> 32) + (old + low < old);
    if (high) atomicAdd(&b.high[bucket], high);
}

__device__ __forceinline__ wide buckets_mass(const struct buckets &b, uint32_t bucket)
{
    return (wide)b.high[bucket] << 32 | b.low[bucket];
}

// Where the running sum of mine, this thread's BUCKETS_PER_THREAD buckets, reaches the target; N_BUCKETS: nowhere.
// before: the sum of the buckets before that one. To every thread.
__device__ __forceinline__ uint32_t find_bucket(const wide (&mine)[BUCKETS_PER_THREAD], wide target, wide *before)
{
    __shared__ uint32_t found;
    __shared__ wide found_before;
    wide sum = 0;
    for (int i = 0; i < BUCKETS_PER_THREAD; i++) sum += mine[i];
    wide running = block_sum_before(sum);
    if (threadIdx.x == 0) found = N_BUCKETS, found_before = 0;
    __syncthreads();
    if (running < target && running + sum >= target) {
        uint32_t n_before = 0; // of this thread's; constant indices alone keep them in registers
        for (int i = 0; i < BUCKETS_PER_THREAD - 1; i++)
            if (n_before == (uint32_t)i && running + mine[i] < target) running += mine[i], n_before++;
        found = threadIdx.x * BUCKETS_PER_THREAD + n_before, found_before = running;
    }
    __syncthreads();
    *before = found_before;
    return found;
}

// ---- the last block of a row ----------------------------------------------------------------------------------------

// Calls visit(place) for each candidate: from the list, or from the row where they are too many for it.
struct candidates {
    const wide *list;
    int32_t n_listed; // -1: read the row
    const float *x;
    int32_t vocab_size;
    float highest, temperature, lowest;
    uint32_t cut;

    template <typename F> __device__ void each(F visit) const
    {
        for (int32_t i = (int32_t)threadIdx.x; i < n_listed; i += THREADS) visit(__ldcg(&list[i]));
        if (n_listed >= 0) return;
        for (int32_t first = (int32_t)threadIdx.x * 4; first < vocab_size; first += THREADS * 4) {
            float run[4];
            load_run(run, x, first, vocab_size);
            for (int i = 0; i < 4; i++) {
                uint32_t key = key_of(temper(run[i], highest, temperature, lowest));
                if (key < KEY_INFINITE && key >> BUCKET_SHIFT <= cut) visit(place_of(key, first + i));
            }
        }
    }
};

// The last place that is kept of those up to `limit`, so that the kept ones' count (or mass) is the least that reaches
// the target.
__device__ wide find_limit(const struct candidates &c, struct buckets &b, wide limit, bool by_mass, wide target)
{
    wide prefix = 0, above = 0;
    for (int top = PLACE_BITS, shift = DIGIT_BITS * 4; shift >= 0; top = shift, shift -= DIGIT_BITS) {
        uint32_t mask = (1u << (top - shift)) - 1;
        buckets_clear(b);
        c.each([&](wide place) {
            if (place <= limit && place >> top == prefix)
                buckets_add(b, (uint32_t)(place >> shift) & mask, by_mass ? mass_of((uint32_t)(place >> ID_BITS)) : 0);
        });
        __syncthreads();
        wide mine[BUCKETS_PER_THREAD], before;
        for (int i = 0; i < BUCKETS_PER_THREAD; i++) {
            uint32_t bucket = threadIdx.x * BUCKETS_PER_THREAD + (uint32_t)i;
            mine[i] = by_mass ? buckets_mass(b, bucket) : b.count[bucket];
        }
        uint32_t bucket = find_bucket(mine, target - above, &before);
        if (bucket == N_BUCKETS) return limit; // less than the target in all: everything stays
        above += before;
        prefix = prefix << (top - shift) | bucket;
        uint32_t count = b.count[bucket];
        if (shift == 0 || count == 1 || (!by_mass && above + count == target)) {
            wide last = ((prefix + 1) << shift) - 1;
            return last < limit ? last : limit;
        }
    }
    return limit;
}

// The least mass to keep of `total`, as the CPU has it: at least one id's.
__device__ __forceinline__ wide mass_target(float top_p, wide total)
{
    double target = ceil((double)top_p * (double)total);
    if (!(target >= 1)) return 1;
    return target < (double)total ? (wide)target : total;
}

// The last place that top_k and top_p keep.
__device__ wide filter(const struct candidates &c, struct buckets &b, const struct device_row &row,
                       const struct row_state &state)
{
    wide limit = ~0ull, total = state.total;
    if (state.top_k > 0) limit = find_limit(c, b, limit, false, (wide)state.top_k);
    if (row.top_p >= 1) return limit;
    if (state.top_k > 0) {
        wide mine = 0;
        c.each([&](wide place) {
            if (place <= limit) mine += mass_of((uint32_t)(place >> ID_BITS));
        });
        total = block_sum(mine);
    }
    return find_limit(c, b, limit, true, mass_target(row.top_p, total));
}

// The draw from what is kept; 0: nothing is.
__device__ wide draw_kept(const struct candidates &c, const struct device_row &row, wide limit, float bound)
{
    wide best = 0;
    c.each([&](wide place) {
        if (place > limit) return;
        int32_t id = (int32_t)(place & ((1u << ID_BITS) - 1));
        uint4 words = philox((uint32_t)id / 4, row.seed, row.position, row.choice);
        uint32_t word = id % 4 == 0 ? words.x : id % 4 == 1 ? words.y : id % 4 == 2 ? words.z : words.w;
        best = draw_one(best, -__uint_as_float((uint32_t)(place >> ID_BITS)), word, id, bound);
    });
    return block_max(best);
}

#endif
