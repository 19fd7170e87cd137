/* device.c: the CPU backend's table and its device: memory, streams that are none, scratch, the choice of ISA. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/machine.h"
#include "kernels/cpu/simd/attention.h"
#include "kernels/cpu/simd/linear.h"
#include "kernels/cpu/simd/vector.h"

// ---- memory ---------------------------------------------------------------------------------------------------------

enum { ALIGNMENT = 64, PAGE_BYTES = 4096, HUGE_FROM = 4 << 20 };

// calloc leaves large blocks to the kernel's zero pages: an array costs memory as it is used. The largest ask for huge
// pages: reading weights through 4 KiB pages reaches 85 % of the bandwidth (Zen 4, one thread).
// The pointer to give back to free() stands before the aligned block.
static void *cpu_alloc(struct device *device, size_t bytes)
{
    (void)device;
    if (bytes > SIZE_MAX - ALIGNMENT - sizeof(void *)) return NULL;
    char *raw = calloc(1, bytes + ALIGNMENT + sizeof(void *));
    if (!raw) return NULL;
    if (bytes >= HUGE_FROM) {
        uintptr_t page = ((uintptr_t)raw + PAGE_BYTES - 1) & ~(uintptr_t)(PAGE_BYTES - 1);
        madvise((void *)page, bytes - PAGE_BYTES, MADV_HUGEPAGE); // advice only: it may fail
    }
    uintptr_t aligned = ((uintptr_t)raw + sizeof(void *) + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1);
    void **memory = (void **)aligned;
    memory[-1] = raw;
    return memory;
}

static void cpu_free(struct device *device, void *memory)
{
    (void)device;
    if (memory) free(((void **)memory)[-1]);
}

static int cpu_copy(struct device *device, void *to, const void *from, size_t bytes, struct error *e)
{
    (void)device, (void)e;
    memcpy(to, from, bytes);
    return 0;
}

// ---- streams: every op is done when it returns ----------------------------------------------------------------------

static uint64_t cpu_record(struct device *device)
{
    (void)device;
    return 0;
}

static int cpu_wait(struct device *device, uint64_t ticket, struct error *e)
{
    (void)device, (void)ticket, (void)e;
    return 0;
}

// ---- device ---------------------------------------------------------------------------------------------------------

static const struct {
    const char *name;        // device_options.isa
    const char *description;
    const struct simd_linear *linear;
    const struct simd_attention *attention;
    const struct simd_vector *vector;
} isa_tables[] = {
    [ISA_GENERIC] = {"generic", "plain C", &simd_linear_generic, &simd_attention_generic, &simd_vector_generic},
#ifdef __x86_64__
    [ISA_AVX2] = {"avx2", "avx2", &simd_linear_avx2, &simd_attention_avx2, &simd_vector_avx2},
    [ISA_AVX512] = {"avx512", "avx512", &simd_linear_avx512, &simd_attention_avx512, &simd_vector_avx512},
    [ISA_AVX512BF16] = {"avx512bf16", "avx512+bf16", &simd_linear_avx512bf16, &simd_attention_avx512bf16,
                        &simd_vector_avx512bf16},
#endif
};

static int choose_isa(struct device *d, const char *name, struct error *e)
{
    enum isa best = machine_isa();
    d->isa = best;
    if (name) {
        d->isa = N_ISAS;
        for (size_t i = 0; i < sizeof isa_tables / sizeof *isa_tables; i++)
            if (!strcmp(name, isa_tables[i].name)) d->isa = (enum isa)i;
    }
    if (d->isa == N_ISAS) return error_set(e, ERR_INVALID, "unknown instruction set \"%.32s\"", name);
    if (d->isa > best) return error_set(e, ERR_UNSUPPORTED, "this machine does not have %s", isa_tables[d->isa].name);
    d->linear = isa_tables[d->isa].linear;
    d->attention = isa_tables[d->isa].attention;
    d->vector = isa_tables[d->isa].vector;
    return 0;
}

static int check_options(const struct device_options *o, struct error *e)
{
    const struct { const char *name; int32_t value; } sizes[] = {
        {"max_vocab_size", o->max_vocab_size}, {"max_context", o->max_context},
        {"max_dim", o->max_dim}, {"max_tokens", o->max_tokens},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < 1) return error_set(e, ERR_INVALID, "device: %s is %d", sizes[i].name, sizes[i].value);
    return 0;
}

static int allocate_scratch(struct device *d, struct error *e)
{
    const struct device_options *o = &d->options;
    size_t attention = attention_scratch_bytes(o), sample = sample_scratch_bytes(o);
    size_t most = attention > sample ? attention : sample;
    d->scratch_per_thread = (most + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
    d->linear_scratch_bytes = linear_scratch_bytes(d);
    d->scratch = cpu_alloc(d, (size_t)thread_pool_size(d->pool) * d->scratch_per_thread);
    d->linear_scratch = cpu_alloc(d, d->linear_scratch_bytes);
    if (d->scratch && d->linear_scratch) return 0;
    return error_set(e, ERR_NOMEM, "device: no memory for %zu + %zu bytes of scratch", d->scratch_per_thread,
                     d->linear_scratch_bytes);
}

static void cpu_device_destroy(struct device *device)
{
    if (!device) return;
    cpu_free(device, device->linear_scratch);
    cpu_free(device, device->scratch);
    thread_pool_destroy(device->pool);
    free(device);
}

static int cpu_device_create(struct device **out, const struct device_options *options, struct error *e)
{
    *out = NULL;
    struct error own;
    if (!e) e = &own;
    struct device *d = calloc(1, sizeof *d);
    if (!d) return error_set(e, ERR_NOMEM, "device: out of memory");
    d->options = *options;
    if (check_options(options, e) || choose_isa(d, options->isa, e) ||
        thread_pool_create(&d->pool, options->n_threads, e) || allocate_scratch(d, e))
        goto fail;
    d->options.n_threads = thread_pool_size(d->pool);
    d->options.isa = isa_tables[d->isa].name; // the caller's string need not live on
    char cpu[64];
    machine_cpu_name(cpu, sizeof cpu);
    snprintf(d->description, sizeof d->description, "%s, %d thread%s, %s", cpu, d->options.n_threads,
             d->options.n_threads == 1 ? "" : "s", isa_tables[d->isa].description);
    *out = d;
    return 0;
fail:
    cpu_device_destroy(d);
    return e->code;
}

static const char *cpu_device_description(struct device *device)
{
    return device->description;
}

static size_t cpu_device_memory(struct device *device)
{
    (void)device;
    return machine_memory();
}

static enum dtype cpu_activation_dtype(struct device *device, enum dtype weights)
{
    (void)device, (void)weights;
    return DTYPE_F32;
}

static size_t cpu_scratch_bytes(struct device *device)
{
    return (size_t)device->options.n_threads * device->scratch_per_thread + device->linear_scratch_bytes;
}

const struct kernels *kernels_cpu(void)
{
    static const struct kernels table = {
        .name = "cpu",
        .device_create = cpu_device_create,
        .device_destroy = cpu_device_destroy,
        .device_description = cpu_device_description,
        .device_memory = cpu_device_memory,
        .activation_dtype = cpu_activation_dtype,
        .scratch_bytes = cpu_scratch_bytes,
        .alloc = cpu_alloc,
        .free = cpu_free,
        .alloc_host = cpu_alloc,
        .free_host = cpu_free,
        .copy_in = cpu_copy,
        .copy_out = cpu_copy,
        .reads_mapped_weights = true,
        .record = cpu_record,
        .wait = cpu_wait,
        .history_write = cpu_history_write,
        .copy_blocks = cpu_copy_blocks,
        .embedding = cpu_embedding,
        .norm = cpu_norm,
        .linear = cpu_linear,
        .rope_table = cpu_rope_table,
        .rope_kv_write = cpu_rope_kv_write,
        .attention = cpu_attention,
        .activation = cpu_activation,
        .route = cpu_route,
        .linear_experts = cpu_linear_experts,
        .combine_experts = cpu_combine_experts,
        .gather_rows = cpu_gather_rows,
        .softcap = cpu_softcap,
        .sample = cpu_sample,
    };
    return &table;
}
