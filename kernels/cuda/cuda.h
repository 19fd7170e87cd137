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

// Bytes of shared memory a block may have: what an A100 gives. GPUs with less (sm_86, sm_89, sm_120) are refused.
enum { MAX_BLOCK_SMEM = 163 * 1024 };

enum { MAX_TABLES = 8 }; // block tables of a step

struct staging; // staging.cu
struct graphs;  // graph.cu
struct cublas;  // linear.cu
struct sampler; // sample.cu

struct device {
    struct device_options options;
    int ordinal;
    int sm;                    // 80, 90, ...
    int n_sms;
    bool kernels_wait;         // the code that runs was made for Hopper: kernels may be launched early (launch.cuh)
    cudaStream_t stream;
    cudaEvent_t *tickets;      // ring of recorded events
    uint64_t n_recorded;
    uint64_t n_passed;         // recorded points that are known to be over
    struct staging *staging;
    struct graphs *graphs;
    bool recording;            // a graph: what is enqueued is not done yet, and will be done many times
    struct cublas *cublas;
    struct sampler *sampler;
    void *scratch;             // of the op that runs: partial sums of attention, of sampling, counts of experts
    size_t scratch_bytes;
    char description[128];
};

#ifdef __cplusplus
extern "C" {
#endif

// Each op's need of scratch, in bytes; device_create takes the largest.
size_t cuda_attention_scratch_bytes(const struct device *d);
size_t cuda_sample_scratch_bytes(const struct device *d);
size_t cuda_route_scratch_bytes(const struct device *d);

int staging_create(struct device *d, struct error *e);
void staging_destroy(struct device *d);
size_t staging_device_bytes(const struct device *d);
int graphs_create(struct device *d, struct error *e);
void graphs_destroy(struct device *d);
int cuda_linear_create(struct device *d, struct error *e);
void cuda_linear_destroy(struct device *d);
int cuda_sample_create(struct device *d, struct error *e);
void cuda_sample_destroy(struct device *d);

// 0, or ERR_DEVICE (out of memory: ERR_NOMEM) with the op's name, CUDA's words, and what they leave open.
int cuda_check(cudaError_t status, const char *op, struct error *e);
// The same for what the launch before it left behind.
int launch_check(const char *op, struct error *e);

// Where kernels can read the n bytes at `host`: the copy staged for this step if there is one, else one that is made now.
// NULL: no room or a failed copy, and e says so. The copy is valid for the ops enqueued until the next `stage`.
const void *device_array(struct device *d, const void *host, size_t bytes, struct error *e);
// Whether an op of this step has asked before, of a staged array: every layer's ops are given the same, and check it once.
bool array_is_checked(struct device *d, const void *host);
// Whether it is one of those that were staged.
bool array_is_staged(const struct device *d, const void *host);

// For loads of 16 bytes.
static inline bool is_aligned(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

// Whether an op's arguments fit together, for ops that are fused with others.
int norm_check(const struct norm_params *p, struct error *e);
int linear_check(const struct linear_params *p, struct error *e);
int rope_kv_write_check(struct device *d, const struct rope_kv_write_params *p, struct error *e);

// The ops of the table.
int cuda_stage(struct device *d, const struct stage_array *arrays, int32_t n, const struct stage_table *tables,
               int32_t n_tables, struct error *e);
int cuda_graph_begin(struct device *d, const void *owner, int32_t n_rows, bool *replayed, struct error *e);
int cuda_graph_end(struct device *d, bool keep, bool *launched, struct error *e);
int cuda_draw(struct device *d, const struct draw_params *p, struct error *e);
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
int cuda_norm_linear(struct device *d, const struct norm_params *norm, const struct linear_params *linear, struct error *e);
int cuda_norm_linear_rope(struct device *d, const struct norm_params *norm, const struct linear_params *linear,
                          const struct rope_kv_write_params *rope, struct error *e);
int cuda_norm_linear_activation(struct device *d, const struct norm_params *norm, const struct linear_params *linear,
                                const struct activation_params *activation, struct error *e);
int cuda_route(struct device *d, const struct route_params *p, struct error *e);
int cuda_linear_experts(struct device *d, const struct linear_experts_params *p, struct error *e);
int cuda_combine_experts(struct device *d, const struct combine_experts_params *p, struct error *e);
int cuda_gather_rows(struct device *d, const struct gather_rows_params *p, struct error *e);
int cuda_softcap(struct device *d, const struct softcap_params *p, struct error *e);
int cuda_sample(struct device *d, const struct sample_params *p, struct error *e);

#ifdef __cplusplus
}
#endif
#endif
