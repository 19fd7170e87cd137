#include "tokenizer/infill.h"

#include "tokenizer/fail.h"
#include "tokenizer/id_list.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_NAMES = 8 };

#define LENGTH(array) (sizeof(array) / sizeof *(array))

// The names of a family's marks, as their models' cards give them; a space stands for U+2581, too.
struct family {
    const char *prefix, *suffix, *middle; // middle NULL: none
    bool suffix_first;
    const char *ends[MAX_NAMES - 3];      // what else may end a middle, where the vocabulary has it
};

static const struct family families[] = {
    // Qwen2.5-Coder, CodeGemma, Granite 3 and later
    {"<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", false,
     {"<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>", "<|endoftext|>"}},
    // StarCoder, StarCoder2, Granite Code, Stable Code
    {"<fim_prefix>", "<fim_suffix>", "<fim_middle>", false, {"<fim_pad>", "<repo_name>", "<file_sep>", "<|endoftext|>"}},
    // SantaCoder
    {"<fim-prefix>", "<fim-suffix>", "<fim-middle>", false, {"<fim-pad>", "<|endoftext|>"}},
    // Code Llama
    {" <PRE>", " <SUF>", " <MID>", false, {" <EOT>"}},
    // DeepSeek-Coder, DeepSeek-V2 and V3: begin, hole, end
    {"<｜fim begin｜>", "<｜fim hole｜>", "<｜fim end｜>", false, {NULL}},
    // Codestral
    {"[PREFIX]", "[SUFFIX]", NULL, true, {NULL}},
    // GLM-4.5
    {"<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", false, {"<|endoftext|>"}},
    // Seed-Coder
    {"<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", true, {NULL}},
};

// ---- marks ----

static bool same_name(const char *bytes, size_t length, const char *name)
{
    size_t i = 0;
    for (; i < length && *name; name++) {
        bool space = length - i >= 3 && !memcmp(bytes + i, "\xE2\x96\x81", 3);
        if ((space ? ' ' : bytes[i]) != *name) return false;
        i += space ? 3 : 1;
    }
    return i == length && !*name;
}

// ids: [MAX_NAMES] of the family's names in their order, -1: not in the vocabulary.
static void find_names(const struct family *family, const struct tokenizer *t, int32_t ids[MAX_NAMES])
{
    const char *names[MAX_NAMES] = {family->prefix, family->suffix, family->middle};
    memcpy(names + 3, family->ends, sizeof family->ends);
    for (int i = 0; i < MAX_NAMES; i++) ids[i] = -1;
    for (int32_t id = 0; id < tokenizer_vocab_size(t); id++) {
        size_t length;
        const char *bytes = tokenizer_token_bytes(t, id, &length);
        if (length < 5 || length > 32) continue; // none of the names
        for (int i = 0; i < MAX_NAMES; i++)
            if (names[i] && ids[i] < 0 && same_name(bytes, length, names[i])) ids[i] = id;
    }
}

static bool adds_space(const struct tokenizer *t)
{
    char error[8];
    int32_t *ids;
    size_t n, length = 0;
    if (tokenizer_encode(t, "a", 1, false, false, &ids, &n, error, sizeof error)) return false;
    const char *bytes = n ? tokenizer_token_bytes(t, ids[0], &length) : NULL;
    bool adds = length > 0 && bytes[0] == ' ';
    free(ids);
    return adds;
}

void infill_find(struct infill *f, const struct tokenizer *t)
{
    int32_t ids[MAX_NAMES];
    *f = (struct infill){.prefix_id = -1, .suffix_id = -1, .middle_id = -1};
    for (size_t i = 0; t && i < LENGTH(families) && !f->found; i++) {
        find_names(&families[i], t, ids);
        f->found = ids[0] >= 0 && ids[1] >= 0 && (ids[2] >= 0 || !families[i].middle);
        f->suffix_first = families[i].suffix_first;
    }
    if (!f->found) return;
    f->prefix_id = ids[0], f->suffix_id = ids[1], f->middle_id = ids[2];
    for (int i = 0; i < MAX_NAMES; i++)
        if (ids[i] >= 0) f->end_ids[f->n_ends++] = ids[i];
    f->adds_space = adds_space(t);
}

// ---- encoding ----

static int append_text(const struct tokenizer *t, const char *text, size_t length, bool add_special, struct id_list *list,
                       char *error, size_t error_size)
{
    int32_t *ids;
    size_t n;
    if (tokenizer_encode(t, text, length, add_special, true, &ids, &n, error, error_size)) return -1;
    int failed = id_list_append(list, ids, n);
    free(ids);
    return failed ? fail(error, error_size, "out of memory") : 0;
}

// The ids of text as it would go on behind a character, without the space that would come before it alone. The character is one
// that joins nothing.
static int append_inside(const struct tokenizer *t, const char *text, size_t length, struct id_list *list, char *error,
                         size_t error_size)
{
    static const char anchor[] = "☺";
    size_t n_anchor = sizeof anchor - 1;
    struct id_list alone = {0}, both = {0};
    char *joined = malloc(n_anchor + length);
    if (!joined) return fail(error, error_size, "out of memory");
    memcpy(joined, anchor, n_anchor);
    memcpy(joined + n_anchor, text, length);
    int result = append_text(t, anchor, n_anchor, false, &alone, error, error_size);
    if (!result) result = append_text(t, joined, n_anchor + length, false, &both, error, error_size);
    bool apart = !result && alone.n > 0 && both.n >= alone.n && !memcmp(both.ids, alone.ids, alone.n * sizeof *alone.ids);
    if (!result && !apart) result = append_text(t, text, length, false, list, error, error_size);
    else if (!result && id_list_append(list, both.ids + alone.n, both.n - alone.n))
        result = fail(error, error_size, "out of memory");
    free(joined);
    free(alone.ids);
    free(both.ids);
    return result;
}

static int append_suffix(const struct infill *f, const struct tokenizer *t, const char *suffix, size_t length, struct id_list *list,
                         char *error, size_t error_size)
{
    if (id_list_append(list, &f->suffix_id, 1)) return fail(error, error_size, "out of memory");
    if (f->adds_space) return append_inside(t, suffix, length, list, error, error_size);
    return append_text(t, suffix, length, false, list, error, error_size);
}

static int append_prefix(const struct infill *f, const struct tokenizer *t, const char *prefix, size_t length, struct id_list *list,
                         char *error, size_t error_size)
{
    if (id_list_append(list, &f->prefix_id, 1)) return fail(error, error_size, "out of memory");
    return append_text(t, prefix, length, false, list, error, error_size);
}

int infill_encode(const struct infill *f, const struct tokenizer *t, const char *prefix, size_t prefix_length, const char *suffix,
                  size_t suffix_length, bool add_special, int32_t **ids, size_t *n, char *error, size_t error_size)
{
    struct id_list list = {0};
    int result = append_text(t, "", 0, add_special, &list, error, error_size); // BOS
    if (!result && f->suffix_first) result = append_suffix(f, t, suffix, suffix_length, &list, error, error_size);
    if (!result) result = append_prefix(f, t, prefix, prefix_length, &list, error, error_size);
    if (!result && !f->suffix_first) result = append_suffix(f, t, suffix, suffix_length, &list, error, error_size);
    if (!result && id_list_append(&list, &f->middle_id, f->middle_id >= 0)) result = fail(error, error_size, "out of memory");
    if (result) {
        free(list.ids);
        return -1;
    }
    *ids = list.ids;
    *n = list.n;
    return 0;
}
