/* test_table_shadow.c: of a step's block table, what travels is enough and is little (kernels/cuda/table_shadow.h).
 *
 * Sequences as the engine has them (alone ones, whose rows have stamps; choices, whose last block may change; windows behind
 * which entries are freed) take rows in any order; the device's table is what the updates make of it.
 */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/cuda/table_shadow.h"

enum { N_ROWS = 6, WIDTH = 20, BLOCK = 16, N_SEQS = 9, N_STEPS = 3000 };

struct sequence { int32_t blocks[WIDTH], n_blocks, length, n_new; uint64_t admission; bool is_alone; };

static struct sequence sequences[N_SEQS];
static uint64_t n_admissions;
static int32_t window;

static int32_t random_below(int32_t n) { return (int32_t)(random() % n); }

static void admit(struct sequence *s)
{
    s->admission = ++n_admissions, s->is_alone = random_below(4) > 0, s->n_blocks = s->length = 0;
}

// A chunk of a prompt, or one token; blocks for it.
static void advance(struct sequence *s)
{
    s->n_new = random_below(5) == 0 ? 1 + random_below(3 * BLOCK) : 1;
    if (s->length + s->n_new > WIDTH * BLOCK || random_below(60) == 0)
        admit(s), s->n_new = 1 + random_below(3 * BLOCK);
    s->length += s->n_new;
    if (!s->is_alone && s->n_blocks > 0 && random_below(8) == 0)
        s->blocks[s->n_blocks - 1] = random_below(1 << 20); // copied on write
    while (s->n_blocks * BLOCK < s->length) s->blocks[s->n_blocks++] = random_below(1 << 20);
}

static int32_t first_seen(const struct sequence *s)
{
    int32_t position = s->length - s->n_new;
    return window > 0 && position >= window ? (position - window + 1) / BLOCK : 0;
}

// Entries that the step sees; what lies around them is anything.
static void fill_row(int32_t *row, const struct sequence *s)
{
    for (int32_t i = 0; i < WIDTH; i++) row[i] = i >= first_seen(s) && i < s->n_blocks ? s->blocks[i] : random_below(1 << 20);
}

START_TEST(any_order_of_rows)
{
    struct table_shadow shadow;
    static int32_t device[N_ROWS * WIDTH], host[N_ROWS * WIDTH];
    static struct table_update updates[N_ROWS * WIDTH];
    int32_t cu[N_ROWS + 1] = {0}, lens[N_ROWS], order[N_SEQS];
    uint64_t stamps[N_ROWS];
    unsigned seed = (unsigned)time(NULL) + (unsigned)_i;
    srandom(seed);
    printf("table shadow: seed %u\n", seed);
    window = _i % 2 ? 40 : 0;
    ck_assert_int_eq(table_shadow_init(&shadow, _i == 2 ? N_ROWS / 2 : N_ROWS, N_ROWS * WIDTH), 0);
    for (int i = 0; i < N_SEQS; i++) admit(&sequences[i]), order[i] = i;
    for (int step = 0; step < N_STEPS; step++) {
        int32_t n = 1 + random_below(N_ROWS), i = random_below(N_SEQS), k = random_below(N_SEQS), swapped = order[i];
        if (random_below(5) == 0) order[i] = order[k], order[k] = swapped;
        for (int32_t row = 0; row < n; row++) {
            struct sequence *s = &sequences[order[row]];
            advance(s);
            fill_row(host + row * WIDTH, s);
            cu[row + 1] = cu[row] + s->n_new, lens[row] = s->length;
            stamps[row] = s->is_alone ? s->admission << 24 | (uint64_t)s->n_blocks : 0;
        }
        const struct stage_table t = {host, cu, lens, n, WIDTH, BLOCK, window, random_below(50) ? stamps : NULL};
        uint32_t n_updates = table_shadow_update(&shadow, &t, updates);
        ck_assert_uint_le(n_updates, (uint32_t)(n * WIDTH));
        for (uint32_t u = 0; u < n_updates; u++) device[updates[u].at] = updates[u].block;
        for (int32_t row = 0; row < n; row++) {
            const struct sequence *s = &sequences[order[row]];
            for (int32_t b = first_seen(s); b < s->n_blocks; b++)
                ck_assert_msg(device[row * WIDTH + b] == s->blocks[b], "step %d, row %d: block %d", step, row, b);
        }
    }
    table_shadow_deinit(&shadow);
}
END_TEST

// One token more in the same block, in the same row: nothing travels, and the row is not read.
START_TEST(a_row_that_did_not_change)
{
    struct table_shadow shadow;
    struct table_update updates[4];
    int32_t host[4] = {7, 8, 0, 0}, cu[2] = {0, 1}, lens[1] = {BLOCK + 3};
    const uint64_t stamps[1] = {5};
    const struct stage_table t = {host, cu, lens, 1, 4, BLOCK, 0, stamps};
    ck_assert_int_eq(table_shadow_init(&shadow, 1, 4), 0);
    ck_assert_uint_eq(table_shadow_update(&shadow, &t, updates), 2);
    lens[0]++, host[0] = 99;
    ck_assert_uint_eq(table_shadow_update(&shadow, &t, updates), 0);
    lens[0] = 2 * BLOCK + 1, host[2] = 9; // an entry beyond what was seen, whatever the stamp
    ck_assert_uint_eq(table_shadow_update(&shadow, &t, updates), 2);
    ck_assert(updates[0].at == 0 && updates[0].block == 99 && updates[1].at == 2 && updates[1].block == 9);
    table_shadow_deinit(&shadow);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("table shadow");
    TCase *tc = tcase_create("table shadow");
    tcase_add_loop_test(tc, any_order_of_rows, 0, 4);
    tcase_add_test(tc, a_row_that_did_not_change);
    suite_add_tcase(s, tc);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
