/* sample_process.cuh: allowed ids, masks, biases, bans and penalties, on the part of a row that a block has.
 *
 * The part's logits go through shared memory, so that each list is applied by all threads to whatever of it falls into
 * the part, in the CPU's order and with its roundings. The context is read once by every block of the row.
 */
#ifndef GPTD_KERNELS_CUDA_SAMPLE_PROCESS_CUH
#define GPTD_KERNELS_CUDA_SAMPLE_PROCESS_CUH

#include "kernels/cuda/sample_block.cuh"

enum { SEEN = 1, GENERATED = 2 }; // of a count: bit 0, and the unit of the bits above

struct processing {
    float x[PART_IDS];
    uint32_t counts[PART_IDS]; // of the context's tokens
};

__device__ __forceinline__ bool is_masked(const int32_t *mask, int32_t id)
{
    return mask && !((uint32_t)mask[id / 32] >> id % 32 & 1);
}

__device__ __forceinline__ void penalize_one(float &x, uint32_t count, const struct device_row &row)
{
    if (count == 0) return;
    x = x > 0 ? __fdiv_rn(x, row.repetition_penalty) : __fmul_rn(x, row.repetition_penalty);
    x = __fsub_rn(x, __fmul_rn(row.frequency_penalty, __uint2float_rn(count / GENERATED)));
    if (count >= GENERATED) x = __fsub_rn(x, row.presence_penalty);
}

__device__ __forceinline__ bool context_ends_in(const int32_t *context, const struct device_row &row,
                                                const int32_t *ids, int32_t n)
{
    if (n < 0 || n > row.position - row.n_prompt) return false;
    for (int32_t i = 0; i < n; i++)
        if (context[row.position - n + i] != ids[i]) return false;
    return true;
}

// ids of the part: first .. first + n - 1; list entries outside it are another block's.
__device__ __forceinline__ void apply_bans(const struct sampling &s, const struct device_row &row, struct processing &p,
                                           const int32_t *context, int32_t first, int32_t n)
{
    const int32_t *banned = s.pool + row.banned, *words = s.pool + row.words, *offsets = s.pool + row.word_offsets;
    for (int32_t i = (int32_t)threadIdx.x; i < row.n_banned; i += THREADS)
        if ((uint32_t)(banned[i] - first) < (uint32_t)n) p.x[banned[i] - first] = -INFINITY;
    for (int32_t i = (int32_t)threadIdx.x; i < row.n_words; i += THREADS) {
        int32_t n_before = offsets[i + 1] - offsets[i] - 1;
        if (n_before < 0) continue;
        int32_t at = words[offsets[i] + n_before] - first;
        if ((uint32_t)at < (uint32_t)n && context_ends_in(context, row, words + offsets[i], n_before))
            p.x[at] = -INFINITY;
    }
}

__device__ __forceinline__ void apply_lists(const struct sampling &s, const struct device_row &row,
                                            struct processing &p, const int32_t *mask, int32_t first, int32_t n)
{
    const int32_t *allowed = s.pool + row.allowed, *bias = s.pool + row.bias, *run_ends = s.pool + row.bias_runs;
    const int32_t *context = s.history + (size_t)row.history_row * (size_t)s.max_len;
    const float *raw = raw_of(s, row);
    for (int32_t i = (int32_t)threadIdx.x; i < row.n_allowed; i += THREADS) {
        int32_t id = allowed[i];
        if ((uint32_t)(id - first) < (uint32_t)n && !is_masked(mask, id)) p.x[id - first] = raw[id];
    }
    __syncthreads();
    for (int32_t run = 0, i = 0; run < row.n_bias_runs; i = run_ends[run++]) {
        for (int32_t j = i + (int32_t)threadIdx.x; j < run_ends[run]; j += THREADS) {
            int32_t at = bias[2 * j] - first;
            if ((uint32_t)at < (uint32_t)n) p.x[at] = __fadd_rn(p.x[at], __int_as_float(bias[2 * j + 1]));
        }
        __syncthreads();
    }
    apply_bans(s, row, p, context, first, n);
    for (int32_t i = (int32_t)threadIdx.x; row.penalized && i < row.position; i += THREADS) {
        int32_t at = context[i] - first;
        if ((uint32_t)at < (uint32_t)n) atomicAdd(&p.counts[at], i >= row.n_prompt ? GENERATED : 0u);
        if ((uint32_t)at < (uint32_t)n && i < row.n_prompt) atomicOr(&p.counts[at], SEEN);
    }
    __syncthreads();
}

// x: this thread's raw logits, processed in place and written to the row's work.
__device__ __forceinline__ void process_part(const struct sampling &s, const struct device_row &row,
                                             float (&x)[IDS_PER_THREAD])
{
    __shared__ struct processing p;
    const int32_t *mask = row.mask >= 0 ? s.pool + row.mask : NULL;
    int32_t first = (int32_t)blockIdx.x * PART_IDS, n = s.vocab_size - first;
    if (n > PART_IDS) n = PART_IDS;
    for (int i = 0; i < IDS_PER_THREAD; i++) {
        int32_t id = id_at(i);
        bool out = id >= s.vocab_size || row.n_allowed > 0 || is_masked(mask, id);
        p.x[id - first] = out ? -INFINITY : x[i];
        p.counts[id - first] = 0;
    }
    __syncthreads();
    apply_lists(s, row, p, mask, first, n);
    float *work = s.work + (size_t)row.slot * s.work_stride;
    for (int i = 0; i < IDS_PER_THREAD; i++) {
        int32_t id = id_at(i);
        x[i] = p.x[id - first];
        penalize_one(x[i], p.counts[id - first], row);
        if (id < s.vocab_size) work[id] = x[i];
    }
}

#endif
