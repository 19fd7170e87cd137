/* The engine as its caller sees it, on tests/fake_model.c: what comes out never depends on what else goes on. */
#include <check.h>
#include <poll.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "engine/engine.h"
#include "tests/fake_model.h"

enum { MAX_OUT = 8192 };

static struct engine_options options_default(void)
{
    return (struct engine_options){
        .model_dir = "fake:", .backend = "fake", .prefix_caching = true, .max_num_seqs = 8,
        .max_num_batched_tokens = 64, .block_size = 16, .max_queue_requests = 1000, .max_queue_tokens = 1000000,
        .max_logprobs = 5, .slow_client_timeout = 30, .seed = 1,
    };
}

static struct engine *start(const struct engine_options *o)
{
    struct engine *engine;
    struct error e = {0};
    ck_assert_msg(engine_create(&engine, o, &e) == 0, "%s", e.message);
    ck_assert_msg(engine_start(engine, &e) == 0, "%s", e.message);
    return engine;
}

// Reads a choice to its end.
static enum finish_reason read_all(struct engine *engine, struct request *r, int32_t choice, int32_t *out, int32_t *n)
{
    struct token_out tokens[64];
    enum finish_reason reason;
    *n = 0;
    for (;;) {
        int32_t got = request_read(r, choice, tokens, 64);
        for (int32_t i = 0; i < got; i++)
            out[(*n)++] = tokens[i].id;
        if (got == 0 && (reason = choice_finish(r, choice, NULL)) != FINISH_NONE)
            return reason;
        uint64_t count;
        struct pollfd p = {engine_event_fd(engine), POLLIN, 0};
        if (got == 0 && poll(&p, 1, 1) > 0)
            ck_assert(read(p.fd, &count, sizeof count) <= 8);
    }
}

START_TEST(test_greedy)
{
    struct engine_options o = options_default();
    struct engine *engine = start(&o);
    int32_t prompt[40], out[MAX_OUT], again[MAX_OUT], n, n_again;
    for (int32_t i = 0; i < 40; i++)
        prompt[i] = i % 64;
    for (int32_t round = 0; round < 2; round++) {
        struct request *r = request_create(prompt, 40);
        request_params(r)->temperature = 0;
        request_params(r)->max_tokens = 100;
        request_params(r)->ignore_eos = true;
        struct error e = {0};
        ck_assert_msg(engine_submit(engine, r, &e) == 0, "%s", e.message);
        ck_assert_int_eq(read_all(engine, r, 0, round == 0 ? out : again, round == 0 ? &n : &n_again), FINISH_LENGTH);
        ck_assert_int_eq(request_cached_tokens(r), round == 0 ? 0 : 32);
        request_release(r);
    }
    ck_assert_int_eq(n, 100);
    ck_assert_mem_eq(out, again, 100 * sizeof *out);
    engine_destroy(engine);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("engine");
    TCase *tc = tcase_create("engine");
    tcase_add_test(tc, test_greedy);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
