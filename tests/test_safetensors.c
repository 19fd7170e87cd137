/* test_safetensors.c: what a weights file must be, and each way in which it is not. */
#include <check.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "models/checkpoint.h"

enum { MAX_FILE = 1 << 16 };

static unsigned seed;
static char dir[64]; // a fresh directory per test

static void make_dir(void)
{
    strcpy(dir, "/tmp/gptd-safetensors-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
}

static void remove_dir(void)
{
    struct dirent **list;
    int n = scandir(dir, &list, NULL, NULL);
    char path[512];
    for (int i = 0; i < n; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, list[i]->d_name);
        unlink(path);
        free(list[i]);
    }
    if (n >= 0) free(list);
    rmdir(dir);
}

// A file of the header's size, the header, and n_data bytes 0, 1, 2 ... Returns its size.
static size_t build(unsigned char *out, const char *header, size_t n_data)
{
    size_t n = strlen(header);
    for (int i = 0; i < 8; i++) out[i] = (unsigned char)(n >> 8 * i);
    memcpy(out + 8, header, n);
    for (size_t i = 0; i < n_data; i++) out[8 + n + i] = (unsigned char)i;
    return 8 + n + n_data;
}

static void write_file(const char *name, const void *bytes, size_t size)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(bytes, 1, size, f), size);
    fclose(f);
}

static void write_tensors(const char *name, const char *header, size_t n_data)
{
    static unsigned char file[MAX_FILE];
    write_file(name, file, build(file, header, n_data));
}

// Parses from memory of exactly that size, so that the address sanitizer sees every byte read beyond it.
static int parse(struct safetensors *st, const void *bytes, size_t size, struct error *e)
{
    static void *copy;
    free(copy);
    copy = malloc(size ? size : 1);
    memcpy(copy, bytes, size);
    return safetensors_parse(st, copy, size, e);
}

#define PAIR "{\"__metadata__\":{\"format\":\"pt\"}," \
             "\"b\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[4,28]}," \
             "\"a\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[0,4]}}"

START_TEST(good_file)
{
    unsigned char file[512];
    struct safetensors st;
    struct error e;
    size_t size = build(file, PAIR "   ", 28); // padded with spaces, as the reference does
    ck_assert_msg(parse(&st, file, size, &e) == 0, "%s", e.message);
    ck_assert_uint_eq(st.n_tensors, 2);
    ck_assert_str_eq(st.tensors[0].name, "a");
    ck_assert_int_eq(st.tensors[0].dtype, DTYPE_BF16);
    ck_assert_str_eq(st.tensors[1].name, "b");
    ck_assert_int_eq(st.tensors[1].n_dims, 2);
    ck_assert_uint_eq(st.tensors[1].shape[0], 2);
    ck_assert_uint_eq(st.tensors[1].shape[1], 3);
    ck_assert_uint_eq(st.tensors[1].size, 24);
    ck_assert_int_eq(*(const unsigned char *)st.tensors[1].data, 4);
    safetensors_close(&st);
}
END_TEST

START_TEST(scalars_empty_tensors_and_empty_files)
{
    unsigned char file[512];
    struct safetensors st;
    struct error e;
    size_t size = build(file, "{}", 0);
    ck_assert_int_eq(parse(&st, file, size, &e), 0);
    ck_assert_uint_eq(st.n_tensors, 0);
    safetensors_close(&st);
    size = build(file, "{\"n\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[0,8]},"
                       "\"z\":{\"dtype\":\"F32\",\"shape\":[0,5],\"data_offsets\":[0,0]},"
                       "\"d\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,2],\"data_offsets\":[8,10]}}", 10);
    ck_assert_msg(parse(&st, file, size, &e) == 0, "%s", e.message);
    ck_assert_uint_eq(st.n_tensors, 3);
    ck_assert_str_eq(st.tensors[0].name, "z");
    ck_assert_int_eq(st.tensors[1].n_dims, 0);
    ck_assert_int_eq(st.tensors[1].dtype, -1);
    ck_assert_int_eq(st.tensors[2].n_dims, 5);
    safetensors_close(&st);
}
END_TEST

#define ONE(dtype, shape, offsets) "{\"w\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

// header, bytes of data, what the error says
static const struct { const char *header; size_t n_data; const char *message; } broken[] = {
    {ONE("\"F32\"", "[2]", "[0,8]"), 9, "1 bytes follow"},
    {ONE("\"F32\"", "[2]", "[0,8]"), 7, "w: data_offsets 0 to 8 do not lie in 7"},
    {ONE("\"F32\"", "[2]", "[1,9]"), 9, "hole or overlaps"},
    {ONE("\"F32\"", "[2]", "[8,0]"), 8, "w: data_offsets"},
    {ONE("\"F32\"", "[3]", "[0,8]"), 8, "w: its shape does not need the 8 bytes"},
    {ONE("\"F32\"", "[2]", "[0,8,8]"), 8, "w: data_offsets are not two sizes"},
    {ONE("\"F32\"", "[2]", "[0]"), 8, "not two sizes"},
    {ONE("\"F32\"", "[2]", "{\"a\":0,\"b\":8}"), 8, "not two sizes"},
    {ONE("\"F32\"", "[2]", "[0,8.5]"), 8, "not two sizes"},
    {ONE("\"F32\"", "[2]", "[-8,8]"), 8, "not two sizes"},
    {ONE("\"F32\"", "[2]", "[0,1e300]"), 8, "not two sizes"},
    {ONE("\"F32\"", "[2]", "[0,\"8\"]"), 8, "not two sizes"},
    {ONE("\"F32\"", "[-2]", "[0,8]"), 8, "shape holds something that is no size"},
    {ONE("\"F32\"", "[2.5]", "[0,8]"), 8, "no size"},
    {ONE("\"F32\"", "[null]", "[0,8]"), 8, "no size"},
    {ONE("\"F32\"", "[9007199254740993]", "[0,8]"), 8, "its shape"},
    {ONE("\"F32\"", "[18446744073709551616]", "[0,8]"), 8, "no size"},
    {ONE("\"F32\"", "[4294967296,4294967296,2]", "[0,8]"), 8, "shape overflows"},
    {ONE("\"F32\"", "[4611686018427387904]", "[0,0]"), 0, "no size"},
    {ONE("\"F64\"", "[4503599627370496,1024]", "[0,0]"), 0, "its shape"},
    {ONE("\"F32\"", "2", "[0,8]"), 8, "shape is not an array"},
    {ONE("\"F33\"", "[2]", "[0,8]"), 8, "w: dtype F33 is unknown"},
    {ONE("32", "[2]", "[0,8]"), 8, "dtype is not a string"},
    {ONE("null", "[2]", "[0,8]"), 8, "dtype is not a string"},
    {"{\"w\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "dtype is not a string"},
    {"{\"w\":{\"Dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "dtype is not a string"},
    {"{\"w\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, "shape is not"},
    {"{\"w\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "data_offsets"},
    {"{\"w\":[]}", 0, "w: not an object"},
    {"{\"w\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
     "\"v\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[2,6]}}", 6, "hole or overlaps"},
    {"{\"w\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
     "\"v\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[5,9]}}", 9, "v: its data leaves a hole"},
    {"{\"w\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
     "\"w\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]}}", 8, "\"w\" stands twice"},
    {"{\"w\":{\"dtype\":\"U8\",\"shape\":[4],\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "\"shape\" stands twice"},
    {"{\"__metadata__\":{\"format\":1}}", 0, "__metadata__"},
    {"{\"__metadata__\":[]}", 0, "__metadata__"},
    {"[]", 0, "does not start with {"},
    {" {}", 0, "does not start with {"},
    {"{} x", 0, "not JSON"},
    {"{}{}", 0, "text after the end"},
    {"{\"a\":01}", 0, "not a valid number"},
    {"{\"a\":1.}", 0, "not a valid number"},
    {"{\"a\":-}", 0, "not a valid number"},
    {"{\"a\":1e}", 0, "not a valid number"},
    {"{\"a\":NaN}", 0, "not JSON: {\"a\":NaN}"},
    {"{\"a\":\"\\u0000\"}", 0, "not a valid string"},
    {"{\"a\x01\":1}", 0, "not a valid string"},
    {"{\"a\xff\":1}", 0, "not a valid string"},
    {"{\"\xc0\xaf\":1}", 0, "not a valid string"},         // overlong
    {"{\"\xed\xa0\x80\":1}", 0, "not a valid string"},     // a surrogate
    {"{\"\xf4\x90\x80\x80\":1}", 0, "not a valid string"}, // beyond U+10FFFF
    {"{\"a\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}", 0, "nested too deeply"},
    {"{\"a\":}", 0, "not JSON"},
    {"{\"a\":1,}", 0, "not JSON"},
    {"{", 0, "not JSON"},
    {"{}}", 0, "closed but never opened"},
};

START_TEST(broken_header)
{
    unsigned char file[1024];
    struct safetensors st;
    struct error e = {0};
    size_t size = build(file, broken[_i].header, broken[_i].n_data);
    ck_assert_msg(parse(&st, file, size, &e) < 0, "accepted: %s", broken[_i].header);
    ck_assert_msg(strstr(e.message, broken[_i].message), "%s: %s", broken[_i].header, e.message);
    ck_assert_ptr_null(st.tensors);
}
END_TEST

START_TEST(header_size)
{
    unsigned char file[512] = {0};
    struct safetensors st;
    struct error e;
    size_t size = build(file, "{}", 0);
    static const struct { uint64_t n; const char *message; } sizes[] = {
        {0, "does not start with {"}, {1, "not JSON"}, {3, "ends inside its header"},
        {100000001, "too large"}, {UINT64_MAX, "too large"}, {UINT64_MAX - 7, "too large"}, {1ull << 63, "too large"},
        {100000000, "ends inside its header"},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (int j = 0; j < 8; j++) file[j] = (unsigned char)(sizes[i].n >> 8 * j);
        ck_assert_int_lt(parse(&st, file, size, &e), 0);
        ck_assert_msg(strstr(e.message, sizes[i].message), "%s", e.message);
    }
}
END_TEST

START_TEST(cut_anywhere)
{
    unsigned char file[512];
    struct safetensors st;
    size_t size = build(file, PAIR, 28);
    for (size_t n = 0; n < size; n++) ck_assert_int_lt(parse(&st, file, n, NULL), 0);
    file[size] = 0;
    ck_assert_int_lt(parse(&st, file, size + 1, NULL), 0);
}
END_TEST

// Any byte changed: refused, or a file whose tensors lie inside it.
START_TEST(random_bytes)
{
    unsigned char file[512], changed[512];
    struct safetensors st;
    size_t size = build(file, PAIR, 28), n_header = size - 28;
    srandom(seed);
    for (int round = 0; round < 20000; round++) {
        memcpy(changed, file, size);
        for (int i = 0; i < 1 + round % 4; i++) changed[(size_t)random() % n_header] = (unsigned char)random();
        if (safetensors_parse(&st, changed, size, NULL)) continue;
        size_t total = 0;
        for (size_t i = 0; i < st.n_tensors; i++) {
            const unsigned char *data = st.tensors[i].data;
            ck_assert(data >= changed && data + st.tensors[i].size <= changed + size);
            total += st.tensors[i].size;
        }
        ck_assert_uint_eq(total, 28);
        safetensors_close(&st);
    }
}
END_TEST

START_TEST(file_of_an_address)
{
    struct checkpoint c;
    struct error e;
    make_dir();
    write_tensors("model.safetensors", PAIR, 28);
    ck_assert_msg(checkpoint_open(&c, dir, &e) == 0, "%s", e.message);
    const struct safetensors_tensor *b = checkpoint_find(&c, "b");
    ck_assert_ptr_nonnull(b);
    ck_assert_ptr_null(checkpoint_find(&c, "c"));
    const char *path = safetensors_file_at((const char *)b->data + b->size - 1);
    ck_assert_ptr_nonnull(path);
    ck_assert_ptr_nonnull(strstr(path, "/model.safetensors"));
    ck_assert_ptr_null(safetensors_file_at(&c));
    ck_assert_ptr_null(safetensors_file_at(NULL));
    ck_assert_int_eq(checkpoint_populate(&c, &e), 0);
    checkpoint_close(&c);
    ck_assert_ptr_null(safetensors_file_at(b));
    remove_dir();
}
END_TEST

// What the page after the cut held is gone: populating refuses, and the process lives.
START_TEST(cut_under_the_map)
{
    static unsigned char file[MAX_FILE];
    struct checkpoint c;
    struct error e;
    char path[256];
    make_dir();
    write_file("model.safetensors", file, build(file, ONE("\"U8\"", "[60000]", "[0,60000]"), 60000));
    ck_assert_int_eq(checkpoint_open(&c, dir, &e), 0);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    ck_assert_int_eq(truncate(path, 4096), 0);
    ck_assert_int_eq(checkpoint_populate(&c, &e), ERR_IO);
    ck_assert_msg(strstr(e.message, "model.safetensors"), "%s", e.message);
    checkpoint_close(&c);
    remove_dir();
}
END_TEST

#define INDEX(map) "{\"metadata\":{\"total_size\":28},\"weight_map\":" map "}"

START_TEST(shards)
{
    struct checkpoint c;
    struct error e;
    make_dir();
    write_tensors("one.safetensors", "{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]}}", 3);
    write_tensors("two.safetensors", "{\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
                                     "\"c\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[2,3]}}", 3);
    write_tensors("again.safetensors", "{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]}}", 3);
    static const struct { const char *index, *message; } indices[] = {
        {INDEX("{\"c\":\"two.safetensors\",\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}"), NULL},
        {INDEX("{\"a\":\"one.safetensors\",\"b\":\"one.safetensors\"}"), "b is not in one.safetensors"},
        {INDEX("{\"a\":\"two.safetensors\",\"b\":\"two.safetensors\"}"), "a is not in two.safetensors"},
        {INDEX("{\"a\":\"one.safetensors\",\"d\":\"two.safetensors\"}"), "d is not in two.safetensors"},
        {INDEX("{\"a\":\"one.safetensors\",\"x\":\"again.safetensors\"}"), "a: in more than one file"},
        {INDEX("{\"a\":\"gone.safetensors\"}"), "gone.safetensors: cannot be opened: No such file"},
        {INDEX("{\"a\":\"../one.safetensors\"}"), "weight_map: a: not a file's name"},
        {INDEX("{\"a\":1}"), "weight_map: a: not a file's name"},
        {INDEX("[]"), "weight_map: not an object"},
        {"{}", "weight_map: not an object"},
        {"{", "model.safetensors.index.json: line 1: not JSON"},
    };
    ck_assert_int_eq(checkpoint_open(&c, dir, &e), ERR_IO);
    ck_assert_msg(strstr(e.message, "neither model.safetensors nor model.safetensors.index.json"), "%s", e.message);
    for (size_t i = 0; i < sizeof indices / sizeof *indices; i++) {
        write_file("model.safetensors.index.json", indices[i].index, strlen(indices[i].index));
        int rc = checkpoint_open(&c, dir, &e);
        if (indices[i].message) {
            ck_assert_msg(rc < 0 && strstr(e.message, indices[i].message), "%s: %s", indices[i].index, e.message);
            continue;
        }
        ck_assert_msg(rc == 0, "%s", e.message);
        ck_assert_uint_eq(c.n_files, 2);
        ck_assert_uint_eq(c.n_tensors, 3);
        ck_assert_uint_eq(checkpoint_find(&c, "b")->size, 2);
        checkpoint_close(&c);
    }
    remove_dir();
}
END_TEST

START_TEST(not_a_file)
{
    struct safetensors st;
    struct error e;
    make_dir();
    ck_assert_int_lt(safetensors_open(&st, dir, &e), 0);
    ck_assert_msg(strstr(e.message, "not a regular file"), "%s", e.message);
    write_file("empty.safetensors", "", 0);
    char path[256];
    snprintf(path, sizeof path, "%s/empty.safetensors", dir);
    ck_assert_int_lt(safetensors_open(&st, path, &e), 0);
    ck_assert_msg(strstr(e.message, "empty.safetensors: empty"), "%s", e.message);
    remove_dir();
}
END_TEST

int main(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = (unsigned)now.tv_nsec;
    printf("seed %u\n", seed);
    fflush(stdout);
    Suite *suite = suite_create("safetensors");
    TCase *tc = tcase_create("files");
    tcase_add_test(tc, good_file);
    tcase_add_test(tc, scalars_empty_tensors_and_empty_files);
    tcase_add_loop_test(tc, broken_header, 0, sizeof broken / sizeof *broken);
    tcase_add_test(tc, header_size);
    tcase_add_test(tc, cut_anywhere);
    tcase_add_test(tc, random_bytes);
    tcase_add_test(tc, file_of_an_address);
    tcase_add_test(tc, cut_under_the_map);
    tcase_add_test(tc, shards);
    tcase_add_test(tc, not_a_file);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
