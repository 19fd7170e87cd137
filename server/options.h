/* options.h: everything that can be configured, in one table.
 *
 * Called by main. Each option is a flag (--max-model-len 4096), a variable (GPTD_MAX_MODEL_LEN=4096) and a key of the
 * JSON file that --config or GPTD_CONFIG names ({"max-model-len": 4096}, underscores do too). Flags win over variables
 * over the file over defaults. An unknown flag, variable or key, and a value out of range, is an error that names the
 * option and where it came from. Names follow vLLM's where it has the option.
 */
#ifndef GPTD_SERVER_OPTIONS_H
#define GPTD_SERVER_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "engine/engine.h"
#include "kernels/error.h"
#include "server/log.h"

struct options {
    struct engine_options engine; // what --model ... --seed fill; strings are owned by this struct

    // server
    const char *served_model_name;   // never NULL: the last part of --model by default
    const char *host;                // address or name to listen on
    int32_t port;                    // 0: any free one
    char **api_keys;                 // [n_api_keys] of --api-key and --api-key-file; none: no key is asked for
    size_t n_api_keys;
    int32_t http_threads;            // threads of the HTTP event loop
    int32_t max_connections;         // open connections; more are answered 503
    size_t max_body_bytes;           // of a request; more: 413
    double request_timeout;          // seconds a request may take from submission to its end; 0: no limit
    double header_timeout;           // seconds from a connection's first byte to the end of the headers
    double body_timeout;             // seconds from the end of the headers to the end of the body
    double idle_timeout;             // seconds a connection may stay open without a request
    double keep_alive_interval;      // seconds of silence on a stream before a ": keep-alive" comment
    double drain_delay;              // seconds that new requests are still taken after SIGTERM, while /ready fails
    double drain_timeout;            // seconds that running requests then get to finish; 0: no limit

    // log
    enum log_format log_format;
    enum log_level log_level;

    // actions
    bool dry_run, help, version;

    const char *model_flag, *api_key, *api_key_file, *config; // raw values behind the fields above
};

// Fills o from argv, environ and the file. 0, or ERR_INVALID (a flag, variable or key), ERR_IO (a file cannot be read),
// ERR_FORMAT (the file is not JSON), ERR_NOMEM. With --help or --version nothing else is required or checked.
// On failure o is empty; otherwise options_deinit frees it.
int options_init(struct options *o, int argc, char **argv, char **environment, struct error *e);
void options_deinit(struct options *o);

// The --help text: options by group, with defaults and variables.
void options_help(FILE *out);

#endif
