#include "server/json_get.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct json_error e;

// A body read from a copy of exactly its size, which the caller frees with drop().
struct read {
    char *text;
    struct json_body body;
    int err;
};

static struct read read_bytes(const char *text, size_t n)
{
    struct read r = {.text = malloc(n ? n : 1)};
    memcpy(r.text, text, n);
    r.err = json_body_init(&r.body, r.text, n, "prompt", &e);
    return r;
}

static struct read read_body(const char *text)
{
    struct read r = read_bytes(text, strlen(text));
    ck_assert_msg(r.err == 0, "%s: %s", text, e.error.message);
    return r;
}

static void drop(struct read *r)
{
    if (!r->err) json_body_deinit(&r->body);
    free(r->text);
}

// ---- what the scan lets through ----

static const char *const accepted[] = {
    "{}", " \t\r\n{ } \n", "{\"\":0}", "{\"a\":[]}", "{\"a\":{}}",
    "{\"a\":[1,-1,0,-0,0.5,1e5,1E+5,1.5e-5,true,false,null,\"\"]}",
    "{\"a\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0001\\u00e9\\uD83D\\uDE00\\uFFFF\"}",
    "{\"a\":\"\xC3\xA9\xF0\x9F\x98\x80\x7F\"}",
    "{\"a\":1e308,\"b\":1e-400,\"c\":-1.7976931348623157e308}", "{\"a\":1,\"A\":2,\"aa\":3}", "{\"\xEF\xBB\xBF\":1}",
    "{\"a\":123456789012345678901234567890123456789012345678901234567890123}", // 63 digits
    "{\"a\":{\"x\":1},\"b\":{\"x\":1}}",
};

START_TEST(strict_json_is_accepted)
{
    struct read r = read_body(accepted[_i]);
    ck_assert(cJSON_IsObject(r.body.root));
    drop(&r);
}
END_TEST

static const struct {
    const char *text;
    size_t at; // the byte the message names
    const char *what;
} refused[] = {
    {"", 0, "end"}, {"  ", 2, "end"}, {"[]", 0, "object"}, {"1", 0, "object"}, {"null", 0, "object"},
    {"\"a\"", 0, "object"},
    {"{", 1, "end"}, {"{\"a\"", 4, "end"}, {"{\"a\":", 5, "end"}, {"{\"a\":1", 6, "end"}, {"{\"a\":1,", 7, "end"},
    {"{\"a\":1,}", 7, "character"}, {"{,}", 1, "character"}, {"{\"a\":1 \"b\":2}", 7, "character"},
    {"{a:1}", 1, "character"},
    {"{'a':1}", 1, "character"}, {"{\"a\" 1}", 5, "character"}, {"{\"a\":[1,]}", 8, "character"},
    {"{\"a\":[1 2]}", 8, "character"},
    {"{\"a\":[,]}", 6, "character"}, {"{\"a\":[1}", 7, "character"}, {"{\"a\":1]", 6, "character"},
    {"{} {}", 3, "after"},
    {"{}x", 2, "after"}, {"{1:2}", 1, "character"}, {"{\"a\":1}//", 7, "after"}, {"{/**/}", 1, "character"},
    {"\xEF\xBB\xBF{}", 0, "byte order mark"}, {"{\"a\":\"\xFF\"}", 6, "UTF-8"},
    {"{\"a\":\"\xED\xA0\x80\"}", 6, "UTF-8"},
    {"{\"a\":\"\xC3\"}", 6, "UTF-8"}, {"{\"\xC0\x80\":1}", 2, "UTF-8"}, {"{\"a\":\"\x01\"}", 6, "control"},
    {"{\"a\":\"\n\"}", 6, "control"}, {"{\"a\":\"x", 7, "unterminated"}, {"{\"a\":\"\\", 6, "escape"},
    {"{\"a\":\"\\x\"}", 6, "escape"},
    {"{\"a\":\"\\'\"}", 6, "escape"}, {"{\"a\":\"\\u12\"}", 6, "escape"}, {"{\"a\":\"\\u12g4\"}", 6, "escape"},
    {"{\"a\":\"\\u", 6, "escape"}, {"{\"a\":\"\\U0041\"}", 6, "escape"}, {"{\"a\":\"b\\u0000c\"}", 7, "NUL"},
    {"{\"a\\u0000\":1}", 3, "NUL"}, {"{\"a\":\"\\ud83d\"}", 6, "surrogate"}, {"{\"a\":\"\\ude00\"}", 6, "surrogate"},
    {"{\"a\":\"\\ud83dx\"}", 6, "surrogate"}, {"{\"a\":\"\\ud83d\\n\"}", 6, "surrogate"},
    {"{\"a\":\"\\ud83d\\ud83d\"}", 6, "surrogate"},
    {"{\"a\":\"\\ud83d\\u0041\"}", 6, "surrogate"}, {"{\"a\":\"\\ud83d", 6, "surrogate"},
    {"{\"a\":01}", 5, "leading zero"},
    {"{\"a\":-01}", 5, "leading zero"}, {"{\"a\":00}", 5, "leading zero"}, {"{\"a\":1.}", 7, "character"},
    {"{\"a\":.5}", 5, "character"},
    {"{\"a\":+1}", 5, "character"}, {"{\"a\":-}", 6, "character"}, {"{\"a\":1e}", 7, "character"},
    {"{\"a\":1e+}", 8, "character"},
    {"{\"a\":1.e5}", 7, "character"}, {"{\"a\":0x10}", 6, "character"}, {"{\"a\":1e400}", 5, "too large"},
    {"{\"a\":[-1e309]}", 6, "too large"}, {"{\"a\":NaN}", 5, "character"}, {"{\"a\":Infinity}", 5, "character"},
    {"{\"a\":-Infinity}", 6, "character"}, {"{\"a\":nul}", 5, "character"}, {"{\"a\":True}", 5, "character"},
    {"{\"a\":truex}", 9, "character"},
    {"{\"a\":1234567890123456789012345678901234567890123456789012345678901234}", 5, "63"},
    {"{\"a\":1,\"a\":2}", 7, "duplicate"},
    {"{\"a\":1,\"b\":2,\"\\u0061\":3}", 13, "duplicate"}, {"{\"x\":{\"k\":1,\"l\":2,\"k\":3}}", 18, "duplicate"},
    {"{\"x\":[{\"\":1,\"\":2}]}", 12, "duplicate"}, {"{\"\xC3\xA9\":1,\"\\u00e9\":2}", 8, "duplicate"},
    {"{\"\xF0\x9F\x98\x80\":1,\"\\ud83d\\ude00\":2}", 10, "duplicate"}, {"{\"\\/\":1,\"/\":2}", 8, "duplicate"},
};

START_TEST(anything_else_is_refused_with_its_place)
{
    struct read r = read_bytes(refused[_i].text, strlen(refused[_i].text));
    ck_assert_msg(r.err == ERR_FORMAT, "%s", refused[_i].text);
    char place[32];
    snprintf(place, sizeof place, " at byte %zu", refused[_i].at);
    const char *found = strstr(e.error.message, place);
    ck_assert_msg(found && !found[strlen(place)], "%s: %s", refused[_i].text, e.error.message);
    ck_assert_msg(strstr(e.error.message, refused[_i].what) != NULL, "%s: %s", refused[_i].text, e.error.message);
    drop(&r);
}
END_TEST

START_TEST(nul_bytes_are_refused)
{
    static const char inside[] = "{\"a\":\"b\0c\"}", before[] = "\0{}", between[] = "{\0}", after[] = "{}\0";
    const struct { const char *text; size_t n; } all[] = {{inside, 11}, {before, 3}, {between, 3}, {after, 3}};
    for (size_t i = 0; i < 4; i++) {
        struct read r = read_bytes(all[i].text, all[i].n);
        ck_assert_int_eq(r.err, ERR_FORMAT);
        drop(&r);
    }
}
END_TEST

// {"a":[[[...]]]} with depth levels in all.
static int scan_nested(int depth)
{
    char text[256] = "{\"a\":";
    for (int i = 1; i < depth; i++) strcat(text, "[");
    if (depth == 1) strcat(text, "1");
    for (int i = 1; i < depth; i++) strcat(text, "]");
    strcat(text, "}");
    struct read r = read_bytes(text, strlen(text));
    drop(&r);
    return r.err;
}

START_TEST(depth_is_bounded)
{
    ck_assert_int_eq(scan_nested(1), 0);
    ck_assert_int_eq(scan_nested(JSON_MAX_DEPTH), 0);
    ck_assert_int_eq(scan_nested(JSON_MAX_DEPTH + 1), ERR_FORMAT);
    char *deep = malloc(1 << 20); // unclosed: no stack is spent on it
    memset(deep, '[', 1 << 20);
    memcpy(deep, "{\"a\":", 5);
    struct read r = read_bytes(deep, 1 << 20);
    ck_assert_int_eq(r.err, ERR_FORMAT);
    drop(&r);
    free(deep);
}
END_TEST

// A body of n members (or of n values in one list), keys sharing a long beginning.
static int scan_many(int n, bool members, bool repeat_first)
{
    char *text = malloc((size_t)n * 64 + 64), *at = text + sprintf(text, members ? "{" : "{\"a\":[");
    for (int i = 0; i < n; i++) {
        int number = repeat_first && i == n - 1 ? 0 : i;
        at += members ? sprintf(at, "\"a key that begins like all others %d\":1,", number) : sprintf(at, "\"\",");
    }
    strcpy(at - 1, members ? "}" : "]}");
    struct read r = read_bytes(text, strlen(text));
    drop(&r);
    free(text);
    return r.err;
}

START_TEST(size_is_bounded_and_duplicates_are_found_fast)
{
    ck_assert_int_eq(scan_many(JSON_MAX_MEMBERS - 1, true, false), 0);
    ck_assert_int_eq(scan_many(JSON_MAX_MEMBERS + 1, true, false), ERR_FORMAT);
    ck_assert_int_eq(scan_many(JSON_MAX_MEMBERS - 1, true, true), ERR_FORMAT);
    ck_assert_int_eq(scan_many(JSON_MAX_VALUES - 2, false, false), 0);
    ck_assert_int_eq(scan_many(JSON_MAX_VALUES - 1, false, false), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(e.error.message, "65536 values"));
}
END_TEST

// ---- token ids ----

START_TEST(token_ids_stay_out_of_cjson)
{
    struct read r = read_body("{\"a\":7,\"prompt\": [1, 2,\n2147483647 ,0] ,\"b\":8}");
    ck_assert(r.body.has_ids && !r.body.ids.nested);
    ck_assert_uint_eq(r.body.ids.n_lists, 1);
    ck_assert_uint_eq(r.body.ids.offsets[1], 4);
    ck_assert_mem_eq(r.body.ids.ids, ((int32_t[]){1, 2, 2147483647, 0}), 16);
    ck_assert(cJSON_IsNumber(cJSON_GetObjectItemCaseSensitive(r.body.root, "prompt"))); // neither absent nor a list
    ck_assert_int_eq(cJSON_GetObjectItemCaseSensitive(r.body.root, "b")->valueint, 8);
    drop(&r);
    r = read_body("{\"pr\\u006fmpt\":[[1,2],[],[3] , [ ]]}");
    ck_assert(r.body.has_ids && r.body.ids.nested);
    ck_assert_uint_eq(r.body.ids.n_lists, 4);
    ck_assert_mem_eq(r.body.ids.offsets, ((size_t[]){0, 2, 2, 3, 3}), 5 * sizeof(size_t));
    ck_assert_mem_eq(r.body.ids.ids, ((int32_t[]){1, 2, 3}), 12);
    drop(&r);
}
END_TEST

START_TEST(empty_lists_count_as_ids)
{
    struct read r = read_body("{\"prompt\":[]}");
    ck_assert(r.body.has_ids && !r.body.ids.nested && r.body.ids.n_lists == 1 && r.body.ids.offsets[1] == 0);
    drop(&r);
    r = read_body("{\"prompt\":[ [] ]}");
    ck_assert(r.body.has_ids && r.body.ids.nested && r.body.ids.n_lists == 1 && r.body.ids.offsets[1] == 0);
    drop(&r);
}
END_TEST

START_TEST(other_prompts_are_left_alone)
{
    static const char *const bodies[] = {"{\"prompt\":\"[1,2]\"}", "{\"prompt\":[\"a\",1]}", "{\"prompt\":[[\"a\"]]}",
                                         "{\"prompt\":1}", "{\"prompt\":null}", "{\"prompts\":[1]}",
                                         "{\"x\":{\"prompt\":[1]}}"};
    for (size_t i = 0; i < sizeof bodies / sizeof *bodies; i++) {
        struct read r = read_body(bodies[i]);
        ck_assert(!r.body.has_ids);
        drop(&r);
    }
}
END_TEST

START_TEST(bad_token_ids_are_refused)
{
    static const char *const lists[] = {"[-1]", "[2147483648]", "[99999999999999999999999]", "[1.0]", "[1e3]",
                                        "[1,\"a\"]", "[1,[2]]", "[[1],2]", "[[[1]]]", "[true]", "[null]", "[{}]",
                                        "[1,null]", "[-0]",
                                        "[[1],[\"\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\"]]"};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        char text[128];
        snprintf(text, sizeof text, "{\"prompt\":%s}", lists[i]);
        struct read r = read_bytes(text, strlen(text));
        ck_assert_msg(r.err == ERR_INVALID, "%s", text);
        ck_assert_str_eq(e.param, "prompt");
        ck_assert_ptr_nonnull(strstr(e.error.message, "'prompt'"));
        drop(&r);
    }
}
END_TEST

START_TEST(a_million_token_ids)
{
    enum { N = 1000000 };
    char *text = malloc(8 * N + 64), *at = text + sprintf(text, "{\"prompt\":[");
    for (int i = 0; i < N; i++) at += sprintf(at, "%d,", i);
    strcpy(at - 1, "],\"n\":2}");
    struct read r = read_body(text);
    ck_assert_uint_eq(r.body.ids.offsets[1], N);
    for (int i = 0; i < N; i += 999) ck_assert_int_eq(r.body.ids.ids[i], i);
    int32_t n = 0;
    ck_assert_int_eq(json_get_int32(r.body.root, "n", 1, 5, &n, &e), 0);
    ck_assert_int_eq(n, 2);
    drop(&r);
    free(text);
}
END_TEST

// ---- getters ----

// Each getter on {"v": value}; returns its error, and the message is in e.
#define GET(value, call) \
    __extension__({ \
        struct read r_ = read_body("{\"v\":" value "}"); \
        const cJSON *o = r_.body.root; \
        const struct json_body *body = &r_.body; \
        (void)o, (void)body; \
        int err_ = (call); \
        drop(&r_); \
        if (err_) ck_assert_str_eq(e.param, "v"); \
        if (err_) ck_assert_ptr_nonnull(strstr(e.error.message, "'v'")); \
        err_; \
    })

START_TEST(integers)
{
    int32_t v = 5;
    ck_assert_int_eq(GET("null", json_get_int32(o, "v", 1, 128, &v, &e)), 0);
    ck_assert_int_eq(GET("1", json_get_int32(o, "w", 1, 128, &v, &e)), 0);
    ck_assert_int_eq(GET("1", json_get_int32(o, "V", 1, 128, &v, &e)), 0);
    ck_assert_int_eq(v, 5); // absent, null and another case leave the default
    ck_assert_int_eq(GET("1", json_get_int32(o, "v", 1, 128, &v, &e)), 0);
    ck_assert_int_eq(v, 1);
    ck_assert_int_eq(GET("1.28e2", json_get_int32(o, "v", 1, 128, &v, &e)), 0);
    ck_assert_int_eq(v, 128);
    ck_assert_int_eq(GET("0", json_get_int32(o, "v", 1, 128, &v, &e)), ERR_INVALID);
    ck_assert_str_eq(e.error.message, "'v' must be an integer from 1 to 128, not 0");
    ck_assert_int_eq(GET("129", json_get_int32(o, "v", 1, 128, &v, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("1.5", json_get_int32(o, "v", 1, 128, &v, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("1e300", json_get_int32(o, "v", 1, INT32_MAX, &v, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("2147483648", json_get_int32(o, "v", 1, INT32_MAX, &v, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("true", json_get_int32(o, "v", 0, 1, &v, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("\"1\"", json_get_int32(o, "v", 0, 1, &v, &e)), ERR_INVALID);
    ck_assert_str_eq(e.error.message, "'v' must be an integer from 0 to 1, not a string");
    ck_assert_int_eq(v, 128); // errors leave it too
    ck_assert_int_eq(GET("2147483647", json_get_int32(o, "v", INT32_MIN, INT32_MAX, &v, &e)), 0);
    ck_assert_int_eq(v, INT32_MAX);
    ck_assert_int_eq(GET("-2147483648", json_get_int32(o, "v", INT32_MIN, INT32_MAX, &v, &e)), 0);
    ck_assert_int_eq(v, INT32_MIN);
}
END_TEST

START_TEST(exact_int64)
{
    int64_t v = 0;
    bool present;
    ck_assert_int_eq(GET("9007199254740993", json_body_int64(body, "v", &present, &v, &e)), 0);
    ck_assert(present && v == 9007199254740993);
    ck_assert_int_eq(GET("-9223372036854775808", json_body_int64(body, "v", &present, &v, &e)), 0);
    ck_assert(v == INT64_MIN);
    ck_assert_int_eq(GET("9223372036854775807", json_body_int64(body, "v", &present, &v, &e)), 0);
    ck_assert(v == INT64_MAX);
    ck_assert_int_eq(GET("1e3", json_body_int64(body, "v", &present, &v, &e)), 0);
    ck_assert(v == 1000);
    ck_assert_int_eq(GET("-0", json_body_int64(body, "v", &present, &v, &e)), 0);
    ck_assert(v == 0 && present);
    ck_assert_int_eq(GET("null", json_body_int64(body, "v", &present, &v, &e)), 0);
    ck_assert(!present);
    ck_assert_int_eq(GET("1", json_body_int64(body, "w", &present, &v, &e)), 0);
    ck_assert(!present);
    ck_assert_int_eq(GET("9223372036854775808", json_body_int64(body, "v", &present, &v, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("-9223372036854775809", json_body_int64(body, "v", &present, &v, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("1e19", json_body_int64(body, "v", &present, &v, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("0.5", json_body_int64(body, "v", &present, &v, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("\"5\"", json_body_int64(body, "v", &present, &v, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("[5]", json_body_int64(body, "v", &present, &v, &e)), ERR_INVALID);
}
END_TEST

START_TEST(floats_and_booleans)
{
    float f = 9;
    bool b = true;
    ck_assert_int_eq(GET("2", json_get_float(o, "v", 0, 2, &f, &e)), 0);
    ck_assert(f == 2);
    ck_assert_int_eq(GET("0.7", json_get_float(o, "v", 0, 2, &f, &e)), 0);
    ck_assert(f == 0.7f);
    ck_assert_int_eq(GET("2.0000001", json_get_float(o, "v", 0, 2, &f, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("-1e-9", json_get_float(o, "v", 0, 2, &f, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("1e308", json_get_float(o, "v", 0, 2, &f, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("\"1\"", json_get_float(o, "v", 0, 2, &f, &e)), ERR_INVALID);
    ck_assert_str_eq(e.error.message, "'v' must be a number from 0 to 2, not a string");
    ck_assert_int_eq(GET("null", json_get_float(o, "v", 0, 2, &f, &e)), 0);
    ck_assert(f == 0.7f);
    ck_assert_int_eq(GET("false", json_get_bool(o, "v", &b, &e)), 0);
    ck_assert(!b);
    ck_assert_int_eq(GET("null", json_get_bool(o, "v", &b, &e)), 0);
    ck_assert(!b);
    ck_assert_int_eq(GET("true", json_get_bool(o, "v", &b, &e)), 0);
    ck_assert(b);
    ck_assert_int_eq(GET("0", json_get_bool(o, "v", &b, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("\"true\"", json_get_bool(o, "v", &b, &e)), ERR_INVALID);
}
END_TEST

START_TEST(strings_and_lists)
{
    const char *s = NULL, *strings[4];
    size_t n = 9;
    ck_assert_int_eq(GET("\"abc\"", json_get_string(o, "v", 1, 3, &s, &e) || strcmp(s, "abc")), 0);
    ck_assert_int_eq(GET("\"abcd\"", json_get_string(o, "v", 1, 3, &s, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("\"\"", json_get_string(o, "v", 1, 3, &s, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("[\"a\"]", json_get_string(o, "v", 1, 3, &s, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("null", json_get_strings(o, "v", 1, 4, 1, 9, strings, &n, &e)), 0);
    ck_assert_uint_eq(n, 9);
    ck_assert_int_eq(GET("\"a\"", json_get_strings(o, "v", 1, 4, 1, 9, strings, &n, &e) || strcmp(strings[0], "a")), 0);
    ck_assert_uint_eq(n, 1);
    ck_assert_int_eq(GET("[\"a\",\"b\",\"c\",\"d\"]",
                         json_get_strings(o, "v", 1, 4, 1, 9, strings, &n, &e) || strcmp(strings[3], "d")), 0);
    ck_assert_uint_eq(n, 4);
    ck_assert_int_eq(GET("[\"a\",\"b\",\"c\",\"d\",\"e\"]",
                         json_get_strings(o, "v", 1, 4, 1, 9, strings, &n, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("[]", json_get_strings(o, "v", 1, 4, 1, 9, strings, &n, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("\"\"", json_get_strings(o, "v", 1, 4, 1, 9, strings, &n, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("[\"a\",\"\"]", json_get_strings(o, "v", 1, 4, 1, 9, strings, &n, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("[\"a\",1]", json_get_strings(o, "v", 1, 4, 1, 9, strings, &n, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("{}", json_get_strings(o, "v", 1, 4, 1, 9, strings, &n, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("[]", json_get_strings(o, "v", 0, 4, 1, 9, strings, &n, &e)), 0);
    ck_assert_uint_eq(n, 0);
}
END_TEST

START_TEST(lists_of_integers)
{
    int32_t *list = NULL, n = -1;
    ck_assert_int_eq(GET("[3,-1,2.0]", json_get_int32s(o, "v", -1, 3, 3, &list, &n, &e)), 0);
    ck_assert_int_eq(n, 3);
    ck_assert_mem_eq(list, ((int32_t[]){3, -1, 2}), 12);
    free(list);
    list = NULL;
    ck_assert_int_eq(GET("[1,1,1,1]", json_get_int32s(o, "v", -1, 3, 3, &list, &n, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("[1,4]", json_get_int32s(o, "v", -1, 3, 3, &list, &n, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("[1,\"a\"]", json_get_int32s(o, "v", -1, 3, 3, &list, &n, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("1", json_get_int32s(o, "v", -1, 3, 3, &list, &n, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("null", json_get_int32s(o, "v", -1, 3, 3, &list, &n, &e)), 0);
    ck_assert_ptr_null(list);
    ck_assert_int_eq(n, 3);
    ck_assert_int_eq(GET("[]", json_get_int32s(o, "v", -1, 3, 3, &list, &n, &e)), 0);
    ck_assert_int_eq(n, 0);
}
END_TEST

START_TEST(objects_and_members)
{
    static const char *const known[] = {"a", "b", "v"}, *const others[] = {"a", "w"};
    const cJSON *object = NULL;
    ck_assert_int_eq(GET("{\"k\":1}", json_get_object(o, "v", &object, &e) || !json_find(object, "k")), 0);
    ck_assert_int_eq(GET("[]", json_get_object(o, "v", &object, &e)), ERR_INVALID);
    ck_assert_int_eq(GET("1", json_require(o, "v", &e)), 0);
    ck_assert_int_eq(GET("null", json_require(o, "v", &e)), ERR_INVALID);
    ck_assert_int_eq(GET("1", json_check_known(o, known, 3, &e)), 0);
    ck_assert_int_eq(GET("1", json_check_known(o, others, 2, &e)), ERR_INVALID);
    ck_assert_str_eq(e.error.message, "unknown field 'v'");
}
END_TEST

// What a client calls a field comes back in the message, cut between characters.
START_TEST(long_names_are_cut_whole)
{
    char text[256] = "{\"";
    for (int i = 0; i < 50; i++) strcat(text, "\xE2\x82\xAC");
    struct read r = read_body(strcat(text, "\":1}"));
    ck_assert_int_eq(json_check_known(r.body.root, (const char *[]){"a"}, 1, &e), ERR_INVALID);
    ck_assert_uint_eq(strlen(e.param), 63);
    ck_assert_uint_eq(strlen(e.error.message), strlen("unknown field ''") + 60);
    drop(&r);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("json");
    TCase *tests = tcase_create("all");
    tcase_set_timeout(tests, 60);
    tcase_add_loop_test(tests, strict_json_is_accepted, 0, sizeof accepted / sizeof *accepted);
    tcase_add_loop_test(tests, anything_else_is_refused_with_its_place, 0, sizeof refused / sizeof *refused);
    tcase_add_test(tests, nul_bytes_are_refused);
    tcase_add_test(tests, depth_is_bounded);
    tcase_add_test(tests, size_is_bounded_and_duplicates_are_found_fast);
    tcase_add_test(tests, token_ids_stay_out_of_cjson);
    tcase_add_test(tests, empty_lists_count_as_ids);
    tcase_add_test(tests, other_prompts_are_left_alone);
    tcase_add_test(tests, bad_token_ids_are_refused);
    tcase_add_test(tests, a_million_token_ids);
    tcase_add_test(tests, integers);
    tcase_add_test(tests, exact_int64);
    tcase_add_test(tests, floats_and_booleans);
    tcase_add_test(tests, strings_and_lists);
    tcase_add_test(tests, lists_of_integers);
    tcase_add_test(tests, objects_and_members);
    tcase_add_test(tests, long_names_are_cut_whole);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
