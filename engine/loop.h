/* loop.h: struct engine and its thread's loop: plan -> launch -> collect the step before -> commit.
 *
 * On a device that works on its own, step N + 1 is launched before step N is read: sampled ids reach it through the
 * history on the device, and the host's work hides behind the device's. Where ops are done when they return, as on the
 * CPU, a step is collected right after its launch, so that its tokens are not published a step late: the same loop with
 * a pipeline one step deep.
 */
#ifndef GPTD_ENGINE_LOOP_H
#define GPTD_ENGINE_LOOP_H

#include "engine/inbox.h"
#include "engine/memory_plan.h"

enum { MAX_DEPTH = 2 }; // steps in flight

// What engine_stats_get reads without a lock: every field on its own.
struct shared_stats {
    _Atomic int32_t n_running, step_tokens, step_seqs;
    _Atomic int32_t group_free[MAX_KV_GROUPS];
    _Atomic int64_t blocks; // of the fullest group: its number, and those that are free in the lower half
    _Atomic uint64_t n_steps, n_preemptions, n_expired, prefix_queries, prefix_hits, prompt_tokens, generation_tokens;
    _Atomic double host_seconds, launch_seconds, step_seconds, device_seconds, weights_seconds,
        warm_up_seconds;
    _Atomic uint64_t warm_up_bytes;
    atomic_bool busy, failed; // failed: `failure` is written
};

struct engine {
    const struct kernels *kernels;
    struct device *device;
    struct model *model;
    const struct model_info *info;
    struct engine_plan plan;
    struct scheduler_config config;
    struct inbox *inbox;
    int event_fd;
    pthread_t thread;
    bool started;
    atomic_bool stopping;
    struct shared_stats stats;
    struct error failure;

    // The engine thread's.
    struct scheduler scheduler;
    struct step steps[MAX_DEPTH];     // step i uses steps[i % depth]
    int32_t depth;
    uint64_t n_launched, n_collected; // steps
    void *tables;                     // what scheduler and steps point into
    struct history history;
    struct kv_cache kv;
    void *kv_memory;                  // all of it
    double launch_seconds, wait_seconds, step_seconds, host_seconds;
};

void *engine_loop(void *engine);
void engine_publish_stats(struct engine *engine);

#endif
