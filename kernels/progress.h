/* progress.h: what the engine's thread is at, and when it last got on, for whoever looks at a process that has crashed or hangs.
 *
 * Set by models/forward.c and engine/loop.c before each op, and within one by kernels/cpu's threads; engine_progress and
 * engine_stats_get give it away. One engine a process.
 */
#ifndef GPTD_KERNELS_PROGRESS_H
#define GPTD_KERNELS_PROGRESS_H

#include <stdint.h>

// op: a constant, NULL: nothing to do. layer: -1, in none. A beat as well.
void progress_at(const char *op, int32_t layer);
const char *progress_op(int32_t *layer);

// Any thread that has done a part of an op: it takes long, but is not stuck.
void progress_beat(void);
double progress_time(void); // of the last beat: CLOCK_MONOTONIC seconds, to 10 ms; 0: none yet

#endif
