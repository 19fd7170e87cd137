/* jinja.h: the part of Jinja2 that chat templates use, rendered in a sandbox of its own.
 *
 * Called by chat_template.c. A template is immutable after creation and may be rendered from any number of threads at once. Text is
 * UTF-8. Templates come from the checkpoint, never from a request; its variables do come from requests. Nothing outside the
 * variables can be reached, and steps, depth, memory and output are limited.
 * Whitespace is as transformers sets Jinja up: trim_blocks and lstrip_blocks on, one trailing newline of the template dropped.
 * Output is Jinja2's own, byte for byte (tests/jinja compares them). What Jinja2 has and this has not is an error: integers
 * beyond 64 bits, recursive loops, blocks of templates, filters of HTML. The one known difference is told at the end of
 * jinja_internal.h: a variable that an inner block reads before the block around it sets it.
 */
#ifndef GPTD_TOKENIZER_JINJA_H
#define GPTD_TOKENIZER_JINJA_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include <cjson/cJSON.h>

#ifdef __cplusplus
extern "C" {
#endif

struct jinja_template;

enum {
    JINJA_RAISED = 1, // the template called raise_exception: the conversation is not one that it takes
};

struct jinja_limits {
    int64_t steps;       // nodes evaluated
    int32_t depth;       // of calls, expressions, blocks and values in each other. No more than 500 counts
    size_t memory_bytes; // of all values and text, which live until the end of the render
    size_t output_bytes;
};

// Generous for any conversation that fits a context: 4 M steps, depth 200, 256 MB, 64 MB.
extern const struct jinja_limits jinja_default_limits;

// Parses. Returns 0, or -1 with "line N: what" in error; what we do not know is refused here by name, not at rendering.
int jinja_create(struct jinja_template **out, const char *source, size_t length, char *error, size_t error_size);
void jinja_destroy(struct jinja_template *t);

// Renders with the members of `variables` (an object) as variables; integers are numbers without a fraction up to 2^53, or raw
// items (cJSON_Raw) with a number's text, as Python's json reads it: an integer unless it has a point or an exponent, and
// members keep their order. Strings of `variables` are used where they are. now: what strftime_now shows, in local time. *text is
// malloc'd and NUL-terminated.
// Returns 0; JINJA_RAISED with the template's own words in error; -1 with "line N: what" (an undefined value that is used, a type
// that does not do, a limit).
int jinja_render(const struct jinja_template *t, const cJSON *variables, const struct jinja_limits *limits, time_t now,
                 char **text, size_t *length, char *error, size_t error_size);

#ifdef __cplusplus
}
#endif
#endif
