/* request_fields.h: the fields that /v1/completions and /v1/chat/completions share, and the checks of a prompt.
 *
 * Private to completion_request.c and chat_request.c. Each fills in a struct request_fields, calls these in its own order, and
 * leaves them what it has of the body. They return 0, or -1 with the error set.
 */
#ifndef GPTD_SERVER_REQUEST_FIELDS_H
#define GPTD_SERVER_REQUEST_FIELDS_H

#include "server/completion_request.h"

#define LENGTH(array) (sizeof(array) / sizeof *(array))

// One parse: what the steps share.
struct request_fields {
    struct completion_request *r;
    const struct completion_limits *limits;
    struct json_body body;
    struct json_error json;
    struct http_error *error;
    const char *prompt_name, *max_tokens_name; // the fields to name when prompt or answer are too long
    bool add_special_tokens;
};

// A 400 that names param: "'param' message".
int fields_invalid(struct request_fields *p, const char *param, const char *message);
int fields_no_memory(struct request_fields *p);
// What a getter returned.
int fields_result(struct request_fields *p, int failed);
// The error of a getter that looked into the object called name.
int fields_nested_error(struct request_fields *p, const char *name);

struct field_names {
    const char *const *known;       // [n_known], sorted
    size_t n_known;
    const char *const *unsupported; // [n_unsupported] would change the answer, and are not there: null and false alone are taken
    size_t n_unsupported;
};
// Unknown and unsupported fields, `user`, `response_format`, `model`.
int fields_check(struct request_fields *p, const struct field_names *names);
// Everything that both requests have but for the prompt, `max_tokens` and `logprobs`. p->add_special_tokens holds its default.
int fields_parse_shared(struct request_fields *p, const char *api_key);
// Adds ids ([n]; those beyond the model's vocabulary are left out) to the stop ids.
int fields_add_stop_ids(struct request_fields *p, const int32_t *ids, int32_t n);
// Once max_tokens is known.
int fields_check_min_tokens(struct request_fields *p);

// Makes room for n prompts, if so many, with params.n choices each, are allowed.
int fields_set_n_prompts(struct request_fields *p, size_t n);
// Whether a prompt of n ids and max_tokens fit the context.
int fields_check_context(struct request_fields *p, size_t n_ids);
// Copies ids ([n], checked).
int fields_set_ids(struct request_fields *p, struct completion_prompt *prompt, const int32_t *ids, size_t n);
// Whether so many bytes of text could fit the context, if their tokens were the longest.
int fields_check_bytes(struct request_fields *p, size_t length);
// Ids of text, control tokens included, unless it is longer than any that fits. *ids is malloc'd.
int fields_encode(struct request_fields *p, const char *text, size_t length, bool add_special, int32_t **ids, size_t *n);

// The most tokens for each choice, by max_request_tokens alone. Everything but max_tokens is known, prompts included.
int64_t fields_allowed_max_tokens(const struct request_fields *p);
// Whether all prompts and choices together keep to max_request_tokens.
int fields_check_total(struct request_fields *p);

#endif
