/* What filters and methods do to strings, as Python's str does it. */
#include "tokenizer/jinja_strings.h"

#include <string.h>

enum { SIGMA = 0x3C3, FINAL_SIGMA = 0x3C2 };

bool jinja_in_chars(const struct string *chars, uint32_t c)
{
    if (!chars) return jinja_is_space(c);
    for (size_t at = 0, size; at < chars->length; at += size) {
        if (jinja_decode(chars->data + at, chars->length - at, &size) == c) return true;
    }
    return false;
}

struct value jinja_strip(struct jinja *j, const struct string *s, const struct string *chars, bool left, bool right)
{
    size_t from = 0, to = s->length, size;
    jinja_charge(j, (int64_t)(s->length / 256));
    while (left && from < to && jinja_in_chars(chars, jinja_decode(s->data + from, to - from, &size))) from += size;
    while (right && to > from) {
        size_t at = to - 1; // the last character: back over the bytes that continue it
        while (at > from && to - at < 4 && ((unsigned char)s->data[at] & 0xC0) == 0x80) at--;
        uint32_t c = jinja_decode(s->data + at, to - at, &size);
        if (size != to - at) { // no UTF-8
            at = to - 1;
            c = 0xFFFD;
        }
        if (!jinja_in_chars(chars, c)) break;
        to = at;
    }
    return jinja_substring(j, s, from, to);
}

// Whether the sigma at `at` ends a word: it is written otherwise then. Marks between letters, which Python skips, are not skipped.
static bool is_final_sigma(const struct string *s, size_t at)
{
    size_t size, before = at;
    if (at == 0) return false;
    do before--;
    while (before > 0 && ((unsigned char)s->data[before] & 0xC0) == 0x80);
    uint32_t previous = jinja_decode(s->data + before, at - before, &size);
    uint32_t next = at + 2 < s->length ? jinja_decode(s->data + at + 2, s->length - at - 2, &size) : ' ';
    return (jinja_is_lower(previous) || jinja_is_upper(previous)) && !jinja_is_lower(next) && !jinja_is_upper(next);
}

// lower, upper: all characters; title: the first one, others lowered.
struct value jinja_recase(struct jinja *j, const struct string *s, enum letter_case first, enum letter_case rest)
{
    struct builder b = {.j = j};
    uint32_t to[3];
    jinja_charge(j, (int64_t)(s->length / 64));
    for (size_t at = 0, size; at < s->length; at += size) {
        uint32_t c = jinja_decode(s->data + at, s->length - at, &size);
        if (c == 0xFFFD) {
            jinja_add(&b, s->data + at, size);
            continue;
        }
        size_t n = jinja_convert(c, at == 0 ? first : rest, to);
        if (to[0] == SIGMA && c != SIGMA && is_final_sigma(s, at)) to[0] = FINAL_SIGMA;
        for (size_t i = 0; i < n; i++) jinja_add_char(&b, to[i]);
    }
    return jinja_built(&b);
}

// The last one of part in s before `to`; NULL: there is none.
static const char *find_last(const struct string *s, size_t to, const struct string *part)
{
    if (part->length > to) return NULL;
    for (size_t at = to - part->length + 1; at-- > 0;) {
        if (memcmp(s->data + at, part->data, part->length) == 0) return s->data + at;
    }
    return NULL;
}

struct value jinja_replace(struct jinja *j, const struct string *s, const struct string *from, const struct string *to,
                           int64_t most)
{
    struct builder b = {.j = j};
    size_t at = 0, size = 0;
    jinja_charge(j, (int64_t)(s->length / 64));
    while (most != 0) {
        const char *found = from->length == 0 ? s->data + at : at < s->length
            ? memmem(s->data + at, s->length - at, from->data, from->length) : NULL;
        if (!found) break;
        jinja_charge(j, 1);
        jinja_add(&b, s->data + at, (size_t)(found - s->data) - at);
        jinja_add(&b, to->data, to->length);
        at = (size_t)(found - s->data) + from->length;
        most -= most > 0;
        if (from->length > 0) continue;
        if (at >= s->length) return jinja_built(&b); // an empty text is between all characters and around them
        jinja_decode(s->data + at, s->length - at, &size);
        jinja_add(&b, s->data + at, size);
        at += size;
    }
    jinja_add(&b, s->data + at, s->length - at);
    return jinja_built(&b);
}

static struct list *split_spaces(struct jinja *j, const struct string *s, int64_t most)
{
    struct list *parts = jinja_list_new(j, 0);
    size_t at = 0, size;
    while (true) {
        while (at < s->length && jinja_is_space(jinja_decode(s->data + at, s->length - at, &size))) at += size;
        if (at >= s->length) return parts;
        size_t from = at;
        if (most-- == 0) {
            jinja_append(j, parts, jinja_substring(j, s, from, s->length));
            return parts;
        }
        while (at < s->length && !jinja_is_space(jinja_decode(s->data + at, s->length - at, &size))) at += size;
        jinja_charge(j, 1);
        jinja_append(j, parts, jinja_substring(j, s, from, at));
    }
}

static void reverse(struct list *list)
{
    for (size_t i = 0; i < list->n / 2; i++) {
        struct value other = list->items[i];
        list->items[i] = list->items[list->n - 1 - i];
        list->items[list->n - 1 - i] = other;
    }
}

static struct list *rsplit_spaces(struct jinja *j, const struct string *s, int64_t most)
{
    struct list *all = split_spaces(j, s, -1), *parts = jinja_list_new(j, 0);
    if (most < 0 || (uint64_t)most >= all->n) return all;
    size_t n_left = all->n - (size_t)most;
    const struct string *last = all->items[n_left - 1].string; // of those that stay together
    jinja_append(j, parts, jinja_substring(j, s, 0, (size_t)(last->data + last->length - s->data)));
    for (size_t i = n_left; i < all->n; i++) jinja_append(j, parts, all->items[i]);
    return parts;
}

static struct list *split_by(struct jinja *j, const struct string *s, const struct string *separator, int64_t most)
{
    struct list *parts = jinja_list_new(j, 0);
    size_t at = 0;
    for (; most != 0 && at < s->length; most -= most > 0) {
        const char *found = memmem(s->data + at, s->length - at, separator->data, separator->length);
        if (!found) break;
        jinja_charge(j, 1);
        jinja_append(j, parts, jinja_substring(j, s, at, (size_t)(found - s->data)));
        at = (size_t)(found - s->data) + separator->length;
    }
    jinja_append(j, parts, jinja_substring(j, s, at, s->length));
    return parts;
}

static struct list *rsplit_by(struct jinja *j, const struct string *s, const struct string *separator, int64_t most)
{
    struct list *parts = jinja_list_new(j, 0);
    size_t to = s->length;
    for (; most != 0; most -= most > 0) {
        const char *found = find_last(s, to, separator);
        if (!found) break;
        jinja_charge(j, 1);
        jinja_append(j, parts, jinja_substring(j, s, (size_t)(found - s->data) + separator->length, to));
        to = (size_t)(found - s->data);
    }
    jinja_append(j, parts, jinja_substring(j, s, 0, to));
    reverse(parts);
    return parts;
}

// separator NULL: runs of spaces.
struct list *jinja_split(struct jinja *j, const struct string *s, const struct string *separator, int64_t most, bool from_right)
{
    jinja_charge(j, (int64_t)(s->length / 64));
    if (!separator) return from_right ? rsplit_spaces(j, s, most) : split_spaces(j, s, most);
    if (separator->length == 0) jinja_fail(j, "empty separator");
    return from_right ? rsplit_by(j, s, separator, most) : split_by(j, s, separator, most);
}

static bool breaks_line(uint32_t c)
{
    return (c >= '\n' && c <= '\r') || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 || c == 0x2029;
}

struct list *jinja_split_lines(struct jinja *j, const struct string *s, bool keep_ends)
{
    struct list *lines = jinja_list_new(j, 0);
    size_t from = 0, size;
    jinja_charge(j, (int64_t)(s->length / 64));
    for (size_t at = 0; at < s->length; at += size) {
        uint32_t c = jinja_decode(s->data + at, s->length - at, &size);
        if (!breaks_line(c)) continue;
        if (c == '\r' && at + 1 < s->length && s->data[at + 1] == '\n') size = 2;
        jinja_append(j, lines, jinja_substring(j, s, from, keep_ends ? at + size : at));
        from = at + size;
    }
    if (from < s->length) jinja_append(j, lines, jinja_substring(j, s, from, s->length));
    return lines;
}

struct value jinja_join(struct jinja *j, const struct string *separator, const struct list *items)
{
    struct builder b = {.j = j};
    for (size_t i = 0; i < items->n; i++) {
        if (i > 0) jinja_add(&b, separator->data, separator->length);
        jinja_add_text(&b, items->items[i]);
    }
    return jinja_built(&b);
}
