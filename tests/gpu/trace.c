/* trace.c: libgptd_trace.so, which the driver loads into a CUDA program that has it in CUDA_INJECTION64_PATH. Writes what
 * the GPU did into the file that GPU_TRACE names, a line each: "kind start end name", times in ns, kind g (a whole
 * graph), k (a kernel outside of one), c (a copy) or s (a memset). scripts/gpu/trace.py reads it.
 *
 * Kernels inside a graph are traced one by one only if GPU_TRACE_NODES is set: that slows them down.
 */
#include <cupti.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

enum { BUFFER_BYTES = 1 << 20, FLUSH_MS = 200 };

static FILE *file;

static void buffer_get(uint8_t **buffer, size_t *size, size_t *max_records)
{
    *buffer = malloc(BUFFER_BYTES);
    *size = *buffer ? BUFFER_BYTES : 0;
    *max_records = 0;
}

static void write_record(const CUpti_Activity *record)
{
    switch (record->kind) {
    case CUPTI_ACTIVITY_KIND_GRAPH_TRACE: {
        const CUpti_ActivityGraphTrace2 *r = (const void *)record;
        fprintf(file, "g %" PRIu64 " %" PRIu64 " %u\n", r->start, r->end, r->graphId);
        break;
    }
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: {
        const CUpti_ActivityKernel10 *r = (const void *)record;
        fprintf(file, "k %" PRIu64 " %" PRIu64 " %.160s\n", r->start, r->end, r->name ? r->name : "-");
        break;
    }
    case CUPTI_ACTIVITY_KIND_MEMCPY: {
        const CUpti_ActivityMemcpy6 *r = (const void *)record;
        fprintf(file, "c %" PRIu64 " %" PRIu64 " %u\n", r->start, r->end, r->copyKind);
        break;
    }
    case CUPTI_ACTIVITY_KIND_MEMSET: {
        const CUpti_ActivityMemset4 *r = (const void *)record;
        fprintf(file, "s %" PRIu64 " %" PRIu64 " -\n", r->start, r->end);
        break;
    }
    default: break;
    }
}

static void buffer_done(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid)
{
    (void)context;
    (void)stream;
    (void)size;
    CUpti_Activity *record = NULL;
    while (valid > 0 && cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) write_record(record);
    free(buffer);
    fflush(file);
}

static void flush(void) { cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED); }

static int ok(CUptiResult result, const char *what)
{
    const char *why = NULL;
    if (result == CUPTI_SUCCESS) return 1;
    cuptiGetResultString(result, &why);
    fprintf(stderr, "trace: %s: %s\n", what, why ? why : "unknown");
    return 0;
}

// CUPTI's name for it; 0 gives up, and the program runs untraced.
int InitializeInjection(void)
{
    static const CUpti_ActivityKind kinds[] = {CUPTI_ACTIVITY_KIND_GRAPH_TRACE, CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                               CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET};
    const char *path = getenv("GPU_TRACE");
    if (!path || !(file = fopen(path, "w"))) {
        fprintf(stderr, "trace: GPU_TRACE names no file that can be written\n");
        return 0;
    }
    if (!ok(cuptiActivityRegisterCallbacks(buffer_get, buffer_done), "callbacks")) return 0;
    for (size_t i = getenv("GPU_TRACE_NODES") ? 1 : 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
        if (!ok(cuptiActivityEnable(kinds[i]), "enabling a kind of record")) return 0;
    ok(cuptiActivityFlushPeriod(FLUSH_MS), "flush period");
    atexit(flush);
    return 1;
}
