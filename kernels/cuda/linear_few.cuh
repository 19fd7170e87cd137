/* linear_few.cuh: products with few rows of activations, and what is fused around them (linear_few.cu); in one chain an
 * element (linear_chain.cu).
 */
#ifndef GPTD_KERNELS_CUDA_LINEAR_FEW_CUH
#define GPTD_KERNELS_CUDA_LINEAR_FEW_CUH

#include "kernels/cuda/cuda.h"

enum {
    FEW_ROWS = 8,          // most rows of x
    FEW_SMEM = 112 * 1024, // most shared memory of a block, in bytes: two fit a multiprocessor of sm_90
};

// Whether x and the weight's parts are what the kernel takes: its sums are not those of the products for many rows.
bool linear_is_few(const struct device *d, const struct linear_params *p);

// out = W x, or out += W x.
int linear_few(struct device *d, const struct linear_params *p, struct error *e);

// W norm(x); rotated and written to the cache; act(W_gate norm(x)) * (W_up norm(x)). The ops' own launchers have
// checked the shapes. False from *_fits: these shapes are not for the fused kernel.
bool linear_few_norm_fits(const struct device *d, const struct norm_params *norm, const struct linear_params *p);
int linear_few_norm(struct device *d, const struct norm_params *norm, const struct linear_params *p, struct error *e);
bool linear_few_rope_fits(const struct device *d, const struct norm_params *norm, const struct linear_params *p,
                          const struct rope_kv_write_params *rope);
int linear_few_rope(struct device *d, const struct norm_params *norm, const struct linear_params *p,
                    const struct rope_kv_write_params *rope, struct error *e);
bool linear_few_gated_fits(const struct device *d, const struct norm_params *norm, const struct linear_params *p,
                           const struct activation_params *activation);
int linear_few_gated(struct device *d, const struct norm_params *norm, const struct linear_params *p,
                     const struct activation_params *activation, struct error *e);

// A product of which every element is one chain (linear_chain.cu). The bias, if there is one, is of out's type.
struct chain_product {
    const void *w, *bias, *x; // [N, K], [N], [T, K]
    void *out;                // [T, ldo]
    enum dtype x_dtype, out_dtype;
    size_t T, N, K, ldo; // T <= FEW_ROWS for linear_chain
    bool accumulate;
};

// What it says depends on T in nothing but x.
bool linear_chain_fits(const struct chain_product *p);
int linear_chain(const struct device *d, const struct chain_product *p, struct error *e);

#endif
