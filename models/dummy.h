/* dummy.h: random weights for a checkpoint that is only a config.json: N(0, 0.02), the same for a seed everywhere.
 *
 * Called by weights.c. Values are drawn from a table of 65,536 normal variates by a counter-based generator, so that
 * several threads, or the device itself (kernels->draw), fill any part in any order, at the speed of memory.
 */
#ifndef GPTD_MODELS_DUMMY_H
#define GPTD_MODELS_DUMMY_H

#include "kernels/kernels.h"

struct dummy;

// NULL: out of memory.
struct dummy *dummy_create(enum dtype dtype, uint64_t seed);
void dummy_destroy(struct dummy *d);

// Fills n elements at `to` (device memory): number `tensor` of the model, random.
int dummy_fill_normal(const struct dummy *d, uint64_t tensor, const struct kernels *kernels, struct device *device,
                      void *to, size_t n, struct error *e);
// Likewise, with one value.
int dummy_fill_value(const struct dummy *d, float value, const struct kernels *kernels, struct device *device, void *to,
                     size_t n, struct error *e);

#endif
