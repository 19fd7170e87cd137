/* A request's life on the engine: limits, order, cancellation, slow readers, faults, shutdown. On tests/fake_model.c. */
#include "tests/engine_jobs.h"
#include "engine/inbox.h"

#include <sys/resource.h>

// ---- the queue ------------------------------------------------------------------------------------------------------

// What a request's choices will take is there while it waits, so that it counts.
START_TEST(test_waiting_memory_is_bounded)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:us=2000,len=700000";
    o.max_num_seqs = 1;
    o.kv_cache_memory_bytes = 64 << 20;
    struct engine *engine = engine_begin(&o);
    struct request *running = request_of(120, 10000), *waiting[3];
    submit(engine, running);
    wait_running(engine);
    for (int32_t i = 0; i < 3; i++) {
        waiting[i] = request_of(10, 600000);
        request_params(waiting[i])->n = 128; // some 380 MB
    }
    submit(engine, waiting[0]);
    submit(engine, waiting[1]);
    struct error e;
    ck_assert_int_eq(engine_submit(engine, waiting[2], &e), ERR_BUSY);
    ck_assert_msg(strstr(e.message, "MiB for their answers"), "%s", e.message);
    request_cancel(waiting[0]);
    wait_done(engine, waiting[0]);
    submit(engine, waiting[2]);
    for (int32_t i = 1; i < 3; i++) request_cancel(waiting[i]);
    request_cancel(running);
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    for (int32_t i = 0; i < 3; i++) request_release(waiting[i]);
    request_release(running);
    engine_destroy(engine);
}
END_TEST

START_TEST(test_queue_is_bounded)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:us=2000";
    o.max_num_seqs = 1;
    o.max_queue_requests = 3;
    o.max_queue_tokens = 100;
    struct engine *engine = engine_begin(&o);
    struct request *running = request_of(120, 1000), *waiting[3];
    submit(engine, running); // longer than the queue's tokens, but alone
    wait_running(engine);
    for (int32_t i = 0; i < 3; i++)
        submit(engine, waiting[i] = request_of(10, 1));
    expect_refusal(engine, request_of(1, 1), ERR_BUSY, "3 requests are waiting");
    request_cancel(waiting[2]);
    wait_done(engine, waiting[2]);
    ck_assert_int_eq(finish_of(waiting[2], 0), FINISH_CANCELLED);
    struct request *again = request_of(90, 1);
    struct error e;
    ck_assert_int_eq(engine_submit(engine, again, &e), ERR_BUSY);
    ck_assert_ptr_nonnull(strstr(e.message, "hold 20 prompt tokens; with 90 more they exceed 100"));
    ck_assert(request_retry_after(again) >= 1 && request_retry_after(again) <= 60);
    request_cancel(running);
    wait_done(engine, waiting[1]);
    submit(engine, again); // the caller still owned it
    wait_done(engine, again);
    ck_assert_int_eq(finish_of(again, 0), FINISH_LENGTH);
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    ck_assert_int_eq(stats.n_waiting, 0);
    ck_assert_int_eq(stats.n_waiting_tokens, 0);
    ck_assert(stats.n_refused_full == 2 && stats.n_refused_wait == 0 && stats.n_expired == 0);
    for (int32_t i = 0; i < 3; i++)
        request_release(waiting[i]);
    request_release(running);
    request_release(again);
    engine_destroy(engine);
}
END_TEST

// Who was not begun in time is told so and when to come again; a call's further prompts wait for as long as it takes.
START_TEST(test_queue_timeout)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:us=1000";
    o.max_num_seqs = 1;
    o.queue_timeout = 0.05;
    struct engine *engine = engine_begin(&o);
    struct request *running = request_of(10, 400), *further = request_of(10, 1), *late[2] = {request_of(10, 1), request_of(11, 1)};
    request_share_params(further, running);
    submit(engine, running);
    wait_running(engine);
    submit(engine, further);
    for (int32_t i = 0; i < 2; i++) submit(engine, late[i]);
    for (int32_t i = 0; i < 2; i++) {
        wait_done(engine, late[i]);
        struct request_times times = request_times_get(late[i]);
        ck_assert_int_eq(finish_of(late[i], 0), FINISH_EXPIRED);
        ck_assert(times.scheduled == 0 && times.finished - times.submitted >= 0.05);
        ck_assert(request_retry_after(late[i]) >= 1 && request_retry_after(late[i]) <= 60);
        request_release(late[i]);
    }
    ck_assert(!request_done(running) && !request_done(further));
    wait_done(engine, further);
    ck_assert_int_eq(finish_of(further, 0), FINISH_LENGTH);
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    ck_assert(stats.n_expired == 2 && stats.n_waiting == 0 && stats.n_free_blocks == stats.n_blocks);
    request_release(running);
    request_release(further);
    engine_destroy(engine);
}
END_TEST

// ---- order ----------------------------------------------------------------------------------------------------------

START_TEST(test_priorities_and_arrival)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:us=1000";
    o.max_num_seqs = 1;
    struct engine *engine = engine_begin(&o);
    static const int32_t priority[] = {5, 5, 0, 0, -1};
    static const int32_t order[] = {4, 2, 3, 0, 1}; // by first come within a priority; 0 is displaced while running
    struct request *r[5];
    for (int32_t i = 0; i < 5; i++) {
        r[i] = request_of(20, i == 0 ? 300 : 30); // long enough to be seen running on a busy machine
        request_params(r[i])->priority = priority[i];
        submit(engine, r[i]);
        if (i == 0)
            wait_running(engine);
    }
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    for (int32_t i = 1; i < 5; i++)
        ck_assert(request_times_get(r[order[i - 1]]).finished < request_times_get(r[order[i]]).finished);
    ck_assert_uint_eq(stats.n_preemptions, 1);
    for (int32_t i = 0; i < 5; i++) {
        struct request_times t = request_times_get(r[i]);
        ck_assert(t.submitted <= t.scheduled && t.scheduled < t.first_token && t.first_token < t.finished);
        ck_assert_int_eq(finish_of(r[i], 0), FINISH_LENGTH);
        request_release(r[i]);
    }
    engine_destroy(engine);
}
END_TEST

// What has waited for longer than a step of priority is worth goes before what comes with a better one.
START_TEST(test_priorities_age)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:us=1000";
    o.max_num_seqs = 1;
    o.priority_aging = 0.05;
    struct engine *engine = engine_begin(&o);
    static const int32_t priority[] = {0, 1, 0, -100};
    static const int32_t order[] = {3, 1, 2}; // 0 is running, and is displaced by 3 alone
    struct request *r[4];
    for (int32_t i = 0; i < 4; i++) {
        r[i] = request_of(20, i == 0 ? 400 : 5);
        request_params(r[i])->priority = priority[i];
        submit(engine, r[i]);
        if (i == 0)
            wait_running(engine);
        if (i == 1)
            nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    }
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    for (int32_t i = 1; i < 3; i++)
        ck_assert(request_times_get(r[order[i - 1]]).finished < request_times_get(r[order[i]]).finished);
    ck_assert_uint_eq(stats.n_preemptions, 1);
    for (int32_t i = 0; i < 4; i++)
        request_release(r[i]);
    engine_destroy(engine);
}
END_TEST

// A long prompt is computed in chunks beside decodes: nobody's tokens stop while it comes in.
START_TEST(test_long_prompt_does_not_block_decodes)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:us=500";
    o.max_num_batched_tokens = 16;
    struct engine *engine = engine_begin(&o);
    struct request *decoding = request_of(5, 200), *prompt = request_of(150, 1);
    submit(engine, decoding);
    while (request_available(decoding, 0) < 10)
        wait_for_news(engine);
    int32_t before = request_available(decoding, 0);
    submit(engine, prompt);
    wait_done(engine, prompt);
    ck_assert_int_ge(request_available(decoding, 0) - before, 150 / 15 - 1);
    request_release(prompt);
    request_release(decoding);
    engine_destroy(engine);
}
END_TEST

// ---- ends -----------------------------------------------------------------------------------------------------------

// A prompt whose log-probabilities are wanted takes every row of logits that a step has for them, for many steps.
START_TEST(test_prompt_logprobs_do_not_block_admission)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:us=5000"; // a step
    o.max_num_batched_tokens = 512;
    struct engine *engine = engine_begin(&o);
    struct request *running = request_of(5, 50), *scored = request_of(JOB_MAX_PROMPT, 1), *quick = request_of(5, 1);
    request_params(scored)->prompt_logprobs = 1;
    submit(engine, running);
    submit(engine, scored);
    submit(engine, quick);
    wait_done(engine, scored);
    wait_done(engine, quick);
    ck_assert(request_times_get(quick).finished < request_times_get(scored).finished);
    request_release(running);
    request_release(scored);
    request_release(quick);
    engine_destroy(engine);
}
END_TEST

START_TEST(test_stop_ids_and_min_tokens)
{
    struct engine_options o = options_default();
    o.backend = _i == 0 ? "fake" : "fake-async";
    struct engine *engine = engine_begin(&o);
    struct token_out said[50], out[50];
    struct request *r = request_of(9, 50);
    submit(engine, r);
    wait_done(engine, r);
    ck_assert_int_eq(request_read(r, 0, said, 50), 50);
    int32_t stop_id = said[20].id, first = 0, stopped_by;
    while (said[first].id != stop_id)
        first++;
    request_release(r);
    for (int32_t round = 0; round < 2; round++) {
        r = request_of(9, 50);
        request_params(r)->stop_token_ids = malloc(sizeof stop_id);
        *request_params(r)->stop_token_ids = stop_id;
        request_params(r)->n_stop_token_ids = 1;
        request_params(r)->min_tokens = round == 0 ? 0 : first + 5;
        submit(engine, r);
        wait_done(engine, r);
        int32_t n = request_read(r, 0, out, 50);
        if (round == 0) {
            ck_assert_int_eq(n, first + 1); // the stop token is the last one
            ck_assert_int_eq(choice_finish(r, 0, &stopped_by), FINISH_STOP);
            ck_assert_int_eq(stopped_by, stop_id);
        } else {
            for (int32_t i = 0; i < first + 5; i++)
                ck_assert_int_ne(out[i].id, stop_id);
            ck_assert_int_ge(n, first + 5);
        }
        request_release(r);
    }
    engine_destroy(engine);
}
END_TEST

START_TEST(test_no_tokens_wanted)
{
    struct engine_options o = options_default();
    struct engine *engine = engine_begin(&o);
    struct request *r = request_of(150, 0);
    request_params(r)->n = 2;
    submit(engine, r);
    wait_done(engine, r);
    ck_assert_int_eq(finish_of(r, 1), FINISH_LENGTH);
    ck_assert_int_eq(request_available(r, 0), 0);
    request_release(r);
    r = request_of(150, 0);
    request_params(r)->prompt_logprobs = 2;
    submit(engine, r);
    wait_done(engine, r);
    const struct token_out *entries = request_prompt_logprobs(r);
    ck_assert_int_eq(entries[0].n_top, 0);
    for (int32_t i = 0; i < 150; i++) {
        ck_assert_int_eq(entries[i].id, request_prompt(r)[i]);
        ck_assert(i == 0 || (entries[i].n_top == 2 && entries[i].top[0].logprob >= entries[i].top[1].logprob &&
                             entries[i].logprob <= entries[i].top[0].logprob));
    }
    ck_assert_int_eq(finish_of(r, 0), FINISH_LENGTH);
    request_release(r);
    engine_destroy(engine);
}
END_TEST

// Cancelled, stopped or let go of at random moments: queued, prefilling, decoding, between launch and commit, ended.
START_TEST(test_cancel_at_any_time)
{
    seed_print("cancel", _i);
    struct engine_options o = options_default();
    o.model_dir = "fake:us=20";
    o.backend = _i == 0 ? "fake" : "fake-async";
    o.max_num_seqs = 4;
    o.kv_cache_memory_bytes = 40 * 256;
    struct engine *engine = engine_begin(&o);
    enum { N = 150 };
    struct request *r[N];
    for (int32_t i = 0; i < N; i++) {
        r[i] = request_of(1 + rand() % 150, 1 + rand() % 100);
        request_params(r[i])->n = 1 + rand() % 6;
        if (rand() % 4 == 0)
            request_params(r[i])->prompt_logprobs = 1;
        submit(engine, r[i]);
        int32_t victim = rand() % (i + 1);
        if (rand() % 3 == 0)
            nanosleep(&(struct timespec){.tv_nsec = rand() % 1000000}, NULL);
        if (r[victim] == NULL)
            continue;
        switch (rand() % 4) {
        case 0:
            request_cancel(r[victim]);
            break;
        case 1:
            choice_stop(r[victim], rand() % request_params(r[victim])->n);
            break;
        case 2:
            request_release(r[victim]);
            r[victim] = NULL;
            break;
        default:
            break;
        }
    }
    for (int32_t i = 0; i < N; i++) {
        if (r[i] == NULL)
            continue;
        if (rand() % 2)
            request_cancel(r[i]);
        wait_done(engine, r[i]);
        request_release(r[i]);
    }
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    ck_assert_int_eq(stats.n_free_blocks, stats.n_blocks);
    ck_assert_int_eq(stats.n_waiting, 0);
    ck_assert_int_eq(stats.n_waiting_tokens, 0);
    engine_destroy(engine);
}
END_TEST

// A cancellation is heard even if it comes before the engine has seen the request, or before its submission.
START_TEST(test_cancel_at_once)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:len=100000,us=1000,window=20";
    struct engine *engine = engine_begin(&o);
    for (int32_t i = 0; i < 200; i++) {
        struct request *r = request_of(5, 50000);
        if (i % 4 == 0)
            request_cancel(r);
        submit(engine, r);
        if (i % 4 > 1)
            request_cancel(r);
        if (i % 4 == 1)
            choice_stop(r, 0);
        wait_done(engine, r);
        ck_assert_int_eq(finish_of(r, 0), i % 4 == 1 ? FINISH_STOP : FINISH_CANCELLED);
        request_release(r);
    }
    engine_destroy(engine);
}
END_TEST

// Stopping choice 0 before it has computed the prompt must not strand the choices that wait for it.
START_TEST(test_first_choice_stopped_early)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:us=1000";
    o.max_num_batched_tokens = 8;
    struct engine *engine = engine_begin(&o);
    struct request *r = request_of(150, 5);
    request_params(r)->n = 3;
    submit(engine, r);
    wait_running(engine);
    choice_stop(r, 2); // not queued yet
    choice_stop(r, 0);
    wait_done(engine, r);
    ck_assert_int_eq(finish_of(r, 0), FINISH_STOP);
    ck_assert_int_eq(finish_of(r, 1), FINISH_LENGTH);
    ck_assert_int_eq(finish_of(r, 2), FINISH_STOP);
    request_release(r);
    r = request_of(150, 2000);
    request_params(r)->n = 2;
    submit(engine, r);
    wait_running(engine);
    choice_stop(r, 1); // heard while choice 1 is on no list; it must count once it is
    while (request_available(r, 0) < 5)
        wait_for_news(engine);
    ck_assert_int_eq(finish_of(r, 1), FINISH_STOP);
    request_release(r);
    engine_destroy(engine);
}
END_TEST

// ---- slow readers ---------------------------------------------------------------------------------------------------

enum { RING = 4096 }; // the most tokens a ring holds

START_TEST(test_slow_reader)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:len=6000,window=20";
    o.backend = _i == 0 ? "fake" : "fake-async";
    o.slow_client_timeout = 0.1;
    struct engine *engine = engine_begin(&o);
    struct request *slow = request_of(5, 5000), *late = request_of(5, 5000), *quick = request_of(5, 3000);
    submit(engine, slow);
    submit(engine, late);
    submit(engine, quick);
    static int32_t late_ids[5000], n = 0;
    struct token_out out[100];
    wait_done(engine, quick); // a full ring holds up nobody else
    ck_assert_int_eq(finish_of(quick, 0), FINISH_LENGTH);
    while (request_available(late, 0) < RING)
        wait_for_news(engine);
    while (choice_finish(late, 0, NULL) == FINISH_NONE) { // begins late, takes little at a time, but gets everything
        int32_t got = request_read(late, 0, out, 100);
        for (int32_t i = 0; i < got; i++)
            late_ids[n++] = out[i].id;
        nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
    }
    ck_assert_int_eq(n, 5000);
    ck_assert_int_eq(choice_finish(late, 0, NULL), FINISH_LENGTH);
    wait_done(engine, slow); // never read
    ck_assert_int_eq(request_available(slow, 0), RING);
    for (int32_t at = 0, got; (got = request_read(slow, 0, out, 100)) > 0; at += got) {
        for (int32_t i = 0; i < got; i++)
            ck_assert(out[i].id == late_ids[at + i]);
    }
    ck_assert_int_eq(choice_finish(slow, 0, NULL), FINISH_SLOW);
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    ck_assert_int_eq(stats.n_free_blocks, stats.n_blocks);
    request_release(slow);
    request_release(late);
    request_release(quick);
    engine_destroy(engine);
}
END_TEST

// Who has nothing to do but to wait for a slow reader is not stuck, however long it waits.
START_TEST(test_parked_is_not_stuck)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:len=6000,window=20";
    o.slow_client_timeout = 3; // seconds
    struct engine *engine = engine_begin(&o);
    struct request *r = request_of(5, 5000);
    submit(engine, r);
    while (request_available(r, 0) < RING)
        wait_for_news(engine);
    struct engine_stats before, after;
    wait_until_idle(engine, &before);
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    engine_stats_get(engine, &after);
    ck_assert(!request_done(r));
    ck_assert_int_eq(after.n_running, 0);
    ck_assert(after.last_beat > before.last_beat);
    ck_assert(after.device_seconds > 0 && after.weights_seconds > 0);
    request_release(r);
    engine_destroy(engine);
}
END_TEST

START_TEST(test_cancel_with_full_ring)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:len=6000,window=20";
    struct engine *engine = engine_begin(&o);
    struct request *r = request_of(5, 5000);
    request_params(r)->logprobs = 3;
    submit(engine, r);
    while (request_available(r, 0) < RING)
        wait_for_news(engine);
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL); // the engine sleeps by now
    request_cancel(r);
    wait_done(engine, r);
    ck_assert_int_eq(finish_of(r, 0), FINISH_CANCELLED);
    request_release(r);
    engine_destroy(engine);
}
END_TEST

// ---- windows --------------------------------------------------------------------------------------------------------

// What lies behind the window is freed: a generation of any length holds as many blocks as a short one.
START_TEST(test_window_holds_constant_memory)
{
    enum { WINDOW = 40, BLOCK = 16, N = 5000, MOST = (WINDOW + BLOCK - 1) / BLOCK + 1 };
    struct engine_options o = options_default();
    o.model_dir = "fake:len=6000,window=40,us=20"; // slow enough to be seen at work
    o.backend = _i == 0 ? "fake" : "fake-async";
    o.kv_cache_memory_bytes = 12 * 256; // bytes; the whole text would take 313 blocks
    struct engine *engine = engine_begin(&o);
    struct request *r = request_of(5, N);
    submit(engine, r);
    struct token_out out[100];
    struct engine_stats stats;
    int32_t n = 0, n_looks = 0;
    while (choice_finish(r, 0, NULL) == FINISH_NONE) {
        wait_for_news(engine);
        n += request_read(r, 0, out, 100);
        engine_stats_get(engine, &stats);
        n_looks += stats.n_running == 1 && n > WINDOW;
        ck_assert_int_eq(stats.n_blocks, 12);
        ck_assert_msg(stats.n_blocks - stats.n_free_blocks <= MOST, "%d blocks are held after %d tokens",
                      stats.n_blocks - stats.n_free_blocks, n);
    }
    ck_assert_int_eq(choice_finish(r, 0, NULL), FINISH_LENGTH);
    ck_assert_int_eq(n, N);
    ck_assert_int_gt(n_looks, 0);
    ck_assert_uint_eq(stats.n_preemptions, 0);
    request_release(r);
    engine_destroy(engine);
}
END_TEST

// ---- faults ---------------------------------------------------------------------------------------------------------

START_TEST(test_nan_fails_one_sequence)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:nan=62";
    o.backend = _i == 0 ? "fake" : "fake-async";
    struct engine *engine = engine_begin(&o);
    int32_t prompt[20] = {62, 62, 62}; // amid a prompt it does no harm: nobody asks for those logits
    struct request *good = request_create(prompt, 20);
    request_params(good)->logit_bias = calloc(1, sizeof(struct logit_bias));
    int32_t *allowed = malloc(2 * sizeof *allowed);
    allowed[0] = 1;
    allowed[1] = 2;
    request_params(good)->allowed_token_ids = allowed;
    request_params(good)->n_allowed_token_ids = 2;
    prompt[19] = 62;
    struct request *bad = request_create(prompt, 20);
    request_params(bad)->n = 2;
    submit(engine, good);
    submit(engine, bad);
    wait_done(engine, good);
    wait_done(engine, bad);
    ck_assert_int_eq(finish_of(good, 0), FINISH_LENGTH);
    for (int32_t c = 0; c < 2; c++)
        ck_assert_int_eq(finish_of(bad, c), FINISH_ERROR);
    ck_assert_str_eq(request_error(bad), "the model gave no finite logit at position 20");
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    ck_assert_ptr_null(stats.failure);
    ck_assert_int_eq(stats.n_free_blocks, stats.n_blocks);
    request_release(good);
    request_release(bad);
    engine_destroy(engine);
}
END_TEST

START_TEST(test_device_failure)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:us=100";
    o.backend = _i % 2 == 0 ? "fake" : "fake-async";
    o.max_num_seqs = 3;
    struct engine *engine = engine_begin(&o);
    struct request *r[6];
    for (int32_t i = 0; i < 6; i++) {
        r[i] = request_of(10, 1000);
        request_params(r[i])->n = 1 + i % 3;
        submit(engine, r[i]);
    }
    struct engine_stats stats;
    do
        engine_stats_get(engine, &stats);
    while (stats.n_running < 3);
    atomic_store(_i < 2 ? &fake_fail_forward : &fake_fail_sample, 20);
    for (int32_t i = 0; i < 6; i++) {
        wait_done(engine, r[i]);
        ck_assert_int_eq(finish_of(r[i], 0), FINISH_ERROR);
        ck_assert_msg(strstr(request_error(r[i]), "broke, as told") != NULL, "%s", request_error(r[i]));
        ck_assert_msg(strncmp(request_error(r[i]), "step of 3 tokens, 3 sequences", 29) == 0, "%s", request_error(r[i]));
    }
    expect_refusal(engine, request_of(3, 3), ERR_DEVICE, "broke, as told");
    wait_until_idle(engine, &stats);
    ck_assert_ptr_nonnull(strstr(stats.failure, "broke, as told"));
    engine_destroy(engine);
    for (int32_t i = 0; i < 6; i++)
        request_release(r[i]);
}
END_TEST

// ---- shutdown, idleness ---------------------------------------------------------------------------------------------

START_TEST(test_drain)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:us=500";
    struct engine *engine = engine_begin(&o);
    struct request *r = request_of(10, 50);
    submit(engine, r);
    engine_drain(engine);
    expect_refusal(engine, request_of(3, 3), ERR_SHUTDOWN, "shutting down");
    wait_done(engine, r);
    ck_assert_int_eq(request_available(r, 0), 50);
    ck_assert_int_eq(finish_of(r, 0), FINISH_LENGTH);
    request_release(r);
    engine_destroy(engine);
}
END_TEST

START_TEST(test_destroy_while_running)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:us=200";
    o.backend = _i == 0 ? "fake" : "fake-async";
    o.max_num_seqs = 2;
    struct engine *engine = engine_begin(&o);
    struct request *r[5];
    for (int32_t i = 0; i < 5; i++) {
        r[i] = request_of(20, 2000);
        request_params(r[i])->n = 2;
        submit(engine, r[i]);
    }
    while (request_available(r[0], 0) < 5)
        wait_for_news(engine);
    request_release(r[4]);
    engine_destroy(engine);
    for (int32_t i = 0; i < 4; i++) {
        struct token_out out[1];
        ck_assert(request_done(r[i]));
        ck_assert(i > 0 || request_read(r[i], 0, out, 1) == 1);
        ck_assert_int_eq(finish_of(r[i], 0), FINISH_CANCELLED);
        request_cancel(r[i]);
        request_release(r[i]);
    }
}
END_TEST

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

START_TEST(test_idle_costs_nothing)
{
    struct engine_options o = options_default();
    struct engine *engine = engine_begin(&o);
    struct request *r = request_of(10, 50);
    submit(engine, r);
    wait_done(engine, r);
    struct engine_stats before, after;
    wait_until_idle(engine, &before);
    double cpu = cpu_seconds();
    nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
    engine_stats_get(engine, &after);
    ck_assert(cpu_seconds() - cpu < 0.01);
    ck_assert_uint_eq(before.n_steps, after.n_steps);
    ck_assert(after.last_beat > before.last_beat); // an idle engine is not a stuck one
    request_release(r);
    engine_destroy(engine);
}
END_TEST

// The first step after a rest counts as work from its launch on, not from its end: it may never end.
START_TEST(test_first_step_is_work)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:us=900000"; // a step takes so long
    struct engine *engine = engine_begin(&o);
    struct request *r = request_of(10, 1);
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    submit(engine, r);
    do
        engine_stats_get(engine, &stats);
    while (stats.n_waiting > 0);
    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    engine_stats_get(engine, &stats);
    ck_assert(!request_done(r));
    ck_assert(stats.busy);
    ck_assert(now_seconds() - stats.last_beat > 0.03);
    wait_done(engine, r);
    request_release(r);
    engine_destroy(engine);
}
END_TEST

// A long step is seen to get on from layer to layer; one of few tokens is one wait.
START_TEST(test_long_step_beats)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:wait_us=300000";
    o.max_num_batched_tokens = 4096;
    const int32_t n_prompt = _i ? 3000 : 100, n_waits = _i ? 3 : 1; // 2 layers and the end
    struct engine *engine = engine_begin(&o);
    int32_t prompt[3000];
    for (int32_t i = 0; i < n_prompt; i++)
        prompt[i] = 1 + i % 60;
    struct request *r = request_create(prompt, n_prompt);
    request_params(r)->max_tokens = 1;
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    double begin = now_seconds(), longest = 0;
    submit(engine, r);
    while (!request_done(r)) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        engine_stats_get(engine, &stats);
        longest = fmax(longest, now_seconds() - stats.last_beat);
    }
    ck_assert(now_seconds() - begin > 0.299 * n_waits);
    ck_assert(longest > 0.25);
    ck_assert(longest < 0.55);
    request_release(r);
    engine_destroy(engine);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("engine_life");
    TCase *tc = tcase_create("engine_life");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, test_queue_is_bounded);
    tcase_add_test(tc, test_waiting_memory_is_bounded);
    tcase_add_test(tc, test_queue_timeout);
    tcase_add_test(tc, test_priorities_and_arrival);
    tcase_add_test(tc, test_priorities_age);
    tcase_add_test(tc, test_long_prompt_does_not_block_decodes);
    tcase_add_test(tc, test_prompt_logprobs_do_not_block_admission);
    tcase_add_loop_test(tc, test_stop_ids_and_min_tokens, 0, 2);
    tcase_add_test(tc, test_no_tokens_wanted);
    tcase_add_loop_test(tc, test_cancel_at_any_time, 0, 2);
    tcase_add_test(tc, test_cancel_at_once);
    tcase_add_test(tc, test_first_choice_stopped_early);
    tcase_add_loop_test(tc, test_slow_reader, 0, 2);
    tcase_add_test(tc, test_parked_is_not_stuck);
    tcase_add_test(tc, test_cancel_with_full_ring);
    tcase_add_loop_test(tc, test_window_holds_constant_memory, 0, 2);
    tcase_add_loop_test(tc, test_nan_fails_one_sequence, 0, 2);
    tcase_add_loop_test(tc, test_device_failure, 0, 4);
    tcase_add_test(tc, test_drain);
    tcase_add_loop_test(tc, test_destroy_while_running, 0, 2);
    tcase_add_test(tc, test_idle_costs_nothing);
    tcase_add_test(tc, test_first_step_is_work);
    tcase_add_loop_test(tc, test_long_step_beats, 0, 2);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
