/* chat_template.h: a conversation as the text its model was trained on, by the checkpoint's own template.
 *
 * Called by server/ alone. A template is compiled once, is immutable afterwards, and may be rendered from any number of threads at
 * once, within jinja_default_limits. Its variables are those of transformers' apply_chat_template: messages, tools and documents
 * (none), add_generation_prompt, the texts of the special tokens, and what a request adds.
 */
#ifndef GPTD_TOKENIZER_CHAT_TEMPLATE_H
#define GPTD_TOKENIZER_CHAT_TEMPLATE_H

#include <stdbool.h>
#include <stddef.h>
#include <time.h>

#include <cjson/cJSON.h>

#ifdef __cplusplus
extern "C" {
#endif

struct chat_template;

enum {
    CHAT_TEMPLATE_ABSENT = 1, // chat_template_create: the directory has none
    CHAT_TEMPLATE_RAISED = 1, // chat_template_render: the template refuses the conversation, in its own words
};

struct chat_conversation {
    const cJSON *messages;       // a list of objects
    const cJSON *kwargs;         // an object with more variables; NULL: none. See chat_template_reserved
    bool add_generation_prompt;
    bool continue_final_message; // the text ends with the last message's content, which is a string
};

// Of dir/chat_template.jinja; where there is none of "chat_template" in dir/tokenizer_config.json: a string, or a list of
// {name, template} of which "default" counts. Special tokens are those of tokenizer_config.json, then special_tokens_map.json.
// Returns 0; CHAT_TEMPLATE_ABSENT (*out is NULL); -1 with a message in error, and in *out, unless there is no memory, a template
// whose every rendering fails with that message: a server can do without chat.
int chat_template_create(struct chat_template **out, const char *dir, char *error, size_t error_size);
void chat_template_destroy(struct chat_template *t);

// The first member of kwargs (an object) that is not a request's to set: the variables above; NULL: none.
const char *chat_template_reserved(const struct chat_template *t, const cJSON *kwargs);

// now: what strftime_now shows, in local time. *text is malloc'd and NUL-terminated. Returns 0; CHAT_TEMPLATE_RAISED with the
// template's own words in error, which may be cut within a character; -1 with a message.
int chat_template_render(const struct chat_template *t, const struct chat_conversation *c, time_t now, char **text, size_t *length,
                         char *error, size_t error_size);

#ifdef __cplusplus
}
#endif
#endif
