#include "tokenizer/json_tokenizer.h"

#include "tokenizer/bpe.h"
#include "tokenizer/fail.h"
#include "tokenizer/json_vocab.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/pretokenizer.h"
#include "tokenizer/unicode.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_EXTRA = 8 }; // tokens before a text, and after it

// An added token, which is looked for before anything else is done: in the text, or in what the normalizer makes of it.
struct added {
    const char *text; // a token's bytes
    size_t length;
    int32_t id;
    bool special, normalized, single_word, lstrip, rstrip;
};

// Added tokens by first byte, the longest first.
struct added_list {
    struct added *added;    // [n]
    size_t n, first[257];   // those that begin with byte b: added[first[b] .. first[b + 1]]
    bool has_plain;         // some are not special
};

struct json_tokenizer {
    struct normalizer *normalizer;
    struct pretokenizer *pretokenizer;
    struct json_vocab vocab;
    struct bpe *bpe;         // or
    struct unigram *unigram;
    struct added_list raw, normalized;
    int32_t prefix[MAX_EXTRA], suffix[MAX_EXTRA];
    size_t n_prefix, n_suffix;
    char **normal_texts;    // [normalized.n], malloc'd: what the normalizer makes of their names
};

// ---- encoding -------------------------------------------------------------------------------------------------------

static int encode_words(const struct json_tokenizer *t, const char *text, size_t length, bool is_first, struct id_list *list,
                        char *error, size_t error_size)
{
    struct pieces words = {0};
    int rc = pretokenizer_split(t->pretokenizer, text, length, is_first, &words, error, error_size);
    for (size_t i = 0, begin = 0; i < words.n && !rc; begin = words.ends[i++]) {
        const char *word = words.text + begin;
        rc = t->bpe ? bpe_encode(t->bpe, word, words.ends[i] - begin, list)
                    : unigram_encode(t->unigram, word, words.ends[i] - begin, list);
        if (rc) fail(error, error_size, rc < 0 ? "out of memory" : "the text has a character that the tokenizer does not know");
    }
    pieces_deinit(&words);
    return rc ? -1 : 0;
}

// The longest added token that the text at `at` begins with; NULL: none.
static const struct added *find_added(const struct added_list *l, const char *text, size_t length, size_t at, bool parse_special)
{
    unsigned char first = (unsigned char)text[at];
    for (size_t i = l->first[first]; i < l->first[first + 1]; i++) {
        const struct added *a = &l->added[i];
        if (a->special && !parse_special) continue;
        if (a->length <= length - at && memcmp(a->text, text + at, a->length) == 0) return a;
    }
    return NULL;
}

static bool stands_alone(const char *text, size_t length, size_t begin, size_t end)
{
    size_t n;
    return (begin == 0 || !unicode_is_word(unicode_last(text, begin, &n))) &&
           (end == length || !unicode_is_word(unicode_first(text + end, length - end, &n)));
}

struct stretch {
    const struct added *added; // NULL: text
    size_t begin, end;
};

// The text up to the next added token, then that. *at: where it goes on.
static struct stretch next_stretch(const struct added_list *l, const char *text, size_t length, size_t *at, bool parse_special,
                                   struct stretch *token)
{
    size_t from = *at, n;
    *token = (struct stretch){NULL, length, length};
    for (size_t i = from; (l->has_plain || parse_special) && i < length; i++) {
        const struct added *a = find_added(l, text, length, i, parse_special);
        if (!a) continue;
        size_t begin = i, end = i + a->length;
        i = end - 1;
        if (a->single_word && !stands_alone(text, length, begin, end)) continue;
        while (a->lstrip && begin > from && unicode_is_space(unicode_last(text, begin, &n))) begin -= n;
        while (a->rstrip && end < length && unicode_is_space(unicode_first(text + end, length - end, &n))) end += n;
        *token = (struct stretch){a, begin, end};
        break;
    }
    *at = token->end;
    return (struct stretch){NULL, from, token->begin};
}

// A stretch without added tokens of the text itself.
static int encode_raw(const struct json_tokenizer *t, const char *text, size_t length, bool is_first, bool parse_special,
                      struct id_list *list, char *error, size_t error_size)
{
    char *normal = NULL;
    size_t n = 0, at = 0;
    int rc = normalizer_apply(t->normalizer, text, length, &normal, &n, error, error_size);
    while (!rc && at < n) {
        struct stretch token, words = next_stretch(&t->normalized, normal, n, &at, parse_special, &token);
        if (words.end > words.begin)
            rc = encode_words(t, normal + words.begin, words.end - words.begin, is_first && words.begin == 0, list, error,
                              error_size);
        if (!rc && token.added && id_list_append(list, &token.added->id, 1)) rc = fail(error, error_size, "out of memory");
    }
    free(normal);
    return rc;
}

int json_tokenizer_encode(const struct json_tokenizer *t, const char *text, size_t length, bool add_special, bool parse_special,
                          struct id_list *list, char *error, size_t error_size)
{
    size_t at = 0;
    int rc = 0;
    if (add_special && id_list_append(list, t->prefix, t->n_prefix)) return fail(error, error_size, "out of memory");
    while (!rc && at < length) {
        struct stretch token, raw = next_stretch(&t->raw, text, length, &at, parse_special, &token);
        if (raw.end > raw.begin)
            rc = encode_raw(t, text + raw.begin, raw.end - raw.begin, raw.begin == 0, parse_special, list, error, error_size);
        if (!rc && token.added && id_list_append(list, &token.added->id, 1)) rc = fail(error, error_size, "out of memory");
    }
    if (!rc && add_special && id_list_append(list, t->suffix, t->n_suffix)) rc = fail(error, error_size, "out of memory");
    return rc;
}

int32_t json_tokenizer_id(const struct json_tokenizer *t, const char *name) { return json_vocab_id(&t->vocab, name); }

const int32_t *json_tokenizer_prefix(const struct json_tokenizer *t, size_t *n)
{
    *n = t->n_prefix;
    return t->prefix;
}

// ---- added tokens ---------------------------------------------------------------------------------------------------

static int compare_added(const void *a, const void *b)
{
    const struct added *x = a, *y = b;
    int first = (unsigned char)x->text[0] - (unsigned char)y->text[0];
    if (first) return first;
    return x->length != y->length ? (x->length < y->length) - (x->length > y->length) : (x->id > y->id) - (x->id < y->id);
}

static void index_added(struct added_list *l)
{
    if (l->n > 0) qsort(l->added, l->n, sizeof *l->added, compare_added);
    for (size_t i = 0; i < l->n; i++) {
        l->first[(unsigned char)l->added[i].text[0] + 1]++;
        l->has_plain |= !l->added[i].special;
    }
    for (int b = 0; b < 256; b++) l->first[b + 1] += l->first[b];
}

static bool is_set(const cJSON *entry, const char *name)
{
    return cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(entry, name));
}

static int read_added(struct json_tokenizer *t, const cJSON *list, char *error, size_t error_size)
{
    const size_t n = (size_t)cJSON_GetArraySize(list);
    const cJSON *entry;
    t->raw.added = calloc(n + 1, sizeof *t->raw.added), t->normalized.added = calloc(n + 1, sizeof *t->raw.added);
    t->normal_texts = calloc(n + 1, sizeof *t->normal_texts);
    if (!t->raw.added || !t->normalized.added || !t->normal_texts) return fail(error, error_size, "out of memory");
    cJSON_ArrayForEach(entry, list)
    {
        const cJSON *id = cJSON_GetObjectItemCaseSensitive(entry, "id");
        const struct token *token = &t->vocab.tokens[id->valueint]; // json_vocab has looked at it
        struct added a = {token->bytes, token->length, id->valueint, is_set(entry, "special"), is_set(entry, "normalized"),
                          is_set(entry, "single_word"), is_set(entry, "lstrip"), is_set(entry, "rstrip")};
        if (a.length == 0) continue;
        if (a.normalized) {
            char **normal = &t->normal_texts[t->normalized.n];
            if (normalizer_apply(t->normalizer, a.text, a.length, normal, &a.length, error, error_size)) return -1;
            a.text = *normal;
            if (a.length > 0) t->normalized.added[t->normalized.n++] = a;
        } else {
            t->raw.added[t->raw.n++] = a;
        }
    }
    index_added(&t->raw), index_added(&t->normalized);
    return 0;
}

// ---- the post-processor ---------------------------------------------------------------------------------------------

static int add_extra(int32_t *list, size_t *n, int32_t id, char *error, size_t error_size)
{
    if (*n == MAX_EXTRA) return fail(error, error_size, "more than %d tokens around a text", MAX_EXTRA);
    list[(*n)++] = id;
    return 0;
}

// {"SpecialToken": {"id": name}}: the ids that `special` has for the name.
static int read_special(struct json_tokenizer *t, const cJSON *piece, const cJSON *special, bool before, char *error,
                        size_t error_size)
{
    const cJSON *token = cJSON_GetObjectItemCaseSensitive(piece, "SpecialToken"), *id;
    const char *name = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(token, "id"));
    const cJSON *ids = cJSON_GetObjectItemCaseSensitive(name ? cJSON_GetObjectItemCaseSensitive(special, name) : NULL, "ids");
    if (!cJSON_IsArray(ids)) return fail(error, error_size, "TemplateProcessing names a token that it has no ids for");
    cJSON_ArrayForEach(id, ids)
    {
        if (id->valueint < 0 || id->valueint >= t->vocab.n_tokens)
            return fail(error, error_size, "TemplateProcessing: token %d is outside the vocabulary", id->valueint);
        if (before ? add_extra(t->prefix, &t->n_prefix, id->valueint, error, error_size)
                   : add_extra(t->suffix, &t->n_suffix, id->valueint, error, error_size)) return -1;
    }
    return 0;
}

static int read_post_processor(struct json_tokenizer *t, const cJSON *spec, char *error, size_t error_size)
{
    const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(spec, "type"));
    const cJSON *each;
    if (!spec || cJSON_IsNull(spec)) return 0;
    if (type && strcmp(type, "ByteLevel") == 0) return 0; // it is about offsets
    if (type && strcmp(type, "Sequence") == 0) {
        cJSON_ArrayForEach(each, cJSON_GetObjectItemCaseSensitive(spec, "processors"))
        {
            if (read_post_processor(t, each, error, error_size)) return -1;
        }
        return 0;
    }
    if (!type || strcmp(type, "TemplateProcessing") != 0)
        return fail(error, error_size, "unknown post-processor \"%.40s\"", type ? type : "");
    const cJSON *special = cJSON_GetObjectItemCaseSensitive(spec, "special_tokens");
    bool before = true;
    cJSON_ArrayForEach(each, cJSON_GetObjectItemCaseSensitive(spec, "single"))
    {
        if (cJSON_GetObjectItemCaseSensitive(each, "Sequence")) before = false;
        else if (read_special(t, each, special, before, error, error_size)) return -1;
    }
    return 0;
}

// ---- loading --------------------------------------------------------------------------------------------------------

static enum strip find_strip(const cJSON *decoder)
{
    const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(decoder, "type"));
    const char *scheme = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(decoder, "prepend_scheme"));
    const cJSON *each;
    if (!type) return STRIP_NONE;
    if (strcmp(type, "Strip") == 0)
        return cJSON_GetNumberValue(cJSON_GetObjectItemCaseSensitive(decoder, "start")) > 0 ? STRIP_FIRST : STRIP_NONE;
    if (strcmp(type, "Metaspace") == 0) {
        if (scheme) return strcmp(scheme, "never") == 0 ? STRIP_NONE : STRIP_FIRST;
        return cJSON_IsFalse(cJSON_GetObjectItemCaseSensitive(decoder, "add_prefix_space")) ? STRIP_NONE : STRIP_FIRST;
    }
    cJSON_ArrayForEach(each, cJSON_GetObjectItemCaseSensitive(decoder, "decoders"))
    {
        if (find_strip(each) != STRIP_NONE) return STRIP_FIRST;
    }
    return STRIP_NONE;
}

static int load(struct json_tokenizer *t, const cJSON *json, char *error, size_t error_size)
{
    const cJSON *model = cJSON_GetObjectItemCaseSensitive(json, "model");
    const cJSON *added = cJSON_GetObjectItemCaseSensitive(json, "added_tokens");
    if (!cJSON_IsObject(json) || !cJSON_IsObject(model)) return fail(error, error_size, "not a tokenizer: no \"model\"");
    if (normalizer_create(&t->normalizer, cJSON_GetObjectItemCaseSensitive(json, "normalizer"), error, error_size)) return -1;
    const cJSON *words = cJSON_GetObjectItemCaseSensitive(json, "pre_tokenizer");
    if (pretokenizer_create(&t->pretokenizer, words, error, error_size)) return -1;
    if (json_vocab_load(&t->vocab, model, added, pretokenizer_is_byte_level(t->pretokenizer), error, error_size)) return -1;
    if (json_vocab_is_unigram(model)) t->unigram = json_vocab_unigram(&t->vocab, model, error, error_size);
    else t->bpe = json_vocab_bpe(&t->vocab, model, error, error_size);
    if ((!t->bpe && !t->unigram) || read_added(t, added, error, error_size)) return -1;
    return read_post_processor(t, cJSON_GetObjectItemCaseSensitive(json, "post_processor"), error, error_size);
}

int json_tokenizer_create(struct json_tokenizer **out, const char *text, size_t length, struct token **tokens, int32_t *n_tokens,
                          enum strip *strip, char *error, size_t error_size)
{
    struct json_tokenizer *t = calloc(1, sizeof *t);
    cJSON *json = cJSON_ParseWithLength(text, length);
    int rc = -1;
    *out = NULL, *tokens = NULL, *n_tokens = 0;
    if (!t || !json) fail(error, error_size, t ? "not JSON" : "out of memory");
    else rc = load(t, json, error, error_size);
    *strip = find_strip(cJSON_GetObjectItemCaseSensitive(json, "decoder"));
    cJSON_Delete(json);
    if (rc) {
        json_tokenizer_destroy(t);
        return -1;
    }
    *out = t, *tokens = t->vocab.tokens, *n_tokens = t->vocab.n_tokens;
    return 0;
}

void json_tokenizer_destroy(struct json_tokenizer *t)
{
    if (!t) return;
    for (size_t i = 0; t->normal_texts && i < t->normalized.n; i++) free(t->normal_texts[i]);
    free(t->normal_texts);
    free(t->raw.added);
    free(t->normalized.added);
    bpe_destroy(t->bpe);
    unigram_destroy(t->unigram);
    json_vocab_deinit(&t->vocab);
    pretokenizer_destroy(t->pretokenizer);
    normalizer_destroy(t->normalizer);
    free(t);
}
