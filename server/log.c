#include "server/log.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "tokenizer/detokenizer.h"

enum {
    LINE_SIZE = 4096, // PIPE_BUF: what poll calls writable takes this much without blocking, and in one piece
    MESSAGE_SIZE = 3840,
    FIELD_SIZE = 640,
};

struct line {
    char text[LINE_SIZE];
    size_t n;
};

static struct {
    pthread_mutex_t mutex; // guards the descriptor and dropped
    int fd;
    enum log_format format;
    enum log_level level;
    uint64_t dropped; // lines that found no room since the last one that did
} state = {PTHREAD_MUTEX_INITIALIZER, STDERR_FILENO, LOG_FORMAT_TEXT, LOG_LEVEL_INFO, 0};

static const char *const level_names[] = {"error", "warning", "info", "debug"};

void log_init(int fd, enum log_format format, enum log_level level)
{
    state.fd = fd;
    state.format = format;
    state.level = level;
}

bool log_enabled(enum log_level level) { return level <= state.level; }

static void append_format(struct line *line, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void append_format(struct line *line, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    size_t room = LINE_SIZE - line->n;
    int n = vsnprintf(line->text + line->n, room, format, args);
    va_end(args);
    if (n > 0) line->n += (size_t)n < room ? (size_t)n : room - 1;
}

// Bytes of the character that starts here, in text known to be UTF-8.
static size_t utf8_size(unsigned char lead) { return lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4; }

// Appends text, at most `most` bytes of it as written. Control characters, and all of what is not UTF-8, are escaped,
// so that neither a terminal nor a JSON parser is led astray; quotes and backslashes only where `quoted`.
static void append_escaped(struct line *line, const char *text, bool quoted, size_t most)
{
    size_t size = strlen(text), end = line->n + most;
    bool valid = utf8_valid(text, size);
    if (end > LINE_SIZE - 64) end = LINE_SIZE - 64; // keeps room for what closes the line
    for (size_t i = 0; i < size && line->n + 6 <= end;) {
        unsigned char c = (unsigned char)text[i];
        size_t n = valid ? utf8_size(c) : 1;
        if (c < 0x20 || c == 0x7f || (c >= 0x80 && !valid))
            append_format(line, "\\u%04x", c);
        else if (quoted && (c == '"' || c == '\\'))
            append_format(line, "\\%c", c);
        else
            append_format(line, "%.*s", (int)n, text + i);
        i += n;
    }
}

static void line_begin(struct line *line, enum log_level level)
{
    struct timespec now;
    struct tm utc;
    char date[32];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%S", &utc);
    line->n = 0;
    if (state.format == LOG_FORMAT_JSON)
        append_format(line, "{\"time\":\"%s.%03ldZ\",\"level\":\"%s\"", date, now.tv_nsec / 1000000,
                      level_names[level]);
    else
        append_format(line, "%s.%03ldZ %-7s", date, now.tv_nsec / 1000000, level_names[level]);
}

static void line_message(struct line *line, const char *message)
{
    bool json = state.format == LOG_FORMAT_JSON;
    append_format(line, json ? ",\"message\":\"" : " ");
    append_escaped(line, message, json, MESSAGE_SIZE);
    if (json) append_format(line, "\"");
}

static void field_string(struct line *line, const char *name, const char *value)
{
    if (!value) return;
    bool json = state.format == LOG_FORMAT_JSON;
    bool quoted = json || !*value || strpbrk(value, " \"\\=");
    append_format(line, json ? ",\"%s\":" : " %s=", name);
    if (quoted) append_format(line, "\"");
    append_escaped(line, value, quoted, FIELD_SIZE);
    if (quoted) append_format(line, "\"");
}

static void field_integer(struct line *line, const char *name, int32_t value)
{
    if (value < 0) return;
    append_format(line, state.format == LOG_FORMAT_JSON ? ",\"%s\":%d" : " %s=%d", name, value);
}

static void field_seconds(struct line *line, const char *name, double seconds)
{
    if (!(seconds >= 0)) return;
    if (state.format == LOG_FORMAT_JSON)
        append_format(line, ",\"%s_seconds\":%.6f", name, seconds);
    else
        append_format(line, " %s=%.1fms", name, seconds * 1e3);
}

// Never blocks: false if there is no room, or nobody at the other end.
static bool line_write(struct line *line)
{
    append_format(line, state.format == LOG_FORMAT_JSON ? "}\n" : "\n");
    struct pollfd p = {.fd = state.fd, .events = POLLOUT};
    if (poll(&p, 1, 0) != 1 || !(p.revents & POLLOUT)) return false;
    return write(state.fd, line->text, line->n) == (ssize_t)line->n;
}

static void line_end(struct line *line)
{
    int saved = errno;
    pthread_mutex_lock(&state.mutex);
    if (state.dropped) {
        struct line note;
        line_begin(&note, LOG_LEVEL_WARNING);
        char message[64];
        snprintf(message, sizeof(message), "%llu log lines dropped: nobody read them",
                 (unsigned long long)state.dropped);
        line_message(&note, message);
        if (line_write(&note)) state.dropped = 0;
    }
    if (!line_write(line)) state.dropped++;
    pthread_mutex_unlock(&state.mutex);
    errno = saved;
}

void log_message(enum log_level level, const char *format, ...)
{
    if (!log_enabled(level)) return;
    int saved = errno;
    char message[MESSAGE_SIZE];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    struct line line;
    line_begin(&line, level);
    line_message(&line, message);
    line_end(&line);
    errno = saved;
}

// Probes and scrapes come every few seconds and say nothing while they succeed.
static enum log_level request_level(const struct log_request *r)
{
    bool asked = !strncmp(r->path, "/v1/", 4) || strstr(r->path, "tokenize");
    return asked || r->status >= 400 ? LOG_LEVEL_INFO : LOG_LEVEL_DEBUG;
}

void log_request(const struct log_request *r)
{
    enum log_level level = request_level(r);
    if (!log_enabled(level)) return;
    struct line line;
    line_begin(&line, level);
    line_message(&line, "request");
    field_string(&line, "id", r->id);
    field_string(&line, "trace_id", r->trace_id);
    field_string(&line, "key", r->key);
    field_string(&line, "method", r->method);
    field_string(&line, "path", r->path);
    field_integer(&line, "status", r->status);
    field_string(&line, "finish", r->finish);
    field_integer(&line, "prompt_tokens", r->prompt_tokens);
    field_integer(&line, "cached_tokens", r->cached_tokens);
    field_integer(&line, "completion_tokens", r->completion_tokens);
    field_seconds(&line, "queue", r->queue);
    field_seconds(&line, "prefill", r->prefill);
    field_seconds(&line, "ttft", r->ttft);
    field_seconds(&line, "decode", r->decode);
    field_seconds(&line, "total", r->total);
    field_string(&line, "error", r->error);
    line_end(&line);
}
