/* Variables from JSON, and |tojson as transformers defines it: Python's json.dumps with ensure_ascii off. */
#include "tokenizer/jinja_internal.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A number by its text.
static struct value number_of(const char *text)
{
    char *end;
    errno = 0;
    long long integer = strtoll(text, &end, 10);
    return *end || errno ? jinja_float(strtod(text, NULL)) : jinja_int(integer);
}

// Strings stay where cJSON has them: the variables outlive the render.
struct value jinja_from_json(struct jinja *j, const cJSON *item)
{
    const cJSON *child;
    struct value v = jinja_none();
    jinja_charge(j, 1);
    jinja_enter(j);
    if (cJSON_IsBool(item)) {
        v = jinja_bool(cJSON_IsTrue(item));
    } else if (cJSON_IsNumber(item)) {
        double d = item->valuedouble;
        v = fabs(d) <= 9007199254740992.0 && d == floor(d) ? jinja_int((int64_t)d) : jinja_float(d);
    } else if (cJSON_IsRaw(item)) {
        v = number_of(item->valuestring);
    } else if (cJSON_IsString(item)) {
        v = jinja_string_c(j, item->valuestring);
    } else if (cJSON_IsArray(item)) {
        v = jinja_list(jinja_list_new(j, 0));
        cJSON_ArrayForEach(child, item) jinja_append(j, v.list, jinja_from_json(j, child));
    } else if (cJSON_IsObject(item)) {
        v = (struct value){.kind = V_DICT, .dict = jinja_dict_new(j)};
        cJSON_ArrayForEach(child, item) jinja_dict_set(j, v.dict, jinja_string_c(j, child->string), jinja_from_json(j, child));
    }
    jinja_leave(j);
    return v;
}

struct writer {
    struct builder b;
    const struct string *indent; // NULL: all on one line
    const struct string *comma, *colon;
    bool ascii, sorted;
};

static void add_json(struct writer *w, struct value v, int64_t level);

static void add_unicode(struct builder *b, uint32_t c)
{
    char text[16];
    if (c >= 0x10000) {
        snprintf(text, sizeof text, "\\u%04x", (unsigned)(0xD800 + ((c - 0x10000) >> 10)) & 0xFFFF);
        jinja_add_c(b, text);
        c = 0xDC00 + ((c - 0x10000) & 0x3FF);
    }
    snprintf(text, sizeof text, "\\u%04x", (unsigned)c & 0xFFFF);
    jinja_add_c(b, text);
}

static void add_string(struct writer *w, const struct string *s)
{
    static const char from[] = "\"\\\n\r\t\b\f", to[] = "\"\\nrtbf";
    jinja_add_c(&w->b, "\"");
    for (size_t at = 0, size; at < s->length; at += size) {
        uint32_t c = jinja_decode(s->data + at, s->length - at, &size);
        const char *simple = c > 0 && c < 0x80 ? strchr(from, (char)c) : NULL;
        if (simple) {
            jinja_add_c(&w->b, "\\");
            jinja_add(&w->b, to + (simple - from), 1);
        } else if (c < ' ' || (w->ascii && c >= 0x7F && c != 0x7F)) {
            add_unicode(&w->b, c);
        } else {
            jinja_add(&w->b, s->data + at, size);
        }
    }
    jinja_add_c(&w->b, "\"");
}

static void add_float(struct writer *w, double f)
{
    char text[40];
    if (isnan(f) || isinf(f)) {
        jinja_add_c(&w->b, isnan(f) ? "NaN" : f < 0 ? "-Infinity" : "Infinity");
        return;
    }
    jinja_format_float(f, text);
    jinja_add_c(&w->b, text);
}

static void add_key(struct writer *w, struct value key)
{
    if (key.kind != V_STRING && key.kind != V_NONE && !jinja_is_number(key))
        jinja_fail(w->b.j, "keys must be str, int, float, bool or None, not %s", jinja_type(key));
    if (key.kind != V_STRING) jinja_add_c(&w->b, "\"");
    add_json(w, key, 0);
    if (key.kind != V_STRING) jinja_add_c(&w->b, "\"");
}

static void add_break(struct writer *w, int64_t level)
{
    if (!w->indent) return;
    jinja_add_c(&w->b, "\n");
    jinja_add_repeated(&w->b, w->indent->data, w->indent->length, level);
}

static void add_comma(struct writer *w, size_t i, int64_t level)
{
    if (i > 0) jinja_add(&w->b, w->comma->data, w->comma->length);
    add_break(w, level);
}

static void add_list(struct writer *w, const struct list *list, int64_t level)
{
    jinja_add_c(&w->b, "[");
    for (size_t i = 0; i < list->n; i++) {
        add_comma(w, i, level + 1);
        add_json(w, list->items[i], level + 1);
    }
    if (list->n > 0) add_break(w, level);
    jinja_add_c(&w->b, "]");
}

static void add_dict(struct writer *w, const struct dict *d, int64_t level)
{
    struct jinja *j = w->b.j;
    struct value *keys = d->keys, *values = d->values;
    if (w->sorted && d->n > 0) {
        keys = memcpy(jinja_alloc_array(j, d->n, sizeof *keys), d->keys, d->n * sizeof *keys);
        values = memcpy(jinja_alloc_array(j, d->n, sizeof *values), d->values, d->n * sizeof *values);
        jinja_sort(j, values, keys, d->n, false);
    }
    jinja_add_c(&w->b, "{");
    for (size_t i = 0; i < d->n; i++) {
        add_comma(w, i, level + 1);
        add_key(w, keys[i]);
        jinja_add(&w->b, w->colon->data, w->colon->length);
        add_json(w, values[i], level + 1);
    }
    if (d->n > 0) add_break(w, level);
    jinja_add_c(&w->b, "}");
}

static void add_json(struct writer *w, struct value v, int64_t level)
{
    struct jinja *j = w->b.j;
    jinja_charge(j, 1);
    jinja_enter(j);
    switch (v.kind) {
    case V_NONE: jinja_add_c(&w->b, "null"); break;
    case V_BOOL: jinja_add_c(&w->b, v.b ? "true" : "false"); break;
    case V_INT: jinja_add_repr(&w->b, v); break;
    case V_FLOAT: add_float(w, v.f); break;
    case V_STRING: add_string(w, v.string); break;
    case V_LIST:
    case V_TUPLE: add_list(w, v.list, level); break;
    case V_DICT: add_dict(w, v.dict, level); break;
    default: jinja_fail(j, "Object of type %s is not JSON serializable", jinja_type(v));
    }
    jinja_leave(j);
}

static const struct string *indent_of(struct jinja *j, struct value indent)
{
    if (indent.kind == V_MISSING || indent.kind == V_NONE) return NULL;
    if (indent.kind == V_STRING) return indent.string;
    struct builder b = {.j = j};
    jinja_add_repeated(&b, " ", 1, jinja_int_argument(j, indent, 0));
    return jinja_built(&b).string;
}

struct value jinja_filter_tojson(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
{
    (void)all; // ensure_ascii, indent, separators, sort_keys
    struct writer w = {.b = {.j = j}, .ascii = jinja_is_true(given[0]), .sorted = jinja_is_true(given[3])};
    w.indent = indent_of(j, given[1]);
    w.comma = jinja_string_c(j, w.indent ? "," : ", ").string;
    w.colon = jinja_string_c(j, ": ").string;
    if (given[2].kind != V_MISSING && given[2].kind != V_NONE) {
        struct list *separators = jinja_items(j, given[2]);
        if (separators->n != 2) jinja_fail(j, "separators must be two strings");
        w.comma = jinja_string_argument(j, separators->items[0]);
        w.colon = jinja_string_argument(j, separators->items[1]);
    }
    add_json(&w, self, 0);
    return jinja_built(&w.b);
}
