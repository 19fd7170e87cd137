#include "tests/fake_model.h"

#include <assert.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

_Atomic int fake_fail_forward, fake_fail_sample;

static uint64_t mix(uint64_t h, uint64_t x)
{
    h = (h ^ x) * 0x9e3779b97f4a7c15;
    return h ^ h >> 29;
}

static void sleep_us(int32_t us)
{
    if (us > 0)
        nanosleep(&(struct timespec){.tv_nsec = us * 1000L}, NULL);
}

// ---- the model ------------------------------------------------------------------------------------------------------

struct model {
    struct model_info info;
    int32_t nan_token, step_us, wait_us;
    int32_t max_logits_rows;
    float *logits;
    const struct kernels *kernels;
    struct device *device;
};

static long option(const char *dir, const char *key, long otherwise)
{
    char pattern[32];
    snprintf(pattern, sizeof pattern, "%s=", key);
    for (const char *at = strstr(dir, pattern); at != NULL; at = strstr(at + 1, pattern)) {
        if (at > dir && (at[-1] == ':' || at[-1] == ','))
            return strtol(at + strlen(pattern), NULL, 10);
    }
    return otherwise;
}

int model_create(struct model **out, const struct model_options *o, struct error *e)
{
    struct model *m = calloc(1, sizeof *m);
    if (m == NULL)
        return error_set(e, ERR_NOMEM, "no memory for the model");
    struct model_info *info = &m->info;
    strcpy(info->architecture, "Fake");
    info->vocab_size = (int32_t)option(o->dir, "vocab", 64);
    info->max_model_len = (int32_t)option(o->dir, "len", 4096);
    if (o->max_model_len > 0 && o->max_model_len < info->max_model_len)
        info->max_model_len = o->max_model_len;
    info->bos_token_id = -1;
    info->eos_token_ids[0] = (int32_t)option(o->dir, "eos", 0);
    info->n_eos_token_ids = info->eos_token_ids[0] >= 0;
    info->n_kv_groups = (int32_t)option(o->dir, "groups", 1);
    for (int32_t g = 0; g < info->n_kv_groups; g++)
        info->kv_groups[g] = (struct kv_spec){2, 0, 1, 1, 1, DTYPE_I32};
    info->kv_groups[info->n_kv_groups - 1].window = (int32_t)option(o->dir, "window", 0);
    info->max_dim = 1;
    info->n_layers = 2;
    m->nan_token = (int32_t)option(o->dir, "nan", -1);
    m->step_us = (int32_t)option(o->dir, "us", 0);
    m->wait_us = (int32_t)option(o->dir, "wait_us", 0);
    m->max_logits_rows = o->max_logits_rows;
    info->workspace_bytes = (size_t)m->max_logits_rows * (size_t)info->vocab_size * sizeof(float);
    *out = m;
    return 0;
}

void model_destroy(struct model *m)
{
    if (m != NULL && m->logits != NULL)
        m->kernels->free(m->device, m->logits);
    free(m);
}

const struct model_info *model_info_get(const struct model *m)
{
    return &m->info;
}

static void set_wait_us(struct device *device, int32_t us);

int model_load(struct model *m, const struct kernels *kernels, struct device *device, struct error *e)
{
    m->kernels = kernels;
    m->device = device;
    set_wait_us(device, m->wait_us);
    m->logits = kernels->alloc(device, m->info.workspace_bytes);
    return m->logits == NULL ? error_set(e, ERR_NOMEM, "no memory for the workspace") : 0;
}

const char *model_file_at(const void *address)
{
    (void)address;
    return NULL; // it maps no files
}

static void write_kv(const struct batch *b, const struct kv_cache *kv, const struct kv_spec *spec, int32_t g)
{
    for (int32_t t = 0; t < b->n_tokens; t++) {
        int32_t token = b->tokens[t], position = b->positions[t], slot = b->slot_mapping[g][t];
        assert(slot >= 0 && slot < kv->n_blocks[g] * b->block_size);
        if (token < 0)
            token = b->history.tokens[(size_t)b->history_rows[t] * (size_t)b->history.max_len + (size_t)position];
        for (int32_t i = 0; i < spec->n_layers; i++) {
            ((int32_t *)kv->layers[g][i].k.data)[slot] = token + i;
            ((int32_t *)kv->layers[g][i].v.data)[slot] = position;
        }
    }
}

// What a query at `position` of batch row `s` sees of group g. Layers must agree on it.
static uint64_t read_kv(const struct batch *b, const struct kv_cache *kv, const struct kv_spec *spec, int32_t g,
                        int32_t s, int32_t position, uint64_t h)
{
    const int32_t *table = b->block_tables[g] + (size_t)s * (size_t)b->max_blocks;
    int32_t first = spec->window > 0 && position >= spec->window ? position - spec->window + 1 : 0;
    for (int32_t p = first; p <= position; p++) {
        int32_t block = table[p / b->block_size];
        assert(block >= 0 && block < kv->n_blocks[g]);
        int32_t slot = block * b->block_size + p % b->block_size;
        for (int32_t i = 0; i < spec->n_layers; i++) {
            h = mix(h, (uint64_t)(((int32_t *)kv->layers[g][i].k.data)[slot] - i));
            h = mix(h, (uint64_t)((int32_t *)kv->layers[g][i].v.data)[slot]);
        }
    }
    return h;
}

static void fill_logits(const struct model *m, const struct batch *b, const struct kv_cache *kv, int32_t row)
{
    int32_t t = b->logits_rows[row], s = 0;
    while (b->cu_seqlens_q[s + 1] <= t)
        s++;
    uint64_t h = 0;
    int32_t position = b->context_lens[s] - (b->cu_seqlens_q[s + 1] - t);
    assert(position == b->positions[t] && (row == 0 || t >= b->logits_rows[row - 1]));
    for (int32_t g = 0; g < m->info.n_kv_groups; g++)
        h = read_kv(b, kv, &m->info.kv_groups[g], g, s, position, h);
    float *logits = m->logits + (size_t)row * (size_t)m->info.vocab_size;
    for (int32_t v = 0; v < m->info.vocab_size; v++)
        logits[v] = (float)(mix(h, (uint64_t)v + 1) % 10007) / 2000.0f;
    for (int32_t v = 0; m->nan_token >= 0 && b->tokens[t] == m->nan_token && v < m->info.vocab_size; v++)
        logits[v] = NAN;
}

int model_forward(struct model *m, const struct batch *b, const struct kv_cache *kv, struct tensor *logits,
                  struct error *e)
{
    if (atomic_load(&fake_fail_forward) > 0 && atomic_fetch_sub(&fake_fail_forward, 1) == 1)
        return error_set(e, ERR_DEVICE, "the fake device broke, as told");
    assert(b->n_tokens > 0 && b->n_logits_rows <= m->max_logits_rows);
    for (int32_t g = 0; g < m->info.n_kv_groups; g++)
        write_kv(b, kv, &m->info.kv_groups[g], g);
    for (int32_t i = 0; b->layer_tickets != NULL && i < m->info.n_layers; i++)
        b->layer_tickets[i] = m->kernels->record(m->device);
    for (int32_t row = 0; row < b->n_logits_rows; row++)
        fill_logits(m, b, kv, row);
    sleep_us(m->step_us);
    *logits = (struct tensor){m->logits, DTYPE_F32, 2, {(size_t)b->n_logits_rows, (size_t)m->info.vocab_size, 0, 0}};
    return 0;
}

// ---- the backend ----------------------------------------------------------------------------------------------------

enum { MAX_PENDING = 4, MAX_ROWS = 4096 };

struct delivery { struct sample_result *to, *rows; int32_t n; uint64_t ticket; };

struct device {
    bool asynchronous;
    struct device_options options;
    uint64_t ticket;
    int32_t wait_us;
    struct delivery pending[MAX_PENDING]; // of an asynchronous device: results not yet waited for
};

static int device_create(struct device **out, const struct device_options *o, struct error *e, bool asynchronous)
{
    struct device *d = calloc(1, sizeof *d);
    if (d == NULL)
        return error_set(e, ERR_NOMEM, "no memory for the device");
    d->options = *o;
    d->asynchronous = asynchronous;
    for (int32_t i = 0; asynchronous && i < MAX_PENDING; i++)
        d->pending[i].rows = calloc(MAX_ROWS, sizeof *d->pending[i].rows);
    *out = d;
    return 0;
}

static int create_sync(struct device **out, const struct device_options *o, struct error *e)
{
    return device_create(out, o, e, false);
}

static int create_async(struct device **out, const struct device_options *o, struct error *e)
{
    return device_create(out, o, e, true);
}

static void device_destroy(struct device *d)
{
    for (int32_t i = 0; i < MAX_PENDING; i++)
        free(d->pending[i].rows);
    free(d);
}

static const char *device_description(struct device *d)
{
    return d->asynchronous ? "fake, asynchronous" : "fake";
}

static size_t device_memory(struct device *d)
{
    (void)d;
    return (size_t)1 << 30;
}

static size_t scratch_bytes(struct device *d)
{
    (void)d;
    return 0;
}

static void *fake_alloc(struct device *d, size_t bytes)
{
    (void)d;
    return calloc(1, bytes);
}

static void fake_free(struct device *d, void *memory)
{
    (void)d;
    free(memory);
}

static uint64_t record(struct device *d)
{
    return ++d->ticket;
}

static int wait_for(struct device *d, uint64_t ticket, struct error *e)
{
    (void)e;
    sleep_us(d->wait_us);
    for (int32_t i = 0; i < MAX_PENDING; i++) {
        struct delivery *p = &d->pending[i];
        if (p->n == 0 || p->ticket > ticket)
            continue;
        memcpy(p->to, p->rows, (size_t)p->n * sizeof *p->rows);
        p->n = 0;
    }
    return 0;
}

static void set_wait_us(struct device *device, int32_t us) { device->wait_us = us; }

static int32_t *history_at(struct history history, int32_t row, int32_t position)
{
    assert(row >= 0 && row < history.n_slots && position >= 0 && position <= history.max_len);
    return history.tokens + (size_t)row * (size_t)history.max_len + position;
}

static int history_write(struct device *d, struct history history, int32_t row, int32_t position,
                         const int32_t *tokens, int32_t n, struct error *e)
{
    (void)d;
    (void)e;
    assert(position + n <= history.max_len);
    memcpy(history_at(history, row, position), tokens, (size_t)n * sizeof *tokens);
    return 0;
}

static int copy_blocks(struct device *d, struct kv_layer cache, const int32_t *from, const int32_t *to, int32_t n,
                       struct error *e)
{
    (void)d;
    (void)e;
    size_t bytes = cache.k.shape[1] * cache.k.shape[2] * cache.k.shape[3] * sizeof(int32_t);
    for (int32_t i = 0; i < n; i++) {
        assert(from[i] != to[i]);
        memcpy((char *)cache.k.data + (size_t)to[i] * bytes, (char *)cache.k.data + (size_t)from[i] * bytes, bytes);
        memcpy((char *)cache.v.data + (size_t)to[i] * bytes, (char *)cache.v.data + (size_t)from[i] * bytes, bytes);
    }
    return 0;
}

// Bad words are one token, or one token twice.
static bool is_bad_word(const struct sample_row *row, struct history history, int32_t id)
{
    for (int32_t i = 0; i < row->n_bad_words; i++) {
        int32_t n_before = row->bad_word_offsets[i + 1] - row->bad_word_offsets[i] - 1;
        bool preceded = row->position - n_before >= row->n_prompt;
        for (int32_t p = row->position - n_before; preceded && p < row->position; p++)
            preceded = *history_at(history, row->history_row, p) == id;
        if (row->bad_word_ids[row->bad_word_offsets[i]] == id && preceded)
            return true;
    }
    return false;
}

static bool is_banned(const struct sample_row *row, struct history history, int32_t id)
{
    bool allowed = row->n_allowed_ids == 0 && !is_bad_word(row, history, id);
    for (int32_t i = 0; i < row->n_allowed_ids; i++)
        allowed = allowed || (row->allowed_ids[i] == id && !is_bad_word(row, history, id));
    for (int32_t i = 0; i < row->n_banned_ids; i++)
        allowed = allowed && row->banned_ids[i] != id;
    if (row->mask != NULL)
        allowed = allowed && (row->mask[id / 32] >> id % 32 & 1) != 0;
    return !allowed;
}

// A penalty is what reads the history: a token said before loses half of its logit for each time.
static float score(const struct sample_row *row, struct history history, const float *logits, int32_t id)
{
    float x = logits[id];
    for (int32_t p = 0; row->repetition_penalty != 1 && p < row->position; p++)
        x = *history_at(history, row->history_row, p) == id ? x * 0.5f : x;
    if (row->temperature > 0)
        x += (float)(mix(mix(mix(row->seed, (uint64_t)row->choice), (uint64_t)row->position), (uint64_t)id) % 10007) /
             2000.0f * row->temperature;
    return x;
}

static void fill_top(struct sample_result *result, const float *logits, int32_t vocab_size, int32_t n)
{
    for (result->n_top = 0; result->n_top < n && result->n_top < vocab_size; result->n_top++) {
        int32_t best = -1;
        for (int32_t id = 0; id < vocab_size; id++) {
            bool taken = false;
            for (int32_t i = 0; i < result->n_top; i++)
                taken = taken || result->top[i].id == id;
            if (!taken && (best < 0 || logits[id] > logits[best]))
                best = id;
        }
        result->top[result->n_top] = (struct token_logprob){best, logits[best]};
    }
}

static void sample_one(const struct sample_row *row, struct history history, const float *logits, int32_t vocab_size,
                       struct sample_result *result)
{
    *result = (struct sample_result){.id = row->target, .invalid = isnan(logits[0])};
    if (row->target < 0) {
        float best = -INFINITY;
        for (int32_t id = 0; id < vocab_size; id++) {
            if (is_banned(row, history, id) || !(score(row, history, logits, id) > best))
                continue;
            best = score(row, history, logits, id);
            result->id = id;
        }
        result->barred = result->id < 0 && !result->invalid;
        if (result->id < 0)
            result->id = 0;
        if (row->position < history.max_len)
            *history_at(history, row->history_row, row->position) = result->id;
    }
    result->logprob = logits[result->id];
    fill_top(result, logits, vocab_size, row->n_logprobs);
}

static int sample(struct device *d, const struct sample_params *p, struct error *e)
{
    struct sample_result *results = p->results;
    if (atomic_load(&fake_fail_sample) > 0 && atomic_fetch_sub(&fake_fail_sample, 1) == 1)
        return error_set(e, ERR_DEVICE, "the fake sampler broke, as told");
    if (d->asynchronous) {
        int32_t i = 0;
        while (d->pending[i].n > 0)
            assert(++i < MAX_PENDING);
        assert(p->n_rows <= MAX_ROWS);
        memset(p->results, 0x7b, (size_t)p->n_rows * sizeof *p->results);
        d->pending[i] = (struct delivery){p->results, d->pending[i].rows, p->n_rows, d->ticket + 1};
        results = d->pending[i].rows;
    }
    int32_t vocab_size = (int32_t)p->logits.shape[1];
    for (int32_t i = 0; i < p->n_rows; i++) {
        const float *logits = (const float *)p->logits.data + (size_t)p->rows[i].logits_row * (size_t)vocab_size;
        sample_one(&p->rows[i], p->history, logits, vocab_size, &results[i]);
    }
    return 0;
}

#define FAKE_KERNELS(is_async, create) { \
    .name = "fake", .asynchronous = is_async, .reads_mapped_weights = true, \
    .device_create = create, .device_destroy = device_destroy, \
    .device_description = device_description, .device_memory = device_memory, .scratch_bytes = scratch_bytes, \
    .alloc = fake_alloc, .free = fake_free, .alloc_host = fake_alloc, .free_host = fake_free, .record = record, \
    .wait = wait_for, .history_write = history_write, .copy_blocks = copy_blocks, .sample = sample, \
}

static const struct kernels synchronous = FAKE_KERNELS(false, create_sync);
static const struct kernels asynchronous = FAKE_KERNELS(true, create_async);

int kernels_open(const struct kernels **out, const char *backend, struct error *e)
{
    *e = (struct error){0};
    *out = strcmp(backend, "fake-async") == 0 ? &asynchronous : &synchronous;
    return 0;
}
