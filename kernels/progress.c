#include "kernels/progress.h"

#include <stdatomic.h>
#include <stddef.h>
#include <time.h>

static _Atomic(const char *) op_at_work = NULL;
static _Atomic int32_t layer_at_work = -1;
static _Atomic double last_beat;

void progress_beat(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t); // a few ms behind, and as many ns
    double now = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    // Threads that beat at once share the line; few of them find it changed.
    if (atomic_load_explicit(&last_beat, memory_order_relaxed) != now)
        atomic_store_explicit(&last_beat, now, memory_order_relaxed);
}

void progress_at(const char *op, int32_t layer)
{
    atomic_store_explicit(&layer_at_work, layer, memory_order_relaxed);
    atomic_store_explicit(&op_at_work, op, memory_order_relaxed);
    progress_beat();
}

const char *progress_op(int32_t *layer)
{
    *layer = atomic_load_explicit(&layer_at_work, memory_order_relaxed);
    return atomic_load_explicit(&op_at_work, memory_order_relaxed);
}

double progress_time(void) { return atomic_load_explicit(&last_beat, memory_order_relaxed); }
