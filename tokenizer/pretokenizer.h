/* pretokenizer.h: cuts text into the words that a tokenizer.json's model sees ("pre_tokenizer").
 *
 * Called by json_tokenizer.c. Immutable after creation; any number of threads may split at once. Regular expressions are PCRE2's,
 * with the white space of Unicode.
 */
#ifndef GPTD_TOKENIZER_PRETOKENIZER_H
#define GPTD_TOKENIZER_PRETOKENIZER_H

#include <stdbool.h>
#include <stddef.h>

#include <cjson/cJSON.h>

// Words that lie one after the other.
struct pieces {
    char *text;   // [ends[n - 1]]
    size_t *ends; // [n]
    size_t n, n_text, text_capacity, capacity;
};

void pieces_deinit(struct pieces *p);

struct pretokenizer;

// spec: the "pre_tokenizer" of a tokenizer.json; NULL or null: words are whole texts. Returns 0, or -1 with a message; what we do
// not know is refused by name.
int pretokenizer_create(struct pretokenizer **out, const cJSON *spec, char *error, size_t error_size);
void pretokenizer_destroy(struct pretokenizer *p);
bool pretokenizer_is_byte_level(const struct pretokenizer *p); // words are bytes, of any text

// Cuts valid UTF-8 into p (zeroed, or of an earlier call). is_first: the text begins the prompt. Returns 0, or -1 with a message.
int pretokenizer_split(const struct pretokenizer *t, const char *text, size_t length, bool is_first, struct pieces *p,
                       char *error, size_t error_size);

#endif
