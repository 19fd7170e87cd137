#include "tokenizer/json_vocab.h"

#include "tokenizer/fail.h"
#include "tokenizer/unicode.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_TOKENS = 1 << 22 };

static const char space_mark[] = "\xE2\x96\x81";

// ---- names and what they stand for ----------------------------------------------------------------------------------

// The byte that a character of a byte-level name is written for; -1: none. Bytes that can be seen are themselves, the others in
// order are U+0100 and on (GPT-2's bytes_to_unicode).
static int byte_of(int32_t c)
{
    bool seen = (c >= '!' && c <= '~') || (c >= 0xA1 && c <= 0xAC) || (c >= 0xAE && c <= 0xFF);
    if (seen) return c;
    if (c < 0x100 || c >= 0x100 + 33 + 34 + 1) return -1;
    c -= 0x100;
    return c < 33 ? c : c < 33 + 34 ? c - 33 + 0x7F : 0xAD;
}

// A byte-level name's bytes, into out of as many bytes as the name; -1: it is none.
static int64_t unmap(const char *name, size_t length, char *out)
{
    size_t n = 0, step;
    for (size_t i = 0; i < length; i += step) {
        int byte = byte_of(unicode_first(name + i, length - i, &step));
        if (byte < 0) return -1;
        out[n++] = (char)byte;
    }
    return (int64_t)n;
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// The byte that "<0x0A>" names; -1: another name.
static int fallback_byte(const char *name, size_t length)
{
    if (length != 6 || memcmp(name, "<0x", 3) != 0 || name[5] != '>' || hex_digit(name[3]) < 0 || hex_digit(name[4]) < 0) return -1;
    return hex_digit(name[3]) * 16 + hex_digit(name[4]);
}

// Spaces for U+2581.
static size_t put_spaces(const char *name, size_t length, char *out)
{
    size_t n = 0;
    for (size_t i = 0; i < length;) {
        bool space = length - i >= 3 && memcmp(name + i, space_mark, 3) == 0;
        out[n++] = space ? ' ' : name[i];
        i += space ? 3 : 1;
    }
    return n;
}

// A piece of the model: what it stands for, and where words find it.
static int add_piece(struct json_vocab *v, const char *name, int32_t id, bool byte_fallback)
{
    struct token *t = &v->tokens[id];
    const size_t length = strlen(name);
    int byte = byte_fallback ? fallback_byte(name, length) : -1;
    free(t->bytes);
    if (!(t->bytes = malloc(length + 1))) return -1;
    t->space_mark = !v->byte_level && length >= 3 && memcmp(name, space_mark, 3) == 0;
    int64_t n = v->byte_level ? unmap(name, length, t->bytes) : -1;
    if (n >= 0) {
        vocab_add(v->pieces, t->bytes, (size_t)n, id);
    } else if (byte >= 0) {
        v->byte_ids[byte] = id;
        t->bytes[0] = (char)byte, n = 1;
    } else {
        n = (int64_t)put_spaces(name, length, t->bytes);
    }
    if (!v->byte_level) vocab_add(v->pieces, name, length, id);
    t->length = (size_t)n;
    t->bytes[n] = '\0';
    return 0;
}

// ---- loading --------------------------------------------------------------------------------------------------------

static int32_t id_of(const cJSON *id)
{
    return cJSON_IsNumber(id) && id->valuedouble >= 0 && id->valuedouble < MAX_TOKENS ? id->valueint : -1;
}

bool json_vocab_is_unigram(const cJSON *model)
{
    const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(model, "type"));
    return type && strcmp(type, "Unigram") == 0;
}

// A name of the vocabulary and its id: {name: id}, or [[name, score]], where ids are counted. NULL: it is none.
static const char *name_of(const cJSON *entry, size_t index, bool is_list, int32_t *id)
{
    *id = is_list ? index < MAX_TOKENS ? (int32_t)index : -1 : id_of(entry);
    return is_list ? cJSON_GetStringValue(cJSON_GetArrayItem(entry, 0)) : entry->string;
}

static int count(struct json_vocab *v, const cJSON *names, const cJSON *added, size_t *n, size_t *bytes, char *error,
                 size_t error_size)
{
    const bool is_list = cJSON_IsArray(names);
    const cJSON *each;
    cJSON_ArrayForEach(each, names)
    {
        int32_t id;
        const char *name = name_of(each, *n, is_list, &id);
        if (!name || id < 0) return fail(error, error_size, "the id of \"%.40s\" is none", name ? name : "");
        if (id >= v->n_tokens) v->n_tokens = id + 1;
        *n += 1, *bytes += strlen(name);
    }
    cJSON_ArrayForEach(each, added)
    {
        int32_t id = id_of(cJSON_GetObjectItemCaseSensitive(each, "id"));
        const char *content = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(each, "content"));
        if (id < 0 || !content) return fail(error, error_size, "an added token without \"id\" or \"content\"");
        if (id >= v->n_tokens) v->n_tokens = id + 1;
        *n += 1, *bytes += strlen(content);
    }
    return v->n_tokens > 0 ? 0 : fail(error, error_size, "no vocabulary");
}

static int add_added(struct json_vocab *v, const cJSON *entry)
{
    const char *content = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(entry, "content"));
    int32_t id = id_of(cJSON_GetObjectItemCaseSensitive(entry, "id"));
    struct token *t = &v->tokens[id];
    free(t->bytes);
    if (!(t->bytes = strdup(content))) return -1;
    t->length = strlen(content);
    t->special = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(entry, "special"));
    t->mark = true, t->space_mark = false;
    vocab_add(v->names, content, t->length, id);
    return 0;
}

int json_vocab_load(struct json_vocab *v, const cJSON *model, const cJSON *added, bool byte_level, char *error, size_t error_size)
{
    const cJSON *names = cJSON_GetObjectItemCaseSensitive(model, "vocab"), *each;
    const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(model, "type"));
    bool byte_fallback = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(model, "byte_fallback"));
    const bool is_list = json_vocab_is_unigram(model);
    size_t n = 0, bytes = 0, index = 0;
    int rc = 0;
    bool is_bpe = (!type || strcmp(type, "BPE") == 0) && cJSON_IsObject(names) && cJSON_GetObjectItemCaseSensitive(model, "merges");
    if (!is_bpe && !(is_list && cJSON_IsArray(names))) return fail(error, error_size, "unknown model \"%.40s\"", type ? type : "");
    if (is_list && byte_level) return fail(error, error_size, "Unigram behind a ByteLevel pre-tokenizer");
    v->byte_level = byte_level;
    for (int b = 0; b < 256; b++) v->byte_ids[b] = -1;
    if (count(v, names, added, &n, &bytes, error, error_size)) return -1;
    v->tokens = calloc((size_t)v->n_tokens, sizeof *v->tokens);
    v->names = vocab_create(n, bytes), v->pieces = vocab_create(n, bytes);
    if (!v->tokens || !v->names || !v->pieces) return fail(error, error_size, "out of memory");
    cJSON_ArrayForEach(each, names)
    {
        int32_t id;
        const char *name = name_of(each, index++, is_list, &id);
        vocab_add(v->names, name, strlen(name), id);
        rc |= add_piece(v, name, id, byte_fallback);
    }
    cJSON_ArrayForEach(each, added) rc |= add_added(v, each);
    return rc ? fail(error, error_size, "out of memory") : 0;
}

void json_vocab_deinit(struct json_vocab *v)
{
    for (int32_t i = 0; v->tokens && i < v->n_tokens; i++) free(v->tokens[i].bytes);
    free(v->tokens);
    vocab_destroy(v->names);
    vocab_destroy(v->pieces);
}

int32_t json_vocab_id(const struct json_vocab *v, const char *name) { return vocab_find(v->names, name, strlen(name)); }

// ---- merges ---------------------------------------------------------------------------------------------------------

// The two names of a merge: ["a", "b"] or "a b". `whole` has room for both.
static bool read_pair(const cJSON *merge, const char **left, size_t *n_left, const char **right, size_t *n_right)
{
    if (cJSON_IsArray(merge)) {
        *left = cJSON_GetStringValue(cJSON_GetArrayItem(merge, 0)), *right = cJSON_GetStringValue(cJSON_GetArrayItem(merge, 1));
        if (!*left || !*right) return false;
        *n_left = strlen(*left), *n_right = strlen(*right);
        return true;
    }
    *left = cJSON_GetStringValue(merge);
    const char *space = *left ? strchr(*left, ' ') : NULL;
    if (!space) return false;
    *n_left = (size_t)(space - *left), *right = space + 1, *n_right = strlen(space + 1);
    return true;
}

static int read_merge(const struct json_vocab *v, const cJSON *merge, struct bpe_merge *out, char *error, size_t error_size)
{
    const char *left, *right;
    size_t n_left, n_right;
    if (!read_pair(merge, &left, &n_left, &right, &n_right)) return fail(error, error_size, "a merge is no pair of names");
    char *whole = malloc(n_left + n_right + 1);
    if (!whole) return fail(error, error_size, "out of memory");
    memcpy(whole, left, n_left), memcpy(whole + n_left, right, n_right);
    *out = (struct bpe_merge){vocab_find(v->names, left, n_left), vocab_find(v->names, right, n_right),
                              vocab_find(v->names, whole, n_left + n_right)};
    bool known = out->left >= 0 && out->right >= 0 && out->merged >= 0;
    free(whole);
    return known ? 0 : fail(error, error_size, "the merge of \"%.*s\" and \"%.*s\" has a name that is not in the vocabulary",
                            (int)(n_left < 40 ? n_left : 40), left, (int)(n_right < 40 ? n_right : 40), right);
}

static bool is_given(const cJSON *model, const char *name)
{
    const cJSON *value = cJSON_GetObjectItemCaseSensitive(model, name);
    return value && !cJSON_IsNull(value) && !(cJSON_IsString(value) && !value->valuestring[0]);
}

struct bpe *json_vocab_bpe(const struct json_vocab *v, const cJSON *model, char *error, size_t error_size)
{
    const cJSON *list = cJSON_GetObjectItemCaseSensitive(model, "merges"), *each;
    const char *unknown = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(model, "unk_token"));
    const struct bpe_options options = {
        .byte_level = v->byte_level,
        .byte_fallback = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(model, "byte_fallback")),
        .ignore_merges = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(model, "ignore_merges")),
        .fuse_unk = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(model, "fuse_unk")),
        .unk_id = unknown ? json_vocab_id(v, unknown) : -1,
    };
    if (is_given(model, "continuing_subword_prefix") || is_given(model, "end_of_word_suffix") || is_given(model, "dropout")) {
        fail(error, error_size, "a BPE with continuing_subword_prefix, end_of_word_suffix or dropout");
        return NULL;
    }
    struct bpe_merge *merges = malloc(((size_t)cJSON_GetArraySize(list) + 1) * sizeof *merges);
    struct bpe *bpe = NULL;
    size_t n = 0;
    int rc = merges ? 0 : fail(error, error_size, "out of memory");
    cJSON_ArrayForEach(each, list)
    {
        if (!rc) rc = read_merge(v, each, &merges[n++], error, error_size);
    }
    if (!rc && !(bpe = bpe_create(&options, v->pieces, v->byte_ids, merges, n))) fail(error, error_size, "out of memory");
    free(merges);
    return bpe;
}

// ---- scores ---------------------------------------------------------------------------------------------------------

struct unigram *json_vocab_unigram(const struct json_vocab *v, const cJSON *model, char *error, size_t error_size)
{
    const cJSON *list = cJSON_GetObjectItemCaseSensitive(model, "vocab"), *each;
    const cJSON *unknown = cJSON_GetObjectItemCaseSensitive(model, "unk_id");
    const bool fallback = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(model, "byte_fallback"));
    struct unigram_piece *pieces = malloc(((size_t)cJSON_GetArraySize(list) + 1) * sizeof *pieces);
    struct unigram *u = NULL;
    size_t n = 0;
    int rc = pieces ? 0 : fail(error, error_size, "out of memory");
    cJSON_ArrayForEach(each, list)
    {
        const char *name = cJSON_GetStringValue(cJSON_GetArrayItem(each, 0));
        const cJSON *score = cJSON_GetArrayItem(each, 1);
        if (!rc && !cJSON_IsNumber(score)) rc = fail(error, error_size, "\"%.40s\" has no score", name);
        if (!rc) pieces[n] = (struct unigram_piece){name, strlen(name), score->valuedouble, (int32_t)n};
        n += !rc;
    }
    int32_t unk_id = cJSON_IsNumber(unknown) ? id_of(unknown) : -1;
    if (!rc && unk_id >= (int32_t)n) rc = fail(error, error_size, "\"unk_id\" is outside the vocabulary");
    if (!rc && !(u = unigram_create(pieces, n, v->pieces, fallback ? v->byte_ids : NULL, unk_id)))
        fail(error, error_size, "out of memory");
    free(pieces);
    return u;
}
