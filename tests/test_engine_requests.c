/* What a request may ask of the engine: what is refused at once, and what its constraints do. On tests/fake_model.c. */
#include "tests/engine_jobs.h"

static int32_t *ids_of(const int32_t *ids, int32_t n)
{
    return memcpy(malloc((size_t)n * sizeof *ids), ids, (size_t)n * sizeof *ids);
}

// Only these ids, and not bad, or not bad twice in a row; EOS (0) ends it.
static struct request *constrained(int32_t n, const int32_t *allowed, bool twice, int32_t bad, int32_t min_tokens)
{
    struct request *r = request_of(3, 8);
    struct sampling_params *p = request_params(r);
    p->ignore_eos = false;
    p->min_tokens = min_tokens;
    p->allowed_token_ids = ids_of(allowed, n);
    p->n_allowed_token_ids = n;
    p->bad_word_ids = ids_of((int32_t[]){bad, bad}, 2);
    p->bad_word_offsets = ids_of((int32_t[]){0, twice ? 2 : 1}, 2);
    p->n_bad_words = 1;
    return r;
}

START_TEST(test_refusals)
{
    struct engine_options o = options_default();
    o.model_dir = "fake:len=400";
    o.kv_cache_memory_bytes = 8 * 256;
    struct engine *engine = engine_begin(&o);
    struct request *r;
    expect_refusal(engine, request_create(NULL, 0), ERR_INVALID, "empty");
    expect_refusal(engine, request_create((int32_t[]){1, 64}, 2), ERR_INVALID, "64 is outside");
    expect_refusal(engine, request_create((int32_t[]){-1}, 1), ERR_INVALID, "-1 is outside");
    expect_refusal(engine, request_of(100, 301), ERR_INVALID, "max_tokens: a prompt of 100");
    expect_refusal(engine, request_of(100, INT32_MAX), ERR_INVALID, "exceed the context");
    expect_refusal(engine, request_of(140, 1), ERR_INVALID, "prompt: a prompt of 140");
    expect_refusal(engine, request_of(100, 29), ERR_INVALID,
                   "max_tokens: a prompt of 100 tokens and max_tokens 29 need 9 KV blocks of 16 tokens; the cache has 8");
#define REFUSED(field, value, says) \
    r = request_of(3, 4); \
    request_params(r)->field = (value); \
    expect_refusal(engine, r, ERR_INVALID, says)
    REFUSED(n, 0, "n: 0 is");
    REFUSED(n, 129, "n: 129 is");
    REFUSED(max_tokens, -1, "max_tokens");
    REFUSED(min_tokens, 5, "min_tokens");
    REFUSED(temperature, -1.0f, "temperature");
    REFUSED(temperature, __builtin_nanf(""), "temperature");
    REFUSED(top_p, 0.0f, "top_p");
    REFUSED(min_p, 1.5f, "min_p");
    REFUSED(top_k, -1, "top_k");
    REFUSED(repetition_penalty, 0.0f, "repetition_penalty");
    REFUSED(frequency_penalty, 2.5f, "frequency_penalty");
    REFUSED(logprobs, 6, "logprobs: 6 is");
    REFUSED(prompt_logprobs, -2, "prompt_logprobs: -2 is");
#undef REFUSED
    r = request_of(3, 4);
    request_params(r)->stop_token_ids = calloc(1, sizeof(int32_t));
    request_params(r)->stop_token_ids[0] = 99;
    request_params(r)->n_stop_token_ids = 1;
    expect_refusal(engine, r, ERR_INVALID, "stop_token_ids: token id 99");
    r = request_of(3, 4);
    request_params(r)->logit_bias = calloc(1, sizeof(struct logit_bias));
    request_params(r)->logit_bias[0].id = -3;
    request_params(r)->n_logit_bias = 1;
    expect_refusal(engine, r, ERR_INVALID, "logit_bias: token id -3");
    expect_refusal(engine, constrained(2, (int32_t[]){0, 0}, false, 0, 1), ERR_INVALID, "allowed_token_ids: no token");
    expect_refusal(engine, constrained(2, (int32_t[]){5, 0}, false, 5, 1), ERR_INVALID, "allowed_token_ids: no token");
    r = constrained(1, (int32_t[]){0}, false, 5, 0); // may stop at once
    submit(engine, r);
    wait_done(engine, r);
    ck_assert_int_eq(finish_of(r, 0), FINISH_STOP);
    request_release(r);
    r = request_of(100, 28); // exactly the cache
    submit(engine, r);
    wait_done(engine, r);
    ck_assert_int_eq(finish_of(r, 0), FINISH_LENGTH);
    request_release(r);
    engine_destroy(engine);
}
END_TEST

START_TEST(test_plan_refuses_what_does_not_fit)
{
    struct engine_options o = options_default();
    struct engine *engine;
    struct error e = {0};
    o.kv_cache_memory_bytes = (size_t)1 << 31; // the fake device has 1 GiB
    ck_assert_int_eq(engine_create(&engine, &o, &e), ERR_NOMEM);
    ck_assert_msg(strstr(e.message, "KV cache 2.000") != NULL && strstr(e.message, "has 1.000 GiB") != NULL, "%s",
                  e.message);
    o.kv_cache_memory_bytes = 255;
    ck_assert_int_eq(engine_create(&engine, &o, &e), ERR_NOMEM);
    ck_assert_ptr_null(engine);
    o.kv_cache_memory_bytes = 0;
    ck_assert_int_eq(engine_create(&engine, &o, &e), 0);
    const struct engine_plan *p = engine_plan_get(engine);
    ck_assert_int_eq(p->kv_groups[0].n_blocks, 8 * 4096 / 16); // all sequences at their longest
    ck_assert_uint_eq(p->kv_cache_bytes, (size_t)p->kv_groups[0].n_blocks * 256);
    ck_assert_uint_eq(p->history_bytes, 8 * 4096 * 4);
    engine_destroy(engine);
    o.max_num_batched_tokens = 7;
    ck_assert_int_eq(engine_create(&engine, &o, &e), ERR_INVALID);
}
END_TEST

START_TEST(test_constraints_that_leave_nothing)
{
    struct engine_options o = options_default();
    o.backend = _i == 0 ? "fake" : "fake-async";
    struct engine *engine = engine_begin(&o);
    struct request *r = constrained(1, (int32_t[]){5}, true, 5, 0);
    struct token_out out[8];
    submit(engine, r);
    wait_done(engine, r);
    ck_assert_int_eq(request_read(r, 0, out, 8), 1);
    ck_assert_int_eq(out[0].id, 5);
    ck_assert_int_eq(choice_finish(r, 0, NULL), FINISH_BARRED);
    struct engine_stats stats;
    wait_until_idle(engine, &stats);
    ck_assert_ptr_null(stats.failure);
    ck_assert_int_eq(stats.n_free_blocks, stats.n_blocks);
    request_release(r);
    engine_destroy(engine);
}
END_TEST

// Arrays that several requests share live as long as the last of them, whoever lets go last.
START_TEST(test_shared_params)
{
    struct engine_options o = options_default();
    struct engine *engine = engine_begin(&o);
    struct request *r[4] = {constrained(2, (int32_t[]){5, 6}, false, 6, 0)};
    for (int32_t i = 1; i < 4; i++) {
        if (i < 3)
            submit(engine, r[i - 1]);
        r[i] = request_of(3 + i, 1);
        request_share_params(r[i], r[i == 3 ? 1 : i - 1]);
        ck_assert_ptr_eq(request_params(r[i])->allowed_token_ids, request_params(r[0])->allowed_token_ids);
    }
    request_release(r[0]);
    submit(engine, r[2]);
    request_release(r[3]); // never submitted
    for (int32_t i = 1; i < 3; i++) {
        struct token_out out[9];
        wait_done(engine, r[i]);
        ck_assert_int_eq(request_read(r[i], 0, out, 9), 8);
        for (int32_t k = 0; k < 8; k++)
            ck_assert_int_eq(out[k].id, 5);
    }
    request_release(r[1]);
    request_release(r[2]);
    engine_destroy(engine);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("engine_requests");
    TCase *tc = tcase_create("engine_requests");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, test_refusals);
    tcase_add_test(tc, test_plan_refuses_what_does_not_fit);
    tcase_add_loop_test(tc, test_constraints_that_leave_nothing, 0, 2);
    tcase_add_test(tc, test_shared_params);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
