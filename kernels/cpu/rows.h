/* rows.h: how the row-wise ops share their work: one row is one item, unless all rows together are less work than
 * waking the other threads.
 */
#ifndef GPTD_KERNELS_CPU_ROWS_H
#define GPTD_KERNELS_CPU_ROWS_H

#include "kernels/cpu/cpu.h"

enum { ROWS_ALONE = 16 * 1024 }; // elements that the caller works off faster alone

static inline void rows_run(struct device *d, int32_t n_rows, size_t row_elements,
                            void (*work)(void *arg, int32_t row, int32_t thread), void *arg)
{
    if ((size_t)n_rows * row_elements > ROWS_ALONE) {
        thread_pool_run(d->pool, n_rows, work, arg);
        return;
    }
    for (int32_t row = 0; row < n_rows; row++) work(arg, row, 0);
}

static inline bool tensor_is(const struct tensor *t, enum dtype dtype, size_t rows, size_t cols)
{
    return t->data && t->dtype == dtype && t->n_dims == 2 && t->shape[0] == rows && t->shape[1] == cols;
}

static inline bool tensor_is_vector(const struct tensor *t, size_t n) // of any weight type
{
    return t->data && t->dtype != DTYPE_I32 && t->n_dims == 1 && t->shape[0] == n;
}

static inline float *row_of(const struct tensor *t, size_t row) // of an F32 [rows, cols]
{
    return (float *)t->data + row * t->shape[1];
}

#endif
