/* cpu.h: the inside of the CPU backend: its device, and the tables of inner loops it picks for this machine's ISA.
 *
 * An op is one file, kernels/cpu/<op>.c: it checks shapes, splits the work into items for the thread pool, and calls
 * inner loops from kernels/cpu/simd/, each file of which is compiled once per instruction set (-DISA=generic, avx2,
 * avx512, avx512bf16) and exports one table named by SIMD_NAME.
 */
#ifndef GPTD_KERNELS_CPU_CPU_H
#define GPTD_KERNELS_CPU_CPU_H

#include "kernels/cpu/thread_pool.h"
#include "kernels/kernels.h"

enum isa { ISA_GENERIC, ISA_AVX2, ISA_AVX512, ISA_AVX512BF16, N_ISAS };

#define SIMD_CONCAT_(a, b) a##_##b
#define SIMD_CONCAT(a, b) SIMD_CONCAT_(a, b)
#define SIMD_NAME(name) SIMD_CONCAT(name, ISA) // in simd/*.c: SIMD_NAME(simd_linear) is simd_linear_avx2, ...

struct simd_linear;    // kernels/cpu/simd/linear.h: matrix products
struct simd_attention; // kernels/cpu/simd/attention.h: one query tile against one KV block
struct simd_vector;    // kernels/cpu/simd/vector.h: norms, activations, conversions, softmax pieces

struct device {
    struct thread_pool *pool;
    enum isa isa;
    const struct simd_linear *linear;
    const struct simd_attention *attention;
    const struct simd_vector *vector;
    struct device_options options;
    char description[128];
    char *scratch;             // [n_threads, scratch_per_thread] bytes, 64-byte aligned
    size_t scratch_per_thread;
    void *linear_scratch;      // activations and packed weights of one product
    size_t linear_scratch_bytes;
};

static inline void *device_scratch(struct device *device, int32_t thread)
{
    return device->scratch + (size_t)thread * device->scratch_per_thread;
}

// Each op's scratch need per thread, in bytes; device_create takes the largest.
size_t attention_scratch_bytes(const struct device_options *o);
size_t sample_scratch_bytes(const struct device_options *o);
size_t linear_scratch_bytes(const struct device *d); // all threads together; pool and ISA are chosen before

// The ops of the table, one file each.
int cpu_history_write(struct device *d, struct history history, int32_t row, int32_t position, const int32_t *tokens,
                      int32_t n, struct error *e);
int cpu_copy_blocks(struct device *d, struct kv_layer cache, const int32_t *from, const int32_t *to, int32_t n,
                    struct error *e);
int cpu_embedding(struct device *d, const struct embedding_params *p, struct error *e);
int cpu_norm(struct device *d, const struct norm_params *p, struct error *e);
int cpu_linear(struct device *d, const struct linear_params *p, struct error *e);
int cpu_rope_table(struct device *d, const struct rope_table_params *p, struct error *e);
int cpu_rope_kv_write(struct device *d, const struct rope_kv_write_params *p, struct error *e);
int cpu_attention(struct device *d, const struct attention_params *p, struct error *e);
int cpu_activation(struct device *d, const struct activation_params *p, struct error *e);
int cpu_softcap(struct device *d, const struct softcap_params *p, struct error *e);
int cpu_route(struct device *d, const struct route_params *p, struct error *e);
int cpu_linear_experts(struct device *d, const struct linear_experts_params *p, struct error *e);
int cpu_combine_experts(struct device *d, const struct combine_experts_params *p, struct error *e);
int cpu_gather_rows(struct device *d, const struct gather_rows_params *p, struct error *e);
int cpu_sample(struct device *d, const struct sample_params *p, struct error *e);

#endif
