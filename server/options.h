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
#include "server/log.h"
#include "server/server.h"

struct options {
    struct engine_options engine; // strings and arrays of these two are owned by this struct
    struct server_options server; // send_timeout is --slow-client-timeout too

    double drain_timeout; // seconds that running requests get after drain_delay; 0: until they end

    enum log_format log_format;
    enum log_level log_level;

    bool dry_run, help, probe, version;

    // What was said, behind the fields above.
    char *model, *served_model_name, *api_key, *api_key_file, *config;
};

// Fills o from argv, environ and the file. 0, or ERR_INVALID (a flag, variable or key), ERR_IO (a file cannot be read),
// ERR_FORMAT (the file is not JSON), ERR_NOMEM. With --help or --version nothing else is required or checked; with --probe a
// model is not required and no key is read.
// On failure o is empty; otherwise options_deinit frees it.
int options_init(struct options *o, int argc, char **argv, char **environment, struct error *e);
void options_deinit(struct options *o);

// The --help text: options by group, with defaults and variables.
void options_help(FILE *out);

#endif
