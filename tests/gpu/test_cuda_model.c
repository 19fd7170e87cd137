/* test_cuda_model.c: every checkpoint under tests/vectors on the GPU, in BF16 and F16, against PyTorch's logits in F32.
 *
 *   test_cuda_model ERRORS
 *
 * ERRORS is what tests/gpu/reference_errors.py printed: PyTorch's own distance from F32 in the same type. Ours may be 1.75
 * times as large (of eight rows; mostly it is smaller), in one pass, in chunks and token by token.
 */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/model_vectors.h"

static char cases[MAX_CASES][128];
static int n_cases;
static unsigned seed;
static const double SLACK = 1.75;

struct limit {
    char dir[128], type[8];
    double error; // PyTorch's
};

static struct limit limits[2 * MAX_CASES];
static int n_limits;

static void limits_read(const char *path)
{
    FILE *f = fopen(path, "r");
    struct limit *l = limits;
    while (f && l < limits + 2 * MAX_CASES && fscanf(f, "%127s %7s %lf", l->dir, l->type, &l->error) == 3) l++;
    n_limits = (int)(l - limits);
    if (f) fclose(f);
}

static double limit_of(const char *dir, enum dtype dtype)
{
    for (int i = 0; i < n_limits; i++)
        if (!strcmp(limits[i].dir, dir) && !strcmp(limits[i].type, dtype_name(dtype))) return SLACK * limits[i].error;
    ck_abort_msg("no limit for %s in %s", dir, dtype_name(dtype));
    return 0;
}

// The quadratic mean over the rows.
static double error_of(const struct expected *x, float logits[MAX_ROWS][MAX_VOCAB])
{
    double sum = 0;
    for (int32_t i = 0; i < x->n_rows; i++) sum += pow(distance(logits[i], x->logits[i], x->vocab_size), 2);
    return sqrt(sum / x->n_rows);
}

START_TEST(vectors)
{
    static struct expected x;
    static float logits[MAX_ROWS][MAX_VOCAB];
    const char *dir = cases[_i / 2];
    enum dtype dtype = _i % 2 ? DTYPE_F16 : DTYPE_BF16;
    double limit = limit_of(dir, dtype);
    expected_read(&x, dir);
    struct rig r;
    rig_init(&r, &(struct rig_options){.dir = dir, .max_model_len = x.max_model_len, .max_tokens = x.n_ids,
                                       .max_len = x.n_ids, .block_size = 16 << random() % 3, .backend = "cuda",
                                       .dtype = dtype, .seed = seed});
    teacher_force(&r, &x, 0, logits);
    double whole = error_of(&x, logits);
    rig_reset(&r);
    teacher_force(&r, &x, 1 + (int32_t)(random() % 40), logits);
    double chunked = error_of(&x, logits);
    rig_reset(&r);
    teacher_force(&r, &x, 1, logits);
    double decoded = error_of(&x, logits);
    printf("%-36s %-4s whole %.2g, chunked %.2g, token by token %.2g of PyTorch's\n", dir, dtype_name(dtype),
           SLACK * whole / limit, SLACK * chunked / limit, SLACK * decoded / limit);
    fflush(stdout);
    rig_deinit(&r);
    ck_assert_msg(whole <= limit && chunked <= limit && decoded <= limit, "%s in %s: more than %g away", dir,
                  dtype_name(dtype), limit);
}
END_TEST

int main(int argc, char **argv)
{
    if (argc != 2) return 2;
    limits_read(argv[1]);
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
