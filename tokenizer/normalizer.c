#include "tokenizer/normalizer.h"

#include "tokenizer/fail.h"
#include "tokenizer/regex.h"
#include "tokenizer/unicode.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_STEPS = 16 };

struct step {
    enum { UNICODE_FORM, REPLACE, PREPEND, STRIP } kind;
    int form;            // UNICODE_FORM: utf8proc's options
    struct regex *regex; // REPLACE
    char *text;          // what is put there
    size_t length;
    bool left, right;    // STRIP
};

struct normalizer {
    struct step steps[MAX_STEPS];
    int n_steps;
};

// ---- steps ----------------------------------------------------------------------------------------------------------

struct buffer {
    char *text;
    size_t n, capacity;
};

static int add(struct buffer *b, const char *text, size_t length)
{
    if (b->n + length + 1 > b->capacity) {
        size_t capacity = (b->n + length + 1) * 2;
        char *grown = realloc(b->text, capacity);
        if (!grown) return -1;
        b->text = grown, b->capacity = capacity;
    }
    if (length > 0) memcpy(b->text + b->n, text, length);
    b->n += length;
    return 0;
}

static int replace(const struct step *s, const char *text, size_t length, struct buffer *out, char *error, size_t error_size)
{
    struct regex_match *match = regex_match_create(s->regex);
    size_t at = 0, begin, end;
    int rc = match ? 1 : fail(error, error_size, "out of memory");
    while (rc == 1 && at < length) {
        rc = regex_next(s->regex, match, text, length, at, &begin, &end, error, error_size);
        if (rc != 1 || end == begin) break;
        if (add(out, text + at, begin - at) || add(out, s->text, s->length)) rc = fail(error, error_size, "out of memory");
        at = end;
    }
    regex_match_destroy(match);
    if (rc >= 0 && add(out, text + at, length - at)) rc = fail(error, error_size, "out of memory");
    return rc < 0 ? -1 : 0;
}

static bool is_ascii(const char *text, size_t length)
{
    for (size_t i = 0; i < length; i++)
        if ((unsigned char)text[i] >= 0x80) return false;
    return true;
}

static int to_form(const struct step *s, const char *text, size_t length, struct buffer *out, char *error, size_t error_size)
{
    utf8proc_uint8_t *mapped = NULL;
    if (is_ascii(text, length)) return add(out, text, length) ? fail(error, error_size, "out of memory") : 0;
    utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)length, &mapped,
                                      (utf8proc_option_t)s->form);
    int rc = n < 0 ? fail(error, error_size, "normalizing: %s", utf8proc_errmsg(n)) : 0;
    if (!rc && add(out, (const char *)mapped, (size_t)n)) rc = fail(error, error_size, "out of memory");
    free(mapped);
    return rc;
}

// U+11A7 composes with nothing, but utf8proc (2.6) loses it behind a syllable: it stays out.
static int to_form_around(const struct step *s, const char *text, size_t length, struct buffer *out, char *error,
                          size_t error_size)
{
    static const char vowel[] = "\xE1\x86\xA7";
    for (const char *at; (at = memmem(text, length, vowel, 3)); length -= (size_t)(at - text) + 3, text = at + 3) {
        if (to_form(s, text, (size_t)(at - text), out, error, error_size)) return -1;
        if (add(out, vowel, 3)) return fail(error, error_size, "out of memory");
    }
    return to_form(s, text, length, out, error, error_size);
}

static void strip(const struct step *s, const char **text, size_t *length)
{
    size_t n;
    while (s->left && *length > 0 && unicode_is_space(unicode_first(*text, *length, &n))) *text += n, *length -= n;
    while (s->right && *length > 0 && unicode_is_space(unicode_last(*text, *length, &n))) *length -= n;
}

static int run_step(const struct step *s, const char *text, size_t length, struct buffer *out, char *error, size_t error_size)
{
    switch (s->kind) {
    case UNICODE_FORM: return to_form_around(s, text, length, out, error, error_size);
    case REPLACE: return replace(s, text, length, out, error, error_size);
    case PREPEND:
        if (length > 0 && add(out, s->text, s->length)) return fail(error, error_size, "out of memory");
        break;
    case STRIP: strip(s, &text, &length); break;
    }
    return add(out, text, length) ? fail(error, error_size, "out of memory") : 0;
}

int normalizer_apply(const struct normalizer *n, const char *text, size_t length, char **out, size_t *out_length, char *error,
                     size_t error_size)
{
    struct buffer now = {0};
    int rc = add(&now, text, length) ? fail(error, error_size, "out of memory") : 0;
    for (int i = 0; i < n->n_steps && !rc; i++) {
        struct buffer next = {0};
        rc = run_step(&n->steps[i], now.text, now.n, &next, error, error_size);
        free(now.text);
        now = next;
    }
    if (rc) free(now.text), now = (struct buffer){0};
    *out = now.text, *out_length = now.n;
    return rc;
}

// ---- loading --------------------------------------------------------------------------------------------------------

static int set_text(struct step *s, const cJSON *spec, const char *name, char *error, size_t error_size)
{
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(spec, name));
    if (!text) return fail(error, error_size, "a normalizer without \"%s\"", name);
    s->length = strlen(text);
    s->text = strdup(text);
    return s->text ? 0 : fail(error, error_size, "out of memory");
}

static int add_replace(struct step *s, const cJSON *spec, char *error, size_t error_size)
{
    s->kind = REPLACE;
    s->regex = regex_of_pattern(cJSON_GetObjectItemCaseSensitive(spec, "pattern"), error, error_size);
    return s->regex ? set_text(s, spec, "content", error, error_size) : -1;
}

static int form_of(const char *type)
{
    const int stable = UTF8PROC_STABLE, compose = stable | UTF8PROC_COMPOSE, decompose = stable | UTF8PROC_DECOMPOSE;
    if (strcmp(type, "NFC") == 0) return compose;
    if (strcmp(type, "NFD") == 0) return decompose;
    if (strcmp(type, "NFKC") == 0) return compose | UTF8PROC_COMPAT;
    if (strcmp(type, "NFKD") == 0) return decompose | UTF8PROC_COMPAT;
    return 0;
}

static int add_step(struct normalizer *n, const cJSON *spec, char *error, size_t error_size)
{
    const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(spec, "type"));
    if (!type) return fail(error, error_size, "a normalizer without a type");
    if (strcmp(type, "Sequence") == 0) {
        const cJSON *each, *list = cJSON_GetObjectItemCaseSensitive(spec, "normalizers");
        cJSON_ArrayForEach(each, list)
        {
            if (add_step(n, each, error, error_size)) return -1;
        }
        return 0;
    }
    if (n->n_steps == MAX_STEPS) return fail(error, error_size, "more than %d normalizers", MAX_STEPS);
    struct step *s = &n->steps[n->n_steps++];
    if (strcmp(type, "Replace") == 0) return add_replace(s, spec, error, error_size);
    if (strcmp(type, "Prepend") == 0) {
        s->kind = PREPEND;
        return set_text(s, spec, "prepend", error, error_size);
    }
    if (strcmp(type, "Strip") == 0) {
        s->kind = STRIP;
        s->left = !cJSON_IsFalse(cJSON_GetObjectItemCaseSensitive(spec, "strip_left"));
        s->right = !cJSON_IsFalse(cJSON_GetObjectItemCaseSensitive(spec, "strip_right"));
        return 0;
    }
    s->kind = UNICODE_FORM, s->form = form_of(type);
    return s->form ? 0 : fail(error, error_size, "unknown normalizer \"%.40s\"", type);
}

int normalizer_create(struct normalizer **out, const cJSON *spec, char *error, size_t error_size)
{
    struct normalizer *n = calloc(1, sizeof *n);
    *out = NULL;
    if (!n) return fail(error, error_size, "out of memory");
    if (spec && !cJSON_IsNull(spec) && add_step(n, spec, error, error_size)) {
        normalizer_destroy(n);
        return -1;
    }
    *out = n;
    return 0;
}

void normalizer_destroy(struct normalizer *n)
{
    if (!n) return;
    for (int i = 0; i < n->n_steps; i++) {
        regex_destroy(n->steps[i].regex);
        free(n->steps[i].text);
    }
    free(n);
}
