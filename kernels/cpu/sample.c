/* sample.c: from a row of logits to a token: processors, filters, the draw, log-probabilities. Item: one row.
 *
 * The logits stay as they are, for the log-probabilities. Scratch of a thread: a copy of the row, as large an array for
 * counts or probabilities, and the buckets of the filters.
 *
 * top_k and top_p without a sort: tempered logits minus the highest are <= 0, so their magnitudes' bits order them as
 * integers, the likeliest lowest. Three passes over those 31 bits, each narrowing to the bucket (of up to 2048) where
 * the running count or mass reaches the target, find the exact value at which to cut. O(V), whatever the ties.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd/vector.h"

enum { N_BUCKETS = 2048 };

static const uint32_t KEY_INFINITE = 0x7f800000; // of -infinity: left out

struct sample {
    struct device *d;
    const struct sample_params *p;
    _Atomic int32_t misfit; // a row that does not fit; -1: none
};

struct sampler {
    const struct simd_vector *v;
    const struct sample_row *row;
    struct history history;
    size_t vocab_size;
    const float *raw;  // [V] the logits
    float *work;       // [V] processed, then tempered and filtered
    union {
        uint32_t *counts; // [V] of the context's tokens
        float *weights;   // [V] probabilities relative to the highest
    };
    double *buckets;   // [N_BUCKETS]
};

static size_t array_bytes(size_t vocab_size)
{
    return (vocab_size * sizeof(float) + 63) / 64 * 64;
}

size_t sample_scratch_bytes(const struct device_options *o)
{
    return 2 * array_bytes((size_t)o->max_vocab_size) + N_BUCKETS * sizeof(double);
}

// ---- processors -----------------------------------------------------------------------------------------------------

static bool has_penalties(const struct sample_row *row)
{
    return row->repetition_penalty != 1 || row->frequency_penalty != 0 || row->presence_penalty != 0;
}

static bool has_processors(const struct sample_row *row)
{
    return row->n_allowed_ids || row->n_logit_bias || row->n_bad_words || row->n_banned_ids || row->mask ||
           has_penalties(row);
}

static const int32_t *context_of(const struct sampler *s)
{
    return s->history.tokens + (size_t)s->row->history_row * (size_t)s->history.max_len;
}

static void allow(const struct sampler *s)
{
    const struct sample_row *row = s->row;
    if (row->n_allowed_ids) {
        for (size_t id = 0; id < s->vocab_size; id++) s->work[id] = -INFINITY;
        for (int32_t i = 0; i < row->n_allowed_ids; i++) s->work[row->allowed_ids[i]] = s->raw[row->allowed_ids[i]];
    }
    if (!row->mask) return;
    for (size_t id = 0; id < s->vocab_size; id++)
        if (!(row->mask[id / 32] >> id % 32 & 1)) s->work[id] = -INFINITY;
}

static void ban_bad_words(const struct sampler *s)
{
    const struct sample_row *row = s->row;
    const int32_t *context = context_of(s);
    for (int32_t i = 0; i < row->n_bad_words; i++) {
        const int32_t *word = row->bad_word_ids + row->bad_word_offsets[i];
        int32_t n_before = row->bad_word_offsets[i + 1] - row->bad_word_offsets[i] - 1;
        if (n_before < 0 || n_before > row->position - row->n_prompt) continue;
        if (memcmp(context + row->position - n_before, word, (size_t)n_before * sizeof(*word)) == 0)
            s->work[word[n_before]] = -INFINITY;
    }
}

// counts[id] is 1 + how often id was generated for ids in the context, 0 for others; each is applied once.
static void penalize(const struct sampler *s)
{
    const struct sample_row *row = s->row;
    const int32_t *context = context_of(s);
    memset(s->counts, 0, s->vocab_size * sizeof(*s->counts));
    for (int32_t i = 0; i < row->position; i++) {
        uint32_t *count = &s->counts[context[i]];
        if (!*count) *count = 1;
        *count += i >= row->n_prompt;
    }
    for (int32_t i = 0; i < row->position; i++) {
        uint32_t count = s->counts[context[i]];
        if (!count) continue;
        s->counts[context[i]] = 0;
        float *logit = &s->work[context[i]];
        *logit = *logit > 0 ? *logit / row->repetition_penalty : *logit * row->repetition_penalty;
        *logit -= row->frequency_penalty * (float)(count - 1);
        if (count > 1) *logit -= row->presence_penalty;
    }
}

static void process(const struct sampler *s)
{
    const struct sample_row *row = s->row;
    memcpy(s->work, s->raw, s->vocab_size * sizeof(float));
    allow(s);
    for (int32_t i = 0; i < row->n_logit_bias; i++) s->work[row->logit_bias[i].id] += row->logit_bias[i].bias;
    ban_bad_words(s);
    for (int32_t i = 0; i < row->n_banned_ids; i++) s->work[row->banned_ids[i]] = -INFINITY;
    if (has_penalties(row)) penalize(s);
}

// ---- filters --------------------------------------------------------------------------------------------------------

static uint32_t key_of(float x)
{
    return f32_bits(x) & 0x7fffffff;
}

// Leaves the fewest ids, likeliest and then lowest first, whose weights (NULL: 1 each) add up to target; the others
// become -infinity.
static void keep_likeliest(const struct sampler *s, const float *weights, double target)
{
    static const struct { int shift, bits; } passes[] = {{20, 11}, {10, 10}, {0, 10}};
    uint32_t key = 0, decided = 0; // the cut's key so far, and which of its bits are
    double above = 0;              // weight of the ids with lower keys
    for (int pass = 0; pass < 3; pass++) {
        int shift = passes[pass].shift;
        uint32_t n_buckets = 1u << passes[pass].bits, cut = 0;
        memset(s->buckets, 0, n_buckets * sizeof(double));
        for (size_t id = 0; id < s->vocab_size; id++) {
            uint32_t k = key_of(s->work[id]);
            if (k < KEY_INFINITE && (k & decided) == key)
                s->buckets[k >> shift & (n_buckets - 1)] += weights ? weights[id] : 1;
        }
        double total = above;
        for (uint32_t b = 0; b < n_buckets && total < target; b++) {
            if (s->buckets[b] == 0) continue;
            cut = b, above = total;
            total += s->buckets[b];
        }
        key |= cut << shift;
        decided |= (n_buckets - 1) << shift;
    }
    for (size_t id = 0; id < s->vocab_size; id++) {
        uint32_t k = key_of(s->work[id]);
        if (k < key) continue;
        if (k == key && above < target)
            above += weights ? weights[id] : 1;
        else
            s->work[id] = -INFINITY;
    }
}

static void filter(const struct sampler *s)
{
    const struct sample_row *row = s->row;
    if (row->min_p > 0) {
        float bound = logf(row->min_p);
        for (size_t id = 0; id < s->vocab_size; id++)
            if (s->work[id] < bound) s->work[id] = -INFINITY;
    }
    if (row->top_k > 0 && (size_t)row->top_k < s->vocab_size) keep_likeliest(s, NULL, row->top_k);
    if (row->top_p >= 1) return;
    s->v->exps(s->weights, s->work, s->vocab_size);
    double total = s->v->sum_exp(s->work, 0, s->vocab_size), target = (double)row->top_p * total;
    keep_likeliest(s, s->weights, target > DBL_MIN ? target : DBL_MIN);
}

// ---- log-probabilities ----------------------------------------------------------------------------------------------

// The likeliest ids, at most `wanted`, in order; logits stand in for log-probabilities.
static int32_t find_top(const struct sampler *s, int32_t wanted, struct token_logprob *top)
{
    int32_t n = 0;
    float bound = -INFINITY;
    size_t id = wanted ? s->v->find_above(s->raw, bound, 0, s->vocab_size) : s->vocab_size;
    while (id < s->vocab_size) {
        int32_t i = n < wanted ? n++ : wanted - 1;
        for (; i > 0 && top[i - 1].logprob < s->raw[id]; i--) top[i] = top[i - 1];
        top[i] = (struct token_logprob){(int32_t)id, s->raw[id]};
        if (n == wanted) bound = top[n - 1].logprob;
        id = s->v->find_above(s->raw, bound, id + 1, s->vocab_size);
    }
    return n;
}

static void report(const struct sampler *s, float highest, struct sample_result *r)
{
    double log_sum = log(s->v->sum_exp(s->raw, highest, s->vocab_size)) + highest;
    r->logprob = (float)(s->raw[r->id] - log_sum);
    r->rank = (int32_t)s->v->rank(s->raw, (size_t)r->id, s->vocab_size);
    r->n_top = find_top(s, s->row->n_logprobs, r->top);
    for (int32_t i = 0; i < r->n_top; i++) r->top[i].logprob = (float)(r->top[i].logprob - log_sum);
}

// ---- one row --------------------------------------------------------------------------------------------------------

// The sampled id; -1 when there is nothing to sample from, and whether that is because all of it is barred.
static int32_t draw(const struct sampler *s, float highest, bool *barred)
{
    const struct sample_row *row = s->row;
    const float *x = s->raw;
    if (has_processors(row)) {
        bool broken;
        process(s);
        x = s->work;
        highest = s->v->highest(x, s->vocab_size, &broken);
        *barred = !broken && highest == -INFINITY;
        if (broken || *barred) return -1;
    }
    if (row->temperature <= 0) return (int32_t)s->v->find(x, highest, s->vocab_size);
    s->v->temper(s->work, x, highest, row->temperature, s->vocab_size);
    filter(s);
    return s->v->gumbel_argmax(s->work, s->vocab_size, row->seed, row->position, row->choice);
}

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
    const int32_t *context = p->history.tokens + (size_t)row->history_row * (size_t)p->history.max_len;
    return ids_fit(row->allowed_ids, row->n_allowed_ids, vocab_size) &&
           ids_fit(row->banned_ids, row->n_banned_ids, vocab_size) &&
           (!row->n_bad_words || ids_fit(row->bad_word_ids, row->bad_word_offsets[row->n_bad_words], vocab_size)) &&
           (!has_penalties(row) || ids_fit(context, row->position, vocab_size));
}

static void sample_item(void *arg, int32_t item, int32_t thread)
{
    struct sample *op = arg;
    const struct sample_params *p = op->p;
    const struct sample_row *row = &p->rows[item];
    if (!row_fits(p, row)) {
        op->misfit = item;
        return;
    }
    size_t vocab_size = p->logits.shape[1];
    char *scratch = device_scratch(op->d, thread);
    struct sampler s = {
        .v = op->d->vector, .row = row, .history = p->history, .vocab_size = vocab_size,
        .raw = row_of(&p->logits, (size_t)row->logits_row), .work = (float *)scratch,
        .weights = (float *)(scratch + array_bytes(vocab_size)),
        .buckets = (double *)(scratch + 2 * array_bytes(vocab_size)),
    };
    struct sample_result *r = &p->results[item];
    *r = (struct sample_result){.id = row->target};
    float highest = s.v->highest(s.raw, vocab_size, &r->invalid);
    r->invalid |= highest == -INFINITY;
    if (row->target < 0) {
        r->id = r->invalid ? -1 : draw(&s, highest, &r->barred);
        r->invalid |= r->id < 0 && !r->barred;
        if (r->id < 0) r->id = 0;
        if (row->position < p->history.max_len)
            p->history.tokens[(size_t)row->history_row * (size_t)p->history.max_len + (size_t)row->position] = r->id;
    }
    if (row->n_logprobs >= 0 && !r->invalid && !r->barred) report(&s, highest, r);
}

// ---- the op ---------------------------------------------------------------------------------------------------------

int cpu_sample(struct device *d, const struct sample_params *p, struct error *e)
{
    if (p->logits.n_dims != 2 || p->logits.dtype != DTYPE_F32 || p->logits.shape[1] < 1 ||
        p->logits.shape[1] > (size_t)d->options.max_vocab_size)
        return error_set(e, ERR_INVALID, "sample: the logits' shape does not fit");
    struct sample op = {d, p, -1};
    rows_run(d, p->n_rows, p->logits.shape[1], sample_item, &op);
    return op.misfit < 0 ? 0 : error_set(e, ERR_INVALID, "sample: row %d does not fit", op.misfit);
}
