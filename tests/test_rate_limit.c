#include "server/rate_limit.h"

#include <check.h>
#include <stdlib.h>

static struct http_error error;

static int32_t refused(int failed)
{
    ck_assert_int_eq(failed, -1);
    ck_assert_int_eq(error.status, 429);
    ck_assert_str_eq(error.code, "rate_limit_exceeded");
    return error.retry_after;
}

START_TEST(no_limits)
{
    struct rate_limit *r = rate_limit_create(&(struct rate_limits){0});
    for (int i = 0; i < 10000; i++) {
        ck_assert_int_eq(rate_limit_begin(r, 5, &error), 0);
        ck_assert_int_eq(rate_limit_charge(r, 1 << 30, 5, &error), 0);
    }
    rate_limit_release(r);
}
END_TEST

// A minute's worth at once, then one each 60 / N seconds; whoever comes back after Retry-After is taken, a second earlier is not.
START_TEST(requests)
{
    struct rate_limit *r = rate_limit_create(&(struct rate_limits){.requests_per_minute = 20});
    double now = 1000;
    for (int i = 0; i < 20; i++) ck_assert_int_eq(rate_limit_begin(r, now, &error), 0);
    for (int i = 0; i < 100; i++) {
        int32_t seconds = refused(rate_limit_begin(r, now, &error));
        ck_assert_int_eq(seconds, 3);
        refused(rate_limit_begin(r, now + seconds - 0.01, &error));
        now += seconds;
        ck_assert_int_eq(rate_limit_begin(r, now, &error), 0);
    }
    now += 3600; // silence is worth a minute, not more
    for (int i = 0; i < 20; i++) ck_assert_int_eq(rate_limit_begin(r, now, &error), 0);
    refused(rate_limit_begin(r, now, &error));
    rate_limit_release(r);
}
END_TEST

START_TEST(at_once)
{
    struct rate_limit *r = rate_limit_create(&(struct rate_limits){.max_concurrent = 2});
    ck_assert_int_eq(rate_limit_begin(r, 1, &error), 0);
    ck_assert_int_eq(rate_limit_begin(r, 1, &error), 0);
    for (int i = 0; i < 50; i++) {
        ck_assert_int_eq(refused(rate_limit_begin(r, 1, &error)), 1);
        rate_limit_end(r, 0, 0);
        ck_assert_int_eq(rate_limit_begin(r, 1, &error), 0);
    }
    rate_limit_release(r);
}
END_TEST

// What a request may come to holds others back; what it left lets them in.
START_TEST(tokens_promised)
{
    struct rate_limit *r = rate_limit_create(&(struct rate_limits){.tokens_per_minute = 600});
    ck_assert_int_eq(rate_limit_charge(r, 1200, 0, &error), 0); // more than a minute's: it begins nevertheless
    ck_assert_int_eq(refused(rate_limit_charge(r, 1, 0, &error)), 60);
    ck_assert_int_eq(refused(rate_limit_charge(r, 1, 30, &error)), 30);
    rate_limit_end(r, 1200, 100);
    ck_assert_int_eq(rate_limit_charge(r, 600, 30, &error), 0);
    ck_assert_int_eq(refused(rate_limit_charge(r, 1, 30, &error)), 1);
    rate_limit_release(r);
}
END_TEST

// Whatever requests promise and however long they run: what is used in a long time is not over the rate.
START_TEST(tokens_used)
{
    enum { LIMIT = 1000, RUNNING = 8 };
    struct { double end; int64_t charged, used; } running[RUNNING] = {0};
    struct rate_limit *r = rate_limit_create(&(struct rate_limits){.tokens_per_minute = LIMIT});
    unsigned seed = (unsigned)_i;
    double now = 0, used = 0, largest = 0;
    for (int step = 0; step < 20000; step++, now += 0.5) {
        int i = rand_r(&seed) % RUNNING;
        if (running[i].charged && now >= running[i].end) {
            rate_limit_end(r, running[i].charged, running[i].used);
            used += (double)running[i].used;
            running[i].charged = 0;
        } else if (!running[i].charged) {
            ck_assert_int_eq(rate_limit_begin(r, now, &error), 0);
            int64_t n = 1 + rand_r(&seed) % 3000;
            if (rate_limit_charge(r, n, now, &error)) {
                ck_assert_int_ge(error.retry_after, 1);
                rate_limit_end(r, 0, 0);
                continue;
            }
            running[i].charged = n;
            running[i].used = rand_r(&seed) % (n + 1);
            running[i].end = now + rand_r(&seed) % 200;
            if ((double)n > largest) largest = (double)n;
        }
    }
    ck_assert_double_le(used, LIMIT * (now / 60 + 1) + RUNNING * largest);
    ck_assert_double_ge(used, LIMIT * (now / 60) * 0.4); // nor far below it, with half of what is promised left over
    rate_limit_release(r);
}
END_TEST

START_TEST(other_limits)
{
    struct rate_limit *r = rate_limit_create(&(struct rate_limits){.requests_per_minute = 2});
    ck_assert_int_eq(rate_limit_begin(r, 0, &error), 0);
    ck_assert_int_eq(rate_limit_begin(r, 0, &error), 0);
    refused(rate_limit_begin(r, 0, &error));
    rate_limit_set(r, &(struct rate_limits){.requests_per_minute = 3});
    ck_assert_int_eq(rate_limit_begin(r, 0, &error), 0);
    refused(rate_limit_begin(r, 0, &error));
    rate_limit_set(r, &(struct rate_limits){.requests_per_minute = 1});
    ck_assert_int_eq(refused(rate_limit_begin(r, 0, &error)), 180);
    rate_limit_hold(r);
    rate_limit_release(r);
    rate_limit_set(r, &(struct rate_limits){0});
    ck_assert_int_eq(rate_limit_begin(r, 0, &error), 0);
    rate_limit_release(r);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("rate_limit");
    TCase *t = tcase_create("rate_limit");
    tcase_add_test(t, no_limits);
    tcase_add_test(t, requests);
    tcase_add_test(t, at_once);
    tcase_add_test(t, tokens_promised);
    tcase_add_loop_test(t, tokens_used, 0, 8);
    tcase_add_test(t, other_limits);
    suite_add_tcase(s, t);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
