/* Text buffers and the JSON they write; error bodies. */
#include "server/error_response.h"
#include "server/text_buffer.h"

#include <check.h>
#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char *finish(struct text_buffer *b)
{
    text_char(b, '\0');
    ck_assert(!b->failed);
    return b->data;
}

START_TEST(numbers)
{
    static const struct {
        int64_t value;
        const char *text;
    } cases[] = {
        {0, "0"}, {7, "7"}, {-1, "-1"}, {INT64_MAX, "9223372036854775807"}, {INT64_MIN, "-9223372036854775808"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct text_buffer b = {0};
        text_int(&b, cases[i].value);
        ck_assert_str_eq(finish(&b), cases[i].text);
        text_deinit(&b);
    }
}
END_TEST

START_TEST(floats_come_back)
{
    unsigned seed = (unsigned)time(NULL);
    fprintf(stderr, "seed %u\n", seed);
    srand(seed);
    for (int i = 0; i < 20000; i++) {
        uint32_t bits = ((uint32_t)rand() << 16) ^ (uint32_t)rand();
        float value, back;
        memcpy(&value, &bits, sizeof value);
        struct text_buffer b = {0};
        text_json_float(&b, value);
        back = strtof(finish(&b), NULL);
        if (isfinite(value))
            ck_assert_msg(back == value, "%a is written %s", (double)value, b.data);
        else
            ck_assert(fabsf(back) == 9999);
        text_deinit(&b);
    }
    struct text_buffer b = {0};
    text_json_float(&b, -0.1f);
    text_char(&b, ' ');
    text_json_float(&b, -INFINITY);
    ck_assert_str_eq(finish(&b), "-0.1 -9999");
    text_deinit(&b);
}
END_TEST

// Every character that JSON wants escaped, and some that it does not, through a parser and back.
START_TEST(strings_come_back)
{
    char text[512];
    size_t n = 0;
    for (int c = 1; c < 128; c++) text[n++] = (char)c;
    strcpy(text + n, "\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80\"\\");
    struct text_buffer b = {0};
    text_json_string(&b, text, strlen(text));
    cJSON *parsed = cJSON_Parse(finish(&b));
    ck_assert_ptr_nonnull(parsed);
    ck_assert_str_eq(parsed->valuestring, text);
    for (size_t i = 0; i + 1 < b.length; i++) ck_assert_uint_ge((unsigned char)b.data[i], 0x20);
    cJSON_Delete(parsed);
    text_deinit(&b);
}
END_TEST

START_TEST(grows_and_fails_once)
{
    struct text_buffer b = {0};
    for (int i = 0; i < 100000; i++) text_printf(&b, "%d,", i % 10);
    ck_assert_uint_eq(b.length, 200000);
    ck_assert_ptr_null(text_reserve(&b, SIZE_MAX - 100));
    ck_assert(b.failed);
    text_string(&b, "more");
    ck_assert_uint_eq(b.length, 200000);
    text_deinit(&b);
}
END_TEST

START_TEST(errors)
{
    struct http_error e;
    struct text_buffer b = {0};
    http_error_set(&e, 400, NULL, "n", "say \"%s\"", "no");
    http_error_write(&b, &e);
    ck_assert_str_eq(finish(&b), "{\"error\":{\"message\":\"say \\\"no\\\"\",\"type\":\"invalid_request_error\","
                                 "\"param\":\"n\",\"code\":null}}");
    text_deinit(&b);
    http_error_set(&e, 429, "c", NULL, "later");
    ck_assert_int_ge(e.retry_after, 1);
    http_error_write(&b, &e);
    ck_assert_str_eq(finish(&b), "{\"error\":{\"message\":\"later\",\"type\":\"rate_limit_error\",\"param\":null,"
                                 "\"code\":\"c\"}}");
    text_deinit(&b);

    // A message that is cut, is cut between characters.
    char text[1024] = "";
    while (strlen(text) < 1000) strcat(text, "\xe2\x82\xac");
    http_error_set(&e, 400, NULL, NULL, "%s", text);
    ck_assert_uint_eq(strlen(e.message) % 3, 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("text_buffer");
    TCase *tc = tcase_create("text");
    tcase_add_test(tc, numbers);
    tcase_add_test(tc, floats_come_back);
    tcase_add_test(tc, strings_come_back);
    tcase_add_test(tc, grows_and_fails_once);
    tcase_add_test(tc, errors);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
