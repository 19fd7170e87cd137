/* test_json_tokenizer.c: tokenizer.json: what is refused and how, added tokens, what is put around a text, decoding. That ids are
 * those of the tokenizers library is tests/tokenizer/compare.py's to show.
 */
#include "tokenizer/tokenizer.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char error[512], dir[] = "/tmp/gptd-json-tokenizer.XXXXXX";

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

static int create(struct tokenizer **t, const char *json, const char *config)
{
    write_file("tokenizer.json", json);
    unlink(path_of("tokenizer_config.json"));
    if (config) write_file("tokenizer_config.json", config);
    return tokenizer_create(t, dir, error, sizeof error);
}

static struct tokenizer *created(const char *json, const char *config)
{
    struct tokenizer *t;
    int rc = create(&t, json, config);
    ck_assert_msg(rc == 0, "%s", error);
    return t;
}

// The ids as "1 2 3".
static const char *encoded(const struct tokenizer *t, const char *text, bool add_special, bool parse_special)
{
    static char out[1000];
    int32_t *ids;
    size_t n, at = 0;
    int rc = tokenizer_encode(t, text, strlen(text), add_special, parse_special, &ids, &n, error, sizeof error);
    ck_assert_msg(rc == 0, "%s", error);
    out[0] = '\0';
    for (size_t i = 0; i < n; i++) at += (size_t)snprintf(out + at, sizeof out - at, i ? " %d" : "%d", ids[i]);
    free(ids);
    return out;
}

static const char *decoded(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special)
{
    static char out[200];
    char *text;
    size_t length;
    int rc = tokenizer_decode(t, ids, n, skip_special, &text, &length, error, sizeof error);
    ck_assert_msg(rc == 0, "%s", error);
    snprintf(out, sizeof out, "%s", text);
    free(text);
    return out;
}

// Pieces of characters: U+2581 for spaces, bytes for what has no piece.
static const char characters[] =
    "{\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"Prepend\", \"prepend\": \"\xE2\x96\x81\"},"
    " {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"\xE2\x96\x81\"}]}, \"pre_tokenizer\": null,"
    " \"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"<s>\", \"type_id\": 0}},"
    " {\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}], \"special_tokens\": {\"<s>\": {\"id\": \"<s>\", \"ids\": [1]}}},"
    " \"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Strip\", \"content\": \" \", \"start\": 1}]},"
    " \"added_tokens\": [{\"id\": 0, \"content\": \"<unk>\", \"special\": true},"
    " {\"id\": 1, \"content\": \"<s>\", \"special\": true},"
    " {\"id\": 2, \"content\": \"</s>\", \"special\": true, \"rstrip\": true}, {\"id\": 12, \"content\": \"<tool>\"},"
    " {\"id\": 13, \"content\": \"ab\", \"single_word\": true}],"
    " \"model\": {\"type\": \"BPE\", \"unk_token\": \"<unk>\", \"fuse_unk\": true, \"byte_fallback\": true,"
    " \"vocab\": {\"<unk>\": 0, \"<s>\": 1, \"</s>\": 2, \"<0xC3>\": 3, \"<0xA9>\": 4, \"\xE2\x96\x81\": 5, \"a\": 6,"
    " \"b\": 7, \"c\": 8,"
    " \"\xE2\x96\x81\x61\": 9, \"bc\": 10, \"\xE2\x96\x81\x61\x62\": 11},"
    " \"merges\": [\"\xE2\x96\x81 a\", [\"b\", \"c\"], \"\xE2\x96\x81\x61 b\"]}}";

START_TEST(characters_and_added_tokens)
{
    struct tokenizer *t = created(characters, "{\"bos_token\": \"<s>\", \"eos_token\": {\"content\": \"</s>\"}}");
    ck_assert_int_eq(tokenizer_vocab_size(t), 14);
    ck_assert_int_eq(tokenizer_bos_id(t), 1);
    ck_assert_int_eq(tokenizer_eos_id(t), 2);
    ck_assert(tokenizer_adds_bos(t) && tokenizer_is_special(t, 2) && !tokenizer_is_special(t, 12));
    ck_assert_str_eq(encoded(t, "a bc", true, true), "1 9 5 10");   // "b c" goes before "_a b"
    ck_assert_str_eq(encoded(t, "abb", false, true), "11 7");
    ck_assert_str_eq(encoded(t, "abc", false, true), "9 10");
    ck_assert_str_eq(encoded(t, "\xC3\xA9", false, true), "5 3 4");  // bytes
    ck_assert_str_eq(encoded(t, "xy", false, true), "5 0");          // one unknown for both
    ck_assert_str_eq(encoded(t, "a</s>  b", false, true), "9 2 5 7"); // with the spaces behind it
    ck_assert_str_eq(encoded(t, "a<tool>b", false, false), "9 12 5 7");
    ck_assert_str_eq(encoded(t, "</s>", false, false), "5 0");
    ck_assert_str_eq(encoded(t, "", true, true), "1");
    ck_assert_str_eq(encoded(t, "c ab c", false, true), "5 8 5 13 5 5 8");
    ck_assert_str_eq(encoded(t, "cab", false, true), "5 8 6 7");
    const int32_t ids[] = {1, 9, 5, 10, 3, 4, 2};
    ck_assert_str_eq(decoded(t, ids, 7, true), "a bc\xC3\xA9");
    ck_assert_str_eq(decoded(t, ids, 7, false), "<s> a bc\xC3\xA9</s>");
    tokenizer_destroy(t);
}
END_TEST

START_TEST(bytes)
{
    struct tokenizer *t = created(
        "{\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false}, \"decoder\": {\"type\": \"ByteLevel\"},"
        " \"added_tokens\": [], \"model\": {\"ignore_merges\": true, \"vocab\": {\"a\": 0, \"\xC4\xA0\": 1, \"\xC4\xA0\x61\": 2,"
        " \"aa\": 3, \"\xC3\x83\": 4, \"\xC2\xA9\": 5, \"aaa\": 6}, \"merges\": [\"\xC4\xA0 a\", \"a a\"]}}", NULL);
    ck_assert_str_eq(encoded(t, "a a aa", true, true), "0 2 2 0");
    ck_assert_str_eq(encoded(t, "aaa", true, true), "6"); // a piece, though no merges lead to it
    ck_assert_str_eq(encoded(t, "aaaa", true, true), "3 3");
    ck_assert_str_eq(encoded(t, "\xC3\xA9z", true, true), "4 5"); // z has no piece, and nothing stands for the unknown
    const int32_t ids[] = {4, 5, 2};
    ck_assert_str_eq(decoded(t, ids, 3, true), "\xC3\xA9 a");
    ck_assert_int_eq(tokenizer_bos_id(t), -1);
    ck_assert(!tokenizer_adds_bos(t));
    tokenizer_destroy(t);
}
END_TEST

// What is not known is named.
START_TEST(refused)
{
#define MODEL "\"model\": {\"vocab\": {\"a\": 0}, \"merges\": []}"
    static const char *const cases[][2] = {
        {"", "not JSON"}, {"[]", "\"model\""}, {"{}", "\"model\""}, {"{\"model\": {\"type\": \"WordPiece\"}}", "WordPiece"},
        {"{\"model\": {\"vocab\": {}, \"merges\": []}}", "vocabulary"},
        {"{\"model\": {\"vocab\": {\"a\": -1}, \"merges\": []}}", "\"a\""},
        {"{\"model\": {\"vocab\": {\"a\": 5000000}, \"merges\": []}}", "\"a\""},
        {"{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": [\"a b\"]}}", "\"b\""},
        {"{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": [\"ab\"]}}", "pair"},
        {"{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": [], \"end_of_word_suffix\": \"</w>\"}}", "end_of_word_suffix"},
        {"{\"normalizer\": {\"type\": \"BertNormalizer\"}, " MODEL "}", "BertNormalizer"},
        {"{\"pre_tokenizer\": {\"type\": \"BertPreTokenizer\"}, " MODEL "}", "BertPreTokenizer"},
        {"{\"pre_tokenizer\": {\"type\": \"Split\", \"behavior\": \"Isolated\", \"pattern\": {\"Regex\": \"(a\"}}, "
         MODEL "}", "(a"},
        {"{\"pre_tokenizer\": {\"type\": \"Split\", \"behavior\": \"Cut\", \"pattern\": {\"Regex\": \"a\"}}, " MODEL "}", "Cut"},
        {"{\"post_processor\": {\"type\": \"BertProcessing\"}, " MODEL "}", "BertProcessing"},
        {"{\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"x\"}}]}, "
         MODEL "}", "ids"},
        {"{\"added_tokens\": [{\"content\": \"x\"}], " MODEL "}", "added token"},
        {"{\"model\": {\"type\": \"Unigram\", \"vocab\": [[\"a\"]]}}", "score"},
        {"{\"model\": {\"type\": \"Unigram\", \"vocab\": [5]}}", "id of"},
        {"{\"model\": {\"type\": \"Unigram\", \"unk_id\": 1, \"vocab\": [[\"a\", 0]]}}", "unk_id"},
    };
    struct tokenizer *t = NULL;
    ck_assert_int_eq(create(&t, cases[_i][0], NULL), -1);
    ck_assert_msg(strstr(error, "tokenizer.json: ") && strstr(error, cases[_i][1]), "%s: %s", cases[_i][0], error);
    ck_assert_ptr_null(t);
}
END_TEST
enum { N_REFUSED = 20 };

START_TEST(unigram)
{
    const char *json = "{\"model\": {\"type\": \"Unigram\", \"unk_id\": %s, \"vocab\": [[\"<unk>\", 0], [\"a\", -2], [\"b\", -2],"
                       " [\"ab\", -3], [\"aba\", -4.5]]}}";
    char text[400];
    int32_t *ids;
    size_t n;
    snprintf(text, sizeof text, json, "0");
    struct tokenizer *t = created(text, NULL);
    ck_assert_str_eq(encoded(t, "aba", true, true), "4");    // -4.5, not -3 - 2
    ck_assert_str_eq(encoded(t, "abab", true, true), "3 3"); // -6, not -4.5 - 2
    ck_assert_str_eq(encoded(t, "axyb", true, true), "1 0 2");
    tokenizer_destroy(t);
    snprintf(text, sizeof text, json, "null");
    t = created(text, NULL);
    ck_assert_int_eq(tokenizer_encode(t, "axb", 3, true, true, &ids, &n, error, sizeof error), -1);
    ck_assert_str_eq(error, "the text has a character that the tokenizer does not know");
    tokenizer_destroy(t);
}
END_TEST

// A word of a megabyte: by a heap, not by looking at all of it after each merge.
START_TEST(long_word)
{
    enum { LENGTH = 1 << 20 };
    struct tokenizer *t = created("{\"model\": {\"vocab\": {\"a\": 0, \"aa\": 1, \"aaaa\": 2},"
                                  " \"merges\": [\"a a\", \"aa aa\"]}}", NULL);
    char *text = malloc(LENGTH);
    int32_t *ids;
    size_t n;
    memset(text, 'a', LENGTH);
    ck_assert_int_eq(tokenizer_encode(t, text, LENGTH, true, true, &ids, &n, error, sizeof error), 0);
    ck_assert_uint_eq(n, LENGTH / 4);
    for (size_t i = 0; i < n; i++) ck_assert_int_eq(ids[i], 2);
    free(ids), free(text);
    tokenizer_destroy(t);
}
END_TEST

static void clean_up(void)
{
    unlink(path_of("tokenizer.json"));
    unlink(path_of("tokenizer_config.json"));
    rmdir(dir);
}

int main(void)
{
    if (!mkdtemp(dir)) return 1;
    Suite *suite = suite_create("json_tokenizer");
    TCase *tc = tcase_create("json_tokenizer");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, characters_and_added_tokens);
    tcase_add_test(tc, bytes);
    tcase_add_test(tc, unigram);
    tcase_add_loop_test(tc, refused, 0, N_REFUSED);
    tcase_add_test(tc, long_word);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    clean_up();
    return failed != 0;
}
