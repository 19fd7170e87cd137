/* error.h: how every C function of gptd reports a failure.
 *
 * A function that can fail returns 0 or a negative `enum err`, and says what went wrong, for whoever caused it, in the
 * `struct error` it takes last. Messages name the thing at fault (file, field, number) and never hold an address.
 */
#ifndef GPTD_KERNELS_ERROR_H
#define GPTD_KERNELS_ERROR_H

#ifdef __cplusplus
extern "C" {
#endif

enum err {
    ERR_INVALID = -1,     // an argument or option is out of range: the caller's fault
    ERR_NOMEM = -2,       // host or device memory does not suffice
    ERR_IO = -3,          // a file cannot be opened, read or mapped
    ERR_FORMAT = -4,      // a file's content breaks its format
    ERR_UNSUPPORTED = -5, // well-formed, but something gptd does not implement
    ERR_DEVICE = -6,      // the device failed: the engine cannot go on
    ERR_BUSY = -7,        // a bounded queue is full: try again later
    ERR_SHUTDOWN = -8,    // the engine is draining or stopped
};

struct error {
    enum err code;
    char message[512]; // one line, NUL-terminated, without a final dot or newline
};

// Stores code and message (printf format) in e, which may be NULL. Returns code, so that `return error_set(...)` works.
int error_set(struct error *e, enum err code, const char *format, ...) __attribute__((format(printf, 3, 4)));

// Puts "prefix: " (printf format) before e's message, code unchanged. Returns e->code; ERR_INVALID if e is NULL.
int error_prefix(struct error *e, const char *format, ...) __attribute__((format(printf, 2, 3)));

#ifdef __cplusplus
}
#endif
#endif
