/* cuda.h: the inside of the CUDA backend: its device, staging of host arrays, and how an op reports a failure.
 *
 * An op is one file, kernels/cuda/<op>.cu: header block, kernels, launcher. Launchers check shapes, put the host arrays
 * they were given where kernels can read them (`device_array`), launch on the device's one stream and return what
 * `launch_check` says. No op allocates or waits. Everything is enqueued in order on `stream`.
 */
#ifndef GPTD_KERNELS_CUDA_CUDA_H
#define GPTD_KERNELS_CUDA_CUDA_H

#include <cuda_runtime.h>

#include "kernels/kernels.h"

enum {
    MAX_STAGED = 16,            // arrays of one step
    N_STAGING_SLOTS = 4,        // steps whose arrays may be on their way at once
    MAX_BLOCK_SMEM = 163 * 1024 // bytes of shared memory a block may have on sm_80, the smallest device we run on
};

// One host array of the step that is being enqueued and its copy on the device.
struct staged {
    const void *host;
    void *device;
    size_t bytes;
};

// Host arrays travel through pinned memory: a slot is filled by the host while earlier slots are still being copied.
struct staging {
    char *pinned;              // [N_STAGING_SLOTS, slot_bytes]
    char *arrays;              // device, [slot_bytes]: one step's, at fixed offsets, so that a graph can be replayed
    size_t slot_bytes, used;   // used: of the slot being filled
    int32_t slot;
    cudaEvent_t copied[N_STAGING_SLOTS];
    struct staged staged[MAX_STAGED];
    int32_t n_staged;
};

struct cublas;  // linear.cu
struct sampler; // sample.cu

struct device {
    struct device_options options;
    int ordinal;
    int sm;                    // 80, 90, ...
    int n_sms;
    size_t l2_bytes;
    cudaStream_t stream;
    cudaEvent_t *tickets;      // ring of recorded events
    uint64_t n_recorded;
    struct staging staging;
    struct cublas *cublas;
    struct sampler *sampler;
    void *scratch;             // of the op that runs: partial sums of attention, of split-K products, of sampling
    size_t scratch_bytes;
    char description[128];
};

#ifdef __cplusplus
extern "C" {
#endif

// Each op's need of scratch, in bytes; device_create takes the largest.
size_t cuda_attention_scratch_bytes(const struct device *d);
size_t cuda_sample_scratch_bytes(const struct device *d);
size_t cuda_linear_scratch_bytes(const struct device *d);

int cuda_linear_create(struct device *d, struct error *e);
void cuda_linear_destroy(struct device *d);
int cuda_sample_create(struct device *d, struct error *e);
void cuda_sample_destroy(struct device *d);

// 0, or ERR_DEVICE with the op's name and CUDA's words.
int cuda_check(cudaError_t status, const char *op, struct error *e);
// The same for what the launch before it left behind.
int launch_check(const char *op, struct error *e);

// Where kernels can read the n bytes at `host`: the copy staged for this step if there is one, else one that is made now.
// NULL: no room or a failed copy, and e says so. The copy is valid for the ops enqueued until the next `stage`.
const void *device_array(struct device *d, const void *host, size_t bytes, struct error *e);

// The ops of the table.
int cuda_stage(struct device *d, const struct stage_array *arrays, int32_t n, struct error *e);
int cuda_history_write(struct device *d, struct history history, int32_t row, int32_t position, const int32_t *tokens,
                       int32_t n, struct error *e);
int cuda_copy_blocks(struct device *d, struct kv_layer cache, const int32_t *from, const int32_t *to, int32_t n,
                     struct error *e);
int cuda_embedding(struct device *d, const struct embedding_params *p, struct error *e);
int cuda_norm(struct device *d, const struct norm_params *p, struct error *e);
int cuda_linear(struct device *d, const struct linear_params *p, struct error *e);
int cuda_rope_table(struct device *d, const struct rope_table_params *p, struct error *e);
int cuda_rope_kv_write(struct device *d, const struct rope_kv_write_params *p, struct error *e);
int cuda_attention(struct device *d, const struct attention_params *p, struct error *e);
int cuda_activation(struct device *d, const struct activation_params *p, struct error *e);
int cuda_gather_rows(struct device *d, const struct gather_rows_params *p, struct error *e);
int cuda_sample(struct device *d, const struct sample_params *p, struct error *e);

#ifdef __cplusplus
}
#endif
#endif
