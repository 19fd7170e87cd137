/* graph.cu: steps that were enqueued once and are launched whole from then on (CUDA graphs).
 *
 * A decode step is some 200 launches of known arguments; recorded, it costs the host one. A graph serves every step of
 * its shape: what differs between steps lies in device memory at fixed places (staging.cu).
 */
#include <stdlib.h>

#include "kernels/cuda/cuda.h"

enum { MAX_GRAPHS = 128 }; // when there are more shapes, the one that was not launched for the longest makes room

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

// Without memory for it, the others make room; *launched false: that was not enough.
static int launch_new(struct device *d, struct graph *place, cudaGraph_t recorded, bool *launched, struct error *e)
{
    struct graphs *all = d->graphs;
    for (int attempt = 0; attempt < 2; attempt++) {
        cudaError_t status = cudaGraphInstantiate(&place->exec, recorded, 0);
        if (status == cudaSuccess) status = cudaGraphUpload(place->exec, d->stream);
        if (status != cudaErrorMemoryAllocation) {
            if (cuda_check(status, "recording a graph", e)) return ERR_DEVICE;
            place->owner = all->owner, place->n_rows = all->n_rows;
            *launched = true;
            return launch(d, place, e);
        }
        cudaGetLastError();
        for (struct graph *g = all->graph; g < all->graph + MAX_GRAPHS; g++) forget(d, g);
    }
    return 0;
}

int cuda_graph_end(struct device *d, bool keep, bool *launched, struct error *e)
{
    struct graphs *all = d->graphs;
    struct graph *place = all->graph;
    cudaGraph_t recorded = NULL;
    cudaError_t status = cudaStreamEndCapture(d->stream, &recorded);
    d->recording = *launched = false;
    if (!keep) {
        if (recorded) cudaGraphDestroy(recorded);
        cudaGetLastError();
        return 0;
    }
    for (struct graph *g = all->graph; g < all->graph + MAX_GRAPHS && place->exec; g++)
        if (!g->exec || g->last_launch < place->last_launch) place = g;
    forget(d, place);
    int rc = cuda_check(status, "recording a graph", e);
    if (!rc) rc = launch_new(d, place, recorded, launched, e);
    if (recorded) cudaGraphDestroy(recorded);
    return rc;
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
