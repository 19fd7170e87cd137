/* Going through values, and sorting them. */
#include "tokenizer/jinja_internal.h"

#include <string.h>

bool jinja_is_iterable(struct value v)
{
    switch (v.kind) {
    case V_UNDEFINED:
    case V_STRING:
    case V_LIST:
    case V_TUPLE:
    case V_DICT:
    case V_RANGE:
    case V_ITERATOR:
    case V_VIEW: return true;
    default: return false;
    }
}

bool jinja_has_length(struct value v, size_t *n)
{
    switch (v.kind) {
    case V_UNDEFINED: *n = 0; return true;
    case V_STRING: *n = v.string->n_chars; return true;
    case V_LIST:
    case V_TUPLE: *n = v.list->n; return true;
    case V_DICT: *n = v.dict->n; return true;
    case V_RANGE: *n = (size_t)v.range->n; return true;
    case V_VIEW: *n = v.view->dict->n; return true;
    default: return false;
    }
}

void jinja_walk(struct jinja *j, struct walk *w, struct value source)
{
    if (!jinja_is_iterable(source)) jinja_fail(j, "'%s' object is not iterable", jinja_type(source));
    *w = (struct walk){.source = source};
}

static struct value next_char(struct jinja *j, struct walk *w)
{
    const struct string *s = w->source.string;
    size_t size, from = w->byte;
    jinja_decode(s->data + from, s->length - from, &size);
    w->byte += size;
    return jinja_substring(j, s, from, from + size);
}

static struct value member(struct jinja *j, const struct view *view, size_t at)
{
    const struct dict *d = view->dict;
    if (view->of != VIEW_ITEMS) return view->of == VIEW_KEYS ? d->keys[at] : d->values[at];
    struct list *pair = jinja_list_new(j, 2);
    jinja_append(j, pair, d->keys[at]);
    jinja_append(j, pair, d->values[at]);
    return jinja_tuple(pair);
}

static void fill(struct jinja *j, struct iterator *iterator)
{
    const struct deferred *d = iterator->deferred;
    jinja_enter(j);
    struct value made = d->builtin->call(j, d->self, d->given, &d->args);
    iterator->deferred = NULL;
    iterator->items = made.iterator->items;
    jinja_leave(j);
}

bool jinja_next(struct jinja *j, struct walk *w, struct value *item)
{
    size_t n = 0;
    jinja_charge(j, 1);
    if (w->source.kind == V_ITERATOR) {
        struct iterator *iterator = w->source.iterator; // whoever goes through it uses it up
        if (iterator->deferred) fill(j, iterator);
        if (iterator->at >= iterator->items->n) return false;
        *item = iterator->items->items[iterator->at++];
        return true;
    }
    jinja_has_length(w->source, &n);
    if (w->at >= n) return false;
    switch (w->source.kind) {
    case V_STRING: *item = next_char(j, w); break;
    case V_DICT: *item = w->source.dict->keys[w->at]; break;
    case V_RANGE: *item = jinja_int(w->source.range->start + (int64_t)w->at * w->source.range->step); break;
    case V_VIEW: *item = member(j, w->source.view, w->at); break;
    default: *item = w->source.list->items[w->at];
    }
    w->at++;
    return true;
}

struct list *jinja_items(struct jinja *j, struct value source)
{
    size_t n = 0;
    struct walk w;
    struct value item;
    jinja_walk(j, &w, source);
    jinja_has_length(source, &n);
    struct list *list = jinja_list_new(j, n);
    while (jinja_next(j, &w, &item)) jinja_append(j, list, item);
    return list;
}

// ---- sorting ----

struct sorted {
    struct value item, key;
};

static void merge(struct jinja *j, struct sorted *from, struct sorted *to, size_t n, bool reverse)
{
    size_t half = n / 2, a = 0, b = half;
    for (size_t i = 0; i < n; i++) {
        // Equal ones stay in order, whichever way it goes: the second half comes first only when it must.
        bool second = a == half || (b < n && (reverse ? jinja_ordered(j, ORDER_LT, from[a].key, from[b].key)
                                                      : jinja_ordered(j, ORDER_LT, from[b].key, from[a].key)));
        to[i] = second ? from[b++] : from[a++];
    }
}

static void merge_sort(struct jinja *j, struct sorted *items, struct sorted *spare, size_t n, bool reverse)
{
    if (n < 2) return;
    merge_sort(j, items, spare, n / 2, reverse);
    merge_sort(j, items + n / 2, spare + n / 2, n - n / 2, reverse);
    jinja_charge(j, (int64_t)n);
    merge(j, items, spare, n, reverse);
    memcpy(items, spare, n * sizeof *items);
}

void jinja_sort(struct jinja *j, struct value *items, struct value *keys, size_t n, bool reverse)
{
    struct sorted *sorted = jinja_alloc_array(j, n, sizeof *sorted), *spare = jinja_alloc_array(j, n, sizeof *spare);
    for (size_t i = 0; i < n; i++) sorted[i] = (struct sorted){items[i], keys[i]};
    merge_sort(j, sorted, spare, n, reverse);
    for (size_t i = 0; i < n; i++) {
        items[i] = sorted[i].item;
        keys[i] = sorted[i].key;
    }
}
