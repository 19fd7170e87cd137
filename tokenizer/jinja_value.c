#include "tokenizer/jinja_internal.h"

#include <string.h>

// ---- making ----

struct value jinja_string(struct jinja *j, const char *data, size_t length)
{
    struct string *s = jinja_alloc(j, sizeof *s);
    *s = (struct string){.data = data, .length = length, .n_chars = jinja_count_chars(data, length)};
    return (struct value){.kind = V_STRING, .string = s};
}

struct value jinja_string_copy(struct jinja *j, const char *data, size_t length)
{
    char *copy = jinja_alloc(j, length);
    if (length > 0) memcpy(copy, data, length);
    return jinja_string(j, copy, length);
}

struct value jinja_string_c(struct jinja *j, const char *text)
{
    return jinja_string(j, text, strlen(text));
}

struct value jinja_built(struct builder *b)
{
    return jinja_string(b->j, b->data ? b->data : "", b->length);
}

struct value jinja_substring(struct jinja *j, const struct string *s, size_t from, size_t to)
{
    return jinja_string(j, s->data + from, to - from);
}

struct value jinja_iterator(struct jinja *j, const struct list *items)
{
    struct iterator *iterator = jinja_alloc(j, sizeof *iterator);
    iterator->items = items;
    return (struct value){.kind = V_ITERATOR, .iterator = iterator};
}

static struct value undefined(struct jinja *j, struct undefined what)
{
    struct undefined *u = jinja_alloc(j, sizeof *u);
    *u = what;
    return (struct value){.kind = V_UNDEFINED, .undefined = u};
}

// hint must be static, or live as long as the run.
struct value jinja_hint(struct jinja *j, const char *hint)
{
    return undefined(j, (struct undefined){.hint = hint});
}

struct value jinja_no_member(struct jinja *j, struct value object, struct value name)
{
    return undefined(j, (struct undefined){.type = jinja_type(object), .name = name});
}

void jinja_fail_undefined(struct jinja *j, struct value v)
{
    const struct undefined *u = v.undefined;
    if (u->hint) jinja_fail(j, "%s", u->hint);
    struct builder b = {.j = j};
    jinja_add_repr(&b, u->name);
    int length = (int)(b.length < 200 ? b.length : 200);
    if (!u->type) jinja_fail(j, "%.*s is undefined", length, b.data);
    const char *object = strcmp(u->type, "NoneType") == 0 ? "" : " object", *type = *object ? u->type : "None";
    if (u->name.kind != V_STRING) jinja_fail(j, "%s%s has no element %.*s", type, object, length, b.data);
    jinja_fail(j, "'%s%s' has no attribute %.*s", type, object, length, b.data);
}

struct list *jinja_list_new(struct jinja *j, size_t capacity)
{
    struct list *list = jinja_alloc(j, sizeof *list);
    list->items = jinja_alloc_array(j, capacity, sizeof *list->items);
    list->capacity = capacity;
    return list;
}

void jinja_append(struct jinja *j, struct list *list, struct value item)
{
    if (list->n == list->capacity) {
        size_t capacity = list->capacity ? list->capacity * 2 : 4;
        struct value *items = jinja_alloc_array(j, capacity, sizeof *items);
        if (list->n > 0) memcpy(items, list->items, list->n * sizeof *items);
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->n++] = item;
}

// ---- what they are ----

const char *jinja_type(struct value v)
{
    switch (v.kind) {
    case V_NONE: return "NoneType";
    case V_BOOL: return "bool";
    case V_INT: return "int";
    case V_FLOAT: return "float";
    case V_STRING: return v.special ? "markupsafe.Markup" : "str";
    case V_LIST: return "list";
    case V_TUPLE: return "tuple";
    case V_DICT: return "dict";
    case V_RANGE: return "range";
    case V_ITERATOR: return "generator";
    case V_VIEW: return v.view->of == VIEW_KEYS ? "dict_keys" : v.view->of == VIEW_VALUES ? "dict_values" : "dict_items";
    case V_NAMESPACE: return "jinja2.utils.Namespace";
    case V_MACRO: return "jinja2.runtime.Macro";
    case V_LOOP: return "jinja2.runtime.LoopContext";
    case V_FUNCTION: return "function";
    case V_METHOD: return "builtin_function_or_method";
    case V_CYCLER: return "jinja2.utils.Cycler";
    case V_JOINER: return "jinja2.utils.Joiner";
    default: return "Undefined";
    }
}

bool jinja_is_true(struct value v)
{
    size_t n;
    switch (v.kind) {
    case V_MISSING:
    case V_UNDEFINED:
    case V_NONE: return false;
    case V_BOOL: return v.b;
    case V_INT: return v.i != 0;
    case V_FLOAT: return v.f != 0;
    default: return !jinja_has_length(v, &n) || n > 0;
    }
}

bool jinja_is_number(struct value v)
{
    return v.kind == V_BOOL || v.kind == V_INT || v.kind == V_FLOAT;
}

bool jinja_as_int(struct value v, int64_t *i)
{
    if (v.kind != V_INT && v.kind != V_BOOL) return false;
    *i = v.kind == V_INT ? v.i : v.b;
    return true;
}

double jinja_as_double(struct value v)
{
    return v.kind == V_FLOAT ? v.f : v.kind == V_INT ? (double)v.i : v.b;
}

int64_t jinja_int_argument(struct jinja *j, struct value v, int64_t otherwise)
{
    int64_t i;
    if (v.kind == V_MISSING || v.kind == V_NONE) return otherwise;
    if (v.kind == V_UNDEFINED) jinja_fail_undefined(j, v);
    if (!jinja_as_int(v, &i)) jinja_fail(j, "'%s' object cannot be interpreted as an integer", jinja_type(v));
    return i;
}

const struct string *jinja_string_argument(struct jinja *j, struct value v)
{
    if (v.kind == V_UNDEFINED) jinja_fail_undefined(j, v);
    if (v.kind != V_STRING) jinja_fail(j, "a string is needed, not '%s'", jinja_type(v));
    return v.string;
}

// ---- comparing ----

bool jinja_is_c(const struct string *s, const char *text)
{
    return s->length == strlen(text) && memcmp(s->data, text, s->length) == 0;
}

bool jinja_same_string(const struct string *a, const struct string *b)
{
    return a == b || (a->length == b->length && memcmp(a->data, b->data, a->length) == 0);
}

// By code point, which is the order of UTF-8's bytes too.
int jinja_compare_strings(const struct string *a, const struct string *b)
{
    size_t n = a->length < b->length ? a->length : b->length;
    int order = n > 0 ? memcmp(a->data, b->data, n) : 0;
    return order ? order : (a->length > b->length) - (a->length < b->length);
}

static bool equal_numbers(struct value a, struct value b)
{
    int64_t x, y;
    if (jinja_as_int(a, &x) && jinja_as_int(b, &y)) return x == y;
    return (a.kind == V_FLOAT ? a.f : (long double)(jinja_as_int(a, &x) ? x : 0)) ==
           (b.kind == V_FLOAT ? b.f : (long double)(jinja_as_int(b, &y) ? y : 0));
}

static bool equal_lists(struct jinja *j, const struct list *a, const struct list *b)
{
    bool equal = a->n == b->n;
    jinja_enter(j);
    for (size_t i = 0; equal && i < a->n; i++) {
        jinja_charge(j, 1);
        equal = jinja_equal(j, a->items[i], b->items[i]);
    }
    jinja_leave(j);
    return equal;
}

static bool equal_dicts(struct jinja *j, const struct dict *a, const struct dict *b)
{
    bool equal = a->n == b->n;
    jinja_enter(j);
    for (size_t i = 0; equal && i < a->n; i++) {
        jinja_charge(j, 1);
        const struct value *other = jinja_dict_find(j, b, a->keys[i]);
        equal = other && jinja_equal(j, a->values[i], *other);
    }
    jinja_leave(j);
    return equal;
}

static bool equal_ranges(const struct range *a, const struct range *b)
{
    return a->n == b->n && (a->n == 0 || (a->start == b->start && (a->n == 1 || a->step == b->step)));
}

bool jinja_equal(struct jinja *j, struct value a, struct value b)
{
    if (jinja_is_number(a) && jinja_is_number(b)) return equal_numbers(a, b);
    if (a.kind != b.kind) return false;
    switch (a.kind) {
    case V_UNDEFINED:
    case V_NONE: return true;
    case V_STRING:
        jinja_charge(j, (int64_t)(a.string->length / 256));
        return jinja_same_string(a.string, b.string);
    case V_LIST:
    case V_TUPLE: return equal_lists(j, a.list, b.list);
    case V_DICT: return equal_dicts(j, a.dict, b.dict);
    case V_RANGE: return equal_ranges(a.range, b.range);
    default: return a.macro == b.macro; // whatever it is: itself
    }
}

static const char *order_name(enum order order)
{
    static const char *const names[] = {"<", "<=", ">", ">="};
    return names[order];
}

static bool in_order(enum order order, int compared)
{
    switch (order) {
    case ORDER_LT: return compared < 0;
    case ORDER_LE: return compared <= 0;
    case ORDER_GT: return compared > 0;
    default: return compared >= 0;
    }
}

static bool ordered_numbers(enum order order, struct value a, struct value b)
{
    int64_t i;
    long double x = jinja_as_int(a, &i) ? (long double)i : (long double)a.f;
    long double y = jinja_as_int(b, &i) ? (long double)i : (long double)b.f;
    if (x != x || y != y) return false;
    return in_order(order, (x > y) - (x < y));
}

// The first items that differ decide; if there are none, the lengths do.
static bool ordered_lists(struct jinja *j, enum order order, const struct list *a, const struct list *b)
{
    size_t i = 0;
    jinja_enter(j);
    while (i < a->n && i < b->n && jinja_equal(j, a->items[i], b->items[i])) {
        jinja_charge(j, 1);
        i++;
    }
    bool result = i < a->n && i < b->n ? jinja_ordered(j, order, a->items[i], b->items[i])
                                       : in_order(order, (a->n > b->n) - (a->n < b->n));
    jinja_leave(j);
    return result;
}

bool jinja_ordered(struct jinja *j, enum order order, struct value a, struct value b)
{
    if (jinja_is_number(a) && jinja_is_number(b)) return ordered_numbers(order, a, b);
    if (a.kind == V_STRING && b.kind == V_STRING) return in_order(order, jinja_compare_strings(a.string, b.string));
    if (a.kind == b.kind && (a.kind == V_LIST || a.kind == V_TUPLE)) return ordered_lists(j, order, a.list, b.list);
    if (a.kind == V_UNDEFINED) jinja_fail_undefined(j, a);
    if (b.kind == V_UNDEFINED) jinja_fail_undefined(j, b);
    jinja_fail(j, "'%s' not supported between instances of '%s' and '%s'", order_name(order), jinja_type(a), jinja_type(b));
}

static bool range_contains(struct jinja *j, const struct range *range, struct value item)
{
    for (int64_t i = 0; i < range->n; i++) {
        jinja_charge(j, 1);
        if (jinja_equal(j, jinja_int(range->start + i * range->step), item)) return true;
    }
    return false;
}

bool jinja_contains(struct jinja *j, struct value container, struct value item)
{
    struct walk w;
    struct value other;
    if (container.kind == V_STRING) {
        const struct string *s = container.string, *part = jinja_string_argument(j, item);
        jinja_charge(j, (int64_t)(s->length / 256));
        return part->length == 0 || (s->length > 0 && memmem(s->data, s->length, part->data, part->length));
    }
    if (container.kind == V_DICT || (container.kind == V_VIEW && container.view->of == VIEW_KEYS)) {
        const struct dict *dict = container.kind == V_DICT ? container.dict : container.view->dict;
        if (!jinja_is_hashable(j, item)) jinja_fail(j, "unhashable type: '%s'", jinja_type(item));
        return jinja_dict_find(j, dict, item) != NULL;
    }
    if (container.kind == V_RANGE) return range_contains(j, container.range, item);
    if (!jinja_is_iterable(container)) jinja_fail(j, "argument of type '%s' is not iterable", jinja_type(container));
    jinja_walk(j, &w, container);
    while (jinja_next(j, &w, &other)) {
        if (jinja_equal(j, other, item)) return true;
    }
    return false;
}
