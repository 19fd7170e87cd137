#include "engine/request.h"

#include <stdlib.h>
#include <string.h>

struct request *request_create(const int32_t *prompt, int32_t n_prompt)
{
    struct request *r = calloc(1, sizeof *r);
    if (r == NULL)
        return NULL;
    r->n_prompt = n_prompt > 0 ? n_prompt : 0;
    r->prompt = malloc((size_t)(r->n_prompt + 1) * sizeof *r->prompt);
    if (r->prompt == NULL) {
        free(r);
        return NULL;
    }
    if (r->n_prompt > 0)
        memcpy(r->prompt, prompt, (size_t)r->n_prompt * sizeof *prompt);
    r->references = 1;
    r->params = (struct sampling_params){
        .n = 1, .max_tokens = 16, .temperature = 1, .top_p = 1, .repetition_penalty = 1,
        .logprobs = -1, .prompt_logprobs = -1,
    };
    return r;
}

struct sampling_params *request_params(struct request *r)
{
    return &r->params;
}

void request_share_params(struct request *r, struct request *of)
{
    r->params_of = of->params_of != NULL ? of->params_of : of;
    r->params = of->params;
    atomic_fetch_add(&r->params_of->references, 1);
}

static void free_params(struct request *r)
{
    if (r->params_of != NULL) {
        request_unref(r->params_of);
        return;
    }
    free(r->params.stop_token_ids);
    free(r->params.logit_bias);
    free(r->params.allowed_token_ids);
    free(r->params.bad_word_ids);
    free(r->params.bad_word_offsets);
}

static void free_storage(struct request *r)
{
    for (int32_t i = 0; r->sequences != NULL && i < r->n; i++) {
        token_ring_deinit(&r->sequences[i].ring);
        free(r->sequences[i].generated);
        free(r->sequences[i].hashes);
    }
    free(r->sequences);
    free(r->prompt_logprobs);
    free(r->prompt_top);
    free(r->stop_ids);
    free(r->prompt_hashes);
    r->sequences = NULL;
    r->n = 0;
    r->storage_bytes = 0;
    r->prompt_logprobs = NULL;
    r->prompt_top = NULL;
    r->stop_ids = NULL;
    r->prompt_hashes = NULL;
}

void request_unref(struct request *r)
{
    if (atomic_fetch_sub_explicit(&r->references, 1, memory_order_acq_rel) > 1)
        return;
    free_storage(r);
    if (r->inbox != NULL)
        inbox_unref(r->inbox);
    free_params(r);
    free(r->prompt);
    free(r);
}

// ---- checks ---------------------------------------------------------------------------------------------------------

static int check_ids(const char *field, const int32_t *ids, int32_t n, int32_t vocab_size, struct error *e)
{
    if (n < 0)
        return error_set(e, ERR_INVALID, "%s: a negative number of ids", field);
    for (int32_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= vocab_size)
            return error_set(e, ERR_INVALID, "%s: token id %d is outside the vocabulary of %d", field, ids[i],
                             vocab_size);
    }
    return 0;
}

static int check_bad_words(const struct sampling_params *p, int32_t vocab_size, struct error *e)
{
    for (int32_t i = 0; i < p->n_bad_words; i++) {
        if (p->bad_word_offsets[i] < 0 || p->bad_word_offsets[i + 1] <= p->bad_word_offsets[i])
            return error_set(e, ERR_INVALID, "bad_words: sequence %d is empty", i);
    }
    return p->n_bad_words > 0 ? check_ids("bad_words", p->bad_word_ids, p->bad_word_offsets[p->n_bad_words],
                                          vocab_size, e) : 0;
}

static int check_id_lists(const struct request *r, int32_t vocab_size, struct error *e)
{
    const struct sampling_params *p = &r->params;
    if (check_ids("prompt", r->prompt, r->n_prompt, vocab_size, e) != 0)
        return ERR_INVALID;
    if (r->params_of != NULL) // checked with that one
        return 0;
    if (check_ids("stop_token_ids", p->stop_token_ids, p->n_stop_token_ids, vocab_size, e) != 0 ||
        check_ids("allowed_token_ids", p->allowed_token_ids, p->n_allowed_token_ids, vocab_size, e) != 0 ||
        check_bad_words(p, vocab_size, e) != 0)
        return ERR_INVALID;
    for (int32_t i = 0; i < p->n_logit_bias; i++) {
        if (check_ids("logit_bias", &p->logit_bias[i].id, 1, vocab_size, e) != 0)
            return ERR_INVALID;
    }
    return 0;
}

static int check_numbers(const struct sampling_params *p, const struct request_limits *limits, struct error *e)
{
    if (p->n < 1 || p->n > MAX_CHOICES)
        return error_set(e, ERR_INVALID, "n: %d is not 1 to %d", p->n, MAX_CHOICES);
    if (p->max_tokens < 0 || p->min_tokens < 0 || p->min_tokens > p->max_tokens)
        return error_set(e, ERR_INVALID, "min_tokens: it is %d and max_tokens %d; 0 <= min_tokens <= max_tokens must "
                         "hold", p->min_tokens, p->max_tokens);
    if (!(p->temperature >= 0 && p->temperature <= 100))
        return error_set(e, ERR_INVALID, "temperature: out of range");
    if (!(p->top_p > 0 && p->top_p <= 1) || !(p->min_p >= 0 && p->min_p <= 1) || p->top_k < 0)
        return error_set(e, ERR_INVALID, "top_p: it, min_p or top_k is out of range");
    if (!(p->repetition_penalty > 0 && p->repetition_penalty <= 100))
        return error_set(e, ERR_INVALID, "repetition_penalty: out of range");
    if (!(p->frequency_penalty >= -2 && p->frequency_penalty <= 2) ||
        !(p->presence_penalty >= -2 && p->presence_penalty <= 2))
        return error_set(e, ERR_INVALID, "frequency_penalty: it and presence_penalty must be -2 to 2");
    if (p->logprobs < -1 || p->logprobs > limits->max_logprobs)
        return error_set(e, ERR_INVALID, "logprobs: %d is not -1 to %d", p->logprobs, limits->max_logprobs);
    if (p->prompt_logprobs < -1 || p->prompt_logprobs > limits->max_logprobs)
        return error_set(e, ERR_INVALID, "prompt_logprobs: %d is not -1 to %d", p->prompt_logprobs,
                         limits->max_logprobs);
    return 0;
}

int32_t request_blocks_needed(const struct request_limits *limits, int32_t g, int32_t n_tokens)
{
    int32_t bs = limits->block_size, all = (int32_t)(((int64_t)n_tokens + bs - 1) / bs);
    if (limits->windows[g] == 0)
        return all;
    // A chunk's first query sees window - 1 tokens before it; both ends may lie inside a block.
    int64_t most = ((int64_t)limits->windows[g] + limits->max_num_batched_tokens + bs - 1) / bs + 1;
    return most < all ? (int32_t)most : all;
}

static int check_size(const struct request *r, const struct request_limits *limits, struct error *e)
{
    int32_t max_tokens = r->params.max_tokens;
    if (r->n_prompt == 0)
        return error_set(e, ERR_INVALID, "prompt: it is empty");
    if (r->n_prompt > limits->max_model_len || max_tokens > limits->max_model_len - r->n_prompt)
        return error_set(e, ERR_INVALID, "%s: a prompt of %d tokens and max_tokens %d exceed the context of %d tokens",
                         r->n_prompt < limits->max_model_len ? "max_tokens" : "prompt", r->n_prompt, max_tokens,
                         limits->max_model_len);
    for (int32_t g = 0; g < limits->n_groups; g++) {
        int32_t need = request_blocks_needed(limits, g, r->n_prompt + max_tokens);
        bool fits = request_blocks_needed(limits, g, r->n_prompt) <= limits->n_blocks[g]; // the prompt alone
        if (need > limits->n_blocks[g])
            return error_set(e, ERR_INVALID,
                             "%s: a prompt of %d tokens and max_tokens %d need %d KV blocks of %d tokens; the cache "
                             "has %d", fits ? "max_tokens" : "prompt", r->n_prompt, max_tokens, need,
                             limits->block_size, limits->n_blocks[g]);
    }
    return 0;
}

// ---- storage --------------------------------------------------------------------------------------------------------

static void fill_stop_ids(struct request *r, const struct request_limits *limits)
{
    const struct sampling_params *p = &r->params;
    r->n_stop_ids = 0;
    for (int32_t i = 0; !p->ignore_eos && i < limits->n_eos_token_ids; i++)
        r->stop_ids[r->n_stop_ids++] = limits->eos_token_ids[i];
    for (int32_t i = 0; i < p->n_stop_token_ids; i++)
        r->stop_ids[r->n_stop_ids++] = p->stop_token_ids[i];
}

// After the stop ids are known.
static int sequence_init(struct sequence *s, struct request *r, int32_t index, int32_t block_size)
{
    const struct sampling_params *p = &r->params;
    int32_t n_tokens = r->n_prompt + p->max_tokens;
    s->request = r;
    s->index = index;
    s->n_stop_ids = r->n_stop_ids;
    for (int32_t i = 0; i < r->n_stop_ids && i < NEAR_STOP_IDS; i++)
        s->stop_ids[i] = r->stop_ids[i];
    s->n_prompt = r->n_prompt;
    s->n_most = n_tokens;
    s->is_alone = r->n == 1;
    s->stop_token_id = -1;
    s->slot = -1;
    s->n_hashed = r->n_prompt / block_size;
    size_t generated = (size_t)(p->max_tokens + 1) * sizeof *s->generated;
    size_t hashes = (size_t)(n_tokens / block_size - s->n_hashed + 1) * sizeof *s->hashes;
    int32_t capacity = p->max_tokens < 1 ? 1 : p->max_tokens < TOKEN_RING_MAX ? p->max_tokens : TOKEN_RING_MAX;
    s->generated = malloc(generated);
    s->hashes = malloc(hashes);
    if (s->generated == NULL || s->hashes == NULL)
        return ERR_NOMEM;
    r->storage_bytes += sizeof *s + generated + hashes + token_ring_bytes(capacity, p->logprobs);
    return token_ring_init(&s->ring, s->generated, capacity, p->logprobs);
}

// Whether the first token can be anything at all. What bad words of several tokens do later is the sampler's to find.
static int check_constraints(const struct request *r, int32_t vocab_size, struct error *e)
{
    const struct sampling_params *p = &r->params;
    int32_t n_stops = p->min_tokens > 0 ? r->n_stop_ids : 0, n_allowed = p->n_allowed_token_ids;
    int32_t n = n_allowed > 0 ? n_allowed : vocab_size, i = 0;
    if (p->max_tokens == 0 || n_stops + p->n_bad_words < (n_allowed > 0 ? 1 : vocab_size))
        return 0;
    bool *banned = calloc((size_t)vocab_size, sizeof *banned);
    if (banned == NULL)
        return error_set(e, ERR_NOMEM, "no memory for a request");
    for (int32_t k = 0; k < n_stops; k++)
        banned[r->stop_ids[k]] = true;
    for (int32_t k = 0; k < p->n_bad_words; k++) {
        if (p->bad_word_offsets[k + 1] - p->bad_word_offsets[k] == 1)
            banned[p->bad_word_ids[p->bad_word_offsets[k]]] = true;
    }
    while (i < n && banned[n_allowed > 0 ? p->allowed_token_ids[i] : i])
        i++;
    free(banned);
    return i < n ? 0 : error_set(e, ERR_INVALID, "%s: no token is left that bad_words and, up to min_tokens, the ids "
                                 "that stop do not ban", n_allowed > 0 ? "allowed_token_ids" : "bad_words");
}

static void fill_prompt_hashes(struct request *r, const struct request_limits *limits)
{
    struct block_hash hash = {{r->params.cache_salt, UINT64_MAX /* no adapter */}};
    for (int32_t i = 0; i < r->n_prompt / limits->block_size; i++) {
        hash = block_hash_next(limits->hash_key, hash, r->prompt + i * limits->block_size, limits->block_size);
        r->prompt_hashes[i] = hash;
    }
    int32_t n_left = r->n_prompt % limits->block_size, tail[MAX_BLOCK_SIZE] = {0}; // the hash is of even numbers
    memcpy(tail, r->prompt + r->n_prompt - n_left, (size_t)n_left * sizeof *tail);
    r->fingerprint = block_hash_next(limits->hash_key, hash, tail, n_left + n_left % 2).h[0];
}

static int allocate(struct request *r, const struct request_limits *limits)
{
    const struct sampling_params *p = &r->params;
    size_t n_prompt = (size_t)r->n_prompt;
    r->n = p->n;
    r->cached_tokens = -1;
    r->sequences = aligned_alloc(CACHE_LINE, (size_t)r->n * sizeof *r->sequences);
    if (r->sequences != NULL)
        memset(r->sequences, 0, (size_t)r->n * sizeof *r->sequences);
    r->stop_ids = malloc((size_t)(p->n_stop_token_ids + MAX_EOS_IDS) * sizeof *r->stop_ids);
    r->prompt_hashes = malloc((n_prompt / (size_t)limits->block_size + 1) * sizeof *r->prompt_hashes);
    if (r->sequences == NULL || r->stop_ids == NULL || r->prompt_hashes == NULL)
        return ERR_NOMEM;
    fill_stop_ids(r, limits);
    for (int32_t i = 0; i < r->n; i++) {
        if (sequence_init(&r->sequences[i], r, i, limits->block_size) != 0)
            return ERR_NOMEM;
    }
    if (p->prompt_logprobs >= 0) {
        r->prompt_logprobs = calloc(n_prompt, sizeof *r->prompt_logprobs);
        r->prompt_top = malloc((n_prompt * (size_t)p->prompt_logprobs + 1) * sizeof *r->prompt_top);
        if (r->prompt_logprobs == NULL || r->prompt_top == NULL)
            return ERR_NOMEM;
        r->storage_bytes += n_prompt * (sizeof *r->prompt_logprobs + (size_t)p->prompt_logprobs * sizeof *r->prompt_top);
        r->prompt_logprobs[0].id = r->prompt[0];
        r->n_prompt_logprobs = 1;
    }
    return 0;
}

int request_prepare(struct request *r, const struct request_limits *limits, struct error *e)
{
    free_storage(r);
    if (check_numbers(&r->params, limits, e) != 0 || check_size(r, limits, e) != 0 ||
        check_id_lists(r, limits->vocab_size, e) != 0)
        return ERR_INVALID;
    if (allocate(r, limits) != 0) {
        free_storage(r);
        return error_set(e, ERR_NOMEM, "no memory for a request of %d choices", r->params.n);
    }
    fill_prompt_hashes(r, limits);
    return r->params_of != NULL ? 0 : check_constraints(r, limits->vocab_size, e);
}

// ---- the server's side ----------------------------------------------------------------------------------------------

void request_cancel(struct request *r)
{
    atomic_store(&r->cancelled, true);
    struct inbox *inbox = atomic_load(&r->inbox);
    if (inbox != NULL)
        inbox_signal(inbox);
}

void choice_stop(struct request *r, int32_t choice)
{
    atomic_store_explicit(&r->sequences[choice].stop, true, memory_order_relaxed);
    inbox_signal(r->inbox);
}

void request_release(struct request *r)
{
    if (r->inbox != NULL && !request_done(r))
        request_cancel(r);
    request_unref(r);
}

int32_t request_read(struct request *r, int32_t choice, struct token_out *out, int32_t max)
{
    struct sequence *s = &r->sequences[choice];
    int32_t n = token_ring_read(&s->ring, out, max);
    if (n > 0 && atomic_load(&s->parked))
        inbox_wake(r->inbox);
    return n;
}

int32_t request_available(const struct request *r, int32_t choice)
{
    return token_ring_used(&r->sequences[choice].ring);
}

enum finish_reason choice_finish(const struct request *r, int32_t choice, int32_t *stop_token_id)
{
    const struct sequence *s = &r->sequences[choice];
    int32_t finish = atomic_load_explicit(&s->finish, memory_order_acquire);
    if (finish == FINISH_NONE || token_ring_used(&s->ring) > 0)
        return FINISH_NONE;
    if (stop_token_id != NULL)
        *stop_token_id = s->stop_token_id;
    return (enum finish_reason)finish;
}

bool request_done(const struct request *r)
{
    for (int32_t i = 0; i < r->n; i++) {
        if (atomic_load_explicit(&r->sequences[i].finish, memory_order_acquire) == FINISH_NONE)
            return false;
    }
    return true;
}

int32_t request_prompt_tokens(const struct request *r)
{
    return r->n_prompt;
}

const int32_t *request_prompt(const struct request *r)
{
    return r->prompt;
}

int32_t request_cached_tokens(const struct request *r)
{
    int32_t n = atomic_load_explicit(&r->cached_tokens, memory_order_relaxed);
    return n > 0 ? n : 0;
}

const struct token_out *request_prompt_logprobs(const struct request *r)
{
    return r->prompt_logprobs;
}

struct request_times request_times_get(const struct request *r)
{
    return (struct request_times){
        atomic_load_explicit(&r->submitted, memory_order_relaxed),
        atomic_load_explicit(&r->scheduled, memory_order_relaxed),
        atomic_load_explicit(&r->first_token, memory_order_relaxed),
        atomic_load_explicit(&r->finished, memory_order_relaxed),
    };
}

int32_t request_retry_after(struct request *r)
{
    struct inbox *inbox = atomic_load(&r->inbox);
    return inbox != NULL ? inbox_promise(inbox, r, now_seconds()) : r->retry_after;
}

const char *request_error(const struct request *r)
{
    return r->error.message;
}
