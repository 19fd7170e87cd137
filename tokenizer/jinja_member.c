/* Attributes, items and slices, as the sandbox of Jinja2 gives them: an attribute is looked for among the items too, and an item
 * among the attributes.
 */
#include "tokenizer/jinja_internal.h"

#include <string.h>

static struct value unsafe(struct jinja *j, struct value object, const struct string *name)
{
    struct builder b = {.j = j};
    jinja_add_c(&b, "access to attribute '");
    jinja_add(&b, name->data, name->length < 60 ? name->length : 60);
    jinja_add_c(&b, "' of '");
    jinja_add_c(&b, jinja_type(object));
    jinja_add_c(&b, "' object is unsafe.");
    jinja_add(&b, "", 1); // the NUL
    return jinja_hint(j, b.data);
}

static struct value cycler_attribute(struct value object, const struct string *name)
{
    const struct cycler *c = object.cycler;
    return jinja_is_c(name, "current") ? c->items.items[c->at] : (struct value){.kind = V_MISSING};
}

// V_MISSING: there is no such attribute.
static struct value own_attribute(struct jinja *j, struct value object, const struct string *name)
{
    const struct builtin *builtin = jinja_find_method(object, name);
    struct value *found;
    if (builtin) {
        struct method *method = jinja_alloc(j, sizeof *method);
        *method = (struct method){builtin, object};
        return (struct value){.kind = V_METHOD, .method = method};
    }
    if (jinja_is_mutator(object, name)) return unsafe(j, object, name);
    if (name->length >= 4 && memcmp(name->data, "__", 2) == 0 && memcmp(name->data + name->length - 2, "__", 2) == 0)
        return unsafe(j, object, name);
    switch (object.kind) {
    case V_NAMESPACE:
        found = jinja_dict_find_string(j, object.dict, name);
        if (found && name->length > 0 && name->data[0] == '_') return unsafe(j, object, name);
        return found ? *found : (struct value){.kind = V_MISSING};
    case V_LOOP: return jinja_loop_attribute(j, object.loop, name);
    case V_CYCLER: return cycler_attribute(object, name);
    case V_MACRO:
        if (jinja_is_c(name, "name") && object.macro->node->name)
            return (struct value){.kind = V_STRING, .string = object.macro->node->name};
        break;
    case V_TUPLE:
        if (object.special && jinja_is_c(name, "grouper")) return object.list->items[0];
        if (object.special && jinja_is_c(name, "list")) return object.list->items[1];
        break;
    default: break;
    }
    return (struct value){.kind = V_MISSING};
}

struct value jinja_attribute(struct jinja *j, struct value object, const struct string *name)
{
    struct value key = {.kind = V_STRING, .string = name}, *found = NULL;
    if (object.kind == V_UNDEFINED) jinja_fail_undefined(j, object);
    struct value v = own_attribute(j, object, name);
    if (v.kind != V_MISSING) return v;
    if (object.kind == V_DICT) found = jinja_dict_find(j, object.dict, key);
    return found ? *found : jinja_no_member(j, object, key);
}

// Where an index of Python's is among n; false: nowhere.
static bool position(int64_t index, size_t n, size_t *at)
{
    if (index < 0) index += (int64_t)n;
    *at = (size_t)index;
    return index >= 0 && *at < n;
}

static struct value char_at(struct jinja *j, struct value text, size_t at)
{
    const struct string *s = text.string;
    size_t from = s->n_chars == s->length ? at : jinja_skip_chars(s->data, s->length, at);
    jinja_charge(j, (int64_t)(from / 256));
    struct value c = jinja_substring(j, s, from, from + jinja_skip_chars(s->data + from, s->length - from, 1));
    c.special = text.special;
    return c;
}

struct value jinja_item(struct jinja *j, struct value object, struct value key)
{
    int64_t index;
    size_t n, at;
    if (object.kind == V_UNDEFINED) jinja_fail_undefined(j, object);
    bool indexed = object.kind == V_STRING || object.kind == V_LIST || object.kind == V_TUPLE || object.kind == V_RANGE;
    if (indexed && jinja_as_int(key, &index) && jinja_has_length(object, &n) && position(index, n, &at)) {
        if (object.kind == V_STRING) return char_at(j, object, at);
        if (object.kind == V_RANGE) return jinja_int(object.range->start + (int64_t)at * object.range->step);
        return object.list->items[at];
    }
    if (object.kind == V_DICT && jinja_is_hashable(j, key)) {
        struct value *found = jinja_dict_find(j, object.dict, key);
        if (found) return *found;
    }
    if (key.kind == V_STRING) {
        struct value v = own_attribute(j, object, key.string);
        if (v.kind != V_MISSING) return v;
    }
    return jinja_no_member(j, object, key);
}

// ---- slices ----

struct bounds {
    int64_t start, stop, step;
    size_t n;
};

static int64_t clamp(int64_t at, int64_t least, int64_t most, int64_t length)
{
    if (at < 0) at += length;
    return at < least ? least : at > most ? most : at;
}

static int64_t slice_part(struct jinja *j, struct value v, int64_t otherwise)
{
    if (v.kind == V_UNDEFINED) jinja_fail(j, "slice indices must be integers or None");
    return jinja_int_argument(j, v, otherwise);
}

// As slice.indices() of Python.
static struct bounds bounds_of(struct jinja *j, struct value start, struct value stop, struct value step, size_t n)
{
    int64_t length = (int64_t)n, by = slice_part(j, step, 1);
    if (by == 0) jinja_fail(j, "slice step cannot be zero");
    if (by < -length - 1) by = -length - 1; // the same, and no overflow
    if (by > length + 1) by = length + 1;
    int64_t least = by < 0 ? -1 : 0, most = by < 0 ? length - 1 : length;
    bool from_start = start.kind == V_MISSING || start.kind == V_NONE, to_stop = stop.kind == V_MISSING || stop.kind == V_NONE;
    int64_t from = from_start ? (by < 0 ? most : least) : clamp(slice_part(j, start, 0), least, most, length);
    int64_t to = to_stop ? (by < 0 ? least : most) : clamp(slice_part(j, stop, 0), least, most, length);
    int64_t count = by > 0 ? (to - from + by - 1) / by : (from - to - by - 1) / -by;
    return (struct bounds){from, to, by, count > 0 ? (size_t)count : 0};
}

static struct value slice_string(struct jinja *j, const struct string *s, struct bounds b)
{
    bool ascii = s->n_chars == s->length;
    if (b.n == 0) return jinja_string(j, "", 0);
    if (b.step == 1) {
        size_t from = ascii ? (size_t)b.start : jinja_skip_chars(s->data, s->length, (size_t)b.start);
        size_t length = ascii ? b.n : jinja_skip_chars(s->data + from, s->length - from, b.n);
        return jinja_substring(j, s, from, from + length);
    }
    size_t *starts = jinja_alloc_array(j, s->n_chars + 1, sizeof *starts); // of each character
    for (size_t i = 0; i < s->n_chars; i++)
        starts[i + 1] = starts[i] + jinja_skip_chars(s->data + starts[i], s->length - starts[i], 1);
    struct builder text = {.j = j};
    for (size_t i = 0; i < b.n; i++) {
        size_t at = (size_t)(b.start + (int64_t)i * b.step);
        jinja_add(&text, s->data + starts[at], starts[at + 1] - starts[at]);
    }
    return jinja_built(&text);
}

static struct value slice_range(struct jinja *j, const struct range *range, struct bounds b)
{
    struct range *part = jinja_alloc(j, sizeof *part);
    *part = (struct range){range->start + b.start * range->step, range->start + b.stop * range->step, range->step * b.step,
                           (int64_t)b.n};
    return (struct value){.kind = V_RANGE, .range = part};
}

struct value jinja_slice(struct jinja *j, struct value object, struct value start, struct value stop, struct value step)
{
    size_t n;
    if (object.kind == V_UNDEFINED) jinja_fail_undefined(j, object);
    if (object.kind != V_STRING && object.kind != V_LIST && object.kind != V_TUPLE && object.kind != V_RANGE)
        jinja_fail(j, "'%s' object cannot be sliced", jinja_type(object));
    jinja_has_length(object, &n);
    struct bounds b = bounds_of(j, start, stop, step, n);
    jinja_charge(j, (int64_t)(b.n / 16));
    if (object.kind == V_STRING) {
        struct value text = slice_string(j, object.string, b);
        text.special = object.special;
        return text;
    }
    if (object.kind == V_RANGE) return slice_range(j, object.range, b);
    struct list *list = jinja_list_new(j, b.n);
    for (size_t i = 0; i < b.n; i++) jinja_append(j, list, object.list->items[b.start + (int64_t)i * b.step]);
    return (struct value){.kind = object.kind, .list = list};
}
