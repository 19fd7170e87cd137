/* engine_jobs.h: random requests and their answers, for the engine's tests: make jobs, run each alone, run them all in
 * some other way, compare. Included by one test file each, hence static.
 */
#ifndef GPTD_TESTS_ENGINE_JOBS_H
#define GPTD_TESTS_ENGINE_JOBS_H

#include <check.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine/engine.h"
#include "tests/fake_model.h"

enum { JOB_MAX_PROMPT = 200, JOB_MAX_TOKENS = 100, JOB_MAX_N = 4 };

struct answer { int32_t ids[JOB_MAX_TOKENS], n; float logprob_sum; enum finish_reason finish; };

struct job {
    int32_t prompt[JOB_MAX_PROMPT], n_prompt;
    struct sampling_params params;        // no arrays
    struct answer expected[JOB_MAX_N], got[JOB_MAX_N];
    float expected_prompt_sum, got_prompt_sum; // of prompt log-probabilities
    struct request *request;
    bool cancel;
    int32_t n_done;
};

static inline struct engine_options options_default(void)
{
    return (struct engine_options){
        .model_dir = "fake:", .backend = "fake", .prefix_caching = true, .max_num_seqs = 8,
        .max_num_batched_tokens = 64, .block_size = 16, .max_queue_requests = 1000, .max_queue_tokens = 1000000,
        .max_logprobs = 5, .priority_aging = 10, .slow_client_timeout = 30, .seed = 1,
    };
}

static inline struct engine *engine_begin(const struct engine_options *o)
{
    struct engine *engine;
    struct error e = {0};
    ck_assert_msg(engine_create(&engine, o, &e) == 0, "%s", e.message);
    ck_assert_msg(engine_start(engine, &e) == 0, "%s", e.message);
    return engine;
}

static inline void submit(struct engine *engine, struct request *r)
{
    struct error e = {0};
    ck_assert_msg(engine_submit(engine, r, &e) == 0, "%s", e.message);
}

// Waits at most a millisecond for news.
static inline void wait_for_news(struct engine *engine)
{
    uint64_t count;
    struct pollfd p = {engine_event_fd(engine), POLLIN, 0};
    if (poll(&p, 1, 1) > 0)
        ck_assert(read(p.fd, &count, sizeof count) == sizeof count);
}

static inline void wait_until_idle(struct engine *engine, struct engine_stats *stats)
{
    for (engine_stats_get(engine, stats); stats->busy || stats->n_waiting > 0; engine_stats_get(engine, stats))
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

// Prompts share beginnings, so that the prefix cache has something to find.
static inline void job_random(struct job *job)
{
    int32_t family = rand() % 3, shared = rand() % JOB_MAX_PROMPT;
    *job = (struct job){.n_prompt = 1 + rand() % JOB_MAX_PROMPT};
    for (int32_t i = 0; i < job->n_prompt; i++)
        job->prompt[i] = i < shared ? (family * 7 + i * i) % 64 : rand() % 64;
    job->params = (struct sampling_params){
        .n = rand() % 4 == 0 ? 1 + rand() % JOB_MAX_N : 1, .max_tokens = 1 + rand() % JOB_MAX_TOKENS,
        .temperature = (float)(rand() % 2), .top_p = 1, .repetition_penalty = rand() % 2 ? 1.0f : 1.1f, .has_seed = true,
        .seed = rand(), .ignore_eos = rand() % 2, .logprobs = rand() % 4 - 1,
        .prompt_logprobs = rand() % 8 == 0 ? rand() % 3 : -1, .priority = rand() % 3,
    };
    if (rand() % 4 == 0)
        job->params.min_tokens = job->params.max_tokens / 2;
    if (rand() % 20 == 0 && job->params.min_tokens == 0)
        job->params.max_tokens = 0;
}

static inline void job_submit(struct engine *engine, struct job *job)
{
    job->request = request_create(job->prompt, job->n_prompt);
    *request_params(job->request) = job->params;
    job->n_done = 0;
    memset(job->got, 0, sizeof job->got);
    submit(engine, job->request);
}

static inline float prompt_sum(const struct job *job)
{
    const struct token_out *entries = request_prompt_logprobs(job->request);
    float sum = 0;
    for (int32_t i = 0; entries != NULL && i < job->n_prompt; i++) {
        ck_assert_int_eq(entries[i].id, job->prompt[i]);
        sum += (float)i * entries[i].logprob;
        for (int32_t k = 0; k < entries[i].n_top; k++)
            sum += (float)entries[i].top[k].id;
    }
    return sum;
}

// Takes what has come; true once every choice has ended.
static inline bool job_read(struct job *job)
{
    struct token_out out[7];
    for (int32_t c = 0; c < job->params.n; c++) {
        struct answer *a = &job->got[c];
        if (a->finish != FINISH_NONE)
            continue;
        for (int32_t n; (n = request_read(job->request, c, out, 7)) > 0;) {
            for (int32_t i = 0; i < n; i++) {
                a->ids[a->n++] = out[i].id;
                a->logprob_sum += out[i].logprob;
                for (int32_t k = 0; k < out[i].n_top; k++)
                    a->logprob_sum += (float)out[i].top[k].id + out[i].top[k].logprob;
            }
        }
        a->finish = choice_finish(job->request, c, NULL);
        job->n_done += a->finish != FINISH_NONE;
    }
    if (job->n_done < job->params.n)
        return false;
    job->got_prompt_sum = prompt_sum(job);
    return true;
}

static inline void jobs_read_all(struct engine *engine, struct job *jobs, int32_t n)
{
    for (int32_t n_open = n; n_open > 0;) {
        n_open = 0;
        for (int32_t i = 0; i < n; i++) {
            if (jobs[i].request == NULL)
                continue;
            if (jobs[i].cancel && jobs[i].got[0].n > 3)
                request_cancel(jobs[i].request);
            if (job_read(&jobs[i])) {
                ck_assert(request_done(jobs[i].request));
                request_release(jobs[i].request);
                jobs[i].request = NULL;
            } else {
                n_open++;
            }
        }
        if (n_open > 0)
            wait_for_news(engine);
    }
}

// Each alone: one sequence at a time, whole prompts, no cache.
static inline void jobs_expect(struct job *jobs, int32_t n, const char *model)
{
    struct engine_options o = options_default();
    o.model_dir = model;
    o.max_num_seqs = 1;
    o.max_num_batched_tokens = 1024;
    o.prefix_caching = false;
    struct engine *engine = engine_begin(&o);
    for (int32_t i = 0; i < n; i++) {
        job_submit(engine, &jobs[i]);
        jobs_read_all(engine, &jobs[i], 1);
        memcpy(jobs[i].expected, jobs[i].got, sizeof jobs[i].got);
        jobs[i].expected_prompt_sum = jobs[i].got_prompt_sum;
    }
    engine_destroy(engine);
}

// A cancelled job's tokens must be the first of the expected ones.
static inline void job_compare(const struct job *job)
{
    for (int32_t c = 0; c < job->params.n; c++) {
        const struct answer *a = &job->expected[c], *b = &job->got[c];
        ck_assert_msg(b->n <= a->n && memcmp(a->ids, b->ids, (size_t)b->n * sizeof *a->ids) == 0,
                      "choice %d of %d differs (prompt %d, max %d)", c, job->params.n, job->n_prompt,
                      job->params.max_tokens);
        if (b->finish == FINISH_CANCELLED && job->cancel)
            continue;
        ck_assert_int_eq(a->n, b->n);
        ck_assert_int_eq(a->finish, b->finish);
        ck_assert(a->logprob_sum == b->logprob_sum && job->expected_prompt_sum == job->got_prompt_sum);
    }
}

static inline unsigned seed_print(const char *what, int32_t i)
{
    unsigned seed = (unsigned)time(NULL) * 31 + (unsigned)i;
    printf("%s: seed %u\n", what, seed);
    fflush(stdout);
    srand(seed);
    return seed;
}

static inline struct request *request_of(int32_t n_prompt, int32_t max_tokens)
{
    int32_t prompt[JOB_MAX_PROMPT];
    for (int32_t i = 0; i < n_prompt; i++)
        prompt[i] = (i * i + 3) % 61;
    struct request *r = request_create(prompt, n_prompt);
    request_params(r)->max_tokens = max_tokens;
    request_params(r)->temperature = 0;
    request_params(r)->ignore_eos = true;
    return r;
}

static inline void wait_done(struct engine *engine, struct request *r)
{
    while (!request_done(r))
        wait_for_news(engine);
}

static inline enum finish_reason finish_of(struct request *r, int32_t choice)
{
    struct token_out out[64];
    while (request_read(r, choice, out, 64) > 0)
        ;
    return choice_finish(r, choice, NULL);
}

static inline void wait_running(struct engine *engine)
{
    struct engine_stats stats;
    do
        engine_stats_get(engine, &stats);
    while (stats.n_running == 0);
}

static inline void expect_refusal(struct engine *engine, struct request *r, enum err code, const char *says)
{
    struct error e = {0};
    ck_assert_int_eq(engine_submit(engine, r, &e), code);
    ck_assert_msg(strstr(e.message, says) != NULL, "'%s' does not say '%s'", e.message, says);
    request_release(r);
}

#endif
