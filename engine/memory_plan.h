/* memory_plan.h: what an engine will hold, to the byte, before any of it is allocated. */
#ifndef GPTD_ENGINE_MEMORY_PLAN_H
#define GPTD_ENGINE_MEMORY_PLAN_H

#include "engine/batch.h"

// One block of group g over its layers, K and V, bytes.
size_t kv_block_bytes(const struct kv_spec *spec, int32_t block_size);

// Fills the plan's sizes and config->limits.n_blocks from model, options and the numbers already in *plan
// (memory_bytes, and the device's own scratch in scratch_bytes). depth: steps in flight. ERR_NOMEM names the sum and its parts.
int memory_plan_fill(struct engine_plan *plan, struct scheduler_config *config, const struct model_info *info,
                     const struct engine_options *options, int32_t depth, struct error *e);

// The engine's own tables, in one arena: the scheduler's and those of `depth` steps.
void tables_layout(struct scheduler *s, struct step *steps, int32_t depth, struct arena *arena,
                   const struct scheduler_config *config);

#endif
