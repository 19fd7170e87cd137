/* faulty_backend.c: a libgptd_cuda.so for machines without a GPU. Its device computes nothing, answers every request with
 * the same token, one step a millisecond, and fails as told: by the word in the file that FAULTY_BACKEND names.
 *
 *   probe    no usable GPU                            linear, sample, wait   fail, as after a fault of the device
 *   create   out of memory for the device's own       hang                   wait does not return
 *   alloc    out of memory for LARGE and more         copy                   copy_in fails
 *   graph    no memory for a record of ops             crash, abort           linear crashes, aborts
 *   slow     works, but 20 times as slowly
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/kernels.h"

enum { TOKEN = 1500, LARGE = 16 << 20 };

struct device {
    uint64_t n_recorded; // tickets
    bool records, ran;   // ops go into a graph; some ran since the last sampling
};

static bool told(const char *fault)
{
    char word[32] = "";
    const char *path = getenv("FAULTY_BACKEND");
    FILE *f = path ? fopen(path, "r") : NULL;
    if (!f) return false;
    bool same = fscanf(f, "%31s", word) == 1 && strcmp(word, fault) == 0;
    fclose(f);
    return same;
}

static int fail_if_told(const char *fault, struct error *e)
{
    return told(fault) ? error_set(e, ERR_DEVICE, "%s: broke, as told", fault) : 0;
}

static int create(struct device **out, const struct device_options *options, struct error *e)
{
    (void)options;
    *out = NULL;
    if (told("create")) return error_set(e, ERR_NOMEM, "device: no memory for its scratch, as told");
    *out = calloc(1, sizeof **out);
    return *out ? 0 : error_set(e, ERR_NOMEM, "device: out of memory");
}

static void destroy(struct device *d) { free(d); }
static const char *description(struct device *d) { return (void)d, "a faulty device"; }
static size_t memory(struct device *d) { return (void)d, (size_t)1 << 30; }
static enum dtype activation_dtype(struct device *d, enum dtype weights) { return (void)d, weights; }
static size_t scratch_bytes(struct device *d) { return (void)d, (size_t)1 << 20; }

static void *allocate(struct device *d, size_t bytes)
{
    (void)d;
    return bytes >= LARGE && told("alloc") ? NULL : calloc(1, bytes ? bytes : 1);
}

static void release(struct device *d, void *memory)
{
    (void)d;
    free(memory);
}

static int copy_in(struct device *d, void *to, const void *from, size_t bytes, struct error *e)
{
    (void)d;
    memcpy(to, from, bytes);
    return fail_if_told("copy", e);
}

static int copy_out(struct device *d, void *to, const void *from, size_t bytes, struct error *e)
{
    (void)d, (void)e;
    memcpy(to, from, bytes);
    return 0;
}

static uint64_t record(struct device *d) { return d->n_recorded++; }

static int wait_for(struct device *d, uint64_t ticket, struct error *e)
{
    (void)d, (void)ticket;
    while (told("hang")) pause();
    usleep(told("slow") ? 20000 : 1000);
    return fail_if_told("wait", e);
}

static int graph_begin(struct device *d, const void *owner, int32_t n_rows, bool *replayed, struct error *e)
{
    (void)owner, (void)n_rows, (void)e;
    d->records = true;
    *replayed = false;
    return 0;
}

static int graph_end(struct device *d, bool keep, bool *launched, struct error *e)
{
    (void)e;
    d->records = false;
    *launched = d->ran = keep && !told("graph");
    return 0;
}

static int history_write(struct device *d, struct history history, int32_t row, int32_t position, const int32_t *tokens,
                         int32_t n, struct error *e)
{
    (void)d, (void)e;
    memcpy(history.tokens + (size_t)row * (size_t)history.max_len + position, tokens, (size_t)n * sizeof *tokens);
    return 0;
}

static int copy_blocks(struct device *d, struct kv_layer cache, const int32_t *from, const int32_t *to, int32_t n,
                       struct error *e)
{
    (void)d, (void)cache, (void)from, (void)to, (void)n, (void)e;
    return 0;
}

static int linear(struct device *d, const struct linear_params *p, struct error *e)
{
    (void)p;
    d->ran |= !d->records;
    if (told("crash")) *(volatile int *)(uintptr_t)0x1234 = 1;
    if (told("abort")) abort();
    return fail_if_told("linear", e);
}

static int sample(struct device *d, const struct sample_params *p, struct error *e)
{
    if (!d->ran) return error_set(e, ERR_DEVICE, "sample: of a step that did not run");
    d->ran = false;
    for (int32_t i = 0; i < p->n_rows; i++) p->results[i] = (struct sample_result){.id = TOKEN};
    return fail_if_told("sample", e);
}

#define OP_WITHOUT_EFFECT(op)                                                                                          \
    static int op(struct device *d, const struct op##_params *p, struct error *e)                                      \
    {                                                                                                                  \
        (void)d, (void)p, (void)e;                                                                                     \
        return 0;                                                                                                      \
    }
OP_WITHOUT_EFFECT(embedding)
OP_WITHOUT_EFFECT(norm)
OP_WITHOUT_EFFECT(rope_table)
OP_WITHOUT_EFFECT(rope_kv_write)
OP_WITHOUT_EFFECT(attention)
OP_WITHOUT_EFFECT(activation)
OP_WITHOUT_EFFECT(gather_rows)

__attribute__((visibility("default"))) int gptd_cuda_probe(struct error *e)
{
    return told("probe") ? error_set(e, ERR_DEVICE, "Faulty 7000 has compute capability 7.0, as told") : 0;
}

__attribute__((visibility("default"))) const struct kernels *gptd_kernels_cuda(void)
{
    static const struct kernels table = {
        .name = "faulty", .asynchronous = true, .device_create = create, .device_destroy = destroy,
        .device_description = description, .device_memory = memory, .activation_dtype = activation_dtype,
        .scratch_bytes = scratch_bytes, .alloc = allocate, .free = release, .alloc_host = allocate,
        .free_host = release, .copy_in = copy_in, .copy_out = copy_out, .record = record, .wait = wait_for,
        .graph_begin = graph_begin, .graph_end = graph_end,
        .history_write = history_write, .copy_blocks = copy_blocks, .embedding = embedding, .norm = norm,
        .linear = linear, .rope_table = rope_table, .rope_kv_write = rope_kv_write, .attention = attention,
        .activation = activation, .gather_rows = gather_rows, .sample = sample,
    };
    return &table;
}
