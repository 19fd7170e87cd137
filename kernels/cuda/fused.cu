/* fused.cu: ops of a layer that belong together: one kernel for few rows, the ops one after another for many. */
#include "kernels/cuda/linear_few.cuh"

static int check(const struct norm_params *norm, const struct linear_params *linear, struct error *e)
{
    int rc = norm_check(norm, e);
    return rc ? rc : linear_check(linear, e);
}

int cuda_norm_linear(struct device *d, const struct norm_params *norm, const struct linear_params *linear, struct error *e)
{
    if (linear_few_norm_fits(d, norm, linear)) {
        int rc = check(norm, linear, e);
        return rc ? rc : linear_few_norm(d, norm, linear, e);
    }
    int rc = cuda_norm(d, norm, e);
    return rc ? rc : cuda_linear(d, linear, e);
}

int cuda_norm_linear_rope(struct device *d, const struct norm_params *norm, const struct linear_params *linear,
                          const struct rope_kv_write_params *rope, struct error *e)
{
    if (linear_few_rope_fits(d, norm, linear, rope)) {
        int rc = rope_kv_write_check(d, rope, e);
        if (!rc) rc = check(norm, linear, e);
        return rc ? rc : linear_few_rope(d, norm, linear, rope, e);
    }
    int rc = cuda_norm_linear(d, norm, linear, e);
    return rc ? rc : cuda_rope_kv_write(d, rope, e);
}

int cuda_norm_linear_activation(struct device *d, const struct norm_params *norm, const struct linear_params *linear,
                                const struct activation_params *activation, struct error *e)
{
    if (linear_few_gated_fits(d, norm, linear, activation)) {
        int rc = check(norm, linear, e);
        return rc ? rc : linear_few_gated(d, norm, linear, activation, e);
    }
    int rc = cuda_norm(d, norm, e);
    if (!rc) rc = cuda_linear(d, linear, e);
    return rc ? rc : cuda_activation(d, activation, e);
}
