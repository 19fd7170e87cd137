/* staging.cu: the host arrays of a step on their way to the device.
 *
 * A step's arrays lie at fixed places on the device, so that a recorded graph reads those of any step. The host writes
 * them to a slot of pinned memory; one kernel reads the slot over the bus, while the step before still runs, and stores
 * when that is over. Of block tables, which may have megabytes, only entries that changed since the last step travel
 * (table_shadow.h); those of all tables in one list.
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
    MAX_ARRAYS = 24,       // of one step, without tables
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
    struct table_shadow shadows[MAX_TABLES];
    int32_t n_tables;
    size_t arrays_bytes;   // of the arrays of a step, the tables last
    size_t table_entries;  // room of a table, whole units of ALIGNMENT
    size_t slot_bytes;     // arrays but the tables, then table updates, then LOOSE_BYTES
    size_t used;           // of the loose bytes of the slot that is being filled
    int32_t slot, n_staged;
    struct staged staged[MAX_ARRAYS + MAX_TABLES];
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
    uint32_t begin[MAX_ARRAYS]; // bytes; the same on both sides
    uint32_t n_vectors[MAX_ARRAYS]; // of 16 bytes
    int32_t n_arrays;
    const struct table_update *updates; // pinned
    uint32_t n_updates;
    int32_t *tables;
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
    if (update.at >= 0) a.tables[update.at] = update.block;
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

// Where the tables begin on the device, and their updates in a slot.
static size_t tables_begin(const struct staging *s)
{
    return s->arrays_bytes - (size_t)s->n_tables * s->table_entries * sizeof(int32_t);
}

static int place_arrays(struct staging *s, const struct stage_array *arrays, int32_t n, struct load_args *a, size_t *end,
                        struct error *e)
{
    size_t at = 0, room = tables_begin(s);
    if (n > MAX_ARRAYS) return error_set(e, ERR_INVALID, "staging: %d arrays, %d at most", n, MAX_ARRAYS);
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

static size_t entries_of(const struct stage_table *table)
{
    return (size_t)table->n_seqs * (size_t)table->width;
}

static int place_tables(struct staging *s, const struct stage_table *tables, int32_t n, struct load_args *a, size_t *end,
                        struct error *e)
{
    const size_t at = tables_begin(s);
    struct table_update *updates = (struct table_update *)(slot_of(s) + at);
    if (n > s->n_tables) return error_set(e, ERR_INVALID, "staging: %d tables, %d at most", n, s->n_tables);
    for (int32_t i = 0; i < n; i++) // all, before any shadow says what is not on its way
        if (entries_of(&tables[i]) > s->table_entries)
            return error_set(e, ERR_INVALID, "staging: a table of %zu entries, %zu at most", entries_of(&tables[i]),
                             s->table_entries);
    a->updates = updates, a->tables = (int32_t *)(s->arrays + at);
    for (int32_t i = 0; i < n; i++) {
        const size_t begin = (size_t)i * s->table_entries, bytes = entries_of(&tables[i]) * sizeof(int32_t);
        uint32_t n_updates = table_shadow_update(&s->shadows[i], &tables[i], updates);
        for (uint32_t j = 0; j < n_updates; j++) updates[j].at += (int32_t)begin;
        s->staged[s->n_staged++] = (struct staged){tables[i].host, a->tables + begin, bytes, false};
        updates += n_updates, a->n_updates += n_updates, *end += n_updates;
    }
    return 0;
}

int cuda_stage(struct device *d, const struct stage_array *arrays, int32_t n, const struct stage_table *tables,
               int32_t n_tables, struct error *e)
{
    struct staging *s = d->staging;
    struct load_args a = {};
    size_t n_threads = 0;
    s->n_staged = 0;
    if (cuda_check(next_slot(d), "staging", e)) return ERR_DEVICE;
    a.pinned = slot_of(s), a.arrays = s->arrays;
    if (place_arrays(s, arrays, n, &a, &n_threads, e) || place_tables(s, tables, n_tables, &a, &n_threads, e))
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
    s->n_tables = o->n_tables > 0 ? o->n_tables : 1;
    size_t tokens = round_up((size_t)o->max_tokens * sizeof(int32_t)), seqs = (size_t)o->max_seqs;
    size_t max_blocks = ((size_t)o->max_context + (size_t)o->block_size - 1) / (size_t)o->block_size;
    // The step's arrays, of which each table has one of its own (slots), and what is as long as there are sequences.
    size_t small = (size_t)(7 + s->n_tables) * tokens + 2 * round_up((seqs + 1) * sizeof(int32_t));
    // The engine's rows may be longer by a little.
    s->table_entries = round_up(seqs * (max_blocks + 2) * sizeof(int32_t)) / sizeof(int32_t);
    const size_t n_entries = (size_t)s->n_tables * s->table_entries;
    if (n_entries > INT32_MAX) return error_set(e, ERR_INVALID, "device: %zu entries of block tables", n_entries);
    s->arrays_bytes = small + n_entries * sizeof(int32_t);
    s->slot_bytes = small + n_entries * sizeof(struct table_update) + LOOSE_BYTES;
    for (int32_t i = 0; i < s->n_tables; i++)
        if (table_shadow_init(&s->shadows[i], seqs, s->table_entries)) return error_set(e, ERR_NOMEM, "staging: out of memory");
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
    for (int32_t i = 0; i < s->n_tables; i++) table_shadow_deinit(&s->shadows[i]);
    free(s);
    d->staging = NULL;
}
