/* jinja_strings.h: what filters and methods do to strings. Private to tokenizer/jinja*.c. */
#ifndef GPTD_TOKENIZER_JINJA_STRINGS_H
#define GPTD_TOKENIZER_JINJA_STRINGS_H

#include "tokenizer/jinja_internal.h"

bool jinja_in_chars(const struct string *chars, uint32_t c); // chars NULL: the spaces
struct value jinja_strip(struct jinja *j, const struct string *s, const struct string *chars, bool left, bool right);
struct value jinja_recase(struct jinja *j, const struct string *s, enum letter_case first, enum letter_case rest);
struct value jinja_replace(struct jinja *j, const struct string *s, const struct string *from, const struct string *to,
                           int64_t most);
struct list *jinja_split(struct jinja *j, const struct string *s, const struct string *separator, int64_t most, bool from_right);
struct list *jinja_split_lines(struct jinja *j, const struct string *s, bool keep_ends);
struct value jinja_join(struct jinja *j, const struct string *separator, const struct list *items);

#endif
