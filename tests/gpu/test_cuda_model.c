/* test_cuda_model.c: every checkpoint under tests/vectors on the GPU, in BF16 and F16, against PyTorch's logits.
 *
 * The vectors are PyTorch's in F32 for F32 checkpoints; in 16 bits both the weights' rounding and that of activations
 * come on top, which the CPU backend's vectors in that type show the size of.
 */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "tests/model_vectors.h"

static char cases[MAX_CASES][128];
static int n_cases;
static unsigned seed;

static double worst_row(const struct expected *x, float logits[MAX_ROWS][MAX_VOCAB])
{
    double worst = 0;
    for (int32_t i = 0; i < x->n_rows; i++) worst = fmax(worst, distance(logits[i], x->logits[i], x->vocab_size));
    return worst;
}

START_TEST(vectors)
{
    static struct expected x;
    static float logits[MAX_ROWS][MAX_VOCAB];
    const char *dir = cases[_i / 2];
    enum dtype dtype = _i % 2 ? DTYPE_F16 : DTYPE_BF16;
    double limit = dtype == DTYPE_BF16 ? 4e-2 : 6e-3;
    expected_read(&x, dir);
    struct rig r;
    rig_init(&r, &(struct rig_options){.dir = dir, .max_model_len = x.max_model_len, .max_tokens = x.n_ids,
                                       .max_len = x.n_ids, .block_size = 16 << random() % 3, .backend = "cuda",
                                       .dtype = dtype, .seed = seed});
    teacher_force(&r, &x, 0, logits);
    double whole = worst_row(&x, logits);
    rig_reset(&r);
    teacher_force(&r, &x, 1 + (int32_t)(random() % 40), logits);
    double chunked = worst_row(&x, logits);
    rig_reset(&r);
    teacher_force(&r, &x, 1, logits);
    double decoded = worst_row(&x, logits);
    printf("%-36s %-4s whole %.2g, chunked %.2g, token by token %.2g\n", dir, dtype_name(dtype), whole, chunked, decoded);
    fflush(stdout);
    rig_deinit(&r);
    ck_assert_msg(whole <= limit && chunked <= limit && decoded <= limit, "%s in %s: more than %g away", dir,
                  dtype_name(dtype), limit);
}
END_TEST

int main(void)
{
    seed = (unsigned)time(NULL);
    srandom(seed);
    n_cases = vectors_find(cases);
    printf("seed %u, %d checkpoints\n", seed, n_cases);
    Suite *suite = suite_create("cuda_model");
    TCase *tc = tcase_create("vectors");
    tcase_set_timeout(tc, 0);
    tcase_add_loop_test(tc, vectors, 0, 2 * n_cases);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0 || n_cases < 20;
}
