/* chat_request.h: the body of POST /v1/chat/completions, checked, rendered by the chat template and tokenized.
 *
 * The result is a completion_request with one prompt: what the template makes of the messages. The template writes BOS itself, so
 * none is added (add_special_tokens false by default, as vLLM has it).
 */
#ifndef GPTD_SERVER_CHAT_REQUEST_H
#define GPTD_SERVER_CHAT_REQUEST_H

#include "server/completion_request.h"

// As completion_request_parse. completion_request_deinit frees.
int chat_request_parse(struct completion_request *r, char *body, size_t length, const char *api_key,
                       const struct completion_limits *limits, struct http_error *e);

#endif
