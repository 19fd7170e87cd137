/* regex.h: regular expressions of a tokenizer.json, by PCRE2. Called by pretokenizer.c and normalizer.c. */
#ifndef GPTD_TOKENIZER_REGEX_H
#define GPTD_TOKENIZER_REGEX_H

#include <stddef.h>

#include <cjson/cJSON.h>

struct regex;
struct regex_match; // where a thread's matches go

// What tokenizers' own engine (Oniguruma) takes, as far as PCRE2 does; \s is white space as Unicode has it. NULL with a message.
struct regex *regex_create(const char *pattern, size_t length, char *error, size_t error_size);
// What the "pattern" of a normalizer or pre-tokenizer says: {"Regex": ..}, or {"String": ..}, to be found as it stands.
struct regex *regex_of_pattern(const cJSON *pattern, char *error, size_t error_size);
// A string to be found as it stands.
struct regex *regex_create_literal(const char *text, size_t length, char *error, size_t error_size);
void regex_destroy(struct regex *r);

struct regex_match *regex_match_create(const struct regex *r); // NULL: out of memory
void regex_match_destroy(struct regex_match *m);
// The next match that begins at `from` or later, in valid UTF-8. Returns 1, 0 (none) or -1 with a message (it took too long).
int regex_next(const struct regex *r, struct regex_match *m, const char *text, size_t length, size_t from, size_t *begin,
               size_t *end, char *error, size_t error_size);

#endif
