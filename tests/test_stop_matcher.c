#include "server/stop_matcher.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static struct stop_matcher *create(const char *const *stops, size_t n, bool include_stop)
{
    struct stop_matcher *m;
    struct error e;
    ck_assert_msg(stop_matcher_create(&m, stops, n, include_stop, &e) == 0, "%s", e.message);
    return m;
}

// Pushes text in pieces (NULL-terminated list) and ends it; the output as a string.
static const char *run(const struct stop_matcher *m, struct stop_stream *s, const char *const *pieces)
{
    static char out[4096];
    size_t n = 0;
    *s = (struct stop_stream){0};
    for (; *pieces; pieces++) n += stop_stream_push(m, s, *pieces, strlen(*pieces), out + n);
    n += stop_stream_finish(m, s, out + n);
    out[n] = '\0';
    return out;
}

START_TEST(holds_back_what_could_begin_a_stop)
{
    struct stop_matcher *m = create((const char *[]){"\n\nUser:", "END"}, 2, false);
    struct stop_stream s = {0};
    char out[64 + STOP_MAX_BYTES];
    ck_assert_uint_eq(stop_stream_push(m, &s, "Hi\n", 3, out), 2);
    ck_assert_uint_eq(stop_stream_held(m, &s), 1);
    ck_assert_uint_eq(stop_stream_push(m, &s, "", 0, out), 0);
    ck_assert_uint_eq(stop_stream_push(m, &s, "\nUs", 3, out), 0);
    ck_assert_uint_eq(stop_stream_held(m, &s), 4);
    ck_assert_uint_eq(stop_stream_push(m, &s, "EN", 2, out), 4); // it was not "User:", but may be "END"
    ck_assert_mem_eq(out, "\n\nUs", 4);
    ck_assert_uint_eq(stop_stream_finish(m, &s, out), 2);
    ck_assert_mem_eq(out, "EN", 2);
    ck_assert(!s.stopped);
    stop_matcher_destroy(m);
}
END_TEST

START_TEST(the_text_ends_at_the_stop)
{
    struct stop_stream s;
    struct stop_matcher *m = create((const char *[]){"STOP"}, 1, false);
    ck_assert_str_eq(run(m, &s, (const char *[]){"a ST", "O", "P b", "more", NULL}), "a ");
    ck_assert(s.stopped && s.stop == 0);
    ck_assert_str_eq(run(m, &s, (const char *[]){"SSTOSTOP", NULL}), "SSTO");
    ck_assert_str_eq(run(m, &s, (const char *[]){"STO", NULL}), "STO");
    ck_assert(!s.stopped);
    stop_matcher_destroy(m);
    m = create((const char *[]){"STOP"}, 1, true);
    ck_assert_str_eq(run(m, &s, (const char *[]){"a ST", "O", "P b", NULL}), "a STOP");
    stop_matcher_destroy(m);
}
END_TEST

START_TEST(the_first_end_wins_then_the_longest)
{
    struct stop_stream s;
    struct stop_matcher *m = create((const char *[]){"abcd", "bc", "c", "xabc"}, 4, false);
    ck_assert_str_eq(run(m, &s, (const char *[]){"zabcd", NULL}), "za"); // "bc" and "c" end before "abcd"
    ck_assert_int_eq(s.stop, 1);
    ck_assert_str_eq(run(m, &s, (const char *[]){"zxa", "bcd", NULL}), "z");
    ck_assert_int_eq(s.stop, 3);
    ck_assert_str_eq(run(m, &s, (const char *[]){"xac", NULL}), "xa");
    ck_assert_int_eq(s.stop, 2);
    stop_matcher_destroy(m);
}
END_TEST

START_TEST(characters_stay_whole)
{
    struct stop_stream s = {0};
    struct stop_matcher *m = create((const char *[]){"\xE3\x80\x82\xE7\xB5\x82"}, 1, false); // two of three bytes each
    char out[64 + STOP_MAX_BYTES];
    // A character that shares its first byte with the stop string is not held back in part once it is whole.
    ck_assert_uint_eq(stop_stream_push(m, &s, "\xE3\x81\x82", 3, out), 3);
    ck_assert_uint_eq(stop_stream_push(m, &s, "\xE3\x80\x82", 3, out), 0);
    ck_assert_uint_eq(stop_stream_push(m, &s, "\xE7\xB5\x82", 3, out), 0);
    ck_assert(s.stopped);
    stop_matcher_destroy(m);
}
END_TEST

START_TEST(limits_are_kept)
{
    struct stop_matcher *m;
    struct error e;
    char longest[STOP_MAX_BYTES + 2];
    const char *stops[STOP_MAX_STRINGS + 1];
    memset(longest, 'x', sizeof longest);
    longest[STOP_MAX_BYTES + 1] = '\0';
    for (int i = 0; i <= STOP_MAX_STRINGS; i++) stops[i] = longest;
    ck_assert_int_eq(stop_matcher_create(&m, stops, 1, false, &e), ERR_INVALID);
    longest[STOP_MAX_BYTES] = '\0';
    ck_assert_int_eq(stop_matcher_create(&m, stops, 0, false, &e), ERR_INVALID);
    ck_assert_int_eq(stop_matcher_create(&m, stops, STOP_MAX_STRINGS + 1, false, &e), ERR_INVALID);
    ck_assert_int_eq(stop_matcher_create(&m, (const char *[]){"a", ""}, 2, false, &e), ERR_INVALID);
    ck_assert_ptr_null(m);
    m = create(stops, STOP_MAX_STRINGS, false);
    struct stop_stream s = {0};
    char out[2 * STOP_MAX_BYTES];
    ck_assert_uint_eq(stop_stream_push(m, &s, longest, STOP_MAX_BYTES - 1, out), 0);
    ck_assert_uint_eq(stop_stream_push(m, &s, "y", 1, out), STOP_MAX_BYTES);
    ck_assert_uint_eq(stop_stream_push(m, &s, longest, STOP_MAX_BYTES, out), 0);
    ck_assert(s.stopped);
    stop_matcher_destroy(m);
}
END_TEST

// The naive answer: the length of the output.
static size_t search_whole(const char *text, size_t n, char stops[][12], size_t n_stops, bool include_stop)
{
    for (size_t end = 1; end <= n; end++) {
        size_t longest = 0;
        for (size_t i = 0; i < n_stops; i++) {
            size_t length = strlen(stops[i]);
            if (length <= longest || length > end) continue;
            if (memcmp(text + end - length, stops[i], length) == 0) longest = length;
        }
        if (longest) return include_stop ? end : end - longest;
    }
    return n;
}

START_TEST(any_split_gives_what_a_search_gives)
{
    enum { SIZE = 200 };
    unsigned seed = (unsigned)time(NULL);
    printf("any_split_gives_what_a_search_gives: seed %u\n", seed);
    srand(seed);
    char stops[STOP_MAX_STRINGS][12], text[SIZE], joined[2 * SIZE + STOP_MAX_BYTES];
    const char *pointers[STOP_MAX_STRINGS];
    int n_stopped = 0;
    for (int round = 0; round < 20000; round++) {
        size_t n_stops = 1 + (size_t)rand() % STOP_MAX_STRINGS, n = (size_t)rand() % SIZE, n_joined = 0;
        int letters = 2 + rand() % 3;
        for (size_t i = 0; i < n_stops; i++) {
            size_t length = 1 + (size_t)rand() % 11;
            if (length < 5) length += (size_t)rand() % 7;
            for (size_t j = 0; j < length; j++) stops[i][j] = (char)('a' + rand() % letters);
            stops[i][length] = '\0';
            pointers[i] = stops[i];
        }
        for (size_t i = 0; i < n; i++) text[i] = (char)('a' + rand() % letters);
        bool include_stop = rand() % 2;
        struct stop_matcher *m = create(pointers, n_stops, include_stop);
        struct stop_stream s = {0};
        for (size_t i = 0, piece; i < n; i += piece) {
            piece = (size_t)rand() % 9;
            if (piece > n - i) piece = n - i;
            n_joined += stop_stream_push(m, &s, text + i, piece, joined + n_joined);
        }
        n_stopped += s.stopped;
        n_joined += stop_stream_finish(m, &s, joined + n_joined);
        ck_assert_uint_eq(n_joined, search_whole(text, n, stops, n_stops, include_stop));
        ck_assert_mem_eq(joined, text, n_joined);
        stop_matcher_destroy(m);
    }
    ck_assert_int_gt(n_stopped, 1000);
    ck_assert_int_lt(n_stopped, 19900);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("stop_matcher");
    TCase *tests = tcase_create("all");
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, holds_back_what_could_begin_a_stop);
    tcase_add_test(tests, the_text_ends_at_the_stop);
    tcase_add_test(tests, the_first_end_wins_then_the_longest);
    tcase_add_test(tests, characters_stay_whole);
    tcase_add_test(tests, limits_are_kept);
    tcase_add_test(tests, any_split_gives_what_a_search_gives);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
