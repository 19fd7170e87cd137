/* test_model.c: every checkpoint under tests/vectors, loaded as a user would load it, against PyTorch's logits. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/model_vectors.h"

static char cases[MAX_CASES][128]; // directories
static int n_cases;
static unsigned seed;

static void greedy_check(struct rig *r, const struct expected *x)
{
    static float logits[MAX_VOCAB];
    rig_step(r, x->ids, x->n_prompt, (int32_t[]){x->n_prompt - 1}, 1, logits);
    for (int32_t i = x->n_prompt; i < x->n_ids; i++) {
        int32_t id = argmax(logits, x->vocab_size);
        ck_assert_msg(id == x->ids[i], "token %d: %d instead of %d", i - x->n_prompt, id, x->ids[i]);
        rig_step(r, &id, 1, (int32_t[]){0}, 1, logits);
    }
}

static void vectors_check(const char *dir, int32_t block_size, bool reference_attention, const char *isa)
{
    static struct expected x;
    static float whole[MAX_ROWS][MAX_VOCAB], chunked[MAX_ROWS][MAX_VOCAB];
    expected_read(&x, dir);
    struct rig r;
    rig_init(&r, &(struct rig_options){.dir = dir, .max_model_len = x.max_model_len, .max_tokens = x.n_ids,
                                       .max_len = x.n_ids, .block_size = block_size, .isa = isa,
                                       .reference_attention = reference_attention, .seed = seed});
    double limit = r.info->dtype == DTYPE_BF16 ? 1e-2 : r.info->dtype == DTYPE_F16 ? 2e-3 : 1e-4, worst = 0, squares = 0;
    ck_assert_int_eq(r.info->vocab_size, x.vocab_size);
    teacher_force(&r, &x, 0, whole);
    for (int32_t i = 0; i < x.n_rows; i++) {
        double d = distance(whole[i], x.logits[i], x.vocab_size);
        if (r.info->dtype != DTYPE_BF16)
            ck_assert_msg(d <= limit, "%s: row %d is %.3g away, more than %.3g", dir, x.rows[i], d, limit);
        worst = fmax(worst, d);
        squares += d * d;
    }
    // What is rounded to BF16 errs by chance, and the worst of so few rows is chance: PyTorch's own is 0.006 to 0.012 away.
    double mean = sqrt(squares / x.n_rows);
    ck_assert_msg(mean <= limit, "%s: %.3g away in the quadratic mean, more than %.3g", dir, mean, limit);
    rig_reset(&r);
    teacher_force(&r, &x, 1 + (int32_t)(random() % 40), chunked);
    for (int32_t i = 0; i < x.n_rows; i++) {
        ck_assert_mem_eq(chunked[i], whole[i], (size_t)x.vocab_size * sizeof(float)); // bit for bit
    }
    rig_reset(&r);
    if (r.info->dtype != DTYPE_BF16) greedy_check(&r, &x);
    printf("%-40s block %2d %-9s %-10s worst row %.2g, mean %.2g\n", dir, block_size, reference_attention ? "reference" : "flash",
           isa ? isa : "best", worst, mean);
    rig_deinit(&r);
}

START_TEST(flash_blocks_of_16) { vectors_check(cases[_i], 16, false, NULL); }
END_TEST

START_TEST(flash_blocks_of_64) { vectors_check(cases[_i], 64, false, NULL); }
END_TEST

START_TEST(reference_attention) { vectors_check(cases[_i], 64, true, NULL); }
END_TEST

START_TEST(plain_c) { vectors_check(cases[_i], 16, false, "generic"); }
END_TEST

int main(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = (unsigned)now.tv_nsec;
    n_cases = vectors_find(cases);
    printf("seed %u, %d checkpoints in tests/vectors\n", seed, n_cases);
    fflush(stdout);
    if (n_cases < 20) return 1;
    Suite *suite = suite_create("model");
    TCase *tc = tcase_create("vectors");
    tcase_set_timeout(tc, 30);
    tcase_add_loop_test(tc, flash_blocks_of_16, 0, n_cases);
    tcase_add_loop_test(tc, flash_blocks_of_64, 0, n_cases);
    tcase_add_loop_test(tc, reference_attention, 0, n_cases);
    tcase_add_loop_test(tc, plain_c, 0, n_cases);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
