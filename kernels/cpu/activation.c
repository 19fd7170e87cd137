/* activation.c: GELU (erf and tanh), SiLU, ReLU; alone or gating a second half; the cap of logits. */
#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd/vector.h"

struct activation_op {
    struct device *d;
    const struct activation_params *p;
};

struct softcap_op {
    struct device *d;
    const struct softcap_params *p;
};

static void activate_row(void *arg, int32_t t, int32_t thread)
{
    (void)thread;
    const struct activation_op *op = arg;
    const struct activation_params *p = op->p;
    size_t m = p->out.shape[1];
    const float *gate = row_of(&p->x, (size_t)t);
    op->d->vector->activate(row_of(&p->out, (size_t)t), gate, p->gated ? gate + m : NULL, p->kind, m);
}

int cpu_activation(struct device *d, const struct activation_params *p, struct error *e)
{
    size_t n_tokens = p->out.shape[0], m = p->out.shape[1];
    if (!tensor_is(&p->out, DTYPE_F32, n_tokens, m) || !tensor_is(&p->x, DTYPE_F32, n_tokens, p->gated ? 2 * m : m))
        return error_set(e, ERR_INVALID, "activation: shapes do not fit");
    struct activation_op op = {d, p};
    rows_run(d, (int32_t)n_tokens, 2 * m, activate_row, &op);
    return 0;
}

static void softcap_row(void *arg, int32_t t, int32_t thread)
{
    (void)thread;
    const struct softcap_op *op = arg;
    op->d->vector->softcap(row_of(&op->p->x, (size_t)t), op->p->cap, op->p->x.shape[1]);
}

int cpu_softcap(struct device *d, const struct softcap_params *p, struct error *e)
{
    if (!tensor_is(&p->x, DTYPE_F32, p->x.shape[0], p->x.shape[1]) || !(p->cap > 0))
        return error_set(e, ERR_INVALID, "softcap: shapes do not fit");
    struct softcap_op op = {d, p};
    rows_run(d, (int32_t)p->x.shape[0], p->x.shape[1], softcap_row, &op);
    return 0;
}
