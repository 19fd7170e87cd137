#include "models/rope.h"

#include <math.h>

// Steps and roundings are those of the Python source, in float where it has float tensors: far into a context, one unit
// in the last place of a frequency is visible in the logits.

static void plain(float theta, int32_t dim, float *inv_freq)
{
    for (int32_t i = 0; i < dim / 2; i++) inv_freq[i] = 1.0f / powf(theta, (float)(2 * i) / (float)dim);
}

// https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr: NTK-aware scaling of the base, growing with the length.
static double dynamic_theta(const struct rope_config *c, int32_t max_model_len)
{
    double length = fmax(max_model_len, c->max_positions);
    double dim = c->dim;
    return c->theta * pow(c->factor * length / c->max_positions - (c->factor - 1), dim / (dim - 2));
}

// Llama 3.1: long waves are stretched by factor, short ones kept, a smooth step between.
static void llama3(const struct rope_config *c, float *inv_freq)
{
    float factor = (float)c->factor, low = (float)c->low_freq_factor, high = (float)c->high_freq_factor;
    float original = (float)c->original_max_positions;
    for (int32_t i = 0; i < c->dim / 2; i++) {
        float wavelength = (float)(2 * M_PI) / inv_freq[i];
        if (wavelength > original / low) {
            inv_freq[i] /= factor;
        } else if (wavelength >= original / high) {
            float smooth = (original / wavelength - low) / (high - low);
            inv_freq[i] = (1 - smooth) * inv_freq[i] / factor + smooth * inv_freq[i];
        }
    }
}

// The dimension whose wave turns `rotations` times over the original context.
static double correction_dim(const struct rope_config *c, double rotations)
{
    return c->dim * log(c->original_max_positions / (rotations * 2 * M_PI)) / (2 * log(c->theta));
}

// YaRN (https://arxiv.org/abs/2309.00071): a ramp over the dimensions from extrapolation to interpolation.
static void yarn(const struct rope_config *c, float *inv_freq)
{
    double low = correction_dim(c, c->beta_fast), high = correction_dim(c, c->beta_slow);
    if (c->truncate) low = floor(low), high = ceil(high);
    low = fmax(low, 0);
    high = fmin(high, c->dim - 1);
    if (low == high) high += 0.001;
    for (int32_t i = 0; i < c->dim / 2; i++) {
        float power = powf((float)c->theta, (float)(2 * i) / (float)c->dim);
        float ramp = fminf(fmaxf(((float)i - (float)low) / (float)(high - low), 0), 1);
        float extrapolation = 1 - ramp;
        inv_freq[i] = 1.0f / ((float)c->factor * power) * (1 - extrapolation) + 1.0f / power * extrapolation;
    }
}

// LongRoPE (https://arxiv.org/abs/2402.13753): a searched factor for each wave.
static void longrope(const struct rope_config *c, int32_t max_model_len, float *inv_freq)
{
    const float *factors = max_model_len > c->original_max_positions ? c->long_factors : c->short_factors;
    for (int32_t i = 0; i < c->dim / 2; i++) {
        inv_freq[i] = 1.0f / (factors[i] * powf((float)c->theta, (float)(2 * i) / (float)c->dim));
    }
}

void rope_inv_freq(const struct rope_config *c, int32_t max_model_len, float *inv_freq)
{
    double theta = c->type == ROPE_DYNAMIC ? dynamic_theta(c, max_model_len) : c->theta;
    plain((float)theta, c->dim, inv_freq);
    if (c->type == ROPE_LINEAR) {
        for (int32_t i = 0; i < c->dim / 2; i++) inv_freq[i] /= (float)c->factor;
    }
    if (c->type == ROPE_LONGROPE) longrope(c, max_model_len, inv_freq);
    if (c->type == ROPE_LLAMA3) llama3(c, inv_freq);
    if (c->type == ROPE_YARN) yarn(c, inv_freq);
}
