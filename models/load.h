/* load.h: a checkpoint's tensors into the device's memory, as several threads can.
 *
 * Called by weights.c, for what cannot be used where the file is mapped. Tensors are cut into pieces of at most 2^20
 * elements. Each thread takes a piece at a time: reads it from the file into host memory of its own (pinned, where the
 * device has such), converts it there, copies it in. While one thread waits for the device others read, so the bus and
 * the file are busy together; the map is not touched, so no page of it is ever made present. Transposed tensors alone are
 * read through the map, which checkpoint_populate has checked.
 */
#ifndef GPTD_MODELS_LOAD_H
#define GPTD_MODELS_LOAD_H

#include "models/checkpoint.h"

struct load_item {
    const struct safetensors_tensor *from; // F32, F16 or BF16
    size_t offset;           // elements of it before those wanted; 0 where transposed
    void *to;                // device, [n_rows, n_cols] of dtype
    enum dtype dtype;        // no wider than the file's
    bool transposed;         // the file has [n_cols, n_rows]
    size_t n_rows, n_cols;
};

// 0, or the first failure, which names the tensor and, if it cannot be read, the file.
int load_run(const struct load_item *items, size_t n, const struct checkpoint *checkpoint, const struct kernels *kernels,
             struct device *device, struct error *e);

#endif
