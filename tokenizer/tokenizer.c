#include "tokenizer/tokenizer.h"

#include "tokenizer/detokenizer.h"
#include "tokenizer/fail.h"
#include "tokenizer/id_list.h"
#include "tokenizer/json_tokenizer.h"
#include "tokenizer/read_file.h"
#include "tokenizer/sentencepiece_wrapper.h"
#include "tokenizer/tokens.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ADDED_TOKENS = 1 << 16 }; // ids beyond SentencePiece's own

_Static_assert((int)TOKENIZER_ABSENT == (int)READ_FILE_ABSENT, "what the readers below return");

struct tokenizer {
    struct json_tokenizer *json; // of tokenizer.json; NULL: what follows is of tokenizer.model
    struct spm *spm;
    int32_t spm_size, vocab_size; // the second with added tokens
    int32_t bos_id, eos_id;       // -1: none
    bool adds_bos;
    enum strip strip;
    struct token *tokens; // [vocab_size]; of tokenizer.json: json's
    // Ids whose names are looked for in the text, by first byte, the longest first.
    int32_t *marks;          // [n_marks]
    size_t n_marks;
    size_t first_mark[257];  // those that begin with byte b: marks[first_mark[b] .. first_mark[b + 1]]
    bool always_looks;       // some of them count without parse_special
};

static const char space_mark[] = "\xE2\x96\x81";

// ---- tokens ----

// Sets what the token stands for: piece with U+2581 as spaces.
static int token_set(struct token *t, const char *piece, size_t length)
{
    char *bytes = malloc(length + 1);
    if (!bytes) return -1;
    free(t->bytes);
    t->bytes = bytes;
    t->length = 0;
    t->space_mark = length >= 3 && memcmp(piece, space_mark, 3) == 0;
    for (size_t i = 0; i < length;) {
        bool space = length - i >= 3 && memcmp(piece + i, space_mark, 3) == 0;
        bytes[t->length++] = space ? ' ' : piece[i];
        i += space ? 3 : 1;
    }
    bytes[t->length] = '\0';
    return 0;
}

// The tokens of the model file itself.
static int add_pieces(struct tokenizer *t)
{
    for (int32_t id = 0; id < t->spm_size; id++) {
        struct token *token = &t->tokens[id];
        enum spm_type type = spm_type(t->spm, id);
        size_t length;
        const char *piece = spm_piece(t->spm, id, &length);
        char surface[64];
        if (type == SPM_UNKNOWN && spm_decode(t->spm, &id, 1, surface, sizeof surface) >= 0) {
            piece = surface; // " \u2047 " unless the model says otherwise
            length = strlen(surface);
        }
        if (type == SPM_BYTE && length == 6) { // "<0x0A>"
            surface[0] = (char)strtol(piece + 3, NULL, 16);
            piece = surface;
            length = 1;
        }
        token->special = token->mark = type == SPM_CONTROL;
        if (token_set(token, piece, length)) return -1;
    }
    return 0;
}

// Whether SentencePiece itself finds the token in its own name, as it does user-defined symbols.
static bool comes_from_text(const struct tokenizer *t, int32_t id, const char *name)
{
    int32_t *ids;
    size_t n;
    char error[8];
    bool found = false;
    if (spm_encode(t->spm, name, strlen(name), &ids, &n, error, sizeof error)) return false;
    for (size_t i = 0; i < n; i++) found |= ids[i] == id;
    free(ids);
    return found;
}

// One entry of added_tokens_decoder: "32000": {"content": "<|im_end|>", "special": true}.
static int add_token(struct tokenizer *t, int32_t id, const cJSON *entry, char *error, size_t error_size)
{
    const cJSON *content = cJSON_GetObjectItemCaseSensitive(entry, "content");
    const cJSON *special = cJSON_GetObjectItemCaseSensitive(entry, "special");
    if (!cJSON_IsString(content) || !content->valuestring[0] || (special && !cJSON_IsBool(special)))
        return fail(error, error_size, "added token %d needs a \"content\" string and a boolean \"special\"", id);
    const char *name = content->valuestring;
    size_t length;
    bool known = id < t->spm_size && strcmp(spm_piece(t->spm, id, &length), name) == 0;
    if (known && (spm_type(t->spm, id) == SPM_UNKNOWN || !cJSON_IsTrue(special))) return 0; // says nothing new
    struct token *token = &t->tokens[id];
    token->special |= cJSON_IsTrue(special);
    token->mark |= !comes_from_text(t, id, name);
    if (token_set(token, name, strlen(name))) return fail(error, error_size, "out of memory");
    return 0;
}

// The id an added token's key names: decimal digits, in reach. -1: it is none.
static int32_t parse_id(const struct tokenizer *t, const char *key)
{
    size_t digits = strspn(key, "0123456789");
    if (digits == 0 || digits > 9 || key[digits]) return -1;
    int32_t id = (int32_t)strtol(key, NULL, 10);
    return id < t->spm_size + MAX_ADDED_TOKENS ? id : -1;
}

static int add_added_tokens(struct tokenizer *t, const cJSON *added, char *error, size_t error_size)
{
    const cJSON *entry;
    int32_t last = t->vocab_size - 1;
    cJSON_ArrayForEach(entry, added)
    {
        int32_t id = parse_id(t, entry->string);
        if (id < 0) return fail(error, error_size, "added token \"%.20s\" is no id near the vocabulary", entry->string);
        if (id > last) last = id;
    }
    struct token *tokens = realloc(t->tokens, ((size_t)last + 1) * sizeof *tokens);
    if (!tokens) return fail(error, error_size, "out of memory");
    memset(tokens + t->vocab_size, 0, (size_t)(last + 1 - t->vocab_size) * sizeof *tokens);
    t->tokens = tokens;
    t->vocab_size = last + 1;
    cJSON_ArrayForEach(entry, added)
    {
        if (add_token(t, parse_id(t, entry->string), entry, error, error_size)) return -1;
    }
    return 0;
}

static int apply_config(struct tokenizer *t, const cJSON *config, char *error, size_t error_size)
{
    if (!cJSON_IsObject(config)) return fail(error, error_size, "not a JSON object");
    const cJSON *adds_bos = cJSON_GetObjectItemCaseSensitive(config, "add_bos_token");
    const cJSON *added = cJSON_GetObjectItemCaseSensitive(config, "added_tokens_decoder");
    if (cJSON_IsBool(adds_bos)) t->adds_bos = cJSON_IsTrue(adds_bos) && tokenizer_bos_id(t) >= 0;
    else if (adds_bos && !cJSON_IsNull(adds_bos)) return fail(error, error_size, "\"add_bos_token\" is not a boolean");
    if (!added || cJSON_IsNull(added)) return 0;
    if (!cJSON_IsObject(added)) return fail(error, error_size, "\"added_tokens_decoder\" is not an object");
    return add_added_tokens(t, added, error, error_size);
}

// The id of a token that the configuration names, or describes: {"content": name}. -1: it does not.
static int32_t named_id(const struct tokenizer *t, const cJSON *config, const char *role)
{
    const cJSON *entry = cJSON_GetObjectItemCaseSensitive(config, role);
    const char *name = cJSON_GetStringValue(cJSON_IsObject(entry) ? cJSON_GetObjectItemCaseSensitive(entry, "content") : entry);
    return name ? json_tokenizer_id(t->json, name) : -1;
}

// What tokenizer.json does not say; what it says counts.
static int apply_names(struct tokenizer *t, const cJSON *config, char *error, size_t error_size)
{
    size_t n;
    const int32_t *prefix = json_tokenizer_prefix(t->json, &n);
    if (!cJSON_IsObject(config)) return fail(error, error_size, "not a JSON object");
    t->bos_id = named_id(t, config, "bos_token"), t->eos_id = named_id(t, config, "eos_token");
    t->adds_bos = n > 0 && prefix[0] == t->bos_id;
    return 0;
}

static int read_config(struct tokenizer *t, const char *dir, char *error, size_t error_size)
{
    static const char name[] = "tokenizer_config.json";
    char *text, message[200];
    size_t size;
    int result = read_file(dir, name, &text, &size, error, error_size);
    if (result) return result == TOKENIZER_ABSENT ? 0 : -1;
    cJSON *config = cJSON_ParseWithLengthOpts(text, size + 1, NULL, true);
    if (!utf8_valid(text, size)) result = fail(message, sizeof message, "not UTF-8");
    else result = t->json ? apply_names(t, config, message, sizeof message) : apply_config(t, config, message, sizeof message);
    if (result) fail(error, error_size, "%s/%s: %s", dir, name, message);
    cJSON_Delete(config);
    free(text);
    return result;
}

// Learns from the library how it decodes the first pieces: its settings are not in its interface.
static enum strip find_strip(const struct tokenizer *t)
{
    char out[8];
    int32_t space = spm_id(t->spm, space_mark), pair[2] = {space, space};
    if (space >= 0) {
        int64_t length = spm_decode(t->spm, pair, 2, out, sizeof out);
        return length == 2 ? STRIP_NONE : length == 1 ? STRIP_ONE : STRIP_UNTIL_TEXT;
    }
    for (int32_t id = 0; id < t->spm_size; id++) { // without a piece for the space alone, the last two are the same
        if (!t->tokens[id].space_mark) continue;
        int64_t length = spm_decode(t->spm, &id, 1, out, sizeof out);
        return length == (int64_t)t->tokens[id].length ? STRIP_NONE : STRIP_ONE;
    }
    return STRIP_NONE;
}

// qsort_r order of marks: by first byte, then the longest first, then by id.
static int compare_marks(const void *a, const void *b, void *tokens)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    const struct token *t = tokens, *p = &t[x], *q = &t[y];
    int first = (unsigned char)p->bytes[0] - (unsigned char)q->bytes[0];
    if (first) return first;
    return p->length != q->length ? (p->length < q->length) - (p->length > q->length) : (x > y) - (x < y);
}

static int collect_marks(struct tokenizer *t)
{
    t->marks = malloc((size_t)t->vocab_size * sizeof *t->marks);
    if (!t->marks) return -1;
    for (int32_t id = 0; id < t->vocab_size; id++) {
        if (!t->tokens[id].mark || t->tokens[id].length == 0) continue;
        t->marks[t->n_marks++] = id;
        t->first_mark[(unsigned char)t->tokens[id].bytes[0] + 1]++;
        t->always_looks |= !t->tokens[id].special;
    }
    for (int b = 0; b < 256; b++) t->first_mark[b + 1] += t->first_mark[b];
    qsort_r(t->marks, t->n_marks, sizeof *t->marks, compare_marks, t->tokens);
    return 0;
}

// Of dir/tokenizer.model. Returns 0, TOKENIZER_ABSENT or -1.
static int load_model(struct tokenizer *t, const char *dir, char *error, size_t error_size)
{
    static const char name[] = "tokenizer.model";
    char message[200], *model;
    size_t size;
    int result = read_file(dir, name, &model, &size, error, error_size);
    if (result) return result;
    result = spm_create(&t->spm, model, size, message, sizeof message);
    free(model);
    if (result) return fail(error, error_size, "%s/%s: not a SentencePiece model: %s", dir, name, message);
    t->spm_size = t->vocab_size = spm_size(t->spm);
    t->bos_id = spm_bos_id(t->spm), t->eos_id = spm_eos_id(t->spm);
    t->adds_bos = t->bos_id >= 0;
    t->tokens = calloc((size_t)t->vocab_size, sizeof *t->tokens);
    if (!t->tokens || add_pieces(t)) return fail(error, error_size, "%s/%s: out of memory", dir, name);
    t->strip = find_strip(t);
    return 0;
}

// Of dir/tokenizer.json. Returns 0, TOKENIZER_ABSENT or -1.
static int load_json(struct tokenizer *t, const char *dir, char *error, size_t error_size)
{
    static const char name[] = "tokenizer.json";
    char message[300], *json;
    size_t size;
    int result = read_file(dir, name, &json, &size, error, error_size);
    if (result) return result;
    if (utf8_valid(json, size))
        result = json_tokenizer_create(&t->json, json, size, &t->tokens, &t->vocab_size, &t->strip, message, sizeof message);
    else result = fail(message, sizeof message, "not UTF-8");
    free(json);
    return result ? fail(error, error_size, "%s/%s: %s", dir, name, message) : 0;
}

int tokenizer_create(struct tokenizer **out, const char *dir, char *error, size_t error_size)
{
    struct tokenizer *t = calloc(1, sizeof *t);
    *out = NULL;
    if (!t) return fail(error, error_size, "%s: out of memory", dir);
    t->bos_id = t->eos_id = -1;
    int result = load_model(t, dir, error, error_size);
    if (result == TOKENIZER_ABSENT) result = load_json(t, dir, error, error_size);
    if (!result) result = read_config(t, dir, error, error_size);
    if (!result && !t->json && collect_marks(t)) result = fail(error, error_size, "%s: out of memory", dir);
    if (result) {
        tokenizer_destroy(t);
        return result;
    }
    *out = t;
    return 0;
}

void tokenizer_destroy(struct tokenizer *t)
{
    if (!t) return;
    for (int32_t id = 0; !t->json && t->tokens && id < t->vocab_size; id++) free(t->tokens[id].bytes);
    if (!t->json) free(t->tokens);
    free(t->marks);
    spm_destroy(t->spm);
    json_tokenizer_destroy(t->json);
    free(t);
}

int32_t tokenizer_vocab_size(const struct tokenizer *t) { return t->vocab_size; }
int32_t tokenizer_bos_id(const struct tokenizer *t) { return t->bos_id; }
int32_t tokenizer_eos_id(const struct tokenizer *t) { return t->eos_id; }
bool tokenizer_adds_bos(const struct tokenizer *t) { return t->adds_bos; }

bool tokenizer_is_special(const struct tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->vocab_size && t->tokens[id].special;
}

const char *tokenizer_token_bytes(const struct tokenizer *t, int32_t id, size_t *length)
{
    if (id < 0 || id >= t->vocab_size) return NULL;
    const struct token *token = &t->tokens[id];
    *length = token->length;
    return token->bytes ? token->bytes : "";
}

// ---- encode ----

// The mark whose name text begins with, the longest; -1: none.
static int32_t find_mark(const struct tokenizer *t, const char *text, size_t length, bool parse_special)
{
    unsigned char first = (unsigned char)text[0];
    for (size_t i = t->first_mark[first]; i < t->first_mark[first + 1]; i++) {
        const struct token *token = &t->tokens[t->marks[i]];
        if (token->special && !parse_special) continue;
        if (token->length <= length && memcmp(token->bytes, text, token->length) == 0) return t->marks[i];
    }
    return -1;
}

static int encode_stretch(const struct tokenizer *t, const char *text, size_t length, struct id_list *list, char *error,
                          size_t error_size)
{
    int32_t *ids;
    size_t n;
    if (length == 0) return 0;
    if (spm_encode(t->spm, text, length, &ids, &n, error, error_size)) return -1;
    int result = id_list_append(list, ids, n);
    free(ids);
    return result ? fail(error, error_size, "out of memory") : 0;
}

// Marks become their id; each stretch of text between them is encoded as SentencePiece encodes it alone.
static int encode_text(const struct tokenizer *t, const char *text, size_t length, bool parse_special,
                       struct id_list *list, char *error, size_t error_size)
{
    bool look = parse_special || t->always_looks;
    size_t begin = 0;
    for (size_t i = 0; look && i < length;) {
        int32_t id = find_mark(t, text + i, length - i, parse_special);
        if (id < 0) {
            i++;
            continue;
        }
        if (encode_stretch(t, text + begin, i - begin, list, error, error_size)) return -1;
        if (id_list_append(list, &id, 1)) return fail(error, error_size, "out of memory");
        begin = i += t->tokens[id].length;
    }
    return encode_stretch(t, text + begin, length - begin, list, error, error_size);
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t length, bool add_special, bool parse_special,
                     int32_t **ids, size_t *n, char *error, size_t error_size)
{
    struct id_list list = {0};
    int result;
    *ids = NULL;
    *n = 0;
    size_t valid = utf8_valid_prefix(text, length);
    if (valid < length) return fail(error, error_size, "the text is not UTF-8 at byte %zu", valid);
    if (t->json) result = json_tokenizer_encode(t->json, text, length, add_special, parse_special, &list, error, error_size);
    else if (id_list_append(&list, &t->bos_id, add_special && t->adds_bos)) result = fail(error, error_size, "out of memory");
    else result = encode_text(t, text, length, parse_special, &list, error, error_size);
    if (result) {
        free(list.ids);
        return -1;
    }
    *ids = list.ids;
    *n = list.n;
    return 0;
}

// ---- decode ----

// Appends the bytes of ids to out, without the spaces that SentencePiece puts before a text. Returns bytes written.
static size_t join_tokens(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special, char *out)
{
    size_t written = 0;
    bool at_start = t->strip != STRIP_NONE;
    for (size_t i = 0; i < n; i++) {
        const struct token *token = &t->tokens[ids[i]];
        if (skip_special && token->special) continue;
        bool first = t->strip == STRIP_FIRST, space = first ? token->length > 0 && token->bytes[0] == ' ' : token->space_mark;
        bool drop = at_start && space && (first || !token->mark);
        size_t length = token->length - drop;
        if (length > 0) memcpy(out + written, token->bytes + drop, length);
        written += length;
        if (first) at_start &= token->length == 0;
        else if (!token->mark && (length > 0 || (drop && t->strip == STRIP_ONE))) at_start = false;
    }
    return written;
}

int tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special, char **text,
                     size_t *length, char *error, size_t error_size)
{
    size_t size = 0;
    *text = NULL;
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= t->vocab_size)
            return fail(error, error_size, "token id %d is outside the vocabulary of %d", ids[i], t->vocab_size);
        size += t->tokens[ids[i]].length;
    }
    char *joined = malloc(size + 1), *repaired = NULL;
    if (!joined) return fail(error, error_size, "out of memory");
    *length = join_tokens(t, ids, n, skip_special, joined);
    if (!utf8_valid(joined, *length)) {
        struct utf8_stream stream = {0};
        repaired = malloc(utf8_stream_bound(*length) + 1);
        size_t joined_length = *length;
        if (repaired) *length = utf8_stream_push(&stream, joined, joined_length, repaired);
        if (repaired) *length += utf8_stream_finish(&stream, repaired + *length);
        free(joined);
        if (!(joined = repaired)) return fail(error, error_size, "out of memory");
    }
    joined[*length] = '\0';
    *text = joined;
    return 0;
}
