/* device.cu: the CUDA backend's table and its device: memory, the stream, tickets. */
#include "kernels/cuda/cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    N_TICKETS = 512, // recorded points that may be waited for; of an older one, a later one is
    OLDEST_SM = 80,
};

// ---- errors ---------------------------------------------------------------------------------------------------------

static void describe_driver(char *text, size_t size)
{
    int has = 0, wants = 0;
    cudaDriverGetVersion(&has);
    cudaRuntimeGetVersion(&wants);
    if (!has) snprintf(text, size, ": no NVIDIA driver is loaded");
    else
        snprintf(text, size, ": the driver supports CUDA %d.%d, this library was built with %d.%d: update the driver",
                 has / 1000, has % 1000 / 10, wants / 1000, wants % 1000 / 10);
}

static void describe_memory(char *text, size_t size)
{
    size_t free_bytes = 0, total = 0;
    *text = '\0';
    if (cudaMemGetInfo(&free_bytes, &total) != cudaSuccess) return;
    snprintf(text, size, ": %.3f of %.3f GiB are free", (double)free_bytes / (1 << 30), (double)total / (1 << 30));
}

// What CUDA's words leave open: who must do what.
static void describe(cudaError_t status, char *text, size_t size)
{
    *text = '\0';
    switch (status) {
    case cudaErrorMemoryAllocation: describe_memory(text, size); break;
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorSystemDriverMismatch: describe_driver(text, size); break;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: snprintf(text, size, ": this library has no code for this GPU"); break;
    case cudaErrorECCUncorrectable:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorUnknown: snprintf(text, size, ": the kernel's log may have more (dmesg, NVRM: Xid)"); break;
    default: break;
    }
}

int cuda_check(cudaError_t status, const char *op, struct error *e)
{
    if (status == cudaSuccess) return 0;
    char more[160];
    describe(status, more, sizeof more);
    return error_set(e, status == cudaErrorMemoryAllocation ? ERR_NOMEM : ERR_DEVICE, "%s: %s (%s)%s", op,
                     cudaGetErrorString(status), cudaGetErrorName(status), more);
}

int launch_check(const char *op, struct error *e)
{
    return cuda_check(cudaGetLastError(), op, e);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

// Threads that load weights come without a current device.
static void make_current(struct device *d)
{
    cudaSetDevice(d->ordinal);
}

static void *cuda_alloc(struct device *d, size_t bytes)
{
    void *memory = NULL;
    make_current(d);
    if (cudaMalloc(&memory, bytes ? bytes : 1) != cudaSuccess) {
        cudaGetLastError(); // it would be taken for a later launch's
        return NULL;
    }
    if (cudaMemsetAsync(memory, 0, bytes, d->stream) == cudaSuccess &&
        cudaStreamSynchronize(d->stream) == cudaSuccess)
        return memory;
    cudaFree(memory);
    return NULL;
}

static void cuda_free(struct device *d, void *memory)
{
    if (!memory) return;
    make_current(d);
    cudaFree(memory);
}

static void *cuda_alloc_host(struct device *d, size_t bytes)
{
    void *memory = NULL;
    make_current(d);
    if (cudaHostAlloc(&memory, bytes ? bytes : 1, cudaHostAllocPortable | cudaHostAllocMapped) != cudaSuccess) {
        cudaGetLastError();
        return NULL;
    }
    return memset(memory, 0, bytes);
}

static void cuda_free_host(struct device *d, void *memory)
{
    if (!memory) return;
    make_current(d);
    cudaFreeHost(memory);
}

static int cuda_copy_in(struct device *d, void *to, const void *from, size_t bytes, struct error *e)
{
    make_current(d);
    // On the stream, behind what alloc or an op may still do there; it returns when `from` may be changed.
    cudaError_t status = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, d->stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(d->stream);
    return cuda_check(status, "copy to the device", e);
}

static int cuda_copy_out(struct device *d, void *to, const void *from, size_t bytes, struct error *e)
{
    make_current(d);
    cudaError_t status = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, d->stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(d->stream);
    return cuda_check(status, "copy from the device", e);
}

// ---- the stream -----------------------------------------------------------------------------------------------------

static uint64_t cuda_record(struct device *d)
{
    uint64_t ticket = d->n_recorded++;
    cudaEventRecord(d->tickets[ticket % N_TICKETS], d->stream);
    return ticket;
}

static int cuda_wait(struct device *d, uint64_t ticket, struct error *e)
{
    if (cuda_check(cudaEventSynchronize(d->tickets[ticket % N_TICKETS]), "waiting for the device", e)) return ERR_DEVICE;
    if (d->n_passed <= ticket) d->n_passed = ticket + 1;
    return 0;
}

// ---- device ---------------------------------------------------------------------------------------------------------

static int check_options(const struct device_options *o, struct error *e)
{
    const struct { const char *name; int32_t value; } sizes[] = {
        {"max_vocab_size", o->max_vocab_size}, {"max_context", o->max_context}, {"max_dim", o->max_dim},
        {"max_tokens", o->max_tokens}, {"max_seqs", o->max_seqs}, {"n_heads", o->n_heads},
        {"n_kv_heads", o->n_kv_heads}, {"head_dim", o->head_dim}, {"block_size", o->block_size},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < 1) return error_set(e, ERR_INVALID, "device: %s is %d", sizes[i].name, sizes[i].value);
    if (o->n_tables < 0 || o->n_tables > MAX_TABLES)
        return error_set(e, ERR_INVALID, "device: n_tables is %d, %d at most", o->n_tables, MAX_TABLES);
    if (o->reference_attention)
        return error_set(e, ERR_UNSUPPORTED, "attention: reference is for comparison on the CPU; a GPU has flash alone");
    return 0;
}

// Stands for all of the library's kernels: they are made for the same devices.
__global__ void any_kernel() {}

// 0 if there is a GPU that this library has code for, and what code; else what is in the way.
static int probe(int ordinal, struct cudaDeviceProp *prop, struct cudaFuncAttributes *code, struct error *e)
{
    int n = 0;
    cudaError_t status = cudaGetDeviceCount(&n);
    cudaGetLastError(); // it would be taken for a later launch's
    int rc = cuda_check(status, "no usable GPU", e);
    if (rc) return rc;
    if (n <= ordinal) return error_set(e, ERR_DEVICE, "no usable GPU: the driver shows %d", n);
    rc = cuda_check(cudaGetDeviceProperties(prop, ordinal), "the GPU's properties", e);
    if (rc) return rc;
    if (prop->major * 10 + prop->minor < OLDEST_SM)
        return error_set(e, ERR_DEVICE, "%.64s has compute capability %d.%d; 8.0 is the oldest that is supported",
                         prop->name, prop->major, prop->minor);
    if (prop->sharedMemPerBlockOptin < MAX_BLOCK_SMEM)
        return error_set(e, ERR_DEVICE, "%.64s has %zu KiB of shared memory a block; %d are needed", prop->name,
                         prop->sharedMemPerBlockOptin / 1024, MAX_BLOCK_SMEM / 1024);
    rc = cuda_check(cudaSetDevice(ordinal), "choosing the GPU", e);
    if (rc) return rc;
    status = cudaFuncGetAttributes(code, any_kernel);
    cudaGetLastError();
    return cuda_check(status, prop->name, e);
}

extern "C" __attribute__((visibility("default"))) int gptd_cuda_probe(struct error *e)
{
    struct cudaDeviceProp prop;
    struct cudaFuncAttributes code;
    return probe(0, &prop, &code, e);
}

static int open_gpu(struct device *d, struct error *e)
{
    struct cudaDeviceProp prop;
    struct cudaFuncAttributes code;
    int rc = probe(d->ordinal, &prop, &code, e);
    if (rc) return rc;
    d->sm = prop.major * 10 + prop.minor;
    d->n_sms = prop.multiProcessorCount;
    snprintf(d->description, sizeof d->description, "%.64s, sm_%d, %d multiprocessors, %.1f GiB", prop.name, d->sm,
             d->n_sms, (double)prop.totalGlobalMem / (1 << 30));
    d->kernels_wait = code.ptxVersion >= 90;
    return 0;
}

static int create_stream(struct device *d, struct error *e)
{
    if (cuda_check(cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking), "a stream", e)) return ERR_DEVICE;
    d->tickets = (cudaEvent_t *)calloc(N_TICKETS, sizeof *d->tickets);
    if (!d->tickets) return error_set(e, ERR_NOMEM, "device: out of memory");
    for (int i = 0; i < N_TICKETS; i++)
        if (cuda_check(cudaEventCreateWithFlags(&d->tickets[i], cudaEventDisableTiming), "an event", e))
            return ERR_DEVICE;
    return 0;
}

static size_t largest(size_t a, size_t b)
{
    return a > b ? a : b;
}

static int allocate(struct device *d, struct error *e)
{
    d->scratch_bytes = largest(cuda_attention_scratch_bytes(d), cuda_sample_scratch_bytes(d));
    d->scratch_bytes = largest(d->scratch_bytes, cuda_route_scratch_bytes(d));
    d->scratch = cuda_alloc(d, d->scratch_bytes);
    if (d->scratch) return 0;
    char more[160];
    describe_memory(more, sizeof more);
    return error_set(e, ERR_NOMEM, "device: no memory for %zu bytes of scratch%s", d->scratch_bytes, more);
}

static void cuda_device_destroy(struct device *d)
{
    if (!d) return;
    if (d->stream) {
        make_current(d);
        cudaStreamSynchronize(d->stream);
        graphs_destroy(d);
        staging_destroy(d);
        cuda_sample_destroy(d);
        cuda_linear_destroy(d);
        for (int i = 0; d->tickets && i < N_TICKETS; i++)
            if (d->tickets[i]) cudaEventDestroy(d->tickets[i]);
        cuda_free(d, d->scratch);
        cudaStreamDestroy(d->stream);
    }
    free(d->tickets);
    free(d);
}

static int cuda_device_create(struct device **out, const struct device_options *options, struct error *e)
{
    *out = NULL;
    struct error own;
    if (!e) e = &own;
    struct device *d = (struct device *)calloc(1, sizeof *d);
    if (!d) return error_set(e, ERR_NOMEM, "device: out of memory");
    d->options = *options;
    d->options.isa = NULL;
    if (check_options(options, e) || open_gpu(d, e) || create_stream(d, e) || cuda_linear_create(d, e) ||
        cuda_sample_create(d, e) || staging_create(d, e) || graphs_create(d, e) || allocate(d, e)) {
        cuda_device_destroy(d);
        return e->code;
    }
    *out = d;
    return 0;
}

static const char *cuda_device_description(struct device *d)
{
    return d->description;
}

static size_t cuda_device_memory(struct device *d)
{
    size_t free_bytes = 0, total = 0;
    make_current(d);
    if (cudaMemGetInfo(&free_bytes, &total) != cudaSuccess) return 0;
    return free_bytes + d->scratch_bytes + staging_device_bytes(d); // what is ours already counts as there
}

static enum dtype cuda_activation_dtype(struct device *d, enum dtype weights)
{
    (void)d;
    return weights;
}

static size_t cuda_scratch_bytes(struct device *d)
{
    return d->scratch_bytes + staging_device_bytes(d);
}

extern "C" __attribute__((visibility("default"))) const struct kernels *gptd_kernels_cuda(void)
{
    static struct kernels table;
    table.name = "cuda";
    table.asynchronous = true;
    table.device_create = cuda_device_create;
    table.device_destroy = cuda_device_destroy;
    table.device_description = cuda_device_description;
    table.device_memory = cuda_device_memory;
    table.activation_dtype = cuda_activation_dtype;
    table.scratch_bytes = cuda_scratch_bytes;
    table.alloc = cuda_alloc;
    table.free = cuda_free;
    table.alloc_host = cuda_alloc_host;
    table.free_host = cuda_free_host;
    table.copy_in = cuda_copy_in;
    table.copy_out = cuda_copy_out;
    table.draw = cuda_draw;
    table.record = cuda_record;
    table.wait = cuda_wait;
    table.stage = cuda_stage;
    table.graph_begin = cuda_graph_begin;
    table.graph_end = cuda_graph_end;
    table.history_write = cuda_history_write;
    table.copy_blocks = cuda_copy_blocks;
    table.embedding = cuda_embedding;
    table.norm = cuda_norm;
    table.linear = cuda_linear;
    table.rope_table = cuda_rope_table;
    table.rope_kv_write = cuda_rope_kv_write;
    table.attention = cuda_attention;
    table.activation = cuda_activation;
    table.norm_linear = cuda_norm_linear;
    table.norm_linear_rope = cuda_norm_linear_rope;
    table.norm_linear_activation = cuda_norm_linear_activation;
    table.route = cuda_route;
    table.linear_experts = cuda_linear_experts;
    table.combine_experts = cuda_combine_experts;
    table.gather_rows = cuda_gather_rows;
    table.softcap = cuda_softcap;
    table.sample = cuda_sample;
    return &table;
}
