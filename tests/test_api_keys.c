#include "server/api_keys.h"

#include <check.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char path[] = "/tmp/gptd-test-keys-XXXXXX";

static void write_keys(const char *text)
{
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
}

static struct api_keys *keys_of(const char *key, const char *text)
{
    struct api_keys *keys;
    struct error e;
    if (text) write_keys(text);
    ck_assert_msg(api_keys_create(&keys, key, text ? path : NULL, &e) == 0, "%s", e.message);
    return keys;
}

static struct api_key *find(struct api_keys *keys, const char *given) { return api_keys_find(keys, given, strlen(given)); }

static void expect_role(struct api_keys *keys, const char *given, enum api_role role)
{
    struct api_key *key = find(keys, given);
    ck_assert_ptr_nonnull(key);
    for (enum api_role r = API_ROLE_USER; r <= API_ROLE_ADMIN; r++)
        ck_assert_int_eq(api_key_may(key, r), r == role || role == API_ROLE_ADMIN);
    api_key_release(key);
}

static void setup(void)
{
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    close(fd);
}

static void teardown(void)
{
    unlink(path);
    strcpy(path, "/tmp/gptd-test-keys-XXXXXX");
}

START_TEST(lookup)
{
    struct api_keys *keys = keys_of("zero", "\n  first \r\n# a comment\nsecond\trole=metrics name=prometheus\n\nthird role=admin");
    ck_assert_uint_eq(api_keys_count(keys), 4);
    expect_role(keys, "zero", API_ROLE_ADMIN);
    expect_role(keys, "first", API_ROLE_USER);
    expect_role(keys, "second", API_ROLE_METRICS);
    expect_role(keys, "third", API_ROLE_ADMIN);
    static const char *const wrong[] = {"", "firs", "first ", "firstt", "First", "#", "prometheus", "role=admin"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) ck_assert_ptr_null(find(keys, wrong[i]));
    ck_assert_ptr_null(api_keys_find(keys, "first\0x", 7));
    struct api_key *key = find(keys, "second");
    ck_assert_str_eq(api_key_name(key), "prometheus");
    api_key_release(key);
    api_keys_destroy(keys);
}
END_TEST

// SHA-256 of "abc": FIPS 180-2, B.1.
#define ABC "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

START_TEST(hashed)
{
    struct api_keys *keys = keys_of(NULL, "sha256:" ABC " name=by-hash\n");
    struct api_key *key = find(keys, "abc");
    ck_assert_ptr_nonnull(key);
    ck_assert_str_eq(api_key_id(key), ABC);
    ck_assert_str_eq(api_key_name(key), "by-hash");
    ck_assert_ptr_null(find(keys, ABC)); // whoever reads the file has no key
    ck_assert_ptr_null(find(keys, "sha256:" ABC));
    api_keys_destroy(keys);
    ck_assert_str_eq(api_key_id(key), ABC); // held
    api_key_release(key);

    keys = keys_of("abc", NULL);
    key = find(keys, "abc");
    ck_assert_str_eq(api_key_id(key), ABC);
    ck_assert_str_eq(api_key_name(key), "key-ba7816bf");
    api_key_release(key);
    api_keys_destroy(keys);
}
END_TEST

static const struct { const char *text, *words; } wrong_files[] = {
    {"", "holds no key"},
    {" \n# only this\n\n", "holds no key"},
    {"good\nsecret\x7f", "line 2: a key is made of visible ASCII"},
    {"secret words", "line 1: after a key may come"},
    {"\n\nsecret name=a name=b/c", "line 3: a name is made of"},
    {"secret role=root", "roles are user, metrics, admin"},
    {"secret role=", "roles are"},
    {"secret max-concurrent=0", "a limit is a number"},
    {"secret max-concurrent=", "a limit is a number"},
    {"secret tokens-per-minute=1e3", "a limit is a number"},
    {"secret requests-per-minute=99999999999999999999", "a limit is a number"},
    {"secret requests-per-minute=-1", "a limit is a number"},
    {"secret requests_per_minute=1", "after a key may come"},
    {"secret =", "after a key may come"},
    {"sha256:secret", "64 hexadecimal digits"},
    {"secret\nother\nsecret role=admin", "line 3: this key is there already"},
    {"abc\nsha256:" ABC, "line 2: this key is there already"},
};

START_TEST(wrong)
{
    struct api_keys *keys;
    struct error e;
    write_keys(wrong_files[_i].text);
    ck_assert_int_eq(api_keys_create(&keys, NULL, path, &e), ERR_INVALID);
    ck_assert_ptr_null(keys);
    ck_assert_msg(strstr(e.message, wrong_files[_i].words), "%s", e.message);
    ck_assert_ptr_null(strstr(e.message, "secret"));
}
END_TEST

START_TEST(wrong_otherwise)
{
    struct api_keys *keys;
    struct error e;
    ck_assert_int_eq(api_keys_create(&keys, NULL, "/nowhere/at/all", &e), ERR_IO);
    ck_assert_int_eq(api_keys_create(&keys, "two words", NULL, &e), ERR_INVALID);
    ck_assert_ptr_null(strstr(e.message, "words"));
    write_keys("one\ntwo");
    ck_assert_int_eq(api_keys_create(&keys, "two", path, &e), ERR_INVALID);
    FILE *f = fopen(path, "w");
    fwrite("one\0two", 1, 7, f);
    fclose(f);
    ck_assert_int_eq(api_keys_create(&keys, NULL, path, &e), ERR_INVALID);
}
END_TEST

START_TEST(reload)
{
    struct http_error refusal;
    struct error e;
    struct api_keys *keys = keys_of("zero", "stays max-concurrent=1\ngoes");
    struct api_key *goes = find(keys, "goes"), *before = find(keys, "stays");
    ck_assert_int_eq(rate_limit_begin(api_key_limit(before), 1, &refusal), 0);

    write_keys("stays max-concurrent=1 role=admin\ncomes");
    ck_assert_int_eq(api_keys_reload(keys, &e), 0);
    ck_assert_uint_eq(api_keys_count(keys), 3);
    ck_assert_ptr_null(find(keys, "goes"));
    ck_assert(api_key_may(goes, API_ROLE_USER)); // who holds it may go on
    api_key_release(goes);
    expect_role(keys, "zero", API_ROLE_ADMIN);
    expect_role(keys, "comes", API_ROLE_USER);
    expect_role(keys, "stays", API_ROLE_ADMIN);
    struct api_key *after = find(keys, "stays"); // what runs counts on
    ck_assert_int_eq(rate_limit_begin(api_key_limit(after), 1, &refusal), -1);
    rate_limit_end(api_key_limit(before), 0, 0);
    api_key_release(before);
    ck_assert_int_eq(rate_limit_begin(api_key_limit(after), 1, &refusal), 0);
    api_key_release(after);

    for (size_t i = 0; i < sizeof wrong_files / sizeof *wrong_files; i++) { // nothing changes
        write_keys(wrong_files[i].text);
        ck_assert_int_lt(api_keys_reload(keys, &e), 0);
        ck_assert_uint_eq(api_keys_count(keys), 3);
    }
    unlink(path);
    ck_assert_int_eq(api_keys_reload(keys, &e), ERR_IO);
    expect_role(keys, "comes", API_ROLE_USER);
    api_keys_destroy(keys);
}
END_TEST

struct reading {
    struct api_keys *keys;
    atomic_bool *ending;
    int n_found;
};

static void *look_up(void *arg)
{
    struct reading *r = arg;
    struct http_error refusal;
    while (!atomic_load(r->ending)) {
        struct api_key *key = find(r->keys, "always");
        ck_assert_ptr_nonnull(key);
        ck_assert_int_eq(rate_limit_begin(api_key_limit(key), r->n_found, &refusal), 0);
        rate_limit_end(api_key_limit(key), 0, 0);
        api_key_release(key);
        key = find(r->keys, "sometimes");
        if (key) ck_assert_str_eq(api_key_name(key), "guest");
        api_key_release(key);
        r->n_found++;
    }
    return NULL;
}

START_TEST(reload_amid_lookups)
{
    enum { THREADS = 3 };
    pthread_t threads[THREADS];
    struct error e;
    atomic_bool ending = false;
    struct api_keys *keys = keys_of(NULL, "always\n");
    struct reading readings[THREADS];
    for (int i = 0; i < THREADS; i++) {
        readings[i] = (struct reading){keys, &ending, 0};
        pthread_create(&threads[i], NULL, look_up, &readings[i]);
    }
    for (int i = 0; i < 300; i++) {
        write_keys(i % 2 ? "always\n" : "sometimes name=guest\nalways max-concurrent=1000\n");
        ck_assert_int_eq(api_keys_reload(keys, &e), 0);
    }
    atomic_store(&ending, true);
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        ck_assert_int_gt(readings[i].n_found, 0);
    }
    api_keys_destroy(keys);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("api_keys");
    TCase *t = tcase_create("api_keys");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_test(t, lookup);
    tcase_add_test(t, hashed);
    tcase_add_loop_test(t, wrong, 0, sizeof wrong_files / sizeof *wrong_files);
    tcase_add_test(t, wrong_otherwise);
    tcase_add_test(t, reload);
    tcase_add_test(t, reload_amid_lookups);
    suite_add_tcase(s, t);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
