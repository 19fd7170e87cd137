#include "engine/loop.h"

#include "kernels/progress.h"

#include <unistd.h>

// ---- launch ---------------------------------------------------------------------------------------------------------

static int write_histories(struct engine *engine, const struct plan *plan, struct error *e)
{
    const struct kernels *k = engine->kernels;
    for (int32_t i = 0; i < plan->n_entered; i++) {
        const struct sequence *seq = plan->entered[i];
        const struct request *r = seq->request;
        int rc = k->history_write(engine->device, engine->history, seq->slot, 0, r->prompt, r->n_prompt, e);
        if (rc == 0 && seq->n_generated > 0)
            rc = k->history_write(engine->device, engine->history, seq->slot, r->n_prompt, seq->generated,
                                  seq->n_generated, e);
        if (rc != 0)
            return rc;
    }
    return 0;
}

static int copy_blocks(struct engine *engine, const struct plan *plan, struct error *e)
{
    for (int32_t g = 0; g < engine->info->n_kv_groups; g++) {
        const struct block_copies *copies = &plan->copies[g];
        for (int32_t i = 0; copies->n > 0 && i < engine->info->kv_groups[g].n_layers; i++) {
            int rc = engine->kernels->copy_blocks(engine->device, engine->kv.layers[g][i], copies->from, copies->to,
                                                  copies->n, e);
            if (rc != 0)
                return rc;
        }
    }
    return 0;
}

static int launch_ops(struct engine *engine, struct step *step, struct error *e)
{
    struct tensor logits;
    progress_at("write_histories", -1);
    int rc = write_histories(engine, &step->plan, e);
    progress_at("copy_blocks", -1);
    if (rc == 0)
        rc = copy_blocks(engine, &step->plan, e);
    if (rc == 0)
        rc = model_forward(engine->model, &step->batch, &engine->kv, &logits, e);
    // Here, between forward and sample, is where a step with constrained rows will wait for the commit of the step
    // before: masks depend on its tokens, the forward pass does not.
    if (rc == 0 && step->plan.n_outputs > 0) {
        struct sample_params p = {logits, engine->history, step->sample_rows, step->plan.n_outputs, step->results};
        progress_at("sample", -1);
        rc = engine->kernels->sample(engine->device, &p, e);
    }
    step->ticket = engine->kernels->record(engine->device);
    return rc;
}

static int launch(struct engine *engine, struct step *step, struct error *e)
{
    batch_fill(step, &engine->scheduler);
    atomic_store_explicit(&engine->stats.step_tokens, step->batch.n_tokens, memory_order_relaxed);
    atomic_store_explicit(&engine->stats.step_seqs, step->batch.n_seqs, memory_order_relaxed);
    if (engine->kernels->graph_begin != NULL && step->batch.is_decode) {
        int32_t n_rows = batch_padded_rows(step->batch.n_seqs), most = engine->config.max_num_seqs;
        batch_pad(&step->batch, n_rows < most ? n_rows : most);
    }
    batch_fill_sample_rows(step);
    engine->n_launched++;
    double begin = now_seconds();
    int rc = launch_ops(engine, step, e);
    engine->launch_seconds += now_seconds() - begin;
    return rc != 0 ? error_prefix(e, "step of %d tokens, %d sequences, %d rows of logits", step->batch.n_tokens,
                                  step->batch.n_seqs, step->batch.n_logits_rows) : 0;
}

// ---- collect --------------------------------------------------------------------------------------------------------

static int collect(struct engine *engine, struct error *e)
{
    struct step *step = &engine->steps[engine->n_collected % (uint64_t)engine->depth];
    double begin = now_seconds();
    int rc = 0;
    for (int32_t i = 0; step->batch.layer_tickets && i < engine->info->n_layers && rc == 0; i++) {
        progress_at("wait", i);
        rc = engine->kernels->wait(engine->device, step->batch.layer_tickets[i], e);
    }
    progress_at("wait", -1);
    if (rc == 0)
        rc = engine->kernels->wait(engine->device, step->ticket, e);
    progress_at("commit", -1);
    double end = now_seconds();
    engine->wait_seconds += end - begin;
    if (rc != 0)
        return rc;
    scheduler_commit(&engine->scheduler, &step->plan, step->results, end);
    engine->n_collected++;
    return 0;
}

static void notify(struct engine *engine)
{
    if (!engine->scheduler.published)
        return;
    engine->scheduler.published = false;
    uint64_t one = 1;
    // It fails only when the counter is full, which then is readable already.
    ssize_t ignored = write(engine->event_fd, &one, sizeof one);
    (void)ignored;
}

// ---- the loop -------------------------------------------------------------------------------------------------------

static void take_requests(struct engine *engine, double now)
{
    for (struct request *r = inbox_take(engine->inbox), *next; r != NULL; r = next) {
        next = r->next;
        scheduler_add(&engine->scheduler, r, now);
    }
}

// Ends everything, in flight or not. Of a failed device nothing more is asked.
static void end_all(struct engine *engine, enum finish_reason reason, const struct error *why)
{
    double now = now_seconds();
    take_requests(engine, now);
    scheduler_end_all(&engine->scheduler, reason, why, now);
    for (; engine->n_collected < engine->n_launched; engine->n_collected++)
        plan_drop(&engine->steps[engine->n_collected % (uint64_t)engine->depth].plan);
    notify(engine);
}

static void fail(struct engine *engine, struct error *why)
{
    why->code = ERR_DEVICE;
    inbox_close(engine->inbox, why); // before the last taking: nobody can slip in after
    engine->failure = *why;
    atomic_store(&engine->stats.failed, true);
    end_all(engine, FINISH_ERROR, why);
}

// One turn; sets *idle if there was nothing to launch or to collect.
static int turn(struct engine *engine, bool *idle, struct error *e)
{
    double begin = now_seconds(), backend = engine->launch_seconds + engine->wait_seconds;
    struct step *step = &engine->steps[engine->n_launched % (uint64_t)engine->depth];
    // Counted before requests are taken: a signal that is counted is of a request taken here or before.
    uint64_t n_signals = atomic_load(&engine->inbox->n_signals);
    take_requests(engine, begin);
    progress_at("plan", -1);
    scheduler_plan(&engine->scheduler, &step->plan, n_signals, begin);
    admission_measure(&engine->inbox->admission, engine->scheduler.oldest != NULL, begin);
    bool planned = step->plan.n_rows > 0;
    if (planned && engine->n_launched == engine->n_collected)
        engine_publish_stats(engine); // work begins: a device that hangs in its first step is seen, too
    int rc = planned ? launch(engine, step, e) : 0;
    uint64_t n_in_flight = engine->n_launched - engine->n_collected;
    *idle = n_in_flight == 0;
    if (rc == 0 && n_in_flight >= (planned ? (uint64_t)engine->depth : 1))
        rc = collect(engine, e);
    notify(engine);
    if (!*idle) {
        double seconds = now_seconds() - begin;
        engine->step_seconds += seconds;
        engine->host_seconds += seconds - (engine->launch_seconds + engine->wait_seconds - backend);
    }
    engine_publish_stats(engine);
    return rc;
}

void *engine_loop(void *arg)
{
    struct engine *engine = arg;
    struct error e = {0};
    bool idle;
    while (!atomic_load(&engine->stopping)) {
        if (turn(engine, &idle, &e) != 0)
            break;
        progress_at(NULL, -1);
        if (idle)
            inbox_sleep(engine->inbox, scheduler_deadline(&engine->scheduler));
    }
    if (e.code != 0)
        fail(engine, &e);
    else if (engine->n_collected < engine->n_launched)
        engine->kernels->wait(engine->device, engine->steps[(engine->n_launched - 1) % (uint64_t)engine->depth].ticket,
                              &e);
    end_all(engine, FINISH_CANCELLED, NULL);
    engine_publish_stats(engine);
    return NULL;
}

const char *engine_progress(int32_t *layer) { return progress_op(layer); }

// ---- statistics -----------------------------------------------------------------------------------------------------

#define SHARE(field, value) atomic_store_explicit(&engine->stats.field, (value), memory_order_relaxed)
#define SHARED(field) atomic_load_explicit(&engine->stats.field, memory_order_relaxed)

static const struct block_manager *fullest_group(const struct engine *engine)
{
    const struct block_manager *blocks = engine->scheduler.blocks, *fullest = blocks;
    for (int32_t g = 1; g < engine->info->n_kv_groups; g++) {
        if ((int64_t)blocks[g].n_free * fullest->n_blocks < (int64_t)fullest->n_free * blocks[g].n_blocks)
            fullest = &blocks[g];
    }
    return fullest;
}

void engine_publish_stats(struct engine *engine)
{
    const struct scheduler *s = &engine->scheduler;
    const struct block_manager *fullest = fullest_group(engine);
    SHARE(n_running, s->n_running);
    SHARE(blocks, (int64_t)fullest->n_blocks << 32 | fullest->n_free);
    for (int32_t g = 0; g < engine->info->n_kv_groups; g++) SHARE(group_free[g], s->blocks[g].n_free);
    SHARE(n_steps, engine->n_collected);
    SHARE(n_preemptions, s->n_preemptions);
    SHARE(n_expired, s->n_expired);
    SHARE(prefix_queries, s->prefix_queries);
    SHARE(prefix_hits, s->prefix_hits);
    SHARE(prompt_tokens, s->prompt_tokens);
    SHARE(generation_tokens, s->generation_tokens);
    SHARE(host_seconds, engine->host_seconds);
    SHARE(launch_seconds, engine->launch_seconds);
    SHARE(step_seconds, engine->step_seconds);
    SHARE(busy, scheduler_busy(s) || engine->n_collected < engine->n_launched);
}

// When the engine last got on; now while it has nothing to do. One that has work and does not wake is stuck, too.
static double last_beat(const struct engine *engine, bool busy)
{
    double beat = progress_time(), untaken_since = atomic_load(&engine->inbox->untaken_since);
    if (busy)
        return beat;
    return untaken_since == 0 ? now_seconds() : untaken_since > beat ? untaken_since : beat;
}

void engine_stats_get(const struct engine *engine, struct engine_stats *out)
{
    bool busy = SHARED(busy);
    int64_t blocks = SHARED(blocks), n_all_blocks = 0;
    for (int32_t g = 0; g < engine->plan.n_kv_groups; g++)
        n_all_blocks += engine->plan.kv_groups[g].n_blocks;
    *out = (struct engine_stats){
        .n_running = SHARED(n_running),
        .n_waiting = atomic_load(&engine->inbox->n_waiting),
        .n_waiting_tokens = atomic_load(&engine->inbox->n_waiting_tokens),
        .n_blocks = (int32_t)(blocks >> 32),
        .n_free_blocks = (int32_t)(blocks & INT32_MAX),
        .n_all_blocks = n_all_blocks,
        .step_tokens = SHARED(step_tokens),
        .step_seqs = SHARED(step_seqs),
        .n_steps = SHARED(n_steps),
        .n_preemptions = SHARED(n_preemptions),
        .n_refused_full = atomic_load(&engine->inbox->n_full),
        .n_refused_wait = atomic_load(&engine->inbox->n_too_long),
        .n_expired = SHARED(n_expired),
        .queue_wait = inbox_wait(engine->inbox, now_seconds()),
        .prefix_queries = SHARED(prefix_queries),
        .prefix_hits = SHARED(prefix_hits),
        .prompt_tokens = SHARED(prompt_tokens),
        .generation_tokens = SHARED(generation_tokens),
        .host_seconds = SHARED(host_seconds),
        .launch_seconds = SHARED(launch_seconds),
        .step_seconds = SHARED(step_seconds),
        .device_seconds = SHARED(device_seconds),
        .weights_seconds = SHARED(weights_seconds),
        .warm_up_seconds = SHARED(warm_up_seconds),
        .warm_up_bytes = SHARED(warm_up_bytes),
        .last_beat = last_beat(engine, busy),
        .busy = busy,
        .failure = atomic_load(&engine->stats.failed) ? engine->failure.message : NULL,
    };
    for (int32_t g = 0; g < engine->plan.n_kv_groups; g++) out->group_free[g] = SHARED(group_free[g]);
}
