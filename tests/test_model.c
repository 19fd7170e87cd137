/* test_model.c: every checkpoint under tests/vectors, loaded as a user would load it, against PyTorch's logits. */
#include <check.h>
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "models/safetensors.h"
#include "tests/model_rig.h"

#define VECTORS "tests/vectors"

enum { MAX_CASES = 64, MAX_LEN = 512, MAX_ROWS = 16, MAX_VOCAB = 512 };

static char cases[MAX_CASES][128]; // directories
static int n_cases;
static unsigned seed;

struct expected {
    int32_t ids[MAX_LEN];      // prompt, then generated
    int32_t n_prompt, n_ids;
    int32_t rows[MAX_ROWS], n_rows;
    float logits[MAX_ROWS][MAX_VOCAB];
    int32_t vocab_size, max_model_len;
};

static int32_t tensor_copy(const struct safetensors *st, const char *name, void *out, size_t max_bytes)
{
    for (size_t i = 0; i < st->n_tensors; i++) {
        const struct safetensors_tensor *t = &st->tensors[i];
        if (strcmp(t->name, name)) continue;
        ck_assert_uint_le(t->size, max_bytes);
        memcpy(out, t->data, t->size);
        return (int32_t)t->shape[t->n_dims - 1];
    }
    ck_abort_msg("%s: missing", name);
    return 0;
}

// The header's metadata is not for the reader of weights: found by its text.
static int32_t metadata_int(const struct safetensors *st, const char *key)
{
    const char *at = memmem(st->map, st->map_size, key, strlen(key));
    return at ? atoi(at + strlen(key)) : 0;
}

static void expected_read(struct expected *x, const char *dir)
{
    char path[256];
    struct safetensors st;
    struct error e;
    static float logits[MAX_ROWS * MAX_VOCAB];
    memset(x, 0, sizeof *x);
    snprintf(path, sizeof path, "%s/expected.safetensors", dir);
    ck_assert_msg(safetensors_open(&st, path, &e) == 0, "%s", e.message);
    x->n_prompt = tensor_copy(&st, "prompt", x->ids, sizeof x->ids);
    x->n_ids = x->n_prompt + tensor_copy(&st, "generated", x->ids + x->n_prompt,
                                         sizeof x->ids - (size_t)x->n_prompt * sizeof(int32_t));
    x->n_rows = tensor_copy(&st, "rows", x->rows, sizeof x->rows);
    x->vocab_size = tensor_copy(&st, "logits", logits, sizeof logits);
    ck_assert_int_le(x->vocab_size, MAX_VOCAB);
    for (int32_t i = 0; i < x->n_rows; i++) {
        memcpy(x->logits[i], logits + i * x->vocab_size, (size_t)x->vocab_size * sizeof(float));
    }
    x->max_model_len = metadata_int(&st, "\"max_model_len\":\"");
    safetensors_close(&st);
}

// ‖out − ref‖ / ‖ref‖
static double distance(const float *out, const float *ref, int32_t n)
{
    double difference = 0, norm = 0;
    for (int32_t i = 0; i < n; i++) {
        difference += pow((double)out[i] - ref[i], 2);
        norm += pow(ref[i], 2);
    }
    return sqrt(difference / norm);
}

static int32_t argmax(const float *x, int32_t n)
{
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++) {
        if (x[i] > x[best]) best = i;
    }
    return best;
}

// The whole sequence in steps of random lengths up to max_step (or in one), tokens given.
static void teacher_force(struct rig *r, const struct expected *x, int32_t max_step, float logits[MAX_ROWS][MAX_VOCAB])
{
    int32_t at = 0, n_seen = 0;
    while (at < x->n_ids) {
        int32_t n = max_step ? 1 + (int32_t)(random() % max_step) : x->n_ids, rows[MAX_ROWS], n_rows = 0;
        if (n > x->n_ids - at) n = x->n_ids - at;
        while (n_seen + n_rows < x->n_rows && x->rows[n_seen + n_rows] < at + n) {
            rows[n_rows] = x->rows[n_seen + n_rows] - at;
            n_rows++;
        }
        static float out[MAX_ROWS * MAX_VOCAB];
        memset(out, 0xFF, sizeof out);
        rig_step(r, x->ids + at, n, rows, n_rows, out);
        for (int32_t i = 0; i < n_rows; i++) {
            memcpy(logits[n_seen++], out + i * x->vocab_size, (size_t)x->vocab_size * sizeof(float));
        }
        at += n;
    }
    ck_assert_int_eq(n_seen, x->n_rows);
}

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
    double limit = r.info->dtype == DTYPE_BF16 ? 1e-2 : r.info->dtype == DTYPE_F16 ? 2e-3 : 1e-4, worst = 0;
    ck_assert_int_eq(r.info->vocab_size, x.vocab_size);
    teacher_force(&r, &x, 0, whole);
    for (int32_t i = 0; i < x.n_rows; i++) {
        double d = distance(whole[i], x.logits[i], x.vocab_size);
        ck_assert_msg(d <= limit, "%s: row %d is %.3g away, more than %.3g", dir, x.rows[i], d, limit);
        worst = fmax(worst, d);
    }
    rig_reset(&r);
    teacher_force(&r, &x, 1 + (int32_t)(random() % 40), chunked);
    for (int32_t i = 0; i < x.n_rows; i++) {
        ck_assert_mem_eq(chunked[i], whole[i], (size_t)x.vocab_size * sizeof(float)); // bit for bit
    }
    rig_reset(&r);
    if (r.info->dtype != DTYPE_BF16) greedy_check(&r, &x);
    printf("%-40s block %2d %-9s %-10s worst row %.2g\n", dir, block_size, reference_attention ? "reference" : "flash",
           isa ? isa : "best", worst);
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

// A directory of a checkpoint with its expectations; other things live there too.
static int is_case(const struct dirent *d)
{
    char path[512];
    snprintf(path, sizeof path, VECTORS "/%s/expected.safetensors", d->d_name);
    return access(path, F_OK) == 0;
}

static void cases_find(void)
{
    struct dirent **list;
    int n = scandir(VECTORS, &list, is_case, alphasort);
    for (int i = 0; i < n; i++) {
        if (n_cases < MAX_CASES) snprintf(cases[n_cases++], sizeof *cases, VECTORS "/%.100s", list[i]->d_name);
        free(list[i]);
    }
    if (n >= 0) free(list);
}

int main(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = (unsigned)now.tv_nsec;
    cases_find();
    printf("seed %u, %d checkpoints in " VECTORS "\n", seed, n_cases);
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
