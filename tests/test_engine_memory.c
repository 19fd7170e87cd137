/* What the engine allocates and when: malloc is counted, and made to fail. On tests/fake_model.c.
 *
 * Under a sanitizer, which brings its own allocator, only the plan is compared.
 */
#include "tests/engine_jobs.h"

#include <errno.h>

#if !defined __SANITIZE_ADDRESS__ && !defined __SANITIZE_THREAD__
#define COUNTING 1

void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *memory, size_t bytes);
void *__libc_memalign(size_t alignment, size_t bytes);
void __libc_free(void *memory);

static atomic_long n_allocations, n_frees;
static atomic_long fail_after = -1;  // allocations until one fails; -1: none does
static __thread bool exempt;         // the test's own thread, while it is not the one under test

static bool allowed(void)
{
    if (exempt)
        return true;
    atomic_fetch_add(&n_allocations, 1);
    if (atomic_load(&fail_after) >= 0 && atomic_fetch_sub(&fail_after, 1) == 0) {
        errno = ENOMEM;
        return false;
    }
    return true;
}

void *malloc(size_t bytes)
{
    return allowed() ? __libc_malloc(bytes) : NULL;
}

void *calloc(size_t n, size_t size)
{
    return allowed() ? __libc_calloc(n, size) : NULL;
}

void *realloc(void *memory, size_t bytes)
{
    return allowed() ? __libc_realloc(memory, bytes) : NULL;
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
    return allowed() ? __libc_memalign(alignment, bytes) : NULL;
}

void free(void *memory)
{
    atomic_fetch_add(&n_frees, memory != NULL);
    __libc_free(memory);
}

// Everything goes on at once: prefill in chunks, decodes, forks, preemption, logprobs, parking; nothing is allocated.
START_TEST(test_steps_allocate_nothing)
{
    exempt = true;
    struct engine_options o = options_default();
    o.backend = _i == 0 ? "fake" : "fake-async";
    o.kv_cache_memory_bytes = 60 * 256;
    o.max_model_len = 320;
    struct engine *engine = engine_begin(&o);
    enum { N = 40 };
    struct job *jobs = calloc(N, sizeof *jobs);
    seed_print("allocations", _i);
    for (int32_t i = 0; i < N; i++)
        job_random(&jobs[i]);
    atomic_store(&n_allocations, 0);
    for (int32_t i = 0; i < N; i++)
        job_submit(engine, &jobs[i]);
    struct engine_stats stats;
    jobs_read_all(engine, jobs, N);
    wait_until_idle(engine, &stats);
    ck_assert_uint_gt(stats.n_steps, 50);
    ck_assert_int_eq(atomic_load(&n_allocations), 0); // by any thread but this one: the engine's
    exempt = false;
    void *volatile counted = malloc(1);
    ck_assert_int_eq(atomic_load(&n_allocations), 1); // the counter does count
    free(counted);
    engine_destroy(engine);
    free(jobs);
}
END_TEST

// Fails the nth allocation of creation and start, for every n: a refusal each time, and nothing kept.
START_TEST(test_creation_survives_every_failure)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:len=256,groups=2";
    o.backend = "fake";
    int32_t n_failed = 0;
    for (long n = 0;; n++) {
        struct engine *engine;
        struct error e = {0};
        atomic_store(&n_allocations, 0);
        atomic_store(&n_frees, 0);
        atomic_store(&fail_after, n);
        int rc = engine_create(&engine, &o, &e);
        if (rc == 0)
            rc = engine_start(engine, &e);
        bool reached = atomic_exchange(&fail_after, -1) < 0;
        engine_destroy(engine);
        long n_kept = atomic_load(&n_allocations) - reached - atomic_load(&n_frees); // the one that failed gave nothing
        if (!reached) {
            ck_assert_int_eq(rc, 0);
            break;
        }
        n_failed++;
        ck_assert_msg(rc == ERR_NOMEM, "allocation %ld failed, but the answer was %d: %s", n, rc, e.message);
        ck_assert_uint_gt(strlen(e.message), 10);
        ck_assert_int_eq(n_kept, 0);
    }
    ck_assert_int_ge(n_failed, 10);
}
END_TEST

START_TEST(test_submission_survives_every_failure)
{
    exempt = true;
    struct engine_options o = options_default();
    struct engine *engine = engine_begin(&o);
    exempt = false;
    int32_t prompt[100] = {1, 2, 3};
    for (long n = 0;; n++) {
        struct error e = {0};
        atomic_store(&fail_after, n);
        struct request *r = request_create(prompt, 100);
        int rc = ERR_NOMEM;
        if (r != NULL) {
            request_params(r)->n = 3;
            request_params(r)->logprobs = request_params(r)->prompt_logprobs = 2;
            rc = engine_submit(engine, r, &e);
        }
        bool reached = atomic_exchange(&fail_after, -1) < 0;
        ck_assert_int_eq(rc, reached ? ERR_NOMEM : 0);
        if (rc != 0 && r != NULL)
            ck_assert_int_eq(engine_submit(engine, r, &e), 0); // the same request, once there is memory
        while (r != NULL && !request_done(r))
            wait_for_news(engine);
        if (r != NULL)
            request_release(r);
        if (!reached)
            break;
    }
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    ck_assert_int_eq(stats.n_free_blocks, stats.n_blocks);
    engine_destroy(engine);
}
END_TEST
#endif

START_TEST(test_default_cache_size)
{
    struct engine_options o = options_default();
    struct engine *engine;
    struct error e;
    o.max_num_seqs = 100;
    o.max_num_batched_tokens = 100;
    o.model_dir = "fake:len=1000000"; // all sequences at their longest want 1.6 GB, the device has 1 GiB
    ck_assert_int_eq(engine_create(&engine, &o, &e), 0);
    const struct engine_plan *p = engine_plan_get(engine);
    size_t fixed = p->weights_bytes + p->workspace_bytes + p->history_bytes + p->scratch_bytes;
    size_t half = (p->memory_bytes - fixed) / 2;
    ck_assert_uint_le(p->kv_cache_bytes, half);
    ck_assert_uint_ge(p->kv_cache_bytes, half / 100 * 95); // the tables are counted for a few blocks more
    ck_assert_uint_eq(p->kv_cache_bytes, (size_t)p->kv_groups[0].n_blocks * p->kv_groups[0].block_bytes);
    engine_destroy(engine);
}
END_TEST

// Two groups, one windowed: one longest sequence fits, and beside it as many equal ones as may run.
START_TEST(test_windowed_layers_have_room_for_many)
{
    struct engine_options o = options_default();
    struct engine *engine;
    struct error e;
    o.max_num_seqs = 50, o.max_num_batched_tokens = 64, o.block_size = 16;
    o.model_dir = "fake:len=20000,groups=2,window=40";
    size_t longest = 0, block = 0;
    for (int32_t round = 0; round < 2; round++) { // the first tells the sizes
        o.kv_cache_memory_bytes = round == 0 ? 1 << 26 : longest + 49 * 10 * block + block / 2;
        ck_assert_int_eq(engine_create(&engine, &o, &e), 0);
        const struct engine_plan *p = engine_plan_get(engine);
        ck_assert(p->n_kv_groups == 2 && p->kv_groups[0].window == 0 && p->kv_groups[1].window == 40);
        block = p->kv_groups[0].block_bytes + p->kv_groups[1].block_bytes;
        longest = 1250 * p->kv_groups[0].block_bytes + 8 * p->kv_groups[1].block_bytes;
        ck_assert_uint_le(p->kv_cache_bytes, o.kv_cache_memory_bytes);
        ck_assert_uint_ge(p->kv_cache_bytes, o.kv_cache_memory_bytes - block * 51);
        // 160 tokens each are 10 blocks of one group, and no more than 8 of the other
        if (round == 1) ck_assert_int_ge(p->kv_groups[0].n_blocks, 1250 + 49 * 10);
        ck_assert_int_ge(p->kv_groups[1].n_blocks, 8 * 50);
        engine_destroy(engine);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("engine_memory");
    TCase *tc = tcase_create("engine_memory");
    tcase_set_timeout(tc, 60);
#ifdef COUNTING
    tcase_add_loop_test(tc, test_steps_allocate_nothing, 0, 2);
    tcase_add_test(tc, test_creation_survives_every_failure);
    tcase_add_test(tc, test_submission_survives_every_failure);
#endif
    tcase_add_test(tc, test_default_cache_size);
    tcase_add_test(tc, test_windowed_layers_have_room_for_many);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
