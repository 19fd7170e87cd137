/* "%s" % values and "{}".format(values), as far as templates go: widths, precisions and the usual conversions of the first,
 * no format specifications in the second.
 */
#include "tokenizer/jinja_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { MAX_WIDTH = 1000, MAX_PRECISION = 60 };

struct percent {
    struct jinja *j;
    const struct string *format;
    size_t at;
    struct value arguments;
    size_t next; // of a tuple
    bool used;   // what is no tuple
    struct builder b;
};

struct spec {
    bool minus, plus, space, zero;
    int width, precision; // precision -1: none
};

static struct value next_argument(struct percent *p)
{
    struct value v = p->arguments;
    if (v.kind == V_TUPLE) {
        if (p->next >= v.list->n) jinja_fail(p->j, "not enough arguments for format string");
        return v.list->items[p->next++];
    }
    if (p->used) jinja_fail(p->j, "not enough arguments for format string");
    p->used = true;
    return v;
}

static char peek(const struct percent *p)
{
    if (p->at >= p->format->length) jinja_fail(p->j, "incomplete format");
    return p->format->data[p->at];
}

static struct value keyed_argument(struct percent *p)
{
    size_t from = ++p->at;
    while (peek(p) != ')') p->at++;
    if (p->arguments.kind != V_DICT) jinja_fail(p->j, "format requires a mapping");
    struct value *found = jinja_dict_find(p->j, p->arguments.dict, jinja_substring(p->j, p->format, from, p->at++));
    if (!found) jinja_fail(p->j, "a key of the format is not in the mapping");
    p->used = true;
    return *found;
}

static int read_number(struct percent *p, int most)
{
    int n = 0;
    if (peek(p) == '*') jinja_fail(p->j, "* in a format is not supported");
    for (; peek(p) >= '0' && peek(p) <= '9'; p->at++) {
        n = n * 10 + (peek(p) - '0');
        if (n > most) jinja_fail(p->j, "a width or precision beyond %d", most);
    }
    return n;
}

static struct spec read_spec(struct percent *p)
{
    struct spec s = {.precision = -1};
    for (;; p->at++) {
        char c = peek(p);
        if (c == '#') jinja_fail(p->j, "# in a format is not supported");
        if (c != '-' && c != '+' && c != ' ' && c != '0') break;
        s.minus |= c == '-', s.plus |= c == '+', s.space |= c == ' ', s.zero |= c == '0';
    }
    s.width = read_number(p, MAX_WIDTH);
    if (peek(p) == '.') {
        p->at++;
        s.precision = read_number(p, MAX_PRECISION);
    }
    return s;
}

static void add_padded(struct percent *p, const struct spec *s, const struct string *text)
{
    int64_t padding = s->width - (int64_t)text->n_chars;
    if (!s->minus) jinja_add_repeated(&p->b, " ", 1, padding);
    jinja_add(&p->b, text->data, text->length);
    if (s->minus) jinja_add_repeated(&p->b, " ", 1, padding);
}

static void add_text(struct percent *p, const struct spec *s, struct value v, bool repr)
{
    struct builder b = {.j = p->j};
    if (repr) jinja_add_repr(&b, v);
    else jinja_add_text(&b, v);
    struct value text = jinja_built(&b);
    if (s->precision >= 0)
        text = jinja_slice(p->j, text, jinja_int(0), jinja_int(s->precision), jinja_none());
    add_padded(p, s, text.string);
}

static void flags_of(const struct spec *s, char out[8])
{
    char *to = out;
    *to++ = '%';
    if (s->minus) *to++ = '-';
    if (s->plus) *to++ = '+';
    if (s->space) *to++ = ' ';
    if (s->zero) *to++ = '0';
    *to = '\0';
}

static void add_int(struct percent *p, const struct spec *s, struct value v, char conversion)
{
    char format[32], flags[8], text[MAX_WIDTH + 80];
    int64_t i;
    if (v.kind == V_FLOAT && conversion == 'd' && v.f > -9e18 && v.f < 9e18) v = jinja_int((int64_t)v.f);
    if (!jinja_as_int(v, &i)) jinja_fail(p->j, "%%%c format: a number is required, not %s", conversion, jinja_type(v));
    if (conversion != 'd' && i < 0) jinja_fail(p->j, "%%%c of a negative number is not supported", conversion);
    if (s->precision >= 0) jinja_fail(p->j, "a precision of %%%c is not supported", conversion);
    flags_of(s, flags);
    snprintf(format, sizeof format, "%s*%s", flags, conversion == 'd' ? PRId64 : conversion == 'x' ? PRIx64 : PRIX64);
    int length = snprintf(text, sizeof text, format, s->width, i);
    jinja_add(&p->b, text, (size_t)length);
}

static void add_float(struct percent *p, const struct spec *s, struct value v, char conversion)
{
    char format[32], flags[8], text[MAX_WIDTH + 400];
    if (!jinja_is_number(v)) jinja_fail(p->j, "must be real number, not %s", jinja_type(v));
    flags_of(s, flags);
    snprintf(format, sizeof format, "%s*.*%c", flags, conversion);
    int length = snprintf(text, sizeof text, format, s->width, s->precision < 0 ? 6 : s->precision, jinja_as_double(v));
    jinja_add(&p->b, text, (size_t)length);
}

static void add_conversion(struct percent *p)
{
    struct value v = {0};
    if (peek(p) == '(') v = keyed_argument(p);
    struct spec s = read_spec(p);
    char conversion = peek(p);
    p->at++;
    if (conversion == '%') {
        jinja_add_c(&p->b, "%");
        return;
    }
    if (v.kind == V_MISSING) v = next_argument(p);
    switch (conversion) {
    case 's':
    case 'r': add_text(p, &s, v, conversion == 'r'); break;
    case 'd':
    case 'i':
    case 'u': add_int(p, &s, v, 'd'); break;
    case 'x':
    case 'X': add_int(p, &s, v, conversion); break;
    case 'e':
    case 'E':
    case 'f':
    case 'F':
    case 'g':
    case 'G': add_float(p, &s, v, conversion); break;
    default: jinja_fail(p->j, "unsupported format character");
    }
}

struct value jinja_percent(struct jinja *j, const struct string *format, struct value arguments)
{
    struct percent p = {.j = j, .format = format, .arguments = arguments, .b = {.j = j}};
    while (p.at < format->length) {
        const char *found = memchr(format->data + p.at, '%', format->length - p.at);
        size_t to = found ? (size_t)(found - format->data) : format->length;
        jinja_add(&p.b, format->data + p.at, to - p.at);
        p.at = to + (found != NULL);
        jinja_charge(j, 1);
        if (found) add_conversion(&p);
    }
    // A mapping or a list may stay unused, as if it were keyed; a number or a text may not.
    bool left = arguments.kind == V_TUPLE ? p.next < arguments.list->n
                                          : !p.used && arguments.kind != V_DICT && arguments.kind != V_LIST &&
                                                arguments.kind != V_RANGE && arguments.kind != V_UNDEFINED;
    if (left) jinja_fail(j, "not all arguments converted during string formatting");
    return jinja_built(&p.b);
}

// ---- str.format ----

// The value of a field's name: a number or nothing for the positional ones, then .attribute and [item].
static struct value field_value(struct jinja *j, struct string field, const struct arguments *all, size_t *automatic)
{
    size_t length = 0;
    int64_t index = 0;
    struct value v = {0};
    while (length < field.length && field.data[length] != '.' && field.data[length] != '[') length++;
    if (length < field.length) jinja_fail(j, "attributes in a format are not supported");
    if (length == 0) {
        index = (int64_t)(*automatic)++;
    } else if (!jinja_parse_int(&field, 10, &index)) {
        for (size_t i = 0; i < all->n_named; i++) {
            if (jinja_same_string(all->names[i], &field)) v = all->named[i];
        }
        if (v.kind == V_MISSING) jinja_fail(j, "a name of the format is not among the arguments");
        return v;
    }
    if (index < 0 || (size_t)index >= all->n) jinja_fail(j, "Replacement index %" PRId64 " out of range", index);
    return all->values[index];
}

struct value jinja_format(struct jinja *j, const struct string *format, const struct arguments *all)
{
    struct builder b = {.j = j};
    size_t automatic = 0;
    for (size_t at = 0; at < format->length;) {
        char c = format->data[at];
        if (c != '{' && c != '}') {
            jinja_add(&b, &c, 1);
            at++;
        } else if (at + 1 < format->length && format->data[at + 1] == c) {
            jinja_add(&b, &c, 1);
            at += 2;
        } else {
            const char *end = c == '{' ? memchr(format->data + at, '}', format->length - at) : NULL;
            if (!end) jinja_fail(j, "Single '%c' encountered in format string", c);
            struct string field = {.data = format->data + at + 1, .length = (size_t)(end - format->data) - at - 1};
            bool plain = !memchr(field.data, ':', field.length) && !memchr(field.data, '!', field.length);
            if (!plain || memchr(field.data, '{', field.length))
                jinja_fail(j, "format specifications are not supported");
            jinja_add_text(&b, field_value(j, field, all, &automatic));
            at += field.length + 2;
        }
        jinja_charge(j, 1);
    }
    return jinja_built(&b);
}
