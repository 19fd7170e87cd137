/* test_infill.c: which models can fill in the middle, and the order of ids that each family wants. */
#include "tokenizer/infill.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char error[512], dir[] = "/tmp/gptd-infill.XXXXXX";

static const char *path_of(const char *name)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

static void write_file(const char *name, const char *text)
{
    FILE *file = fopen(path_of(name), "wb");
    ck_assert(file != NULL && fputs(text, file) >= 0);
    fclose(file);
}

static struct tokenizer *open_tokenizer(const char *where)
{
    struct tokenizer *t;
    int rc = tokenizer_create(&t, where, error, sizeof error);
    ck_assert_msg(rc == 0, "%s", error);
    return t;
}

// Of bytes, with the pieces a, b, ab and the space, and added tokens from id 10 on, `names`, the first of which begins a text.
static struct tokenizer *bytes_tokenizer(const char *const *names)
{
    char json[4096], added[2048] = "";
    size_t at = 0;
    for (int i = 0; names[i]; i++)
        at += (size_t)snprintf(added + at, sizeof added - at, "%s{\"id\": %d, \"content\": \"%s\", \"special\": %s}",
                               i ? "," : "", 10 + i, names[i], i % 2 ? "true" : "false");
    snprintf(json, sizeof json,
             "{\"normalizer\": null, \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false,"
             " \"use_regex\": false}, \"post_processor\": {\"type\": \"TemplateProcessing\", \"single\":"
             " [{\"SpecialToken\": {\"id\": \"%s\", \"type_id\": 0}}, {\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}],"
             " \"special_tokens\": {\"%s\": {\"id\": \"%s\", \"ids\": [10]}}}, \"decoder\": {\"type\": \"ByteLevel\"},"
             " \"added_tokens\": [%s], \"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1, \"ab\": 2,"
             " \"\xC4\xA0\": 3}, \"merges\": [\"a b\"]}}", names[0], names[0], names[0], added);
    write_file("tokenizer.json", json);
    struct tokenizer *t = open_tokenizer(dir);
    unlink(path_of("tokenizer.json"));
    return t;
}

// The ids as "1 2 3".
static const char *filled(const struct infill *f, const struct tokenizer *t, const char *prefix, const char *suffix, bool special)
{
    static char out[1000];
    int32_t *ids;
    size_t n, at = 0;
    int rc = infill_encode(f, t, prefix, strlen(prefix), suffix, strlen(suffix), special, &ids, &n, error, sizeof error);
    ck_assert_msg(rc == 0, "%s", error);
    out[0] = '\0';
    for (size_t i = 0; i < n; i++) at += (size_t)snprintf(out + at, sizeof out - at, i ? " %d" : "%d", ids[i]);
    free(ids);
    return out;
}

static const struct {
    const char *names[9];
    const char *expected; // of the prefix "a" and the suffix "b ab", with BOS; NULL: not found
    int32_t n_ends;
} cases[] = {
    {{"<s>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|file_sep|>", "<|x|>"},
     "10 11 0 12 1 3 2 13", 5},
    {{"<s>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_prefix|>"}, "10 13 0 12 1 3 2 11", 3},
    {{"<s>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>"}, "10 11 0 12 1 3 2 13", 4},
    {{"<s>", "<fim-prefix>", "<fim-suffix>", "<fim-middle>"}, "10 11 0 12 1 3 2 13", 3},
    {{"<s>", "\xE2\x96\x81<PRE>", "\xE2\x96\x81<SUF>", "\xE2\x96\x81<MID>", "\xE2\x96\x81<EOT>"}, "10 11 0 12 1 3 2 13", 4},
    {{"<s>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"}, "10 11 0 12 1 3 2 13", 3},
    {{"<s>", "[PREFIX]", "[SUFFIX]", "[MIDDLE]"}, "10 12 1 3 2 11 0", 2},
    {{"<s>", "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"}, "10 11 0 13 1 3 2 12", 3},
    {{"<s>", "<[fim-suffix]>", "<[fim-prefix]>", "<[fim-middle]>"}, "10 11 1 3 2 12 0 13", 3},
    {{"<s>", "<|fim_prefix|>", "<|fim_suffix|>"}, NULL, 0},
    {{"<s>", "<|fim_prefix|>", "<fim_suffix>", "<|fim_middle|>"}, NULL, 0},
    {{"<s>", "<|FIM_PREFIX|>", "<|FIM_SUFFIX|>", "<|FIM_MIDDLE|>"}, NULL, 0},
    {{"<s>", "[PREFIX]"}, NULL, 0},
};

START_TEST(families)
{
    struct infill f;
    struct tokenizer *t = bytes_tokenizer(cases[_i].names);
    infill_find(&f, t);
    ck_assert_int_eq(f.found, cases[_i].expected != NULL);
    ck_assert_int_eq(f.n_ends, cases[_i].n_ends);
    if (f.found) {
        ck_assert(!f.adds_space);
        ck_assert_str_eq(filled(&f, t, "a", "b ab", true), cases[_i].expected);
        ck_assert_str_eq(filled(&f, t, "a", "b ab", false), strchr(cases[_i].expected, ' ') + 1);
        for (int32_t i = 0; i < f.n_ends; i++) ck_assert(f.end_ids[i] > 10 && f.end_ids[i] < 20);
    }
    tokenizer_destroy(t);
}
END_TEST

// Text does not join with marks, nor prefix with suffix; control tokens in either are what they are in a prompt.
START_TEST(parts_are_apart)
{
    struct infill f;
    struct tokenizer *t = bytes_tokenizer(cases[0].names);
    infill_find(&f, t);
    ck_assert_str_eq(filled(&f, t, "", "", false), "11 12 13");
    ck_assert_str_eq(filled(&f, t, "b", "b", false), "11 1 12 1 13");
    ck_assert_str_eq(filled(&f, t, "a<|x|>", "<|fim_pad|>b", false), "11 0 16 12 14 1 13");
    int32_t *ids;
    size_t n;
    ck_assert_int_eq(infill_encode(&f, t, "a", 1, "\xff", 1, false, &ids, &n, error, sizeof error), -1);
    ck_assert_ptr_nonnull(strstr(error, "UTF-8"));
    ck_assert_int_eq(infill_encode(&f, t, "\xff", 1, "a", 1, false, &ids, &n, error, sizeof error), -1);
    tokenizer_destroy(t);
}
END_TEST

// SentencePiece puts a space before a text; a suffix goes on in the middle of one.
START_TEST(no_space_before_a_suffix)
{
    static const char *const suffixes[] = {"x = 1", " x", "\n    return", "世界", "(a, b)", "A", "+", "  two"};
    struct infill f;
    write_file("tokenizer_config.json",
               "{\"added_tokens_decoder\": {\"1600\": {\"content\": \"\xE2\x96\x81<PRE>\", \"special\": true},"
               " \"1601\": {\"content\": \"\xE2\x96\x81<SUF>\", \"special\": true},"
               " \"1602\": {\"content\": \"\xE2\x96\x81<MID>\", \"special\": true}}}");
    char *here = realpath("models/demo/tokenizer.model", NULL);
    ck_assert(here != NULL && symlink(here, path_of("tokenizer.model")) == 0);
    struct tokenizer *t = open_tokenizer(dir);
    unlink(path_of("tokenizer.model")), unlink(path_of("tokenizer_config.json")), free(here);
    infill_find(&f, t);
    ck_assert(f.found && f.adds_space && f.prefix_id == 1600 && f.suffix_id == 1601 && f.middle_id == 1602 && f.n_ends == 3);
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
        int32_t *ids;
        size_t n, at = 0, length;
        char text[256] = "";
        size_t n_suffix = strlen(suffixes[i]);
        ck_assert_int_eq(infill_encode(&f, t, "def f():", 8, suffixes[i], n_suffix, true, &ids, &n, error, sizeof error), 0);
        ck_assert(ids[0] == 1 && ids[1] == 1600 && ids[n - 1] == 1602);
        while (ids[at] != 1601) at++;
        for (size_t k = at + 1; k + 1 < n; k++) strncat(text, tokenizer_token_bytes(t, ids[k], &length), 32);
        ck_assert_str_eq(text, suffixes[i]);
        free(ids);
    }
    tokenizer_destroy(t);
}
END_TEST

START_TEST(none)
{
    struct infill f;
    struct tokenizer *t = open_tokenizer("models/demo");
    infill_find(&f, t);
    ck_assert(!f.found && f.prefix_id == -1);
    infill_find(&f, NULL);
    ck_assert(!f.found && f.n_ends == 0);
    tokenizer_destroy(t);
}
END_TEST

int main(void)
{
    if (!mkdtemp(dir)) return 1;
    Suite *suite = suite_create("infill");
    TCase *tc = tcase_create("marks");
    tcase_add_loop_test(tc, families, 0, sizeof cases / sizeof *cases);
    tcase_add_test(tc, parts_are_apart);
    tcase_add_test(tc, no_space_before_a_suffix);
    tcase_add_test(tc, none);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    rmdir(dir);
    return failed != 0;
}
