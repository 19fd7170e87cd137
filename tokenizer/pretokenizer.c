#include "tokenizer/pretokenizer.h"

#include "tokenizer/fail.h"
#include "tokenizer/regex.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_STAGES = 16, MAX_MARK = 8 };

enum behavior { REMOVED, ISOLATED, MERGED_WITH_PREVIOUS, MERGED_WITH_NEXT, CONTIGUOUS };

// What a pretokenizer does with every word that the one before it left.
struct stage {
    struct regex *regex; // NULL: does not cut
    enum behavior behavior;
    bool invert;         // what does not match counts as the match
    bool prefix_space;   // " " goes first, where there is none
    char mark[MAX_MARK]; // Metaspace: what stands for a space; "": none
    enum { NEVER, FIRST, ALWAYS } prepend; // the mark
};

struct pretokenizer {
    struct stage stages[MAX_STAGES];
    int n_stages;
    bool byte_level;
};

static const char gpt2_words[] = "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

// ---- pieces ---------------------------------------------------------------------------------------------------------

void pieces_deinit(struct pieces *p)
{
    free(p->text);
    free(p->ends);
    *p = (struct pieces){0};
}

static int reserve(void **array, size_t *capacity, size_t n, size_t size)
{
    if (n <= *capacity) return 0;
    void *grown = realloc(*array, n * 2 * size);
    if (!grown) return -1;
    *array = grown, *capacity = n * 2;
    return 0;
}

static int add_text(struct pieces *p, const char *text, size_t length)
{
    if (reserve((void **)&p->text, &p->text_capacity, p->n_text + length, 1)) return -1;
    if (length > 0) memcpy(p->text + p->n_text, text, length);
    p->n_text += length;
    return 0;
}

static int end_piece(struct pieces *p)
{
    if (p->n_text == (p->n > 0 ? p->ends[p->n - 1] : 0)) return 0; // nothing in it
    if (reserve((void **)&p->ends, &p->capacity, p->n + 1, sizeof *p->ends)) return -1;
    p->ends[p->n++] = p->n_text;
    return 0;
}

// ---- cutting --------------------------------------------------------------------------------------------------------

// Goes through the stretches of a word, which alternate as the regular expression has it.
struct cutter {
    const struct stage *stage;
    struct pieces *out;
    bool last_matched, any;
};

static int take_stretch(struct cutter *c, const char *text, size_t length, bool matches)
{
    struct pieces *p = c->out;
    bool first = !c->any, joins = false;
    matches ^= c->stage->invert;
    switch (c->stage->behavior) {
    case REMOVED: if (matches) return end_piece(p); break;
    case ISOLATED: break;
    case MERGED_WITH_PREVIOUS: joins = !first && matches && !c->last_matched; break;
    case MERGED_WITH_NEXT: joins = !first && !matches && c->last_matched; break;
    case CONTIGUOUS: joins = !first && matches == c->last_matched; break;
    }
    c->any = true, c->last_matched = matches;
    if (!joins && end_piece(p)) return -1;
    return add_text(p, text, length);
}

static int cut(const struct stage *stage, const char *text, size_t length, struct pieces *out, char *error, size_t error_size)
{
    struct cutter c = {stage, out, false, false};
    struct regex_match *match = regex_match_create(stage->regex);
    size_t at = 0, from = 0, begin, end;
    int rc = match ? 1 : fail(error, error_size, "out of memory");
    while (rc == 1 && from <= length) {
        rc = regex_next(stage->regex, match, text, length, from, &begin, &end, error, error_size);
        if (rc != 1) break;
        from = end > begin ? end : end + 1; // of nothing: looked for further on
        while (from < length && ((unsigned char)text[from] & 0xC0) == 0x80) from++;
        if (end == begin) continue;
        if ((begin > at && take_stretch(&c, text + at, begin - at, false)) || take_stretch(&c, text + begin, end - begin, true))
            rc = fail(error, error_size, "out of memory");
        at = end;
    }
    if (rc >= 0 && at < length && take_stretch(&c, text + at, length - at, false)) rc = fail(error, error_size, "out of memory");
    regex_match_destroy(match);
    if (rc >= 0 && end_piece(out)) rc = fail(error, error_size, "out of memory");
    return rc < 0 ? -1 : 0;
}

// The word with marks for spaces and what goes first, malloc'd.
static char *rewrite(const struct stage *stage, const char *text, size_t *length, bool is_first)
{
    const size_t n_mark = strlen(stage->mark);
    char *out = malloc(*length * (n_mark > 1 ? n_mark : 1) + MAX_MARK), *end = out;
    if (!out) return NULL;
    bool begins = n_mark > 0 && (*text == ' ' || (*length >= n_mark && memcmp(text, stage->mark, n_mark) == 0));
    if (stage->prefix_space && *text != ' ') *end++ = ' ';
    if (n_mark > 0 && !begins && (stage->prepend == ALWAYS || (stage->prepend == FIRST && is_first)))
        end = (char *)memcpy(end, stage->mark, n_mark) + n_mark;
    for (size_t i = 0; i < *length; i++) {
        if (n_mark > 0 && text[i] == ' ') end = (char *)memcpy(end, stage->mark, n_mark) + n_mark;
        else *end++ = text[i];
    }
    *length = (size_t)(end - out);
    return out;
}

static int run_stage(const struct stage *stage, const char *text, size_t length, bool is_first, struct pieces *out, char *error,
                     size_t error_size)
{
    char *rewritten = NULL;
    if (stage->prefix_space || stage->mark[0]) {
        text = rewritten = rewrite(stage, text, &length, is_first);
        if (!text) return fail(error, error_size, "out of memory");
    }
    int rc = 0;
    if (stage->regex) rc = cut(stage, text, length, out, error, error_size);
    else if (add_text(out, text, length) || end_piece(out)) rc = fail(error, error_size, "out of memory");
    free(rewritten);
    return rc;
}

int pretokenizer_split(const struct pretokenizer *t, const char *text, size_t length, bool is_first, struct pieces *p,
                       char *error, size_t error_size)
{
    struct pieces before = {0};
    int rc = 0;
    p->n = p->n_text = 0;
    if (add_text(p, text, length) || end_piece(p)) rc = fail(error, error_size, "out of memory");
    for (int i = 0; i < t->n_stages && !rc; i++) {
        struct pieces swap = before;
        before = *p, *p = swap;
        p->n = p->n_text = 0;
        for (size_t k = 0, begin = 0; k < before.n && !rc; begin = before.ends[k++])
            rc = run_stage(&t->stages[i], before.text + begin, before.ends[k] - begin, is_first && k == 0, p, error, error_size);
    }
    pieces_deinit(&before);
    return rc;
}

// ---- loading --------------------------------------------------------------------------------------------------------

static bool flag(const cJSON *spec, const char *name, bool otherwise)
{
    const cJSON *value = cJSON_GetObjectItemCaseSensitive(spec, name);
    return cJSON_IsBool(value) ? cJSON_IsTrue(value) : otherwise;
}

static int read_behavior(const cJSON *spec, enum behavior *out, char *error, size_t error_size)
{
    static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    const char *name = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(spec, "behavior"));
    for (int i = 0; name && i < 5; i++)
        if (strcmp(name, names[i]) == 0) return *out = (enum behavior)i, 0;
    return fail(error, error_size, "unknown \"behavior\" of a pre-tokenizer: %.40s", name ? name : "none");
}

static int add_split(struct stage *stage, const cJSON *spec, char *error, size_t error_size)
{
    stage->invert = flag(spec, "invert", false);
    if (read_behavior(spec, &stage->behavior, error, error_size)) return -1;
    stage->regex = regex_of_pattern(cJSON_GetObjectItemCaseSensitive(spec, "pattern"), error, error_size);
    return stage->regex ? 0 : -1;
}

static int add_byte_level(struct stage *stage, const cJSON *spec, char *error, size_t error_size)
{
    stage->prefix_space = flag(spec, "add_prefix_space", true);
    stage->behavior = ISOLATED;
    if (!flag(spec, "use_regex", true)) return 0;
    stage->regex = regex_create(gpt2_words, sizeof gpt2_words - 1, error, error_size);
    return stage->regex ? 0 : -1;
}

static int add_metaspace(struct stage *stage, const cJSON *spec, char *error, size_t error_size)
{
    const char *mark = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(spec, "replacement"));
    const char *scheme = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(spec, "prepend_scheme"));
    if (!mark) mark = "\xE2\x96\x81";
    if (!mark[0] || strlen(mark) >= MAX_MARK) return fail(error, error_size, "a Metaspace with \"replacement\" %.20s", mark);
    if (!scheme) scheme = flag(spec, "add_prefix_space", true) ? "always" : "never";
    strcpy(stage->mark, mark);
    if (strcmp(scheme, "always") == 0) stage->prepend = ALWAYS;
    else if (strcmp(scheme, "first") == 0) stage->prepend = FIRST;
    else if (strcmp(scheme, "never") == 0) stage->prepend = NEVER;
    else return fail(error, error_size, "unknown \"prepend_scheme\" of Metaspace: %.40s", scheme);
    stage->behavior = MERGED_WITH_NEXT;
    if (!flag(spec, "split", true)) return 0;
    stage->regex = regex_create_literal(mark, strlen(mark), error, error_size);
    return stage->regex ? 0 : -1;
}

static int add_pattern(struct stage *stage, const char *pattern, enum behavior behavior, bool invert, char *error,
                       size_t error_size)
{
    stage->behavior = behavior, stage->invert = invert;
    stage->regex = regex_create(pattern, strlen(pattern), error, error_size);
    return stage->regex ? 0 : -1;
}

static int add_stage(struct pretokenizer *t, const cJSON *spec, char *error, size_t error_size)
{
    const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(spec, "type"));
    if (!type) return fail(error, error_size, "a pre-tokenizer without a type");
    if (strcmp(type, "Sequence") == 0) {
        const cJSON *each, *list = cJSON_GetObjectItemCaseSensitive(spec, "pretokenizers");
        cJSON_ArrayForEach(each, list)
        {
            if (add_stage(t, each, error, error_size)) return -1;
        }
        return 0;
    }
    if (t->n_stages == MAX_STAGES) return fail(error, error_size, "more than %d pre-tokenizers", MAX_STAGES);
    struct stage *stage = &t->stages[t->n_stages++];
    if (strcmp(type, "Split") == 0) return add_split(stage, spec, error, error_size);
    if (strcmp(type, "Metaspace") == 0) return add_metaspace(stage, spec, error, error_size);
    if (strcmp(type, "Digits") == 0)
        return add_pattern(stage, "\\p{N}", flag(spec, "individual_digits", false) ? ISOLATED : CONTIGUOUS, false, error,
                           error_size);
    if (strcmp(type, "Whitespace") == 0) return add_pattern(stage, "\\w+|[^\\w\\s]+", REMOVED, true, error, error_size);
    if (strcmp(type, "WhitespaceSplit") == 0) return add_pattern(stage, "\\s", REMOVED, false, error, error_size);
    if (strcmp(type, "ByteLevel") == 0) {
        t->byte_level = true;
        return add_byte_level(stage, spec, error, error_size);
    }
    return fail(error, error_size, "unknown pre-tokenizer \"%.40s\"", type);
}

int pretokenizer_create(struct pretokenizer **out, const cJSON *spec, char *error, size_t error_size)
{
    struct pretokenizer *t = calloc(1, sizeof *t);
    *out = NULL;
    if (!t) return fail(error, error_size, "out of memory");
    if (spec && !cJSON_IsNull(spec) && add_stage(t, spec, error, error_size)) {
        pretokenizer_destroy(t);
        return -1;
    }
    *out = t;
    return 0;
}

void pretokenizer_destroy(struct pretokenizer *t)
{
    if (!t) return;
    for (int i = 0; i < t->n_stages; i++) regex_destroy(t->stages[i].regex);
    free(t);
}

bool pretokenizer_is_byte_level(const struct pretokenizer *t) { return t->byte_level; }
