/* safetensors.h: one safetensors file: mapped read-only, checked by the reference implementation's rules.
 *
 * Called by checkpoint.c. Owns the map; tensors are used where they lie in it, so the file must not change while it is
 * mapped. A file that is cut short under the map makes the kernel raise SIGBUS on the next touch of what is gone:
 * safetensors_file_at lets a signal handler name the file.
 *
 * Format: u64 (little-endian) header size n <= 100,000,000; a JSON object of n bytes, {"name": {"dtype", "shape",
 * "data_offsets": [begin, end]}, ..., "__metadata__": {string: string}}; then the data, without holes or overlaps, to
 * the file's last byte. https://github.com/huggingface/safetensors#format
 */
#ifndef GPTD_MODELS_SAFETENSORS_H
#define GPTD_MODELS_SAFETENSORS_H

#include "kernels/kernels.h"

struct safetensors_tensor {
    const char *name;
    const char *type;       // as the file names it: "BF16"
    int32_t dtype;          // enum dtype; -1: a type that gptd has no use for
    int32_t n_dims;
    size_t shape[MAX_DIMS]; // the first MAX_DIMS of n_dims
    const void *data;       // in the map; aligned to nothing
    size_t size;            // bytes
    bool used;              // by the model: set by weights.c
};

struct safetensors {
    struct safetensors_tensor *tensors; // [n_tensors], in the order of their data
    size_t n_tensors;
    char *names;            // the tensors' names, each ended by NUL
    void *map;              // NULL: parsed from the caller's memory
    size_t map_size;        // bytes
    int fd;                 // of the file; -1: none, or closed by checkpoint_read_end
    char *path;
    struct safetensors *next; // in the list that safetensors_file_at walks
};

// Maps and checks a file. On failure nothing is left behind, and the error names the file.
int safetensors_open(struct safetensors *st, const char *path, struct error *e);
void safetensors_close(struct safetensors *st);

// Checks a file's bytes [size] in memory and fills tensors, n_tensors, names. Tensors point into bytes.
int safetensors_parse(struct safetensors *st, const void *bytes, size_t size, struct error *e);

// The path of the open file that the address lies in; NULL: in none. May be called from a signal handler. Opening and
// closing files must not run at the same time.
const char *safetensors_file_at(const void *address);

#endif
