/* encode.c: the ids of texts, for compare.py.
 *
 *   encode DIR <texts >ids      texts: a length in bytes, a newline, the text, and so on
 *
 * A line of ids a text, then what they decode to, with special tokens and without, as texts come. With --seconds: how long
 * encoding took, at the end.
 */
#include "tokenizer/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int main(int argc, char **argv)
{
    char error[500];
    struct tokenizer *t;
    size_t length, n;
    int32_t *ids;
    double seconds = 0;
    if (argc < 2 || tokenizer_create(&t, argv[1], error, sizeof error)) {
        fprintf(stderr, "encode: %s\n", argc < 2 ? "encode DIR" : error);
        return 1;
    }
    while (scanf("%zu", &length) == 1 && getchar() == '\n') {
        char *text = malloc(length + 1), *back;
        size_t n_back;
        if (!text || fread(text, 1, length, stdin) != length) return 1;
        double begin = now();
        if (tokenizer_encode(t, text, length, true, true, &ids, &n, error, sizeof error)) {
            printf("error %s\n", error);
            free(text);
            continue;
        }
        seconds += now() - begin;
        for (size_t i = 0; i < n; i++) printf(i ? " %d" : "%d", ids[i]);
        putchar('\n');
        for (int skip_special = 0; skip_special < 2; skip_special++) {
            if (tokenizer_decode(t, ids, n, skip_special, &back, &n_back, error, sizeof error)) return 1;
            printf("%zu\n", n_back);
            fwrite(back, 1, n_back, stdout);
            putchar('\n');
            free(back);
        }
        free(ids), free(text);
    }
    if (argc > 2 && strcmp(argv[2], "--seconds") == 0) fprintf(stderr, "%.6f\n", seconds);
    tokenizer_destroy(t);
    return 0;
}
