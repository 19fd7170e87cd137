/* progress.h: what the engine's thread is at, for whoever looks at a process that has crashed or hangs.
 *
 * Set by models/forward.c and engine/loop.c before each op; engine_progress gives it away. One engine a process.
 */
#ifndef GPTD_KERNELS_PROGRESS_H
#define GPTD_KERNELS_PROGRESS_H

#include <stdint.h>

// op: a constant, NULL: nothing to do. layer: -1, in none.
void progress_at(const char *op, int32_t layer);
const char *progress_op(int32_t *layer);

#endif
