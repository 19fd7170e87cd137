/* staging.cu: the host arrays of a step on their way to the device.
 *
 * A step's arrays lie at fixed places on the device, so that a recorded graph reads those of any step. The host writes
 * them to a slot of pinned memory; one kernel reads the slot over the bus, while the step before still runs, and stores
 * when that is over. Of block tables, which may have megabytes, only entries that changed since the last step travel
 * (table_shadow.h).
 *
 * What nobody staged (prompts, parameters of many sampled rows) is copied by the ops that are given it, through the rest of
 * the slot.
 */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/table_shadow.h"

enum {
    THREADS = 256,
    ALIGNMENT = 256,       // of arrays on the device: whole sectors, and what bulk copies want
    LOOSE_BYTES = 8 << 20, // room of a step for arrays that nobody staged
    MAX_STAGED = 16,       // arrays of one step
    N_SLOTS = 4,           // steps whose arrays may be on their way at once
};

// One host array of the step that is being enqueued and its copy on the device.
struct staged {
    const void *host;
    void *device;
    size_t bytes;
    bool checked;
};

struct staging {
    char *pinned;          // [N_SLOTS, slot_bytes]
    char *arrays;          // device, [arrays_bytes + LOOSE_BYTES]
    struct table_shadow shadow; // of the table
    size_t arrays_bytes;   // of the arrays of a step, the table last
    size_t table_entries;  // room of the table
    size_t slot_bytes;     // arrays but the table, then table updates, then LOOSE_BYTES
    size_t used;           // of the loose bytes of the slot that is being filled
    int32_t slot, n_staged;
    struct staged staged[MAX_STAGED];
    uint64_t free_after[N_SLOTS]; // recorded points that must be over before a slot is written to
};

static size_t round_up(size_t n)
{
    return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

struct load_args {
    const char *pinned;
    char *arrays;
    uint32_t begin[MAX_STAGED]; // bytes; the same on both sides
    uint32_t n_vectors[MAX_STAGED]; // of 16 bytes
    int32_t n_arrays;
    const struct table_update *updates; // pinned
    uint32_t n_updates;
    int32_t *table;
};

// One vector or update a thread: read at once, stored when the step before is over. The next kernel is not let in before
// the end, so that all kernels of the step find its arrays there, even before they have waited.
__global__ void __launch_bounds__(THREADS) load_step_kernel(const __grid_constant__ struct load_args a)
{
    uint32_t i = blockIdx.x * THREADS + threadIdx.x;
    uint4 vector = {};
    struct table_update update = {-1, 0};
    char *to = NULL;
    for (int32_t j = 0; j < a.n_arrays && !to; j++) {
        if (i < a.n_vectors[j]) {
            vector = *(const uint4 *)(a.pinned + a.begin[j] + i * 16);
            to = a.arrays + a.begin[j] + i * 16;
        } else {
            i -= a.n_vectors[j];
        }
    }
    if (!to && i < a.n_updates) update = a.updates[i];
    previous_kernel_wait();
    if (to) *(uint4 *)to = vector;
    if (update.at >= 0) a.table[update.at] = update.block;
    __threadfence(); // for whoever begins when the last block has ended
}

// ---- slots ----------------------------------------------------------------------------------------------------------

// What has been enqueued reads the slot: until the next recorded point.
static void hold_slot(struct device *d)
{
    d->staging->free_after[d->staging->slot] = d->n_recorded + 1;
}

// The oldest one. It is free but for who enqueues without waiting, or more than a slot takes.
static cudaError_t next_slot(struct device *d)
{
    struct staging *s = d->staging;
    s->slot = (s->slot + 1) % N_SLOTS;
    s->used = 0;
    return s->free_after[s->slot] > d->n_passed ? cudaStreamSynchronize(d->stream) : cudaSuccess;
}

static char *slot_of(const struct staging *s)
{
    return s->pinned + (size_t)s->slot * s->slot_bytes;
}

static int place_arrays(struct staging *s, const struct stage_array *arrays, int32_t n, struct load_args *a, size_t *end,
                        struct error *e)
{
    size_t at = 0, room = s->arrays_bytes - round_up(s->table_entries * sizeof(int32_t));
    if (n >= MAX_STAGED) return error_set(e, ERR_INVALID, "staging: %d arrays, %d at most", n, MAX_STAGED - 1);
    for (int32_t i = 0; i < n; i++) {
        size_t capacity = arrays[i].capacity > arrays[i].bytes ? arrays[i].capacity : arrays[i].bytes;
        if (at + round_up(capacity) > room)
            return error_set(e, ERR_INVALID, "staging: array %d does not fit the %zu bytes of a step", i, room);
        memcpy(slot_of(s) + at, arrays[i].host, arrays[i].bytes);
        s->staged[s->n_staged++] = (struct staged){arrays[i].host, s->arrays + at, arrays[i].bytes, false};
        a->begin[i] = (uint32_t)at;
        a->n_vectors[i] = (uint32_t)((arrays[i].bytes + 15) / 16);
        *end += a->n_vectors[i];
        at += round_up(capacity);
    }
    a->n_arrays = n;
    return 0;
}

static int place_table(struct staging *s, const struct stage_table *table, struct load_args *a, size_t *end,
                       struct error *e)
{
    size_t bytes = (size_t)table->n_seqs * (size_t)table->width * sizeof(int32_t), room = s->table_entries * sizeof(int32_t);
    if (bytes > room) return error_set(e, ERR_INVALID, "staging: a table of %zu bytes, %zu at most", bytes, room);
    size_t at = s->arrays_bytes - round_up(room);
    struct table_update *updates = (struct table_update *)(slot_of(s) + at);
    a->updates = updates, a->table = (int32_t *)(s->arrays + at);
    a->n_updates = table_shadow_update(&s->shadow, table, updates);
    s->staged[s->n_staged++] = (struct staged){table->host, a->table, bytes, false};
    *end += a->n_updates;
    return 0;
}

int cuda_stage(struct device *d, const struct stage_array *arrays, int32_t n, const struct stage_table *table,
               struct error *e)
{
    struct staging *s = d->staging;
    struct load_args a = {};
    size_t n_threads = 0;
    s->n_staged = 0;
    if (cuda_check(next_slot(d), "staging", e)) return ERR_DEVICE;
    a.pinned = slot_of(s), a.arrays = s->arrays;
    if (place_arrays(s, arrays, n, &a, &n_threads, e) || (table && place_table(s, table, &a, &n_threads, e)))
        return ERR_INVALID;
    if (n_threads == 0) return 0;
    dim3 grid((unsigned)((n_threads + THREADS - 1) / THREADS));
    hold_slot(d);
    return cuda_check(launch_early(d, load_step_kernel, grid, THREADS, 0, a), "staging", e);
}

// ---- for ops --------------------------------------------------------------------------------------------------------

static struct staged *find_staged(const struct device *d, const void *host, size_t bytes)
{
    struct staging *s = d->staging;
    for (int32_t i = 0; i < s->n_staged; i++)
        if (s->staged[i].host == host && bytes <= s->staged[i].bytes) return &s->staged[i];
    return NULL;
}

const void *device_array(struct device *d, const void *host, size_t bytes, struct error *e)
{
    struct staging *s = d->staging;
    const struct staged *staged = find_staged(d, host, bytes);
    if (staged) return staged->device;
    if (d->recording) { // replays would read what lies there then
        error_set(e, ERR_INVALID, "staging: %zu bytes that were not staged, while a graph is recorded", bytes);
        return NULL;
    }
    if (bytes > LOOSE_BYTES / 4) { // an op's few arrays must outlive one turn of the ring
        error_set(e, ERR_INVALID, "staging: %zu bytes are more than a loose array may have", bytes);
        return NULL;
    }
    if (s->used + bytes > LOOSE_BYTES && cuda_check(next_slot(d), "staging", e)) return NULL;
    char *pinned = slot_of(s) + s->slot_bytes - LOOSE_BYTES + s->used, *device = s->arrays + s->arrays_bytes + s->used;
    s->used += round_up(bytes);
    memcpy(pinned, host, bytes);
    hold_slot(d);
    cudaError_t status = cudaMemcpyAsync(device, pinned, bytes, cudaMemcpyHostToDevice, d->stream);
    return cuda_check(status, "staging", e) ? NULL : device;
}

bool array_is_staged(const struct device *d, const void *host)
{
    return find_staged(d, host, 0) != NULL;
}

bool array_is_checked(struct device *d, const void *host)
{
    struct staged *staged = find_staged(d, host, 0);
    if (!staged) return false;
    bool checked = staged->checked;
    staged->checked = true;
    return checked;
}

// ---- making it ------------------------------------------------------------------------------------------------------

size_t staging_device_bytes(const struct device *d)
{
    return d->staging ? d->staging->arrays_bytes + LOOSE_BYTES : 0;
}

int staging_create(struct device *d, struct error *e)
{
    const struct device_options *o = &d->options;
    struct staging *s = d->staging = (struct staging *)calloc(1, sizeof *s);
    if (!s) return error_set(e, ERR_NOMEM, "staging: out of memory");
    size_t tokens = round_up((size_t)o->max_tokens * sizeof(int32_t)), seqs = (size_t)o->max_seqs;
    size_t max_blocks = ((size_t)o->max_context + (size_t)o->block_size - 1) / (size_t)o->block_size;
    size_t small = 8 * tokens + 2 * round_up((seqs + 1) * sizeof(int32_t));
    s->table_entries = seqs * (max_blocks + 2); // the engine's rows may be longer by a little
    s->arrays_bytes = small + round_up(s->table_entries * sizeof(int32_t));
    s->slot_bytes = small + round_up(s->table_entries * sizeof(struct table_update)) + LOOSE_BYTES;
    if (table_shadow_init(&s->shadow, seqs, s->table_entries)) return error_set(e, ERR_NOMEM, "staging: out of memory");
    size_t pinned = N_SLOTS * s->slot_bytes;
    if (cudaHostAlloc((void **)&s->pinned, pinned, cudaHostAllocMapped) != cudaSuccess) {
        cudaGetLastError();
        return error_set(e, ERR_NOMEM, "device: no memory for %zu bytes of staging on the host", pinned);
    }
    if (cudaMalloc((void **)&s->arrays, s->arrays_bytes + LOOSE_BYTES) == cudaSuccess) return 0;
    cudaGetLastError();
    return error_set(e, ERR_NOMEM, "device: no memory for %zu bytes of staging", s->arrays_bytes + LOOSE_BYTES);
}

void staging_destroy(struct device *d)
{
    struct staging *s = d->staging;
    if (!s) return;
    if (s->pinned) cudaFreeHost(s->pinned);
    cudaFree(s->arrays);
    table_shadow_deinit(&s->shadow);
    free(s);
    d->staging = NULL;
}
