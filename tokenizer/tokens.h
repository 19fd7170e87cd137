/* tokens.h: what the two kinds of tokenizer (SentencePiece's and tokenizer.json's) have of each id. */
#ifndef GPTD_TOKENIZER_TOKENS_H
#define GPTD_TOKENIZER_TOKENS_H

#include <stdbool.h>
#include <stddef.h>

struct token {
    char *bytes; // [length], NUL-terminated, malloc'd; NULL: an id that no file names
    size_t length;
    bool special;    // left out by skip_special
    bool space_mark; // the piece begins with U+2581
    bool mark;       // comes out of no model: control tokens and most added ones
};

// How decoding treats the U+2581 of the first pieces. STRIP_FIRST: a space that the text begins with goes, whatever it is of.
enum strip { STRIP_NONE, STRIP_ONE, STRIP_UNTIL_TEXT, STRIP_FIRST };

#endif
