/* The engine as its caller sees it, on tests/fake_model.c: alone = batched = chunked = cached = preempted = forked. */
#include "tests/engine_jobs.h"

// ---- the same answer every time -------------------------------------------------------------------------------------

struct variant {
    const char *model, *backend;
    int32_t max_num_seqs, max_num_batched_tokens, block_size;
    bool prefix_caching;
    int32_t kv_blocks; // 0: plenty
    int32_t kv_block_bytes;
};

// One block of 16 tokens of the fake model is 2 layers * (K + V) * 16 tokens * 4 bytes = 256 bytes a group.
static const struct variant variants[] = {
    {"fake:", "fake", 64, 2048, 16, false, 0, 256},               // batched
    {"fake:", "fake", 8, 11, 16, false, 0, 256},                  // chunked
    {"fake:", "fake", 16, 64, 16, true, 0, 256},                  // cached
    {"fake:", "fake", 16, 64, 16, true, 25, 256},                 // preempted
    {"fake:", "fake", 16, 64, 32, false, 14, 512},                // preempted, computed anew
    {"fake:", "fake-async", 16, 64, 16, true, 0, 256},            // a step ahead
    {"fake:", "fake-async", 16, 40, 16, true, 21, 256},           // a step ahead, preempted
    {"fake:window=40", "fake", 16, 64, 16, true, 0, 256},         // windowed
    {"fake:window=40", "fake-async", 16, 64, 16, true, 14, 256},
    {"fake:groups=2,window=24", "fake", 16, 64, 16, true, 0, 512}, // two groups
    {"fake:groups=2,window=24", "fake-async", 16, 64, 16, true, 60, 512},
};

enum { N_JOBS = 60 };

START_TEST(test_same_answer)
{
    const struct variant *v = &variants[_i];
    seed_print(v->model, _i);
    struct job *jobs = calloc(N_JOBS, sizeof *jobs);
    for (int32_t i = 0; i < N_JOBS; i++)
        job_random(&jobs[i]);
    jobs_expect(jobs, N_JOBS, v->model);
    struct engine_options o = options_default();
    o.model_dir = v->model;
    o.backend = v->backend;
    o.max_num_seqs = v->max_num_seqs;
    o.max_num_batched_tokens = v->max_num_batched_tokens;
    o.block_size = v->block_size;
    o.prefix_caching = v->prefix_caching;
    o.kv_cache_memory_bytes = (size_t)v->kv_blocks * (size_t)v->kv_block_bytes;
    o.max_model_len = v->kv_blocks > 0 ? 320 : 0;
    struct engine *engine = engine_begin(&o);
    for (int32_t round = 0; round < 2; round++) {
        for (int32_t i = 0; i < N_JOBS; i++)
            job_submit(engine, &jobs[i]);
        jobs_read_all(engine, jobs, N_JOBS);
        for (int32_t i = 0; i < N_JOBS; i++)
            job_compare(&jobs[i]);
    }
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    ck_assert_int_eq(stats.n_free_blocks, stats.n_blocks);
    ck_assert_int_eq(stats.n_running, 0);
    ck_assert(v->prefix_caching == (stats.prefix_hits > 0));
    if (v->kv_blocks > 0 && strchr(v->model, '=') == NULL)
        ck_assert_uint_gt(stats.n_preemptions, 0);
    printf("  %lu steps, %lu preemptions, %lu of %lu tokens cached, host %.1f us a step\n", stats.n_steps,
           stats.n_preemptions, stats.prefix_hits, stats.prefix_queries, stats.host_seconds / (double)stats.n_steps * 1e6);
    engine_destroy(engine);
    free(jobs);
}
END_TEST

// 500 at once on a cache a tenth of what they need, a third of them cancelled midway.
START_TEST(test_500_concurrent)
{
    enum { N = 500 };
    seed_print("500 concurrent", _i);
    struct job *jobs = calloc(N, sizeof *jobs);
    int64_t blocks_wanted = 0;
    for (int32_t i = 0; i < N; i++) {
        job_random(&jobs[i]);
        jobs[i].n_prompt = jobs[i].n_prompt / 4 + 1; // short prompts, long answers: admission cannot foresee what they need
        jobs[i].params.ignore_eos = true;
        jobs[i].params.max_tokens = JOB_MAX_TOKENS;
        blocks_wanted += jobs[i].params.n * ((jobs[i].n_prompt + jobs[i].params.max_tokens + 15) / 16);
    }
    jobs_expect(jobs, N, "fake:");
    for (int32_t i = 0; i < N; i++)
        jobs[i].cancel = rand() % 3 == 0;
    struct engine_options o = options_default();
    o.backend = _i == 0 ? "fake" : "fake-async";
    o.max_num_seqs = 500;
    o.max_num_batched_tokens = 600;
    o.kv_cache_memory_bytes = (size_t)blocks_wanted / 10 * 256;
    struct engine *engine = engine_begin(&o);
    for (int32_t i = 0; i < N; i++)
        job_submit(engine, &jobs[i]);
    jobs_read_all(engine, jobs, N);
    for (int32_t i = 0; i < N; i++)
        job_compare(&jobs[i]);
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    ck_assert_int_eq(stats.n_free_blocks, stats.n_blocks);
    ck_assert_uint_gt(stats.n_preemptions, 0);
    printf("  %ld blocks wanted, %d there; %lu steps, %lu preemptions, host %.1f us a step\n", (long)blocks_wanted,
           stats.n_blocks, stats.n_steps, stats.n_preemptions, stats.host_seconds / (double)stats.n_steps * 1e6);
    engine_destroy(engine);
    free(jobs);
}
END_TEST

// Choices draw their own numbers and are the same whether they are forked or computed each alone.
START_TEST(test_many_choices)
{
    static const int32_t slots[] = {128, 8, 1};
    int32_t first[128][20];
    for (int32_t round = 0; round < 3; round++) {
        struct engine_options o = options_default();
        o.backend = round == 1 ? "fake-async" : "fake";
        o.max_num_seqs = slots[round];
        o.max_num_batched_tokens = 128;
        o.prefix_caching = round != 2;
        struct engine *engine = engine_begin(&o);
        int32_t prompt[37], n_equal = 0;
        for (int32_t i = 0; i < 37; i++)
            prompt[i] = i;
        struct request *r = request_create(prompt, 37);
        struct sampling_params *p = request_params(r);
        p->n = 128;
        p->max_tokens = 20;
        p->has_seed = p->ignore_eos = true;
        submit(engine, r);
        while (!request_done(r))
            wait_for_news(engine);
        for (int32_t c = 0; c < 128; c++) {
            struct token_out out[21];
            ck_assert_int_eq(request_read(r, c, out, 21), 20);
            for (int32_t i = 0; i < 20; i++) {
                ck_assert(round == 0 || out[i].id == first[c][i]);
                first[c][i] = out[i].id;
            }
            n_equal += c > 0 && memcmp(first[c], first[c - 1], sizeof first[c]) == 0;
        }
        ck_assert_int_eq(n_equal, 0);
        struct engine_stats stats;
        wait_until_idle(engine, &stats);
        // Once a request, however many of its choices wait for a slot or are computed anew.
        ck_assert_uint_eq(stats.prompt_tokens, 37);
        ck_assert_uint_eq(stats.prefix_queries, o.prefix_caching ? 37 : 0);
        ck_assert_int_eq(stats.n_free_blocks, stats.n_blocks);
        request_release(r);
        engine_destroy(engine);
    }
}
END_TEST

// Two turns of a chat: the second prompt is the first with its answer and more; generated blocks are found again.
START_TEST(test_generated_blocks_are_reused)
{
    struct engine_options o = options_default();
    struct engine *engine = engine_begin(&o);
    int32_t prompt[200] = {1, 2, 3, 4, 5};
    struct request *r = request_create(prompt, 20);
    request_params(r)->max_tokens = 100;
    request_params(r)->ignore_eos = true;
    submit(engine, r);
    while (!request_done(r))
        wait_for_news(engine);
    struct token_out out[100];
    ck_assert_int_eq(request_read(r, 0, out, 100), 100);
    ck_assert_int_eq(request_cached_tokens(r), 0);
    for (int32_t i = 0; i < 100; i++)
        prompt[20 + i] = out[i].id;
    request_release(r);
    for (uint64_t salt = 0; salt < 2; salt++) {
        r = request_create(prompt, 130);
        request_params(r)->cache_salt = salt;
        submit(engine, r);
        while (!request_done(r))
            wait_for_news(engine);
        ck_assert_int_eq(request_cached_tokens(r), salt == 0 ? 112 : 0); // 119 tokens were computed: 7 full blocks
        request_release(r);
    }
    engine_destroy(engine);
}
END_TEST

// Requests without a seed differ from each other, and a restarted engine gives the same ones again.
START_TEST(test_seeds_of_the_engine)
{
    int32_t said[2][2][30];
    for (int32_t round = 0; round < 2; round++) {
        struct engine_options o = options_default();
        struct engine *engine = engine_begin(&o);
        for (int32_t i = 0; i < 2; i++) {
            struct request *r = request_create((int32_t[]){1, 2, 3}, 3);
            request_params(r)->max_tokens = 30;
            request_params(r)->ignore_eos = true;
            submit(engine, r);
            while (!request_done(r))
                wait_for_news(engine);
            struct token_out out[30];
            ck_assert_int_eq(request_read(r, 0, out, 30), 30);
            for (int32_t k = 0; k < 30; k++)
                said[round][i][k] = out[k].id;
            request_release(r);
        }
        engine_destroy(engine);
    }
    ck_assert_mem_eq(said[0], said[1], sizeof said[0]);
    ck_assert_mem_ne(said[0][0], said[0][1], sizeof said[0][0]);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("engine");
    TCase *tc = tcase_create("engine");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, test_same_answer, 0, (int)(sizeof variants / sizeof *variants));
    tcase_add_loop_test(tc, test_500_concurrent, 0, 2);
    tcase_add_test(tc, test_many_choices);
    tcase_add_test(tc, test_generated_blocks_are_reused);
    tcase_add_test(tc, test_seeds_of_the_engine);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
