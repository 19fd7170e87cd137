/* thread_pool.h: runs the items of one op on all cores.
 *
 * Used by the CPU backend's ops, one caller at a time (the engine's thread), which works too. Workers spin for a short
 * while after an op, since the next one usually follows at once, then sleep: an idle server uses no CPU.
 */
#ifndef GPTD_KERNELS_CPU_THREAD_POOL_H
#define GPTD_KERNELS_CPU_THREAD_POOL_H

#include <stdint.h>

#include "kernels/error.h"

struct thread_pool;

// n_threads counts the caller: 1 starts no thread. 0: one per core this process may use.
int thread_pool_create(struct thread_pool **out, int32_t n_threads, struct error *e);
void thread_pool_destroy(struct thread_pool *pool);
int32_t thread_pool_size(const struct thread_pool *pool);

// Calls work(arg, item, thread) once for each item of 0 .. n_items-1 and returns when all are done. Items are handed
// out in ascending order to whichever thread is free; thread is 0 .. size-1 (scratch index). Results must not depend on it.
void thread_pool_run(struct thread_pool *pool, int32_t n_items, void (*work)(void *arg, int32_t item, int32_t thread),
                     void *arg);

#endif
