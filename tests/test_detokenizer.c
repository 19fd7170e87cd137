#include "tokenizer/detokenizer.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FFFD "\xEF\xBF\xBD"

// Pushes bytes in pieces of at most max_piece (1: one by one) and ends the stream.
static size_t stream(const char *bytes, size_t n, size_t max_piece, char *out)
{
    struct utf8_stream s = {0};
    size_t written = 0;
    for (size_t i = 0, piece; i < n; i += piece) {
        piece = max_piece > 1 ? (size_t)rand() % (max_piece + 1) : 1;
        if (piece > n - i) piece = n - i;
        size_t now = utf8_stream_push(&s, bytes + i, piece, out + written);
        ck_assert_uint_le(now, utf8_stream_bound(piece));
        written += now;
        ck_assert_int_eq(utf8_valid(out, written), 1); // whole characters at any time
    }
    written += utf8_stream_finish(&s, out + written);
    ck_assert_int_eq(s.n_held, 0);
    return written;
}

static size_t encode(uint32_t c, char *out)
{
    if (c < 0x80) return out[0] = (char)c, 1;
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)((0xF00 >> n & 0xFF) | c);
    return n;
}

START_TEST(every_code_point_passes)
{
    char bytes[4], out[16];
    for (uint32_t c = 0; c < 0x110000; c++) {
        size_t n = encode(c, bytes);
        int surrogate = c >= 0xD800 && c < 0xE000;
        if (utf8_valid(bytes, n) == surrogate) ck_abort_msg("U+%04X: utf8_valid", c);
        if (surrogate) continue;
        struct utf8_stream s = {0};
        for (size_t i = 0; i + 1 < n; i++) // nothing comes out before the last byte
            if (utf8_stream_push(&s, bytes + i, 1, out) != 0) ck_abort_msg("U+%04X: early", c);
        if (utf8_stream_push(&s, bytes + n - 1, 1, out) != n || memcmp(out, bytes, n)) ck_abort_msg("U+%04X", c);
        if (utf8_length(bytes, n) != 1) ck_abort_msg("U+%04X: length", c);
    }
    ck_assert_int_eq(utf8_valid("\xF4\x90\x80\x80", 4), 0); // U+110000
}
END_TEST

// Bytes and what Python's bytes.decode("utf-8", "replace") makes of them; the first is Unicode's table 3-8.
static const struct {
    const char *bytes, *text;
} broken[] = {
    {"\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64", "a" FFFD FFFD FFFD "b" FFFD "c" FFFD FFFD "d"},
    {"\xC0\x80", FFFD FFFD}, {"\xC1\xBF", FFFD FFFD}, {"\xE0\x80\x80", FFFD FFFD FFFD},
    {"\xE0\x9F\xBF", FFFD FFFD FFFD},
    {"\xED\xA0\x80", FFFD FFFD FFFD}, {"\xED\xBF\xBF", FFFD FFFD FFFD}, {"\xF0\x80\x80\x80", FFFD FFFD FFFD FFFD},
    {"\xF0\x8F\xBF\xBF", FFFD FFFD FFFD FFFD}, {"\xF4\x90\x80\x80", FFFD FFFD FFFD FFFD}, {"\xF5\x80", FFFD FFFD},
    {"\xFF", FFFD}, {"\xFE\xFE", FFFD FFFD}, {"\x80", FFFD}, {"\xBF\xBF", FFFD FFFD}, {"\xC3", FFFD},
    {"\xC3\x28", FFFD "("},
    {"\xE2\x82", FFFD}, {"\xE2\x82\x28", FFFD "("}, {"\xE2\x82\xE2\x82\xAC", FFFD "\xE2\x82\xAC"},
    {"\xF0\x9F\x98", FFFD},
    {"\xF0\x9F\x98\xC3\xA9", FFFD "\xC3\xA9"}, {"\xF0\xF0\x9F\x98\x80", FFFD "\xF0\x9F\x98\x80"},
    {"\xE2\xE2\xE2", FFFD FFFD FFFD},
};

START_TEST(broken_bytes_become_replacements)
{
    char out[128];
    const char *bytes = broken[_i].bytes, *text = broken[_i].text;
    for (size_t max_piece = 1; max_piece < 8; max_piece++) {
        size_t n = stream(bytes, strlen(bytes), max_piece, out);
        ck_assert_uint_eq(n, strlen(text));
        ck_assert_mem_eq(out, text, n);
    }
    ck_assert_int_eq(utf8_valid(bytes, strlen(bytes)), 0);
    // The longest well-formed beginning comes out as it is, and no longer one would.
    size_t valid = utf8_valid_prefix(bytes, strlen(bytes));
    ck_assert_int_eq(utf8_valid(bytes, valid), 1);
    ck_assert_mem_eq(bytes, text, valid);
    for (size_t n = valid + 1; n <= strlen(bytes); n++) ck_assert_int_eq(utf8_valid(bytes, n), 0);
}
END_TEST

START_TEST(any_split_gives_the_same)
{
    enum { SIZE = 400 };
    unsigned seed = (unsigned)time(NULL);
    printf("any_split_gives_the_same: seed %u\n", seed);
    srand(seed);
    char bytes[SIZE], whole[6 * SIZE], split[6 * SIZE];
    static const char common[] = "\x00\x61\x80\x9F\xA0\xBF\xC2\xE0\xE2\xED\xF0\xF4\xF5\xFF\x82\xAC"; // 16
    for (int round = 0; round < 3000; round++) {
        size_t n = (size_t)rand() % SIZE;
        for (size_t i = 0; i < n; i++) bytes[i] = rand() % 4 ? common[rand() % 16] : (char)rand();
        struct utf8_stream s = {0};
        size_t n_whole = utf8_stream_push(&s, bytes, n, whole);
        n_whole += utf8_stream_finish(&s, whole + n_whole);
        size_t n_split = stream(bytes, n, 1 + (size_t)rand() % 9, split);
        ck_assert_uint_eq(n_whole, n_split);
        ck_assert_mem_eq(whole, split, n_whole);
        ck_assert_uint_ge(n_whole, utf8_valid_prefix(bytes, n));
    }
}
END_TEST

START_TEST(lengths_count_code_points)
{
    ck_assert_uint_eq(utf8_length("", 0), 0);
    ck_assert_uint_eq(utf8_length("a\0b", 3), 3);
    ck_assert_uint_eq(utf8_length("\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", 9), 3);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("detokenizer");
    TCase *tests = tcase_create("all");
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, every_code_point_passes);
    tcase_add_loop_test(tests, broken_bytes_become_replacements, 0, sizeof broken / sizeof *broken);
    tcase_add_test(tests, any_split_gives_the_same);
    tcase_add_test(tests, lengths_count_code_points);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
