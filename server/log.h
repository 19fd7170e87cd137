/* log.h: what the process says on stderr, one line at a time.
 *
 * Called by server/ from any thread. Lines are readable text, or one JSON object each; one write(2) a line, so
 * that lines of several threads never mix. Logging never blocks: when stderr is a pipe that nobody empties, lines are
 * dropped and counted, and the next line that gets through is preceded by their number.
 * There is one log per process, hence no object. Before log_init: text, level info.
 */
#ifndef GPTD_SERVER_LOG_H
#define GPTD_SERVER_LOG_H

#include <stdbool.h>
#include <stdint.h>

enum log_level { LOG_LEVEL_ERROR, LOG_LEVEL_WARNING, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };
enum log_format { LOG_FORMAT_TEXT, LOG_FORMAT_JSON };

// One HTTP request, logged when it has ended. Strings are borrowed; control characters in them are escaped.
struct log_request {
    const char *id;            // x-request-id
    const char *trace_id;      // of the client's traceparent; NULL: none
    const char *key;           // name of the API key; NULL: none asked for
    const char *method, *path; // as the client sent them, without the query
    int32_t status;            // HTTP status; 0: the client went away before there was one
    const char *finish;        // finish reason ("stop", "length", "cancelled", ...); NULL: not a completion
    const char *error;         // message of the error answered or met; NULL: none
    int32_t prompt_tokens, cached_tokens, completion_tokens; // negative: not known, left out
    double queue, prefill;     // seconds from submission to the first step, from there to the first token
    double ttft, total;        // from the request's last byte to the first token, to the end
    double decode;             // from the first token to the last; all of them negative: not known, left out
};

// Also takes over the descriptor to write to (2 for stderr; tests pass a pipe).
void log_init(int fd, enum log_format format, enum log_level level);
bool log_enabled(enum log_level level);
// One line (printf format, without a newline). What is over 4,000 bytes is cut. errno is kept.
void log_message(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));
// Level info; below status 400 on routes other than /v1/ and the tokenizer's (probes, scrapes): level debug.
void log_request(const struct log_request *r);

#endif
