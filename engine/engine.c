/* engine.c: planning, starting and ending an engine. The thread's work is in loop.c. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include "engine/loop.h"

enum { PROMPT_LOGPROB_ROWS = 64 }; // rows of logits a step has for prompt log-probabilities, beside a row a sequence

static int check_options(const struct engine_options *o, struct error *e)
{
    if (o->block_size != 16 && o->block_size != 32 && o->block_size != 64)
        return error_set(e, ERR_INVALID, "block size %d is not 16, 32 or 64", o->block_size);
    if (o->max_num_seqs < 1 || o->max_num_seqs > 4096)
        return error_set(e, ERR_INVALID, "max_num_seqs is %d; it must be 1 to 4096", o->max_num_seqs);
    if (o->max_num_batched_tokens != 0 &&
        (o->max_num_batched_tokens < o->max_num_seqs || o->max_num_batched_tokens > 1 << 20))
        return error_set(e, ERR_INVALID, "max_num_batched_tokens is %d; it must be max_num_seqs (%d) to %d",
                         o->max_num_batched_tokens, o->max_num_seqs, 1 << 20);
    if (o->max_queue_requests < 1 || o->max_queue_tokens < 1)
        return error_set(e, ERR_INVALID, "max_queue_requests and max_queue_tokens must be at least 1");
    if (o->max_logprobs < 0 || o->max_logprobs > MAX_LOGPROBS)
        return error_set(e, ERR_INVALID, "max_logprobs is %d; it must be 0 to %d", o->max_logprobs, MAX_LOGPROBS);
    if (!(o->slow_client_timeout >= 0 && o->queue_timeout >= 0 && o->priority_aging >= 0))
        return error_set(e, ERR_INVALID, "slow_client_timeout, queue_timeout and priority_aging must not be negative");
    return 0;
}

// And the options whose defaults are the backend's: a GPU computes a long prompt at full speed only in long chunks.
static int open_backend(struct engine *engine, struct engine_options *o, struct error *e)
{
    if (kernels_open(&engine->kernels, o->backend, e) != 0)
        return e->code;
    strcpy(engine->plan.note, e->message);
    if (o->max_num_batched_tokens == 0) {
        int32_t n = engine->kernels->reads_mapped_weights ? 512 : 8192;
        o->max_num_batched_tokens = n > o->max_num_seqs ? n : o->max_num_seqs;
    }
    return 0;
}

static int open_model(struct engine *engine, const struct engine_options *o, struct error *e)
{
    struct model_options mo = {
        .dir = o->model_dir,
        .load_format = o->dummy_weights ? LOAD_DUMMY : LOAD_AUTO,
        .max_model_len = o->max_model_len,
        .max_num_batched_tokens = o->max_num_batched_tokens,
        .max_logits_rows = o->max_num_seqs + PROMPT_LOGPROB_ROWS,
        .seed = o->seed,
        .tp_size = 1,
    };
    mo.copies_weights = !engine->kernels->reads_mapped_weights;
    if (o->dtype != ENGINE_DTYPE_AUTO && !mo.copies_weights) {
        error_set(e, ERR_UNSUPPORTED, "dtype: the CPU computes with the weights as they are in the file");
        return engine->plan.note[0] ? error_prefix(e, "%s", engine->plan.note) : e->code;
    }
    mo.dtype = o->dtype == ENGINE_DTYPE_BF16 ? DTYPE_BF16 : o->dtype == ENGINE_DTYPE_F16 ? DTYPE_F16 : DTYPE_F32;
    if (model_create(&engine->model, &mo, e) != 0)
        return e->code;
    engine->info = model_info_get(engine->model);
    struct device_options dopt = {
        .n_threads = o->n_threads,
        .reference_attention = o->reference_attention,
        .deterministic = o->deterministic,
        .max_vocab_size = engine->info->vocab_size,
        .max_context = engine->info->max_model_len,
        .max_dim = engine->info->max_dim,
        .max_tokens = o->max_num_batched_tokens > mo.max_logits_rows ? o->max_num_batched_tokens : mo.max_logits_rows,
        .max_seqs = o->max_num_seqs,
        .n_heads = engine->info->n_heads,
        .n_kv_heads = engine->info->n_kv_heads,
        .head_dim = engine->info->head_dim,
        .n_tables = engine->info->n_kv_groups,
        .block_size = o->block_size,
    };
    return engine->kernels->device_create(&engine->device, &dopt, e);
}

static int fill_config(struct engine *engine, const struct engine_options *o, struct error *e)
{
    const struct model_info *info = engine->info;
    struct scheduler_config *c = &engine->config;
    struct request_limits *l = &c->limits;
    c->max_num_seqs = o->max_num_seqs;
    c->n_layers = info->n_layers;
    c->max_logits_rows = o->max_num_seqs + PROMPT_LOGPROB_ROWS;
    c->prefix_caching = o->prefix_caching;
    c->own_memory = !engine->kernels->reads_mapped_weights;
    c->slow_client_timeout = o->slow_client_timeout;
    c->queue_timeout = o->queue_timeout;
    c->priority_aging = o->priority_aging;
    l->vocab_size = info->vocab_size;
    l->max_model_len = info->max_model_len;
    l->max_logprobs = o->max_logprobs < info->vocab_size ? o->max_logprobs : info->vocab_size;
    l->block_size = o->block_size;
    l->max_num_batched_tokens = o->max_num_batched_tokens;
    l->n_groups = info->n_kv_groups;
    for (int32_t g = 0; g < l->n_groups; g++)
        l->windows[g] = info->kv_groups[g].window;
    l->n_eos_token_ids = info->n_eos_token_ids;
    memcpy(l->eos_token_ids, info->eos_token_ids, sizeof l->eos_token_ids);
    if (getrandom(&l->hash_key, sizeof l->hash_key, 0) != (ssize_t)sizeof l->hash_key)
        return error_set(e, ERR_IO, "no random bytes from the system");
    return 0;
}

static void fill_plan(struct engine *engine, const struct engine_options *o)
{
    const struct model_info *info = engine->info;
    struct engine_plan *p = &engine->plan;
    memcpy(p->architecture, info->architecture, sizeof p->architecture);
    strncpy(p->dtype, dtype_name(info->dtype), sizeof p->dtype - 1);
    strncpy(p->device, engine->kernels->device_description(engine->device), sizeof p->device - 1);
    p->n_parameters = info->n_parameters;
    p->memory_bytes = engine->kernels->device_memory(engine->device);
    if (engine->config.own_memory)
        p->memory_bytes = (size_t)((double)p->memory_bytes * o->gpu_memory_utilization);
    p->scratch_bytes = engine->kernels->scratch_bytes(engine->device);
    p->block_size = engine->config.limits.block_size;
    p->vocab_size = info->vocab_size;
    p->max_model_len = info->max_model_len;
    p->max_num_seqs = engine->config.max_num_seqs;
    p->max_num_batched_tokens = engine->config.limits.max_num_batched_tokens;
    p->bos_token_id = info->bos_token_id;
    p->eos_token_ids = info->eos_token_ids;
    p->n_eos_token_ids = info->n_eos_token_ids;
}

int engine_create(struct engine **out, const struct engine_options *wanted, struct error *e)
{
    struct engine_options with_defaults = *wanted, *options = &with_defaults;
    struct error unwanted;
    e = e != NULL ? e : &unwanted;
    *out = NULL;
    if (check_options(options, e) != 0)
        return ERR_INVALID;
    struct engine *engine = calloc(1, sizeof *engine);
    if (engine == NULL)
        return error_set(e, ERR_NOMEM, "no memory for the engine");
    engine->event_fd = -1;
    double begin = now_seconds();
    if (open_backend(engine, options, e) != 0 || open_model(engine, options, e) != 0 || fill_config(engine, options, e) != 0)
        goto fail;
    atomic_store(&engine->stats.device_seconds, now_seconds() - begin);
    fill_plan(engine, options);
    engine->depth = engine->kernels->asynchronous ? MAX_DEPTH : 1;
    if (memory_plan_fill(&engine->plan, &engine->config, engine->info, options, engine->depth, e) != 0)
        goto fail;
    engine->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (engine->event_fd < 0) {
        error_set(e, ERR_IO, "no eventfd: %s", strerror(errno));
        goto fail;
    }
    engine->inbox = inbox_create(options->max_queue_requests, options->max_queue_tokens, options->queue_timeout,
                                 options->seed);
    if (engine->inbox == NULL) {
        error_set(e, ERR_NOMEM, "no memory for the engine");
        goto fail;
    }
    *out = engine;
    return 0;
fail:
    engine_destroy(engine);
    return e->code;
}

const struct engine_plan *engine_plan_get(const struct engine *engine)
{
    return &engine->plan;
}

static int refused(const struct engine *engine, const char *what, size_t bytes, struct error *e)
{
    const struct kernels *k = engine->kernels;
    size_t has = k->device_memory(engine->device), scratch = k->scratch_bytes(engine->device);
    double gib = 1 << 30;
    return error_set(e, ERR_NOMEM, "no %.3f GiB for the %s, which the plan had found free: the device now has %.3f GiB",
                     (double)bytes / gib, what, (double)(has > scratch ? has - scratch : 0) / gib);
}

static int allocate_tables(struct engine *engine, struct error *e)
{
    struct arena arena = {0};
    tables_layout(&engine->scheduler, engine->steps, engine->depth, &arena, &engine->config);
    engine->tables = aligned_alloc(CACHE_LINE, arena.used);
    if (engine->tables == NULL)
        return error_set(e, ERR_NOMEM, "no memory for %zu bytes of tables", arena.used);
    memset(engine->tables, 0, arena.used);
    arena = (struct arena){.base = engine->tables};
    tables_layout(&engine->scheduler, engine->steps, engine->depth, &arena, &engine->config);
    scheduler_init(&engine->scheduler);
    return 0;
}

static int allocate_steps(struct engine *engine, struct error *e)
{
    const struct kernels *k = engine->kernels;
    engine->history = (struct history){
        k->alloc(engine->device, engine->plan.history_bytes), engine->config.max_num_seqs, engine->plan.max_model_len,
    };
    if (engine->history.tokens == NULL)
        return refused(engine, "history", engine->plan.history_bytes, e);
    for (int32_t i = 0; i < engine->depth; i++) {
        struct step *step = &engine->steps[i];
        size_t bytes = (size_t)engine->config.max_logits_rows * sizeof *step->results;
        step->results = k->alloc_host(engine->device, bytes);
        if (step->results == NULL)
            return error_set(e, ERR_NOMEM, "no memory for %zu bytes of results", bytes);
        step_init(step, &engine->scheduler, engine->history);
    }
    return 0;
}

// The next [n_blocks, n_kv_heads, block_size, dim] of the cache's one allocation.
static struct tensor take_kv(const struct engine *engine, int32_t g, int32_t dim, size_t *at)
{
    const struct kv_spec *spec = &engine->info->kv_groups[g];
    struct tensor t = {.dtype = spec->dtype, .n_dims = 4};
    t.shape[0] = (size_t)engine->config.limits.n_blocks[g];
    t.shape[1] = (size_t)spec->n_kv_heads;
    t.shape[2] = (size_t)engine->config.limits.block_size;
    t.shape[3] = (size_t)dim;
    t.data = (char *)engine->kv_memory + *at;
    *at += t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3] * dtype_size(spec->dtype);
    return t;
}

static int allocate_kv(struct engine *engine, struct error *e)
{
    size_t at = 0;
    engine->kv_memory = engine->kernels->alloc(engine->device, engine->plan.kv_cache_bytes);
    if (engine->kv_memory == NULL)
        return refused(engine, "KV cache", engine->plan.kv_cache_bytes, e);
    for (int32_t g = 0; g < engine->info->n_kv_groups; g++) {
        const struct kv_spec *spec = &engine->info->kv_groups[g];
        engine->kv.n_blocks[g] = engine->config.limits.n_blocks[g];
        engine->kv.layers[g] = calloc((size_t)spec->n_layers, sizeof *engine->kv.layers[g]);
        if (engine->kv.layers[g] == NULL)
            return error_set(e, ERR_NOMEM, "no memory for the layers of the KV cache");
        for (int32_t i = 0; i < spec->n_layers; i++) {
            engine->kv.layers[g][i].k = take_kv(engine, g, spec->k_dim, &at);
            engine->kv.layers[g][i].v = take_kv(engine, g, spec->v_dim, &at);
        }
    }
    return 0;
}

// A prompt of n zeros that is kept nowhere.
static void fill_warm_up_prompt(struct batch *b, int32_t n)
{
    for (int32_t t = 0; t < n; t++) {
        b->tokens[t] = b->history_rows[t] = 0;
        b->positions[t] = t;
        for (int32_t g = 0; g < MAX_KV_GROUPS; g++) {
            if (b->slot_mapping[g] != NULL)
                b->slot_mapping[g][t] = -1;
        }
    }
    b->n_tokens = b->cu_seqlens_q[1] = b->context_lens[0] = n;
    b->n_seqs = b->n_logits_rows = 1;
    b->logits_rows[0] = n - 1;
}

// n rows of decode, or a prompt of n, and a token from the first row of logits.
static int warm_up_step(struct engine *engine, int32_t n, bool is_decode, struct error *e)
{
    struct step *step = &engine->steps[0];
    struct tensor logits;
    step->batch.n_seqs = 0;
    step->batch.is_decode = is_decode;
    if (is_decode)
        batch_pad(&step->batch, n);
    else
        fill_warm_up_prompt(&step->batch, n);
    step->sample_rows[0] = (struct sample_row){.target = -1, .n_logprobs = -1, .top_p = 1, .repetition_penalty = 1};
    int rc = model_forward(engine->model, &step->batch, &engine->kv, &logits, e);
    struct sample_params p = {logits, engine->history, step->sample_rows, 1, step->results};
    return rc != 0 ? rc : engine->kernels->sample(engine->device, &p, e);
}

// A device that records graphs meets its kernels here, not in the first requests: recordings of the usual sizes, others
// follow when they occur.
static int warm_up(struct engine *engine, struct error *e)
{
    const struct kernels *k = engine->kernels;
    const struct request_limits *l = &engine->config.limits;
    int32_t longest = l->max_model_len < l->max_num_batched_tokens ? l->max_model_len : l->max_num_batched_tokens;
    const double begin = now_seconds();
    int rc = 0;
    if (k->graph_begin == NULL)
        return 0;
    const size_t there = k->device_memory(engine->device);
    for (int32_t n = 1; n <= engine->config.max_num_seqs && rc == 0; n *= 2)
        rc = warm_up_step(engine, n, true, e);
    for (int32_t n = 64; n <= longest && n <= 512 && rc == 0; n *= 8)
        rc = warm_up_step(engine, n, false, e);
    if (rc == 0)
        rc = k->wait(engine->device, k->record(engine->device), e);
    const size_t left = k->device_memory(engine->device);
    atomic_store(&engine->stats.warm_up_seconds, now_seconds() - begin);
    atomic_store(&engine->stats.warm_up_bytes, left < there ? there - left : 0);
    return rc;
}

int engine_start(struct engine *engine, struct error *e)
{
    double begin = now_seconds();
    int rc = model_load(engine->model, engine->kernels, engine->device, e);
    if (rc != 0)
        return rc;
    atomic_store(&engine->stats.weights_seconds, now_seconds() - begin);
    if (allocate_tables(engine, e) != 0 || allocate_steps(engine, e) != 0 || allocate_kv(engine, e) != 0)
        return e->code;
    if (warm_up(engine, e) != 0)
        return error_prefix(e, "warming up");
    engine_publish_stats(engine);
    if (pthread_create(&engine->thread, NULL, engine_loop, engine) != 0)
        return error_set(e, ERR_NOMEM, "no thread for the engine");
    engine->started = true;
    return 0;
}

void engine_drain(struct engine *engine)
{
    struct error why;
    error_set(&why, ERR_SHUTDOWN, "the server is shutting down");
    inbox_close(engine->inbox, &why);
}

static void free_device_memory(struct engine *engine)
{
    const struct kernels *k = engine->kernels;
    for (int32_t g = 0; g < MAX_KV_GROUPS; g++)
        free(engine->kv.layers[g]);
    k->free(engine->device, engine->kv_memory);
    for (int32_t i = 0; i < MAX_DEPTH; i++)
        k->free_host(engine->device, engine->steps[i].results);
    k->free(engine->device, engine->history.tokens);
}

void engine_destroy(struct engine *engine)
{
    if (engine == NULL)
        return;
    if (engine->inbox != NULL) {
        engine_drain(engine);
        atomic_store(&engine->stopping, true);
        inbox_wake(engine->inbox);
    }
    if (engine->started)
        pthread_join(engine->thread, NULL);
    if (engine->device != NULL)
        free_device_memory(engine);
    model_destroy(engine->model);
    if (engine->device != NULL)
        engine->kernels->device_destroy(engine->device);
    if (engine->inbox != NULL)
        inbox_unref(engine->inbox);
    if (engine->event_fd >= 0)
        close(engine->event_fd);
    free(engine->tables);
    free(engine);
}

int engine_event_fd(const struct engine *engine)
{
    return engine->event_fd;
}

int engine_submit(struct engine *engine, struct request *r, struct error *e)
{
    int rc = request_prepare(r, &engine->config.limits, e);
    return rc != 0 ? rc : inbox_submit(engine->inbox, r, now_seconds(), e);
}

const char *engine_file_at(const void *address)
{
    return model_file_at(address);
}
