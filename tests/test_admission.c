/* Who is let in and who is told to come when: the measured rate, the promises, and clients that keep to them, in virtual time. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/request.h"

static const struct request_limits limits = {
    .vocab_size = 1000, .max_model_len = 1000, .block_size = 16, .max_num_batched_tokens = 64, .n_groups = 1, .n_blocks = {1000},
};

static struct request *request_of(int32_t n_prompt, int32_t first_token)
{
    int32_t prompt[1000];
    struct error e;
    for (int32_t i = 0; i < n_prompt; i++)
        prompt[i] = (first_token + i) % 1000;
    struct request *r = request_create(prompt, n_prompt);
    ck_assert_msg(request_prepare(r, &limits, &e) == 0, "%s", e.message);
    return r;
}

// ---- the rate -------------------------------------------------------------------------------------------------------

// Turns of 10 ms, one begun in each `every`; something waits or not.
static double run(struct admission *a, double from, double seconds, int32_t every, bool waiting)
{
    int32_t n = (int32_t)(seconds * 100);
    for (int32_t i = 1; i <= n; i++) {
        if (i % every == 0)
            admission_note(a, 10, 100);
        admission_measure(a, waiting, from + 0.01 * i);
    }
    return from + 0.01 * n;
}

START_TEST(test_rate)
{
    struct admission *a = calloc(1, sizeof *a);
    struct admission_rate rate = admission_rate_get(a, 7, 70, 1000);
    ck_assert(!rate.measured && rate.requests == 10 && rate.tokens == 7 && rate.bytes == 70);
    double now = run(a, 1000, 60, 10, false); // nobody waits: what is asked of it says nothing of what it can do
    ck_assert(!admission_rate_get(a, 7, 70, now).measured);
    now = run(a, now, 30, 2, true);
    rate = admission_rate_get(a, 7, 70, now);
    ck_assert(rate.measured && fabs(rate.requests - 50) < 1 && fabs(rate.tokens - 10) < 0.1 && fabs(rate.bytes - 100) < 1);
    now = run(a, now, 60, 20, true); // it became slower
    ck_assert_double_eq_tol(admission_rate_get(a, 7, 70, now).requests, 5, 3);
    // A turn that takes long is seen while it does.
    ck_assert(admission_rate_get(a, 7, 70, now + 20).requests < 0.6 * admission_rate_get(a, 7, 70, now).requests);
    run(a, now, 0.01, 2, false);
    ck_assert(!admission_rate_get(a, 7, 70, now + 100).measured); // long ago
    free(a);
}
END_TEST

// ---- promises -------------------------------------------------------------------------------------------------------

START_TEST(test_promises)
{
    struct admission *a = calloc(1, sizeof *a);
    // Ten at once, at two a second, the first in three seconds: spread, not all together.
    for (int32_t i = 0; i < 10; i++)
        ck_assert_int_eq(admission_promise(a, (uint64_t)i, 3, 0.5, false, 100), 3 + (i + 1) / 2);
    ck_assert_int_eq(admission_promise(a, 10, 1, 0.5, true, 100), 1); // to whom one was broken
    ck_assert_int_eq(admission_held(a, 99), 0);
    ck_assert_int_eq(admission_held(a, 100), 1);
    ck_assert_int_eq(admission_held(a, 103), 4); // those of 101, 103 and 104
    ck_assert(!admission_redeem(a, 5, 103.5)); // too early
    ck_assert(!admission_redeem(a, 77, 103.5)); // nobody's
    ck_assert(admission_redeem(a, 0, 103.5));
    ck_assert(!admission_redeem(a, 0, 103.5)); // once
    ck_assert(admission_redeem(a, 5, 108)); // a little late
    ck_assert(!admission_redeem(a, 6, 109.5)); // too late
    ck_assert_int_eq(admission_held(a, 200), 0); // nobody came
    // Equal prompts: one promise each.
    for (int32_t i = 0; i < 4; i++)
        admission_promise(a, 1, 0, 0.01, false, 300);
    for (int32_t i = 0; i < 5; i++)
        ck_assert_int_eq(admission_redeem(a, 1, 301), i < 4);
    // At most a minute, however many come.
    for (int32_t i = 0; i < 100000; i++)
        ck_assert_int_le(admission_promise(a, (uint64_t)i, 1, 1, false, 400), ADMISSION_MAX_RETRY);
    ck_assert_int_eq(admission_promise(a, 1, 1, 1, false, 410), 50); // they are not forgotten
    admission_shorten(a, 30); // but did not come
    ck_assert_int_le(admission_promise(a, 1, 1, 1, false, 411), 30);
    admission_shorten(a, INFINITY);
    ck_assert_int_eq(admission_promise(a, 1, 2, 1, false, 411), 2);
    free(a);
}
END_TEST

// ---- the inbox ------------------------------------------------------------------------------------------------------

// Begins the first of those that wait, as the engine does.
static void begin_one(struct inbox *inbox, struct request **waiting, int32_t *n)
{
    struct request *r = waiting[0];
    memmove(waiting, waiting + 1, (size_t)--*n * sizeof *waiting);
    ck_assert(inbox_leave(inbox, r));
    admission_note(&inbox->admission, r->n_prompt, (int64_t)r->storage_bytes);
    request_unref(r);
}

static int submit(struct inbox *inbox, struct request *r, double now, int32_t priority, struct request **waiting, int32_t *n)
{
    struct error e;
    request_params(r)->priority = priority;
    int rc = inbox_submit(inbox, r, now, &e);
    if (rc == 0)
        waiting[(*n)++] = inbox_take(inbox);
    else
        ck_assert(rc == ERR_BUSY && r->retry_after >= 1 && r->retry_after <= ADMISSION_MAX_RETRY);
    return rc;
}

// A queue that drains at 10 a second, and takes what will be begun within 5 s.
START_TEST(test_foreseen_wait)
{
    struct inbox *inbox = inbox_create(1000, 1000000, 5, 1);
    struct request *waiting[1000], *made[1000];
    int32_t n = 0, n_made = 0, tried = 0;
    double now = 1000;
    for (; tried < 300; tried++) // nothing measured: all are taken
        ck_assert_int_eq(submit(inbox, made[n_made++] = request_of(10, tried), now, 0, waiting, &n), 0);
    admission_measure(&inbox->admission, true, now);
    for (int32_t i = 0; i < 200; i++) {
        begin_one(inbox, waiting, &n);
        admission_measure(&inbox->admission, true, now += 0.1);
    }
    ck_assert_double_eq_tol(inbox_wait(inbox, now), 10, 2);
    struct request *r = made[n_made++] = request_of(10, 500);
    ck_assert_int_eq(submit(inbox, r, now, 0, waiting, &n), ERR_BUSY); // 100 are waiting: 10 s
    ck_assert_int_ge(r->retry_after, 5);
    ck_assert_int_eq(inbox->n_too_long, 1);
    ck_assert_int_eq(submit(inbox, r, now, 1, waiting, &n), ERR_BUSY);
    ck_assert_int_eq(submit(inbox, made[n_made++] = request_of(10, 501), now, -1, waiting, &n), 0); // nobody is before it
    // A call's further prompts do not ask for how long.
    struct request *further = made[n_made++] = request_of(10, 502);
    request_share_params(further, made[0]);
    ck_assert_int_eq(submit(inbox, further, now, 0, waiting, &n), 0);
    // The engine stands still; whoever is alone is taken all the same.
    admission_measure(&inbox->admission, true, now += 600);
    while (n > 0) {
        ck_assert_int_eq(submit(inbox, r, now, 1, waiting, &n), ERR_BUSY);
        begin_one(inbox, waiting, &n);
    }
    ck_assert_int_eq(submit(inbox, r, now, 0, waiting, &n), 0);
    begin_one(inbox, waiting, &n);
    for (int32_t i = 0; i < n_made; i++)
        request_release(made[i]);
    inbox_unref(inbox);
}
END_TEST

// Where tokens are what there is no room for, their rate tells.
START_TEST(test_tokens_decide)
{
    struct inbox *inbox = inbox_create(1000, 1000, 0, 1);
    struct request *waiting[100], *made[100];
    int32_t n = 0, n_made = 0;
    double now = 50;
    for (int32_t i = 0; i < 10; i++)
        ck_assert_int_eq(submit(inbox, made[n_made++] = request_of(100, i), now, 0, waiting, &n), 0);
    admission_measure(&inbox->admission, true, now);
    for (int32_t i = 0; i < 40; i++) { // 100 tokens every 2 s
        begin_one(inbox, waiting, &n);
        admission_measure(&inbox->admission, true, now += 2);
        ck_assert_int_eq(submit(inbox, made[n_made++] = request_of(100, i), now, 0, waiting, &n), 0);
    }
    struct request *r = made[n_made++] = request_of(500, 9);
    ck_assert_int_eq(submit(inbox, r, now, 0, waiting, &n), ERR_BUSY);
    ck_assert_int_ge(r->retry_after, 8);
    ck_assert_int_le(r->retry_after, 11);
    while (n > 0)
        begin_one(inbox, waiting, &n);
    for (int32_t i = 0; i < n_made; i++)
        request_release(made[i]);
    inbox_unref(inbox);
}
END_TEST

// ---- clients that do as they are told -------------------------------------------------------------------------------

enum { CLIENTS = 3000 };

struct client { struct request *request; double comes; int32_t tries; bool in; };

static int by_time(const void *a, const void *b)
{
    double x = (*(struct client *const *)a)->comes, y = (*(struct client *const *)b)->comes;
    return (x > y) - (x < y);
}

// New clients come at random, three for each that the server can take, for a time; those who are refused come again, after
// what they were told or after `constant` seconds. Returns the share of those who were let in at the first or second try.
static double simulate(double constant, double *mean_tries)
{
    static struct client clients[CLIENTS];
    struct client *order[CLIENTS];
    struct request *waiting[CLIENTS];
    struct inbox *inbox = inbox_create(40, 1000000, 0, 1);
    int32_t n = 0, n_in = 0, n_early = 0, n_clients = 900;
    double now = 1000, served = 0, sum = 0, comes = now;
    for (int32_t i = 0; i < n_clients; i++) {
        comes += -log((1 + rand() % 10000) / 10001.0) / 30; // 30 a second, for half a minute; 10 are begun
        clients[i] = (struct client){.request = request_of(20 + rand() % 100, rand() % 1000), .comes = comes};
        order[i] = &clients[i];
    }
    for (; n_in < n_clients; now += 0.02) {
        ck_assert_msg(now < 3000, "%d of %d are in", n_in, n_clients);
        qsort(order, (size_t)n_clients, sizeof *order, by_time);
        for (int32_t i = 0; i < n_clients && order[i]->comes <= now; i++) {
            struct client *c = order[i];
            c->tries++;
            c->in = submit(inbox, c->request, now, 0, waiting, &n) == 0;
            n_in += c->in;
            n_early += c->in && c->tries <= 2;
            c->comes = c->in ? INFINITY : now + (constant > 0 ? constant : c->request->retry_after) + 0.001 * (rand() % 50);
        }
        for (served += 0.2; served >= 1; served--) {
            if (n > 0)
                begin_one(inbox, waiting, &n);
        }
        admission_measure(&inbox->admission, n > 0, now);
    }
    while (n > 0)
        begin_one(inbox, waiting, &n);
    for (int32_t i = 0; i < n_clients; i++) {
        sum += clients[i].tries;
        request_release(clients[i].request);
    }
    inbox_unref(inbox);
    *mean_tries = sum / n_clients;
    return (double)n_early / n_clients;
}

START_TEST(test_obeying_pays)
{
    unsigned seed = (unsigned)time(NULL);
    double tries, tries_of_one;
    srand(seed);
    double told = simulate(0, &tries), each_second = simulate(1, &tries_of_one);
    printf("at three times the rate (seed %u): as told %.0f %% within two tries, %.1f on average; each second %.0f %%, %.1f\n",
           seed, 100 * told, tries, 100 * each_second, tries_of_one);
    ck_assert(told > 0.8 && tries < 2.5 && tries < tries_of_one / 4);
}
END_TEST

// Places that are kept for clients who never come back cost little: at ten times what can be done, whatever bounds the queue, it
// stays more than half full, and who is let in waits no longer than he may.
START_TEST(test_never_idle)
{
    static const struct { int32_t max_requests; double timeout; int32_t most; } bounds[] = {
        {1, 0, 1}, {2, 0, 2}, {8, 0, 8}, {1000, 2, 20}, {30, 1, 10}, {1000, 20, 200},
    };
    struct request *waiting[1000];
    double since[1000], now = 1000, work = 0, longest = 0, sum = 0;
    int32_t n = 0, n_idle = 0, n_begun = 0;
    struct inbox *inbox = inbox_create(bounds[_i].max_requests, 1000000, bounds[_i].timeout, 1);
    srand((unsigned)time(NULL));
    for (int32_t turn = 0; turn < 120 * 50; turn++, now += 0.02) { // 10 a second are begun, 100 come
        for (int32_t k = rand() % 5; k > 0; k--) {
            struct request *r = request_of(5, rand() % 1000);
            if (submit(inbox, r, now, 0, waiting, &n) == 0)
                since[n - 1] = now;
            request_release(r);
        }
        for (work += 0.2; work >= 1; work--) {
            n_idle += n == 0 && turn > 50;
            if (n == 0)
                continue;
            longest = turn > 60 * 50 && now - since[0] > longest ? now - since[0] : longest;
            memmove(since, since + 1, (size_t)(n - 1) * sizeof *since);
            begin_one(inbox, waiting, &n);
            n_begun++;
        }
        admission_measure(&inbox->admission, n > 0, now);
        sum += n;
    }
    ck_assert_msg(sum / (120 * 50) > 0.55 * bounds[_i].most, "%f wait on average", sum / (120 * 50));
    ck_assert_msg(n_idle <= n_begun / 50, "%d idle, %d begun", n_idle, n_begun);
    ck_assert_msg(bounds[_i].timeout == 0 || longest < 1.2 * bounds[_i].timeout, "waited for %f s", longest);
    ck_assert_msg(bounds[_i].timeout == 0 || longest > 0.3 * bounds[_i].timeout, "never waited for more than %f s", longest);
    while (n > 0)
        begin_one(inbox, waiting, &n);
    inbox_unref(inbox);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("admission");
    TCase *tc = tcase_create("admission");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, test_rate);
    tcase_add_test(tc, test_promises);
    tcase_add_test(tc, test_foreseen_wait);
    tcase_add_test(tc, test_tokens_decide);
    tcase_add_test(tc, test_obeying_pays);
    tcase_add_loop_test(tc, test_never_idle, 0, 6);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
