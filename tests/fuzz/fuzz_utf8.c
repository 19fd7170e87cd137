// Bytes pushed in random pieces give what a decoder written another way gives for the whole: valid UTF-8, one U+FFFD
// per maximal ill-formed subpart.
#include "tokenizer/detokenizer.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

// Whether some character's encoding begins with these n bytes: tried out, not derived from ranges of bytes.
static int begins_character(const uint8_t *p, size_t n, size_t *whole)
{
    for (*whole = 1; *whole <= 4; ++*whole) {
        if (*whole == 1 ? p[0] >= 0x80 : p[0] >> (7 - *whole) != (1u << (*whole + 1)) - 2) continue;
        uint32_t low = *whole == 1 ? p[0] : p[0] & (0x7Fu >> *whole), high = low;
        for (size_t i = 1; i < *whole; i++) {
            if (i < n && p[i] >> 6 != 2) return 0;
            low = low << 6 | (i < n ? p[i] & 0x3F : 0);
            high = high << 6 | (i < n ? p[i] & 0x3F : 0x3F);
        }
        static const uint32_t first[] = {0, 0, 0x80, 0x800, 0x10000}, last[] = {0, 0x7F, 0x7FF, 0xFFFF, 0x10FFFF};
        if (high < first[*whole] || low > last[*whole]) return 0;
        return !(low >= 0xD800 && high <= 0xDFFF);
    }
    return 0;
}

static size_t decode_whole(const uint8_t *p, size_t n, char *out, int *valid)
{
    size_t written = 0;
    *valid = 1;
    while (n > 0) {
        size_t taken = 0, whole = 0;
        while (taken < n && taken < 4 && begins_character(p, taken + 1, &whole) && taken < whole) taken++;
        if (taken > 0 && begins_character(p, taken, &whole) && taken == whole) {
            memcpy(out + written, p, taken);
            written += taken;
        } else {
            *valid = 0;
            memcpy(out + written, "\xEF\xBF\xBD", 3);
            written += 3;
            if (taken == 0) taken = 1;
        }
        p += taken;
        n -= taken;
    }
    return written;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1) return 0;
    uint32_t random = data[0] * 2654435761u;
    const uint8_t *bytes = data + 1;
    size_t n = size - 1, n_streamed = 0;
    char *whole = malloc(utf8_stream_bound(n)), *streamed = malloc(2 * utf8_stream_bound(n));
    struct utf8_stream s = {0};
    for (size_t i = 0; i < n;) {
        random = random * 1664525 + 1013904223;
        size_t piece = (random >> 24) % 6;
        if (piece > n - i) piece = n - i;
        size_t written = utf8_stream_push(&s, (const char *)bytes + i, piece, streamed + n_streamed);
        assert(written <= utf8_stream_bound(piece) && s.n_held >= 0 && s.n_held <= 3);
        n_streamed += written;
        i += piece;
        assert(utf8_valid(streamed, n_streamed));
    }
    n_streamed += utf8_stream_finish(&s, streamed + n_streamed);
    int valid;
    size_t n_whole = decode_whole(bytes, n, whole, &valid);
    assert(n_streamed == n_whole && memcmp(streamed, whole, n_whole) == 0);
    assert(utf8_valid((const char *)bytes, n) == valid);
    size_t prefix = utf8_valid_prefix((const char *)bytes, n);
    assert(memcmp(whole, bytes, prefix) == 0 && (prefix == n) == valid);
    free(whole);
    free(streamed);
    return 0;
}
