/* plan.h: the memory plan, for people and for programs.
 *
 * Called by main for --dry-run. Every figure is the engine's own (engine_plan_get), computed before anything is
 * allocated.
 */
#ifndef GPTD_SERVER_PLAN_H
#define GPTD_SERVER_PLAN_H

#include <stdbool.h>
#include <stdio.h>

#include "engine/engine.h"

// Prints a table, or one JSON object with every figure in bytes or tokens.
void plan_print(const struct engine_plan *plan, bool json, FILE *out);
// Everything the plan allocates or maps, bytes.
size_t plan_total(const struct engine_plan *plan);
// bytes as "14.0 MiB".
const char *plan_bytes(size_t bytes, char text[32]);

#endif
