// Stop strings and a text, split at random: the output is what a search over the whole text gives.
#include "server/stop_matcher.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

// The naive answer: the length of the output, and which stop ended it (-1: none).
static size_t search_whole(const char *text, size_t n, char stops[][8], size_t n_stops, bool include_stop,
                           int32_t *stop)
{
    *stop = -1;
    for (size_t end = 1; end <= n; end++) {
        size_t best = 0;
        for (size_t i = 0; i < n_stops; i++) {
            size_t length = strlen(stops[i]);
            if (length > end || length <= best || memcmp(text + end - length, stops[i], length) != 0) continue;
            best = length;
            *stop = (int32_t)i;
        }
        if (*stop >= 0) return include_stop ? end : end - best;
    }
    return n;
}

// data: options, stop strings of up to 7 bytes that end with byte 0, then the text. Bytes are folded to four letters so
// that matches are common; the split points come from the text's upper bits.
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2) return 0;
    size_t n_stops = 1 + data[0] % STOP_MAX_STRINGS, at = 1;
    bool include_stop = data[0] & 0x80;
    char stops[STOP_MAX_STRINGS][8];
    const char *pointers[STOP_MAX_STRINGS];
    for (size_t i = 0; i < n_stops; i++) {
        size_t length = 0;
        while (at < size && data[at] && length < 7) stops[i][length++] = (char)('a' + data[at++] % 4);
        if (at < size && !data[at]) at++;
        if (length == 0) stops[i][length++] = 'e';
        stops[i][length] = '\0';
        pointers[i] = stops[i];
    }
    size_t n = size - at;
    char *text = malloc(n + 1), *joined = malloc(stop_stream_bound(n)), *piece = malloc(stop_stream_bound(n));
    for (size_t i = 0; i < n; i++) text[i] = (char)('a' + data[at + i] % 4);

    struct stop_matcher *m;
    assert(stop_matcher_create(&m, pointers, n_stops, include_stop, NULL) == 0);
    struct stop_stream s = {0};
    size_t n_joined = 0, begin = 0;
    for (size_t i = 0; i <= n; i++) {
        if (i < n && data[at + i] < 64) continue;
        size_t written = stop_stream_push(m, &s, text + begin, i - begin, piece);
        memcpy(joined + n_joined, piece, written);
        n_joined += written;
        begin = i;
        assert(s.stopped || n_joined + stop_stream_held(m, &s) == i);
    }
    n_joined += stop_stream_finish(m, &s, joined + n_joined);

    int32_t stop;
    size_t expected = search_whole(text, n, stops, n_stops, include_stop, &stop);
    assert(n_joined == expected && memcmp(joined, text, n_joined) == 0);
    assert(s.stopped == (stop >= 0));
    assert(!s.stopped || strcmp(stops[s.stop], stops[stop]) == 0);
    stop_matcher_destroy(m);
    free(text);
    free(joined);
    free(piece);
    return 0;
}
