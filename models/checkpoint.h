/* checkpoint.h: a checkpoint's weight files, one or a sharded set, as one set of named tensors.
 *
 * Called by model.c and weights.c. Takes dir/model.safetensors if there is one, else the files that
 * dir/model.safetensors.index.json names in its "weight_map".
 */
#ifndef GPTD_MODELS_CHECKPOINT_H
#define GPTD_MODELS_CHECKPOINT_H

#include "models/safetensors.h"

struct checkpoint {
    struct safetensors *files;                 // [n_files]
    size_t n_files;
    struct safetensors_tensor **tensors;        // [n_tensors], by name
    size_t n_tensors;
};

// Maps the files and reads their headers. On failure nothing is left behind.
int checkpoint_open(struct checkpoint *c, const char *dir, struct error *e);
void checkpoint_close(struct checkpoint *c);

// The tensor of that name; NULL: there is none.
struct safetensors_tensor *checkpoint_find(const struct checkpoint *c, const char *name);

// Reads the files into memory now, so that a ready server answers its first request at full speed, and a file that was
// cut short is refused here rather than killing the process later.
int checkpoint_populate(const struct checkpoint *c, struct error *e);

// Reads n bytes that a file has where the map has `from`, without touching the map: a file that was cut short is an error.
// Any thread.
int checkpoint_read(const struct checkpoint *c, void *to, const void *from, size_t n, struct error *e);
// Closes the files; their maps stay. Nothing is read after it.
void checkpoint_read_end(struct checkpoint *c);

#endif
