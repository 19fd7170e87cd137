/* Values as text, as Python's str() and repr() have them, and numbers from text. */
#include "tokenizer/jinja_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- numbers ----

// The shortest digits that read back as f; where the point goes is decided as Python's repr() does.
void jinja_format_float(double f, char out[40])
{
    char digits[32];
    if (isnan(f) || isinf(f)) {
        strcpy(out, isnan(f) ? "nan" : f < 0 ? "-inf" : "inf");
        return;
    }
    int precision = 0;
    do snprintf(digits, sizeof digits, "%.*e", precision, f);
    while (precision++ < 17 && strtod(digits, NULL) != f);
    int exponent = atoi(strchr(digits, 'e') + 1), n_digits = precision;
    if (exponent >= 16 || exponent < -4) {
        *strchr(digits, 'e') = '\0';
        snprintf(out, 40, "%se%c%02d", digits, exponent < 0 ? '-' : '+', abs(exponent) % 1000);
    } else if (n_digits - 1 > exponent) {
        snprintf(out, 40, "%.*f", n_digits - 1 - exponent, f);
    } else {
        snprintf(out, 40, "%.1f", f);
    }
}

static struct string stripped(const struct string *s)
{
    size_t from = 0, to = s->length, size;
    while (from < to && jinja_is_space(jinja_decode(s->data + from, to - from, &size))) from += size;
    size_t last = from;
    for (size_t at = from; at < to; at += size) {
        if (!jinja_is_space(jinja_decode(s->data + at, to - at, &size))) last = at + size;
    }
    return (struct string){.data = s->data + from, .length = last - from};
}

static int digit_value(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'z' ? (c | 32) - 'a' + 10 : 99;
}

// As int(s, base): spaces around, a sign, a prefix of the base, single underscores. false: no integer, or none of 64 bits.
bool jinja_parse_int(const struct string *s, int64_t base, int64_t *i)
{
    struct string t = stripped(s);
    const char *at = t.data, *end = t.data + t.length;
    bool negative = at < end && *at == '-';
    if (at < end && (*at == '-' || *at == '+')) at++;
    char letter = end - at >= 2 && *at == '0' ? (char)(at[1] | 32) : 0;
    int prefixed = letter == 'x' ? 16 : letter == 'o' ? 8 : letter == 'b' ? 2 : 0;
    bool underscore_ok = false;
    if (prefixed && (base == prefixed || base == 0)) {
        base = prefixed;
        at += 2;
        underscore_ok = true;
    }
    if (base == 0) base = 10;
    int64_t n = 0;
    if (at == end) return false;
    for (; at < end; at++) {
        if (*at == '_' && underscore_ok) {
            underscore_ok = false;
            if (at + 1 == end) return false;
            continue;
        }
        if (digit_value(*at) >= base || __builtin_mul_overflow(n, base, &n) || __builtin_sub_overflow(n, digit_value(*at), &n))
            return false;
        underscore_ok = true;
    }
    return negative ? (*i = n, true) : !__builtin_sub_overflow(0, n, i);
}

bool jinja_parse_float(struct jinja *j, const struct string *s, double *f)
{
    static const char *const words[] = {"inf", "infinity", "nan"};
    struct string t = stripped(s);
    char *text = jinja_alloc(j, t.length + 1), *end;
    size_t n = 0, sign = t.length > 0 && (t.data[0] == '-' || t.data[0] == '+');
    for (size_t k = 0; k < t.length; k++) {
        char c = t.data[k];
        bool between = k > 0 && k + 1 < t.length && digit_value(t.data[k - 1]) < 10 && digit_value(t.data[k + 1]) < 10;
        if (c == '_' && between) continue;
        text[n++] = c;
    }
    if (n == 0 || memchr(text, '\0', n)) return false;
    bool plain = strspn(text, "0123456789+-.eE") == n; // strtod knows hexadecimal ones and more
    for (size_t k = 0; k < 3; k++) plain |= strcasecmp(text + sign, words[k]) == 0;
    if (!plain) return false;
    *f = strtod(text, &end);
    return *end == '\0';
}

// ---- str() and repr() ----

static void add_int(struct builder *b, int64_t i)
{
    char text[24];
    snprintf(text, sizeof text, "%" PRId64, i);
    jinja_add_c(b, text);
}

static void add_escaped(struct builder *b, uint32_t c)
{
    char text[16];
    const char *simple = c == '\n' ? "\\n" : c == '\r' ? "\\r" : c == '\t' ? "\\t" : c == '\\' ? "\\\\" : NULL;
    snprintf(text, sizeof text, c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x", (unsigned)c);
    jinja_add_c(b, simple ? simple : text);
}

static void add_quoted(struct builder *b, const struct string *s)
{
    bool single = s->length > 0 && memchr(s->data, '\'', s->length), twofold = s->length > 0 && memchr(s->data, '"', s->length);
    char quote = single && !twofold ? '"' : '\'';
    jinja_add(b, &quote, 1);
    for (size_t at = 0, size; at < s->length; at += size) {
        uint32_t c = jinja_decode(s->data + at, s->length - at, &size);
        if (c == (unsigned char)quote) jinja_add_c(b, "\\");
        if (c == '\\' || !jinja_is_printable(c)) add_escaped(b, c);
        else jinja_add(b, s->data + at, size);
    }
    jinja_add(b, &quote, 1);
}

static void add_items(struct builder *b, const struct list *list, const char *open, const char *close)
{
    jinja_add_c(b, open);
    for (size_t i = 0; i < list->n; i++) {
        if (i > 0) jinja_add_c(b, ", ");
        jinja_add_repr(b, list->items[i]);
    }
    jinja_add_c(b, close);
}

static void add_dict(struct builder *b, const struct dict *d)
{
    jinja_add_c(b, "{");
    for (size_t i = 0; i < d->n; i++) {
        if (i > 0) jinja_add_c(b, ", ");
        jinja_add_repr(b, d->keys[i]);
        jinja_add_c(b, ": ");
        jinja_add_repr(b, d->values[i]);
    }
    jinja_add_c(b, "}");
}

static void add_range(struct builder *b, const struct range *range)
{
    jinja_add_c(b, "range(");
    add_int(b, range->start);
    jinja_add_c(b, ", ");
    add_int(b, range->stop);
    if (range->step != 1) {
        jinja_add_c(b, ", ");
        add_int(b, range->step);
    }
    jinja_add_c(b, ")");
}

static void add_view(struct builder *b, struct value v)
{
    jinja_add_c(b, jinja_type(v));
    add_items(b, jinja_items(b->j, v), "([", "])");
}

static void add_macro(struct builder *b, const struct macro *macro)
{
    jinja_add_c(b, "<Macro ");
    if (macro->node->name) add_quoted(b, macro->node->name);
    else jinja_add_c(b, "anonymous");
    jinja_add_c(b, ">");
}

static void add_scalar(struct builder *b, struct value v)
{
    char text[40];
    switch (v.kind) {
    case V_NONE: jinja_add_c(b, "None"); break;
    case V_BOOL: jinja_add_c(b, v.b ? "True" : "False"); break;
    case V_INT: add_int(b, v.i); break;
    case V_FLOAT:
        jinja_format_float(v.f, text);
        jinja_add_c(b, text);
        break;
    case V_UNDEFINED: jinja_add_c(b, "Undefined"); break;
    // What Python shows of others has an address in it.
    default: jinja_fail(b->j, "a '%s' cannot be shown as text", jinja_type(v));
    }
}

static void add_string(struct builder *b, struct value v)
{
    if (v.special) jinja_add_c(b, "Markup(");
    add_quoted(b, v.string);
    if (v.special) jinja_add_c(b, ")");
}

void jinja_add_repr(struct builder *b, struct value v)
{
    jinja_charge(b->j, 1);
    jinja_enter(b->j);
    switch (v.kind) {
    case V_STRING: add_string(b, v); break;
    case V_LIST: add_items(b, v.list, "[", "]"); break;
    case V_TUPLE: add_items(b, v.list, "(", v.list->n == 1 ? ",)" : ")"); break;
    case V_DICT: add_dict(b, v.dict); break;
    case V_NAMESPACE:
        jinja_add_c(b, "<Namespace ");
        add_dict(b, v.dict);
        jinja_add_c(b, ">");
        break;
    case V_RANGE: add_range(b, v.range); break;
    case V_VIEW: add_view(b, v); break;
    case V_MACRO: add_macro(b, v.macro); break;
    default: add_scalar(b, v);
    }
    jinja_leave(b->j);
}

void jinja_add_text(struct builder *b, struct value v)
{
    if (v.kind == V_STRING) jinja_add(b, v.string->data, v.string->length);
    else if (v.kind != V_UNDEFINED) jinja_add_repr(b, v);
}

struct value jinja_to_string(struct jinja *j, struct value v)
{
    if (v.kind == V_STRING) return v;
    struct builder b = {.j = j};
    jinja_add_text(&b, v);
    return jinja_built(&b);
}

const struct string *jinja_text(struct jinja *j, struct value v)
{
    return jinja_to_string(j, v).string;
}
