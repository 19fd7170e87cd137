/* sample.cu: from rows of logits to tokens, on the device: processors, filters, the draw, log-probabilities.
 *
 * Grid (ceil(V / 4096), n_rows), 512 threads, each 8 ids; the last block of a row to finish combines its parts (see
 * sample_block.cuh). All floats are F32. Passes over a row of V logits, 4 V bytes each (from L2 after the first):
 *
 *   highest_kernel  highest raw logit, faults; greedy rows are done here. Rows with processors write what they leave to
 *                   `work` (4 V more bytes); rows with log-probabilities sum exp and find the top of each part.
 *   draw_kernel     rows with temperature: Gumbel-max, done here; rows with top_k or top_p: the histogram of keys' 11
 *                   highest bits, from which the bucket where they cut is known.
 *   select_kernel   top_k, top_p: lists the ids in buckets up to that one; the row's last block finds the exact cut
 *                   among them and draws.
 *   report_kernel   log-probabilities: rank.
 *
 * A batch launches those that one of its rows needs: highest_kernel alone if it is greedy. Bound by bandwidth with
 * many rows, by launches and latency (an estimated 3 us a kernel) with few: 1 row of 128k ids is 32 blocks of 16 KB.
 * The draw's noise costs 20 integer operations an id (Philox); its logarithms are taken only where an id can still win.
 *
 * Results go straight to the host's memory (mapped, from alloc_host): under 200 bytes a row, on the bus while the
 * kernel ends, where a copy would be one more operation in the stream behind it. They are complete with the kernel, so
 * after wait() of a later record().
 *
 * Scratch: rows with processors or filters take one of SLOTS slots (work row, histogram, list); a batch with more is
 * cut into several launches, as is one of more than MAX_ROWS rows, or whose lists exceed PACK_BYTES.
 */
#include "kernels/cuda/cuda.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sample_block.cuh"
#include "kernels/cuda/sample_filter.cuh"
#include "kernels/cuda/sample_process.cuh"

enum {
    MAX_ROWS = 256,        // of a launch
    SLOTS = 64,            // of those, how many can have processors or filters
    PACK_BYTES = 2 << 20,  // of a launch's rows and lists, on their way to the device
};

struct sampler {
    char *pack;            // host, [PACK_BYTES]: struct device_row[n_rows], then the pool
    uint32_t *seen;        // host, [ceil(max_vocab_size / 32)]: bits of ids, 0 between uses
    uint32_t *arrived;     // device, [MAX_ROWS]
};

// ---- highest --------------------------------------------------------------------------------------------------------

// The best of this thread's ids.
__device__ __forceinline__ wide best_of(const float (&x)[IDS_PER_THREAD])
{
    float highest = -INFINITY;
    int32_t id = 0;
    bool broken = false;
#pragma unroll
    for (int i = 0; i < IDS_PER_THREAD; i++) {
        broken |= !(x[i] < INFINITY);
        if (x[i] > highest) highest = x[i], id = id_at(i);
    }
    return broken ? BROKEN : candidate(highest, id);
}

// Sum of exp and the top of the part, for log-probabilities.
__device__ __forceinline__ void summarize(const float (&x)[IDS_PER_THREAD], wide best, int32_t n_top, struct part *part)
{
    float highest = value_of(best), sum = 0;
    bool sound = best != 0 && best != BROKEN;
    for (int i = 0; i < IDS_PER_THREAD && sound; i++) sum += exp_of(x[i] - highest);
    double total = block_sum((double)sum);
    if (threadIdx.x == 0) part->sum = total;
    wide mine[IDS_PER_THREAD];
#pragma unroll
    for (int i = 0; i < IDS_PER_THREAD; i++) mine[i] = candidate(x[i], id_at(i));
    block_top(mine, n_top, part->top);
}

// What the parts' summaries come to.
__device__ __forceinline__ void combine_summaries(const struct sampling &s, int32_t n_top, wide best,
                                                  struct row_state *state)
{
    wide mine[IDS_PER_THREAD];
    double sum = 0, highest = value_of(best);
    int32_t thread = (int32_t)threadIdx.x;
    if (thread < s.n_parts) {
        wide raw = __ldcg(&part_of(s, thread)->raw);
        if (raw != 0 && raw != BROKEN) sum = __ldcg(&part_of(s, thread)->sum) * exp(value_of(raw) - highest);
    }
    sum = block_sum(sum);
    if (thread == 0) state->log_sum = log(sum) + highest;
    for (int32_t i = 0, j = thread; i < IDS_PER_THREAD; i++, j += THREADS)
        mine[i] = j < s.n_parts * n_top ? __ldcg(&part_of(s, j / n_top)->top[j % n_top]) : 0;
    block_top(mine, n_top, state->top);
}

// Ends the row if it has a target, is greedy, or has nothing to sample from; else leaves it to the draw.
__device__ __forceinline__ void decide(const struct sampling &s, const struct device_row &row, struct row_state *state,
                                       wide raw, wide processed)
{
    wide best = row.processed ? processed : raw;
    bool invalid = raw == 0 || raw == BROKEN, barred = !invalid && row.processed && best == 0;
    if (row.target >= 0) {
        finish_row(s, row, state, row.target, invalid, false);
        return;
    }
    invalid |= best == BROKEN;
    if (invalid || barred || row.temperature <= 0) {
        finish_row(s, row, state, invalid || barred ? 0 : id_of(best), invalid, barred);
        return;
    }
    uint32_t id = (uint32_t)id_of(best);
    uint4 words = philox(id / 4, row.seed, row.position, row.choice);
    uint32_t word = id % 4 == 0 ? words.x : id % 4 == 1 ? words.y : id % 4 == 2 ? words.z : words.w;
    state->best = best, state->highest = value_of(best), state->bound = gumbel(uniform(word));
    state->total = 0, state->top_k = 0, state->cut = 0, state->n_listed = 0;
    state->id = 0, state->valid = 0, state->open = 1;
}

template <bool GENERAL>
__global__ void __launch_bounds__(THREADS) highest_kernel(const __grid_constant__ struct sampling s)
{
    next_kernel_allow(); // the next step's arrays are on their way
    const struct device_row &row = row_of(s);
    struct part *part = part_of(s, (int32_t)blockIdx.x);
    float x[IDS_PER_THREAD];
    load_ids(x, raw_of(s, row), s.vocab_size);
    wide raw = block_max(best_of(x)), processed = 0;
    if (GENERAL && row.n_logprobs >= 0) summarize(x, raw, row.n_logprobs, part);
    if (GENERAL && row.processed) {
        process_part(s, row, x);
        processed = block_max(best_of(x));
    }
    if (GENERAL && row.filtered) {
        uint32_t *words = (uint32_t *)&s.histograms[row.slot];
        uint32_t step = gridDim.x * THREADS;
        for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < sizeof(struct histogram) / 4; i += step) words[i] = 0;
    }
    if (threadIdx.x == 0) part->raw = raw, part->processed = processed;
    if (!is_last_of_row(s)) return;
    struct row_state *state = &s.states[blockIdx.y];
    bool mine = (int32_t)threadIdx.x < s.n_parts;
    raw = block_max(mine ? __ldcg(&part_of(s, (int32_t)threadIdx.x)->raw) : 0);
    if (GENERAL && row.processed)
        processed = block_max(mine ? __ldcg(&part_of(s, (int32_t)threadIdx.x)->processed) : 0);
    if (GENERAL && row.n_logprobs >= 0) combine_summaries(s, row.n_logprobs, raw, state);
    if (threadIdx.x == 0) decide(s, row, state, raw, processed);
}

// ---- draw -----------------------------------------------------------------------------------------------------------

// The best draw of this thread's ids.
__device__ __forceinline__ wide draw_ids(const float (&tempered)[IDS_PER_THREAD], const struct device_row &row,
                                         float bound)
{
    wide best = 0;
#pragma unroll
    for (int run = 0; run < IDS_PER_THREAD / 4; run++) {
        const float *t = tempered + 4 * run;
        int32_t first = run_first(run);
        if (fmaxf(fmaxf(t[0], t[1]), fmaxf(t[2], t[3])) + MAX_GUMBEL < bound) continue;
        uint4 words = philox((uint32_t)first / 4, row.seed, row.position, row.choice);
        best = draw_one(best, t[0], words.x, first, bound);
        best = draw_one(best, t[1], words.y, first + 1, bound);
        best = draw_one(best, t[2], words.z, first + 2, bound);
        best = draw_one(best, t[3], words.w, first + 3, bound);
    }
    return best;
}

__device__ __forceinline__ void count_ids(const float (&tempered)[IDS_PER_THREAD], bool by_mass, struct buckets &b,
                                          struct histogram *h)
{
    buckets_clear(b);
#pragma unroll
    for (int i = 0; i < IDS_PER_THREAD; i++) {
        uint32_t key = key_of(tempered[i]);
        if (key < KEY_INFINITE) buckets_add(b, key >> BUCKET_SHIFT, by_mass ? mass_of(key) : 0);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < N_BUCKETS; i += THREADS) {
        if (b.count[i] == 0) continue;
        atomicAdd(&h->count[i], b.count[i]);
        if (by_mass) atomicAdd(&h->mass[i], buckets_mass(b, i));
    }
}

// From the whole row's histogram: in which bucket the filters cut.
__device__ __forceinline__ void find_cut(const struct histogram *h, const struct device_row &row,
                                         struct row_state *state)
{
    wide counts[BUCKETS_PER_THREAD], masses[BUCKETS_PER_THREAD], n = 0, total = 0, before;
    for (uint32_t i = 0; i < BUCKETS_PER_THREAD; i++) {
        uint32_t bucket = threadIdx.x * BUCKETS_PER_THREAD + i;
        n += counts[i] = __ldcg(&h->count[bucket]);
        total += masses[i] = __ldcg(&h->mass[bucket]);
    }
    n = block_sum(n), total = block_sum(total);
    uint32_t cut = N_BUCKETS;
    bool by_count = row.top_k > 0 && n > (wide)row.top_k;
    if (by_count)
        cut = find_bucket(counts, (wide)row.top_k, &before);
    else if (row.top_p < 1)
        cut = find_bucket(masses, mass_target(row.top_p, total), &before);
    if (threadIdx.x == 0) state->cut = cut, state->total = total, state->top_k = by_count ? row.top_k : 0;
}

template <bool GENERAL>
__global__ void __launch_bounds__(THREADS) draw_kernel(const __grid_constant__ struct sampling s)
{
    next_kernel_allow();
    struct row_state *state = &s.states[blockIdx.y];
    if (!state->open) return;
    const struct device_row &row = row_of(s);
    float x[IDS_PER_THREAD], highest = state->highest;
    load_ids(x, GENERAL ? source_of(s, row) : raw_of(s, row), s.vocab_size);
#pragma unroll
    for (int i = 0; i < IDS_PER_THREAD; i++) x[i] = temper(x[i], highest, row.temperature, row.lowest);
    if (GENERAL && row.filtered) {
        __shared__ struct buckets b;
        struct histogram *h = &s.histograms[row.slot];
        count_ids(x, row.top_p < 1, b, h);
        if (is_last_of_row(s)) find_cut(h, row, state);
        return;
    }
    wide drawn = block_max(draw_ids(x, row, state->bound));
    if (threadIdx.x == 0) part_of(s, (int32_t)blockIdx.x)->drawn = drawn;
    if (!is_last_of_row(s)) return;
    bool mine = (int32_t)threadIdx.x < s.n_parts;
    drawn = block_max(mine ? __ldcg(&part_of(s, (int32_t)threadIdx.x)->drawn) : 0);
    if (threadIdx.x == 0) finish_draw(s, row, state, drawn);
}

// ---- select ---------------------------------------------------------------------------------------------------------

// Appends this block's candidates to the row's list, in any order; where the list is full, it only counts them.
__device__ __forceinline__ void list_ids(const float (&tempered)[IDS_PER_THREAD], uint32_t cut, wide *list,
                                         uint32_t *n_listed)
{
    __shared__ uint32_t n_mine, base;
    uint32_t n = 0;
    if (threadIdx.x == 0) n_mine = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < IDS_PER_THREAD; i++) {
        uint32_t key = key_of(tempered[i]);
        n += key < KEY_INFINITE && key >> BUCKET_SHIFT <= cut;
    }
    uint32_t at = n ? atomicAdd(&n_mine, n) : 0;
    __syncthreads();
    if (threadIdx.x == 0) base = n_mine ? atomicAdd(n_listed, n_mine) : 0;
    __syncthreads();
    if (n == 0) return;
    at += base;
#pragma unroll
    for (int i = 0; i < IDS_PER_THREAD; i++) {
        uint32_t key = key_of(tempered[i]);
        if (key >= KEY_INFINITE || key >> BUCKET_SHIFT > cut) continue;
        if (at < MAX_LISTED) list[at] = place_of(key, id_at(i));
        at++;
    }
}

__global__ void __launch_bounds__(THREADS) select_kernel(const __grid_constant__ struct sampling s)
{
    next_kernel_allow();
    struct row_state *state = &s.states[blockIdx.y];
    const struct device_row &row = row_of(s);
    if (!row.filtered || !state->open) return;
    wide *list = s.lists + (size_t)row.slot * MAX_LISTED;
    const float *source = source_of(s, row);
    float x[IDS_PER_THREAD];
    load_ids(x, source, s.vocab_size);
#pragma unroll
    for (int i = 0; i < IDS_PER_THREAD; i++) x[i] = temper(x[i], state->highest, row.temperature, row.lowest);
    list_ids(x, state->cut, list, &state->n_listed);
    if (!is_last_of_row(s)) return;
    __shared__ struct buckets b;
    uint32_t n_listed = __ldcg(&state->n_listed);
    struct candidates c = {list, n_listed <= MAX_LISTED ? (int32_t)n_listed : -1, source, s.vocab_size, state->highest,
                           row.temperature, row.lowest, state->cut};
    wide drawn = draw_kept(c, row, filter(c, b, row, *state), state->bound);
    if (threadIdx.x == 0) finish_draw(s, row, state, drawn);
}

// ---- report ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void report(const struct sampling &s, const struct device_row &row,
                                       const struct row_state *state, uint32_t n_before)
{
    struct sample_result *r = row.result;
    float value = raw_of(s, row)[state->id];
    int32_t n = 0;
    for (; n < row.n_logprobs && state->top[n]; n++) {
        r->top[n].id = id_of(state->top[n]);
        r->top[n].logprob = (float)(value_of(state->top[n]) - state->log_sum);
    }
    r->n_top = n, r->rank = (int32_t)n_before + 1, r->logprob = (float)(value - state->log_sum);
}

__global__ void __launch_bounds__(THREADS) report_kernel(const __grid_constant__ struct sampling s)
{
    next_kernel_allow();
    const struct row_state *state = &s.states[blockIdx.y];
    const struct device_row &row = row_of(s);
    if (row.n_logprobs < 0 || !state->valid) return;
    float x[IDS_PER_THREAD], value = raw_of(s, row)[state->id];
    load_ids(x, raw_of(s, row), s.vocab_size);
    wide n = 0;
#pragma unroll
    for (int i = 0; i < IDS_PER_THREAD; i++) n += x[i] > value || (x[i] == value && id_at(i) < state->id);
    n = block_sum(n);
    if (threadIdx.x == 0) part_of(s, (int32_t)blockIdx.x)->n_before = (uint32_t)n;
    if (!is_last_of_row(s)) return;
    bool mine = (int32_t)threadIdx.x < s.n_parts;
    n = block_sum((wide)(mine ? __ldcg(&part_of(s, (int32_t)threadIdx.x)->n_before) : 0));
    if (threadIdx.x == 0) report(s, row, state, (uint32_t)n);
}

// ---- what the host hands over ---------------------------------------------------------------------------------------

struct pack {
    struct device_row *rows;
    int32_t *pool;
    size_t n_pool;
    int32_t n_slots;
};

static bool has_penalties(const struct sample_row *row)
{
    return row->repetition_penalty != 1 || row->frequency_penalty != 0 || row->presence_penalty != 0;
}

static bool has_processors(const struct sample_row *row)
{
    return row->target < 0 && (row->n_allowed_ids || row->n_logit_bias || row->n_bad_words || row->n_banned_ids ||
                               row->mask || has_penalties(row));
}

static bool has_filters(const struct sample_row *row, size_t vocab_size)
{
    return row->target < 0 && row->temperature > 0 &&
           ((row->top_k > 0 && (size_t)row->top_k < vocab_size) || row->top_p < 1);
}

static size_t mask_words(size_t vocab_size)
{
    return (vocab_size + 31) / 32;
}

// A long list of allowed ids travels as a mask.
static bool allows_by_mask(const struct sample_row *row, size_t vocab_size)
{
    return row->n_allowed_ids > 0 && (size_t)row->n_allowed_ids > mask_words(vocab_size);
}

// Words of the pool that the row may need.
static size_t pool_words(const struct sample_row *row, size_t vocab_size)
{
    if (!has_processors(row)) return 0;
    bool by_mask = allows_by_mask(row, vocab_size);
    size_t n = row->mask || by_mask ? mask_words(vocab_size) : 0;
    if (row->n_allowed_ids > 0 && !by_mask) n += (size_t)row->n_allowed_ids;
    if (row->n_logit_bias > 0) n += 3 * (size_t)row->n_logit_bias;
    if (row->n_banned_ids > 0) n += (size_t)row->n_banned_ids;
    if (row->n_bad_words > 0)
        n += (size_t)row->bad_word_offsets[row->n_bad_words] + (size_t)row->n_bad_words + 1;
    return n;
}

static int32_t pack_words(struct pack *pack, const void *words, int32_t n)
{
    size_t at = pack->n_pool;
    if (n > 0) memcpy(pack->pool + at, words, (size_t)n * sizeof(int32_t)), pack->n_pool += (size_t)n;
    return (int32_t)at;
}

static void pack_allowed(struct pack *pack, struct device_row *to, const struct sample_row *row, size_t vocab_size)
{
    bool by_mask = allows_by_mask(row, vocab_size);
    size_t n_words = mask_words(vocab_size);
    if (!by_mask && row->n_allowed_ids > 0)
        to->allowed = pack_words(pack, row->allowed_ids, row->n_allowed_ids), to->n_allowed = row->n_allowed_ids;
    if (!by_mask && !row->mask) return;
    uint32_t *mask = (uint32_t *)pack->pool + pack->n_pool;
    to->mask = (int32_t)pack->n_pool, pack->n_pool += n_words;
    if (!by_mask) {
        memcpy(mask, row->mask, n_words * sizeof *mask);
        return;
    }
    memset(mask, 0, n_words * sizeof *mask);
    for (int32_t i = 0; i < row->n_allowed_ids; i++) {
        uint32_t id = (uint32_t)row->allowed_ids[i], bit = 1u << id % 32;
        if (!row->mask || row->mask[id / 32] & bit) mask[id / 32] |= bit;
    }
}

// Biases of one id are added one after another: the list is cut into runs without an id twice.
static void pack_bias(struct pack *pack, struct device_row *to, const struct sample_row *row, uint32_t *seen)
{
    const struct logit_bias *bias = row->logit_bias;
    int32_t n = row->n_logit_bias > 0 ? row->n_logit_bias : 0, begin = 0;
    to->bias = pack_words(pack, bias, 2 * n);
    to->bias_runs = (int32_t)pack->n_pool;
    for (int32_t i = 0; i <= n; i++) {
        if (i < n && !(seen[bias[i].id / 32] >> bias[i].id % 32 & 1)) {
            seen[bias[i].id / 32] |= 1u << bias[i].id % 32;
            continue;
        }
        for (int32_t j = begin; j < i; j++) seen[bias[j].id / 32] = 0;
        if (i > begin) pack->pool[pack->n_pool++] = i, to->n_bias_runs++;
        begin = i;
        if (i < n) seen[bias[i].id / 32] |= 1u << bias[i].id % 32;
    }
}

static void pack_processors(struct pack *pack, struct device_row *to, const struct sample_row *row, size_t vocab_size,
                            uint32_t *seen)
{
    to->processed = 1, to->penalized = has_penalties(row);
    pack_allowed(pack, to, row, vocab_size);
    pack_bias(pack, to, row, seen);
    to->banned = pack_words(pack, row->banned_ids, row->n_banned_ids), to->n_banned = row->n_banned_ids;
    if (row->n_bad_words <= 0) return;
    to->words = pack_words(pack, row->bad_word_ids, row->bad_word_offsets[row->n_bad_words]);
    to->word_offsets = pack_words(pack, row->bad_word_offsets, row->n_bad_words + 1), to->n_words = row->n_bad_words;
}

static void pack_row(struct pack *pack, struct device_row *to, const struct sample_row *row, size_t vocab_size,
                     uint32_t *seen)
{
    memset(to, 0, sizeof *to);
    to->mask = to->slot = -1;
    to->seed = row->seed, to->choice = row->choice;
    to->logits_row = row->logits_row, to->history_row = row->history_row;
    to->position = row->position, to->n_prompt = row->n_prompt;
    to->target = row->target, to->n_logprobs = row->n_logprobs;
    to->temperature = row->temperature, to->top_p = row->top_p;
    to->top_k = (size_t)row->top_k < vocab_size ? row->top_k : 0; // below 0: past any size
    to->lowest = row->min_p > 0 ? logf(row->min_p) : -INFINITY;
    to->repetition_penalty = row->repetition_penalty;
    to->frequency_penalty = row->frequency_penalty, to->presence_penalty = row->presence_penalty;
    to->filtered = has_filters(row, vocab_size);
    if (has_processors(row)) pack_processors(pack, to, row, vocab_size, seen);
    if (to->filtered || to->processed) to->slot = pack->n_slots++;
}

// How many rows from `rows` on one launch takes; 0: not even the first fits.
static int32_t count_rows(const struct sample_row *rows, int32_t n_rows, size_t vocab_size)
{
    size_t bytes = 0;
    int32_t n = 0, n_slots = 0;
    for (; n < n_rows && n < MAX_ROWS; n++) {
        bytes += sizeof(struct device_row) + pool_words(&rows[n], vocab_size) * sizeof(int32_t);
        n_slots += has_processors(&rows[n]) || has_filters(&rows[n], vocab_size);
        if (bytes > PACK_BYTES || n_slots > SLOTS) break;
    }
    return n;
}

// ---- checks ---------------------------------------------------------------------------------------------------------

static bool ids_fit(const int32_t *ids, int32_t n, size_t vocab_size)
{
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < 0 || (size_t)ids[i] >= vocab_size) return false;
    return true;
}

static bool row_fits(const struct sample_params *p, const struct sample_row *row)
{
    size_t vocab_size = p->logits.shape[1];
    if (row->logits_row < 0 || (size_t)row->logits_row >= p->logits.shape[0] || row->n_logprobs > MAX_LOGPROBS)
        return false;
    if (row->target >= 0) return (size_t)row->target < vocab_size;
    if (row->history_row < 0 || row->history_row >= p->history.n_slots || row->position < 0 ||
        row->position > p->history.max_len || row->n_prompt < 0)
        return false;
    for (int32_t i = 0; i < row->n_logit_bias; i++)
        if (!ids_fit(&row->logit_bias[i].id, 1, vocab_size)) return false;
    return ids_fit(row->allowed_ids, row->n_allowed_ids, vocab_size) &&
           ids_fit(row->banned_ids, row->n_banned_ids, vocab_size) &&
           (row->n_bad_words <= 0 || ids_fit(row->bad_word_ids, row->bad_word_offsets[row->n_bad_words], vocab_size));
}

static int check(const struct device *d, const struct sample_params *p, struct error *e)
{
    if (p->logits.n_dims != 2 || p->logits.dtype != DTYPE_F32 || p->logits.shape[1] < 1 ||
        p->logits.shape[1] > (size_t)d->options.max_vocab_size)
        return error_set(e, ERR_INVALID, "sample: the logits' shape does not fit");
    for (int32_t i = 0; i < p->n_rows; i++)
        if (!row_fits(p, &p->rows[i]) || count_rows(&p->rows[i], 1, p->logits.shape[1]) != 1)
            return error_set(e, ERR_INVALID, "sample: row %d does not fit", i);
    return 0;
}

// ---- the op ---------------------------------------------------------------------------------------------------------

static size_t take(size_t *used, size_t bytes)
{
    size_t at = *used;
    *used += (bytes + 255) / 256 * 256;
    return at;
}

// Lays a launch's arrays out in scratch, which may be NULL. Returns their bytes, more the larger the vocabulary.
static size_t layout(struct sampling *s, char *scratch, size_t vocab_size)
{
    size_t used = 0;
    s->vocab_size = (int32_t)vocab_size;
    s->n_parts = (int32_t)((vocab_size + PART_IDS - 1) / PART_IDS);
    s->work_stride = (vocab_size + 3) / 4 * 4;
    s->states = (struct row_state *)(scratch + take(&used, MAX_ROWS * sizeof *s->states));
    s->parts = (struct part *)(scratch + take(&used, MAX_ROWS * (size_t)s->n_parts * sizeof *s->parts));
    s->histograms = (struct histogram *)(scratch + take(&used, SLOTS * sizeof *s->histograms));
    s->lists = (wide *)(scratch + take(&used, (size_t)SLOTS * MAX_LISTED * sizeof *s->lists));
    s->work = (float *)(scratch + take(&used, SLOTS * s->work_stride * sizeof *s->work));
    return used;
}

size_t cuda_sample_scratch_bytes(const struct device *d)
{
    struct sampling s;
    return layout(&s, NULL, (size_t)d->options.max_vocab_size);
}

int cuda_sample_create(struct device *d, struct error *e)
{
    if (d->options.max_vocab_size > MAX_PARTS * PART_IDS)
        return error_set(e, ERR_UNSUPPORTED, "sample: a vocabulary of %d, %d at most", d->options.max_vocab_size,
                         MAX_PARTS * PART_IDS);
    struct sampler *sampler = d->sampler = (struct sampler *)calloc(1, sizeof *sampler);
    if (!sampler) return error_set(e, ERR_NOMEM, "sample: out of memory");
    sampler->pack = (char *)malloc(PACK_BYTES);
    sampler->seen = (uint32_t *)calloc(mask_words((size_t)d->options.max_vocab_size), sizeof *sampler->seen);
    if (!sampler->pack || !sampler->seen) return error_set(e, ERR_NOMEM, "sample: out of memory");
    size_t bytes = MAX_ROWS * sizeof *sampler->arrived;
    if (cuda_check(cudaMalloc((void **)&sampler->arrived, bytes), "sample", e)) return ERR_DEVICE;
    return cuda_check(cudaMemsetAsync(sampler->arrived, 0, bytes, d->stream), "sample", e);
}

void cuda_sample_destroy(struct device *d)
{
    if (!d->sampler) return;
    free(d->sampler->pack);
    free(d->sampler->seen);
    cudaFree(d->sampler->arrived);
    free(d->sampler);
    d->sampler = NULL;
}

static void launch(struct device *d, const struct sampling &s, const struct device_row *rows, int32_t n_rows)
{
    bool general = false, draws = false, filters = false, reports = false;
    for (int32_t i = 0; i < n_rows; i++) {
        const struct device_row *row = &rows[i];
        draws |= row->target < 0 && !(row->temperature <= 0);
        filters |= row->filtered != 0, reports |= row->n_logprobs >= 0;
        general |= row->filtered || row->processed || row->n_logprobs >= 0;
    }
    dim3 grid((unsigned)s.n_parts, (unsigned)n_rows);
    if (general)
        highest_kernel<true><<<grid, THREADS, 0, d->stream>>>(s);
    else
        highest_kernel<false><<<grid, THREADS, 0, d->stream>>>(s);
    if (draws && general) draw_kernel<true><<<grid, THREADS, 0, d->stream>>>(s);
    if (draws && !general) draw_kernel<false><<<grid, THREADS, 0, d->stream>>>(s);
    if (filters) select_kernel<<<grid, THREADS, 0, d->stream>>>(s);
    if (reports) report_kernel<<<grid, THREADS, 0, d->stream>>>(s);
}

// One launch's rows: packed, sent, launched.
static int sample_rows(struct device *d, struct sampling *s, const struct sample_row *rows, int32_t n_rows,
                       struct sample_result *results, struct error *e)
{
    struct pack pack = {(struct device_row *)d->sampler->pack, NULL, 0, 0};
    pack.pool = (int32_t *)(pack.rows + n_rows);
    for (int32_t i = 0; i < n_rows; i++) {
        pack_row(&pack, &pack.rows[i], &rows[i], (size_t)s->vocab_size, d->sampler->seen);
        pack.rows[i].result = &results[i];
    }
    size_t row_bytes = (size_t)n_rows * sizeof *pack.rows;
    if (n_rows <= NEAR_ROWS && pack.n_pool == 0) {
        memcpy(s->near, pack.rows, row_bytes);
        s->rows = NULL;
    } else {
        const char *there = (const char *)device_array(d, pack.rows, row_bytes + pack.n_pool * sizeof(int32_t), e);
        if (!there) return e ? e->code : ERR_DEVICE;
        s->rows = (const struct device_row *)there;
        s->pool = (const int32_t *)(there + row_bytes);
    }
    launch(d, *s, pack.rows, n_rows);
    return launch_check("sample", e);
}

int cuda_sample(struct device *d, const struct sample_params *p, struct error *e)
{
    struct sampling s = {};
    int rc = check(d, p, e);
    if (rc) return rc;
    layout(&s, (char *)d->scratch, p->logits.shape[1]);
    s.logits = (const float *)p->logits.data;
    s.history = p->history.tokens, s.max_len = p->history.max_len;
    s.arrived = d->sampler->arrived;
    for (int32_t first = 0, n; first < p->n_rows && rc == 0; first += n) {
        n = count_rows(p->rows + first, p->n_rows - first, p->logits.shape[1]);
        rc = sample_rows(d, &s, p->rows + first, n, p->results + first, e);
    }
    return rc;
}
