#include "kernels/progress.h"

#include <stdatomic.h>
#include <stddef.h>

static _Atomic(const char *) op_at_work = NULL;
static _Atomic int32_t layer_at_work = -1;

void progress_at(const char *op, int32_t layer)
{
    atomic_store_explicit(&layer_at_work, layer, memory_order_relaxed);
    atomic_store_explicit(&op_at_work, op, memory_order_relaxed);
}

const char *progress_op(int32_t *layer)
{
    *layer = atomic_load_explicit(&layer_at_work, memory_order_relaxed);
    return atomic_load_explicit(&op_at_work, memory_order_relaxed);
}
