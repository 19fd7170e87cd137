/* error_response.h: what goes wrong with a request, and the JSON that says so: {"error":{message,type,param,code}}. */
#ifndef GPTD_SERVER_ERROR_RESPONSE_H
#define GPTD_SERVER_ERROR_RESPONSE_H

#include "kernels/error.h"
#include "server/json_get.h"
#include "server/text_buffer.h"

#include <stdint.h>

struct http_error {
    int32_t status;      // HTTP status; 0: no error
    int32_t retry_after; // seconds for Retry-After; 0: no such header
    const char *code;    // a constant; NULL: none
    char param[128];     // the field at fault ("stream_options.include_usage" within an object); "": none
    char message[512];
};

// Stores all of it (param may be NULL). Returns -1, so that `return http_error_set(...)` works. 429 and 503 get a
// retry_after of 1.
int http_error_set(struct http_error *e, int32_t status, const char *code, const char *param, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
// The same from an error of another module: the status follows from its code.
int http_error_from(struct http_error *e, const struct error *cause, const char *param);
int http_error_from_json(struct http_error *e, const struct json_error *cause);

// Appends the error's JSON object.
void http_error_write(struct text_buffer *out, const struct http_error *e);

#endif
