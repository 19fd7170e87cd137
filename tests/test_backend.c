/* Finding a backend by name. The CUDA library beside this program is what a test puts there; a GPU's driver is there when a
 * test says so. */
#include <check.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/kernels.h"

static bool has_driver;
static char library[PATH_MAX], faulty[PATH_MAX], fault[PATH_MAX]; // beside the program; what stands in for it; FAULTY_BACKEND

// Before the C library's: kernels/backend.c asks it for the driver's device file and for the library.
int access(const char *path, int mode)
{
    if (strcmp(path, "/dev/nvidiactl") == 0) return has_driver ? 0 : -1;
    return faccessat(AT_FDCWD, path, mode, 0);
}

static void paths_init(void)
{
    char program[PATH_MAX - 64] = "";
    if (readlink("/proc/self/exe", program, sizeof program - 1) < 0) abort();
    *strrchr(program, '/') = '\0';
    snprintf(library, sizeof library, "%s/libgptd_cuda.so", program);
    snprintf(faulty, sizeof faulty, "%s/faulty/libgptd_cuda.so", program);
    snprintf(fault, sizeof fault, "%s/fault", program);
}

static void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
}

static void begin(void)
{
    remove(library);
    remove(fault);
    setenv("FAULTY_BACKEND", fault, 1);
    has_driver = false;
}

static void use_faulty(const char *word)
{
    ck_assert_int_eq(symlink(faulty, library), 0);
    write_file(fault, word);
}

static void end(void)
{
    remove(library);
    remove(fault);
}

// What opens under the name, with e as found before: never what was asked last.
static const struct kernels *open_backend(const char *name, int expected, struct error *e)
{
    const struct kernels *k = (const struct kernels *)&library;
    *e = (struct error){ERR_IO, "left from before"};
    ck_assert_int_eq(kernels_open(&k, name, e), expected);
    ck_assert((k != NULL) == (expected == 0));
    ck_assert_ptr_null(strstr(e->message, "before"));
    ck_assert_int_eq(e->code, expected);
    return k;
}

START_TEST(cuda_opens_what_lies_beside_the_program)
{
    struct error e;
    use_faulty("");
    ck_assert_str_eq(open_backend("cuda", 0, &e)->name, "faulty");
    ck_assert_str_eq(e.message, "");
}
END_TEST

START_TEST(cuda_is_refused_with_the_reason)
{
    struct error e;
    open_backend("cuda", ERR_DEVICE, &e); // there is none
    ck_assert_ptr_nonnull(strstr(e.message, "the CUDA backend cannot be loaded: libgptd_cuda.so"));
    write_file(library, "not a library");
    open_backend("cuda", ERR_DEVICE, &e);
    ck_assert_ptr_nonnull(strstr(e.message, "the CUDA backend cannot be loaded"));
    ck_assert_ptr_nonnull(strstr(e.message, library));
    remove(library);
    use_faulty("probe");
    open_backend("cuda", ERR_DEVICE, &e);
    ck_assert_str_eq(e.message, "Faulty 7000 has compute capability 7.0, as told");
    ck_assert_int_eq(kernels_open(&(const struct kernels *){NULL}, "cuda", NULL), ERR_DEVICE);
}
END_TEST

START_TEST(auto_takes_a_gpu_that_is_there)
{
    struct error e;
    use_faulty("");
    ck_assert_ptr_eq(open_backend("auto", 0, &e), kernels_cpu()); // no driver: not even looked for
    ck_assert_str_eq(e.message, "");
    has_driver = true;
    ck_assert_str_eq(open_backend("auto", 0, &e)->name, "faulty");
    ck_assert_str_eq(e.message, "");
    ck_assert_ptr_eq(open_backend("cpu", 0, &e), kernels_cpu());
}
END_TEST

START_TEST(auto_tells_why_it_is_the_cpu)
{
    struct error e;
    has_driver = true;
    ck_assert_ptr_eq(open_backend("auto", 0, &e), kernels_cpu());
    ck_assert_ptr_nonnull(strstr(e.message, "on the CPU, for the GPU cannot be used: the CUDA backend cannot be loaded"));
    use_faulty("probe");
    ck_assert_ptr_eq(open_backend("auto", 0, &e), kernels_cpu());
    ck_assert_str_eq(e.message, "on the CPU, for the GPU cannot be used: Faulty 7000 has compute capability 7.0, as told");
    ck_assert_int_eq(kernels_open(&(const struct kernels *){NULL}, "auto", NULL), 0);
}
END_TEST

START_TEST(unknown_names_are_refused)
{
    struct error e;
    has_driver = true;
    open_backend("abacus", ERR_UNSUPPORTED, &e);
    ck_assert_ptr_nonnull(strstr(e.message, "abacus"));
}
END_TEST

int main(void)
{
    paths_init();
    Suite *suite = suite_create("backend");
    TCase *tcase = tcase_create("backend");
    tcase_add_checked_fixture(tcase, begin, end);
    tcase_add_test(tcase, cuda_opens_what_lies_beside_the_program);
    tcase_add_test(tcase, cuda_is_refused_with_the_reason);
    tcase_add_test(tcase, auto_takes_a_gpu_that_is_there);
    tcase_add_test(tcase, auto_tells_why_it_is_the_cpu);
    tcase_add_test(tcase, unknown_names_are_refused);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
