/* norm.c: RMS and layer norm.
 *
 * As PyTorch in F32: RMS x * (1 / sqrt(mean(x^2) + eps)) * w; layer (x - mean) * (1 / sqrt(var + eps)) * w + b, the
 * variance from a second pass.
 */
#include <math.h>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd/vector.h"

struct norm {
    struct device *d;
    const struct norm_params *p;
};

static void norm_row(void *arg, int32_t t, int32_t thread)
{
    (void)thread;
    const struct norm *op = arg;
    const struct norm_params *p = op->p;
    const struct simd_vector *v = op->d->vector;
    const float *x = row_of(&p->x, (size_t)t);
    size_t dim = p->x.shape[1];
    float mean = p->kind == NORM_LAYER ? v->sum(x, dim) / (float)dim : 0;
    const struct normalization how = {
        .shift = mean, .scale = 1.0f / sqrtf(v->sum_squares(x, mean, dim) / (float)dim + p->eps),
        .offset = p->weight_offset, .weight = &p->weight, .bias = p->bias.data ? &p->bias : NULL,
        .accumulate = p->accumulate,
    };
    v->normalize(row_of(&p->out, (size_t)t), x, &how, dim);
}

int cpu_norm(struct device *d, const struct norm_params *p, struct error *e)
{
    size_t n_tokens = p->x.shape[0], dim = p->x.shape[1];
    if (!tensor_is(&p->x, DTYPE_F32, n_tokens, dim) || !tensor_is(&p->out, DTYPE_F32, n_tokens, dim) ||
        !tensor_is_vector(&p->weight, dim) || (p->bias.data && !tensor_is_vector(&p->bias, dim)))
        return error_set(e, ERR_INVALID, "norm: shapes do not fit");
    struct norm op = {d, p};
    rows_run(d, (int32_t)n_tokens, dim, norm_row, &op);
    return 0;
}
