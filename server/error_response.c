#include "server/error_response.h"

#include "tokenizer/detokenizer.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int http_error_set(struct http_error *e, int32_t status, const char *code, const char *param, const char *format, ...)
{
    e->status = status;
    e->retry_after = status == 429 || status == 503;
    e->code = code;
    snprintf(e->param, sizeof e->param, "%s", param ? param : "");
    va_list args;
    va_start(args, format);
    vsnprintf(e->message, sizeof e->message, format, args);
    va_end(args);
    e->message[utf8_valid_prefix(e->message, strlen(e->message))] = '\0'; // it may have been cut within a character
    return -1;
}

int http_error_from(struct http_error *e, const struct error *cause, const char *param)
{
    int32_t status = 500;
    switch (cause->code) {
    case ERR_INVALID:
    case ERR_FORMAT:
    case ERR_UNSUPPORTED: status = 400; break;
    case ERR_BUSY: status = 429; break;
    case ERR_NOMEM:
    case ERR_DEVICE:
    case ERR_SHUTDOWN: status = 503; break;
    case ERR_IO: break;
    }
    return http_error_set(e, status, NULL, param, "%s", cause->message);
}

int http_error_from_json(struct http_error *e, const struct json_error *cause)
{
    return http_error_from(e, &cause->error, cause->param);
}

static const char *type_of(int32_t status)
{
    switch (status) {
    case 401: return "authentication_error";
    case 429: return "rate_limit_error";
    case 503: return "service_unavailable_error";
    default: return status >= 500 ? "server_error" : "invalid_request_error";
    }
}

void http_error_write(struct text_buffer *out, const struct http_error *e)
{
    text_string(out, "{\"error\":{\"message\":");
    text_json_string(out, e->message, strlen(e->message));
    text_printf(out, ",\"type\":\"%s\",\"param\":", type_of(e->status));
    if (e->param[0])
        text_json_string(out, e->param, strlen(e->param));
    else
        text_string(out, "null");
    text_string(out, ",\"code\":");
    if (e->code)
        text_json_string(out, e->code, strlen(e->code));
    else
        text_string(out, "null");
    text_string(out, "}}");
}
