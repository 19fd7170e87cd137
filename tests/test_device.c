/* The CPU device: what it accepts, and its memory. */
#include <check.h>
#include <stdint.h>
#include <string.h>

#include "kernels/cpu/machine.h"
#include "kernels/kernels.h"

static const struct kernels *k;
static struct error e;
static const struct device_options good = {
    .n_threads = 2, .max_vocab_size = 100, .max_context = 64, .max_dim = 64, .max_tokens = 8};

static struct device *create(void)
{
    struct device *d;
    ck_assert_msg(k->device_create(&d, &good, &e) == 0, "%s", e.message);
    return d;
}

START_TEST(dtypes_have_sizes_and_names)
{
    ck_assert_uint_eq(dtype_size(DTYPE_F32), 4);
    ck_assert_uint_eq(dtype_size(DTYPE_F16), 2);
    ck_assert_uint_eq(dtype_size(DTYPE_BF16), 2);
    ck_assert_uint_eq(dtype_size(DTYPE_I32), 4);
    ck_assert_str_eq(dtype_name(DTYPE_F32), "F32");
    ck_assert_str_eq(dtype_name(DTYPE_F16), "F16");
    ck_assert_str_eq(dtype_name(DTYPE_BF16), "BF16");
    ck_assert_str_eq(dtype_name(DTYPE_I32), "I32");
}
END_TEST

START_TEST(options_are_checked)
{
    struct device *d;
    struct device_options bad = good;
    bad.max_dim = 0;
    ck_assert_int_eq(k->device_create(&d, &bad, &e), ERR_INVALID);
    ck_assert_ptr_null(d);
    ck_assert_ptr_nonnull(strstr(e.message, "max_dim"));
    bad = good, bad.n_threads = -1;
    ck_assert_int_eq(k->device_create(&d, &bad, &e), ERR_INVALID);
    bad = good, bad.isa = "mmx";
    ck_assert_int_eq(k->device_create(&d, &bad, &e), ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(e.message, "mmx"));
    if (machine_isa() < ISA_AVX512BF16) {
        bad.isa = "avx512bf16";
        ck_assert_int_eq(k->device_create(&d, &bad, &e), ERR_UNSUPPORTED);
    }
}
END_TEST

START_TEST(every_isa_of_the_machine_can_be_forced)
{
    static const char *const names[] = {"generic", "avx2", "avx512", "avx512bf16"};
    for (int i = 0; i <= (int)machine_isa(); i++) {
        struct device_options options = good;
        options.isa = names[i];
        struct device *d;
        ck_assert_int_eq(k->device_create(&d, &options, &e), 0);
        ck_assert_ptr_nonnull(strstr(k->device_description(d), "2 threads"));
        k->device_destroy(d);
    }
}
END_TEST

START_TEST(memory_is_aligned_and_zero)
{
    static const size_t sizes[] = {0, 1, 63, 4096, 5000001, (size_t)64 << 20};
    struct device *d = create();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char *memory = k->alloc(d, sizes[i]);
        ck_assert_ptr_nonnull(memory);
        ck_assert_uint_eq((uintptr_t)memory % 64, 0);
        size_t n_set = 0;
        for (size_t j = 0; j < sizes[i]; j++) n_set += memory[j] != 0;
        ck_assert_uint_eq(n_set, 0);
        memset(memory, 0xA5, sizes[i]);
        k->free(d, memory);
    }
    ck_assert_ptr_null(k->alloc(d, SIZE_MAX));
    k->free(d, NULL);
    k->device_destroy(d);
}
END_TEST

START_TEST(copies_and_streams)
{
    struct device *d = create();
    const char text[] = "to the device and back";
    char back[sizeof text] = "";
    char *memory = k->alloc(d, sizeof text);
    ck_assert_int_eq(k->copy_in(d, memory, text, sizeof text, &e), 0);
    ck_assert_int_eq(k->wait(d, k->record(d), &e), 0);
    ck_assert_int_eq(k->copy_out(d, back, memory, sizeof text, &e), 0);
    ck_assert_str_eq(back, text);
    ck_assert(k->reads_mapped_weights && !k->asynchronous);
    ck_assert_int_eq(k->activation_dtype(d, DTYPE_BF16), DTYPE_F32);
    ck_assert_uint_gt(k->device_memory(d), (size_t)64 << 20);
    ck_assert_uint_gt(k->scratch_bytes(d), 0);
    k->free(d, memory);
    k->device_destroy(d);
}
END_TEST

int main(void)
{
    k = kernels_cpu();
    Suite *suite = suite_create("device");
    TCase *tcase = tcase_create("device");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, dtypes_have_sizes_and_names);
    tcase_add_test(tcase, options_are_checked);
    tcase_add_test(tcase, every_isa_of_the_machine_can_be_forced);
    tcase_add_test(tcase, memory_is_aligned_and_zero);
    tcase_add_test(tcase, copies_and_streams);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
