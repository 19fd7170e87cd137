/* completion_request.h: the body of POST /v1/completions, checked and tokenized; and what a chat becomes, too (chat_request.h).
 *
 * Everything that can be wrong with a request is found here, with the field's name, before the engine sees any of it.
 * Fields of OpenAI's and vLLM's request classes that cannot change our answer are accepted and ignored; those that
 * would, and that we don't have, and unknown ones, are refused by name.
 */
#ifndef GPTD_SERVER_COMPLETION_REQUEST_H
#define GPTD_SERVER_COMPLETION_REQUEST_H

#include "engine/engine.h"
#include "server/error_response.h"
#include "server/server.h"
#include "server/stop_matcher.h"
#include "tokenizer/chat_template.h"
#include "tokenizer/infill.h"
#include "tokenizer/tokenizer.h"

// What a request is checked against.
struct completion_limits {
    const struct server_options *options;
    const struct engine_plan *plan;
    const struct tokenizer *tokenizer; // NULL: none
    size_t max_token_bytes;            // of the longest token; with a tokenizer
    struct infill infill;              // of the tokenizer
    const struct chat_template *chat_template; // NULL: none
};

struct completion_prompt {
    int32_t *ids;       // [n_ids]
    int32_t n_ids;
    char *text;         // for echo: what was sent, or the ids as text; NULL: no echo or no tokenizer
    size_t text_length; // bytes
    bool text_was_sent; // text is the client's, not made of the ids
};

struct completion_request {
    struct completion_prompt *prompts; // [n_prompts]
    int32_t n_prompts;
    struct sampling_params params;     // of each prompt; params.n is best_of; the arrays are this struct's
    int32_t n;                         // choices to return per prompt
    int32_t logprobs;                  // to return: -1 none, k: of the token and the top k
    int32_t prompt_logprobs;           // likewise; params.prompt_logprobs also serves echo
    bool echo, stream, include_usage, skip_special_tokens, include_stop, return_token_ids, tokens_as_ids;
    bool chat;                         // of /v1/chat/completions: one prompt, and answers are messages
    struct stop_matcher *stop;         // NULL: no stop strings
};

// What one request may come to, in tokens: see struct server_options.
int64_t completion_max_tokens(const struct completion_limits *limits);

// Those that it comes to if no choice ends early.
int64_t completion_request_tokens(const struct completion_request *r);

// Parses body ([length] bytes and a NUL), which it may change. api_key (may be NULL) keeps the prefix cache of its
// owner apart. Slow for long prompts. On failure there is nothing to free.
int completion_request_parse(struct completion_request *r, char *body, size_t length, const char *api_key,
                             const struct completion_limits *limits, struct http_error *e);
void completion_request_deinit(struct completion_request *r);

#endif
