/* experts.c: the choice of experts for each token, and the sum of what they answer. Their products: linear.c. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/rows.h"

// ---- route ----------------------------------------------------------------------------------------------------------

static bool is_chosen(const int32_t *ids, int32_t n, int32_t id)
{
    for (int32_t i = 0; i < n; i++)
        if (ids[i] == id) return true;
    return false;
}

// The n highest logits, ties to the lower id, NaN lowest of all.
static void choose(const float *logits, int32_t n_experts, int32_t *ids, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        int32_t best = -1;
        for (int32_t id = 0; id < n_experts; id++) {
            if (is_chosen(ids, i, id)) continue;
            if (best < 0 || logits[id] > logits[best] || (isnan(logits[best]) && !isnan(logits[id]))) best = id;
        }
        ids[i] = best;
    }
}

static void sort_ascending(int32_t *ids, int32_t n)
{
    for (int32_t i = 1; i < n; i++)
        for (int32_t j = i; j > 0 && ids[j] < ids[j - 1]; j--) {
            int32_t id = ids[j];
            ids[j] = ids[j - 1], ids[j - 1] = id;
        }
}

static void weigh(const float *logits, int32_t n_experts, const int32_t *ids, int32_t n, bool renormalize, float *weights)
{
    float max = -INFINITY, sum = 0, chosen = 0;
    for (int32_t i = 0; i < n_experts; i++) max = fmaxf(max, logits[i]); // NaN is left out, here and of the sum
    for (int32_t i = 0; i < n_experts; i++) sum += isnan(logits[i]) ? 0 : expf(logits[i] - max);
    for (int32_t i = 0; i < n; i++) chosen += weights[i] = isnan(logits[ids[i]]) ? 0 : expf(logits[ids[i]] - max) / sum;
    for (int32_t i = 0; renormalize && i < n; i++) weights[i] /= chosen;
}

// By expert, then by token: counts, their running sum, then each pair at its expert's next place. Until then `rows` holds
// the experts' ids.
static void sort_pairs(const struct expert_plan *plan, int32_t n_tokens)
{
    int32_t n_pairs = n_tokens * plan->n_chosen, *offsets = plan->offsets;
    memset(offsets, 0, ((size_t)plan->n_experts + 1) * sizeof *offsets);
    for (int32_t i = 0; i < n_pairs; i++) offsets[plan->rows[i] + 1]++;
    for (int32_t i = 0; i < plan->n_experts; i++) offsets[i + 1] += offsets[i];
    for (int32_t i = 0; i < n_pairs; i++) {
        int32_t row = offsets[plan->rows[i]]++;
        plan->tokens[row] = i / plan->n_chosen;
        plan->rows[i] = row;
    }
    memmove(offsets + 1, offsets, (size_t)plan->n_experts * sizeof *offsets); // each is where the next begins
    offsets[0] = 0;
}

int cpu_route(struct device *d, const struct route_params *p, struct error *e)
{
    (void)d;
    const struct expert_plan *plan = &p->plan;
    size_t n_tokens = p->logits.shape[0];
    if (plan->n_experts < 1 || plan->n_chosen < 1 || plan->n_chosen > plan->n_experts || plan->n_chosen > MAX_CHOSEN_EXPERTS ||
        !tensor_is(&p->logits, DTYPE_F32, n_tokens, (size_t)plan->n_experts))
        return error_set(e, ERR_INVALID, "route: %d of %d experts", plan->n_chosen, plan->n_experts);
    for (size_t t = 0; t < n_tokens; t++) {
        const float *logits = row_of(&p->logits, t);
        int32_t *ids = plan->rows + t * (size_t)plan->n_chosen;
        choose(logits, plan->n_experts, ids, plan->n_chosen);
        sort_ascending(ids, plan->n_chosen);
        weigh(logits, plan->n_experts, ids, plan->n_chosen, p->renormalize, plan->weights + t * (size_t)plan->n_chosen);
    }
    sort_pairs(plan, (int32_t)n_tokens);
    return 0;
}

// ---- combine --------------------------------------------------------------------------------------------------------

static void combine_row(void *arg, int32_t t, int32_t thread)
{
    (void)thread;
    const struct combine_experts_params *p = arg;
    size_t dim = p->out.shape[1], k = (size_t)p->plan.n_chosen;
    const int32_t *rows = p->plan.rows + (size_t)t * k;
    const float *weights = p->plan.weights + (size_t)t * k;
    float *out = row_of(&p->out, (size_t)t);
    for (size_t j = 0; j < dim; j++) {
        float sum = 0;
        for (size_t i = 0; i < k; i++) sum += weights[i] * ((const float *)p->x.data)[(size_t)rows[i] * dim + j];
        out[j] += sum;
    }
}

int cpu_combine_experts(struct device *d, const struct combine_experts_params *p, struct error *e)
{
    size_t n_tokens = p->out.shape[0], dim = p->out.shape[1];
    if (!tensor_is(&p->out, DTYPE_F32, n_tokens, dim) ||
        !tensor_is(&p->x, DTYPE_F32, n_tokens * (size_t)p->plan.n_chosen, dim))
        return error_set(e, ERR_INVALID, "combine_experts: shapes do not fit");
    rows_run(d, (int32_t)n_tokens, dim * (size_t)p->plan.n_chosen, combine_row, (void *)p);
    return 0;
}
