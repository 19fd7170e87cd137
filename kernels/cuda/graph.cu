/* graph.cu: steps that were enqueued once and are launched whole from then on (CUDA graphs).
 *
 * A decode step is some 200 launches of known arguments; recorded, it costs the host one. A graph serves every step of
 * its shape: what differs between steps lies in device memory at fixed places (staging.cu).
 */
#include <stdlib.h>

#include "kernels/cuda/cuda.h"

enum {
    MAX_GRAPHS = 128, // when there are more shapes, the one that was not launched for the longest makes room
    SKIPPED = 1000,   // steps that run op by op after there was no memory for a single graph
};

struct graph {
    const void *owner;
    int32_t n_rows;
    uint64_t last_launch;
    cudaGraphExec_t exec; // NULL: free
};

struct graphs {
    struct graph graph[MAX_GRAPHS];
    const void *owner;    // of what is being recorded
    int32_t n_rows;
    uint64_t n_launches;
    int32_t n_skipped;    // steps that are still to go unrecorded
};

static int launch(struct device *d, struct graph *g, struct error *e)
{
    g->last_launch = ++d->graphs->n_launches;
    return cuda_check(cudaGraphLaunch(g->exec, d->stream), "launching a graph", e);
}

int cuda_graph_begin(struct device *d, const void *owner, int32_t n_rows, bool *replayed, struct error *e)
{
    struct graphs *all = d->graphs;
    *replayed = false;
    for (struct graph *g = all->graph; g < all->graph + MAX_GRAPHS; g++) {
        if (!g->exec || g->owner != owner || g->n_rows != n_rows) continue;
        *replayed = true;
        return launch(d, g, e);
    }
    all->owner = owner, all->n_rows = n_rows;
    if (all->n_skipped > 0) return 0; // the ops run as they come
    // Relaxed: kernels that are met for the first time are loaded while they are recorded.
    if (cuda_check(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeRelaxed), "recording a graph", e))
        return ERR_DEVICE;
    d->recording = true;
    return 0;
}

// The graph may still run.
static void forget(struct device *d, struct graph *g)
{
    if (!g->exec) return;
    cudaStreamSynchronize(d->stream);
    cudaGraphExecDestroy(g->exec);
    g->exec = NULL;
}

// The one that was not launched for the longest; NULL: there is none.
static struct graph *oldest(struct graphs *all)
{
    struct graph *found = NULL;
    for (struct graph *g = all->graph; g < all->graph + MAX_GRAPHS; g++)
        if (g->exec && (!found || g->last_launch < found->last_launch)) found = g;
    return found;
}

// In place, which is free. Without memory for it others make room, one after the other.
static cudaError_t instantiate(struct device *d, struct graph *place, cudaGraph_t recorded)
{
    for (;;) {
        cudaGraphExec_t exec = NULL;
        cudaError_t status = cudaGraphInstantiate(&exec, recorded, 0);
        if (status == cudaSuccess) status = cudaGraphUpload(exec, d->stream);
        if (status == cudaSuccess) place->exec = exec;
        if (status != cudaSuccess && exec) cudaGraphExecDestroy(exec);
        struct graph *other = status == cudaErrorMemoryAllocation ? oldest(d->graphs) : NULL;
        if (!other) return status;
        cudaGetLastError();
        forget(d, other);
    }
}

int cuda_graph_end(struct device *d, bool keep, bool *launched, struct error *e)
{
    struct graphs *all = d->graphs;
    struct graph *place = all->graph;
    cudaGraph_t recorded = NULL;
    if (!d->recording) {
        all->n_skipped--;
        *launched = true;
        return 0;
    }
    cudaError_t status = cudaStreamEndCapture(d->stream, &recorded);
    d->recording = *launched = false;
    if (!keep) {
        if (recorded) cudaGraphDestroy(recorded);
        cudaGetLastError();
        return 0;
    }
    while (place < all->graph + MAX_GRAPHS && place->exec) place++;
    if (place == all->graph + MAX_GRAPHS) forget(d, place = oldest(all));
    if (status == cudaSuccess) status = instantiate(d, place, recorded);
    if (recorded) cudaGraphDestroy(recorded);
    if (status == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        all->n_skipped = SKIPPED;
        return 0;
    }
    if (cuda_check(status, "recording a graph", e)) return ERR_DEVICE;
    place->owner = all->owner, place->n_rows = all->n_rows;
    *launched = true;
    return launch(d, place, e);
}

int graphs_create(struct device *d, struct error *e)
{
    d->graphs = (struct graphs *)calloc(1, sizeof *d->graphs);
    return d->graphs ? 0 : error_set(e, ERR_NOMEM, "device: out of memory");
}

void graphs_destroy(struct device *d)
{
    if (!d->graphs) return;
    for (int i = 0; i < MAX_GRAPHS; i++)
        if (d->graphs->graph[i].exec) cudaGraphExecDestroy(d->graphs->graph[i].exec);
    free(d->graphs);
    d->graphs = NULL;
}
