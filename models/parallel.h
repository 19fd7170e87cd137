/* parallel.h: one function on several threads at once, the caller's among them; for what is done once, while loading.
 *
 * Called by load.c and dummy.c. The work shares itself out, by an atomic counter in its argument.
 */
#ifndef GPTD_MODELS_PARALLEL_H
#define GPTD_MODELS_PARALLEL_H

#include <stddef.h>

// Threads worth having for n pieces of work: 1 to 16, at most one per core.
size_t parallel_width(size_t n);

// Calls work(arg) on `width` threads (on fewer, if the system has no more) and returns when all calls have. width: 1 to 16.
void parallel_run(size_t width, void *(*work)(void *), void *arg);

#endif
