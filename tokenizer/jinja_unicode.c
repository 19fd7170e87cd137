#include "tokenizer/jinja_internal.h"
#include "tokenizer/jinja_unicode_tables.h"

#define COUNT(table) (sizeof(table) / sizeof *(table))

// ---- UTF-8 ----

uint32_t jinja_decode(const char *data, size_t length, size_t *size)
{
    const unsigned char *s = (const unsigned char *)data;
    size_t n = s[0] < 0x80 ? 1 : s[0] < 0xC2 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : s[0] < 0xF5 ? 4 : 0;
    static const unsigned char first_bits[] = {0, 0x7F, 0x1F, 0x0F, 0x07};
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    *size = 1;
    if (n == 0 || n > length) return 0xFFFD;
    uint32_t c = s[0] & first_bits[n];
    for (size_t i = 1; i < n; i++) {
        if ((s[i] & 0xC0) != 0x80) return 0xFFFD;
        c = c << 6 | (s[i] & 0x3F);
    }
    if (c < least[n] || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) return 0xFFFD;
    *size = n;
    return c;
}

size_t jinja_encode(uint32_t c, char out[4])
{
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const unsigned char marks[] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (size_t i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)(marks[n] | c);
    return n;
}

size_t jinja_count_chars(const char *data, size_t length)
{
    size_t n = 0;
    for (size_t i = 0, size = 1; i < length; i += size, n++) {
        if ((unsigned char)data[i] < 0x80) size = 1;
        else jinja_decode(data + i, length - i, &size);
    }
    return n;
}

size_t jinja_skip_chars(const char *data, size_t length, size_t n_chars)
{
    size_t at = 0;
    for (size_t size; n_chars > 0 && at < length; n_chars--, at += size) jinja_decode(data + at, length - at, &size);
    return at;
}

// ---- classes ----

static bool in_ranges(const struct char_range *ranges, size_t n, uint32_t c)
{
    size_t low = 0, high = n;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (c > ranges[middle].last) low = middle + 1;
        else high = middle;
    }
    return low < n && c >= ranges[low].first;
}

bool jinja_is_space(uint32_t c)
{
    if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x1F);
    return in_ranges(spaces, COUNT(spaces), c);
}

bool jinja_is_alpha(uint32_t c)
{
    if (c < 0x80) return (c | 32) >= 'a' && (c | 32) <= 'z';
    return in_ranges(letters, COUNT(letters), c);
}

bool jinja_is_alnum(uint32_t c)
{
    if (c < 0x80) return jinja_is_alpha(c) || (c >= '0' && c <= '9');
    return in_ranges(letters, COUNT(letters), c) || in_ranges(numerals, COUNT(numerals), c);
}

bool jinja_is_digit(uint32_t c)
{
    if (c < 0x80) return c >= '0' && c <= '9';
    return in_ranges(digits, COUNT(digits), c);
}

bool jinja_is_printable(uint32_t c)
{
    if (c < 0x80) return c >= ' ' && c < 0x7F;
    return !in_ranges(unprintables, COUNT(unprintables), c);
}

// ---- case ----

// What c becomes; c itself if it is not in the table.
static uint32_t mapped(const struct case_range *ranges, size_t n, uint32_t c)
{
    size_t low = 0, high = n;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (c > ranges[middle].last) low = middle + 1;
        else high = middle;
    }
    if (low == n || c < ranges[low].first || (c - ranges[low].first) % (uint32_t)ranges[low].step != 0) return c;
    return c + (uint32_t)ranges[low].delta;
}

// How many characters c becomes; 0: it is not in the table.
static size_t special(const struct case_special *table, size_t count, uint32_t c, uint32_t out[3])
{
    size_t n = 0;
    for (size_t i = 0; i < count && table[i].from <= c; i++) {
        if (table[i].from != c) continue;
        for (; n < 3 && table[i].to[n]; n++) out[n] = table[i].to[n];
    }
    return n;
}

static uint32_t lower(uint32_t c)
{
    return c < 0x80 ? (c >= 'A' && c <= 'Z' ? c + 32 : c) : mapped(lowers, COUNT(lowers), c);
}

size_t jinja_convert(uint32_t c, enum letter_case to, uint32_t out[3])
{
    out[0] = c;
    if (to == CASE_LOWER) {
        out[0] = lower(c);
        if (c != 0x130) return 1;
        out[0] = 'i'; // the only one that becomes two
        out[1] = 0x307;
        return 2;
    }
    if (c < 0x80) {
        if (c >= 'a' && c <= 'z') out[0] = c - 32;
        return 1;
    }
    if (to == CASE_TITLE && in_ranges(only_titles, COUNT(only_titles), c)) {
        out[0] = mapped(titles, COUNT(titles), c);
        return 1;
    }
    size_t n = to == CASE_TITLE ? special(special_titles, COUNT(special_titles), c, out) : 0;
    if (n > 0) return n;
    n = special(special_uppers, COUNT(special_uppers), c, out);
    for (size_t i = 1; to == CASE_TITLE && i < n; i++) out[i] = lower(out[i]);
    if (n > 0) return n;
    out[0] = mapped(uppers, COUNT(uppers), c);
    return 1;
}

bool jinja_is_lower(uint32_t c)
{
    if (c < 0x80) return c >= 'a' && c <= 'z';
    return in_ranges(lower_letters, COUNT(lower_letters), c);
}

bool jinja_is_upper(uint32_t c)
{
    if (c < 0x80) return c >= 'A' && c <= 'Z';
    return in_ranges(upper_letters, COUNT(upper_letters), c);
}
