#include "server/options.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "server/json_get.h"
#include "server/text_file.h"

enum option_type {
    OPTION_STRING,
    OPTION_SWITCH, // bool field, true for the second of two choices
    OPTION_ENUM,   // enum field, the index of the choice
    OPTION_UINT16,
    OPTION_INT32,
    OPTION_INT64,
    OPTION_UINT64,
    OPTION_BYTES,   // size_t, with suffixes K, M, G, T (powers of 1,024)
    OPTION_SECONDS, // double
    OPTION_SHARE,   // double
    OPTION_BOOL,    // --name, --no-name; true or false in variables and files
    OPTION_ACTION,  // bool, on the command line only
};

struct option {
    const char *name; // NULL: `help` opens a group
    enum option_type type;
    size_t offset;        // in struct options
    const char *argument; // what --help calls the value; choices are "a|b"
    const char *initial;  // the default, as one would write it; NULL: none
    double min, max;      // inclusive, of numbers
    const char *help;
};

// Whose value stands: the highest.
enum source { SOURCE_DEFAULT, SOURCE_FILE, SOURCE_VARIABLE, SOURCE_FLAG };

#define AT(field) offsetof(struct options, field)
// clang-format off
#define GROUP(title) {NULL, OPTION_ACTION, 0, NULL, NULL, 0, 0, title}

static const struct option options_table[] = {
    GROUP("Model"),
    {"model", OPTION_STRING, AT(model), "DIR", NULL, 0, 0, "directory of the checkpoint (required)"},
    {"served-model-name", OPTION_STRING, AT(served_model_name), "NAME", NULL, 0, 0,
     "what requests call it, or several names with commas [the directory's]"},
    {"load-format", OPTION_SWITCH, AT(engine.dummy_weights), "auto|dummy", "auto", 0, 0,
     "dummy: random weights, config.json is all that is needed"},
    {"max-model-len", OPTION_INT32, AT(engine.max_model_len), "TOKENS", "0", 0, 1 << 24,
     "prompt and answer together; 0: what the checkpoint allows"},
    {"seed", OPTION_UINT64, AT(engine.seed), "N", "0", 0, 0, "base of the seeds of requests without one"},

    GROUP("Engine"),
    {"backend", OPTION_STRING, AT(engine.backend), "auto|cpu|cuda", "auto", 0, 0, "where the model runs"},
    {"dtype", OPTION_ENUM, AT(engine.dtype), "auto|bfloat16|float16", "auto", 0, 0,
     "what a GPU computes in; auto: the checkpoint's, bfloat16 for float32"},
    {"gpu-memory-utilization", OPTION_SHARE, AT(engine.gpu_memory_utilization), "SHARE", "0.9", 0.01, 1,
     "of the memory that is free on the GPU, for everything"},
    {"attention", OPTION_SWITCH, AT(engine.reference_attention), "flash|reference", "flash", 0, 0,
     "reference: the textbook form, to compare with, on a CPU"},
    {"deterministic", OPTION_BOOL, AT(engine.deterministic), NULL, "false", 0, 0,
     "GPU: the same answer, bit for bit, whatever else runs; slower"},
    {"threads", OPTION_INT32, AT(engine.n_threads), "N", "0", 0, 1024, "CPU threads of the model; 0: one per core"},
    {"max-num-seqs", OPTION_INT32, AT(engine.max_num_seqs), "N", "256", 1, 4096, "sequences that run at once"},
    {"max-num-batched-tokens", OPTION_INT32, AT(engine.max_num_batched_tokens), "TOKENS", "0", 0, 1 << 20,
     "tokens computed in one step; at least --max-num-seqs; 0: 512, on a GPU 8192"},
    {"block-size", OPTION_INT32, AT(engine.block_size), "16|32|64", "64", 16, 64, "tokens in a block of the KV cache"},
    {"kv-cache-memory-bytes", OPTION_BYTES, AT(engine.kv_cache_memory_bytes), "BYTES", "0", 0, 0x1p50,
     "such as 4G; 0: all sequences in full, at most half the memory (GPU: all)"},
    {"enable-prefix-caching", OPTION_BOOL, AT(engine.prefix_caching), NULL, "true", 0, 0,
     "reuse the KV of equal beginnings across requests"},
    {"max-queue-requests", OPTION_INT32, AT(engine.max_queue_requests), "N", "2048", 1, 1 << 20,
     "requests that wait; more are answered 429"},
    {"max-queue-tokens", OPTION_INT64, AT(engine.max_queue_tokens), "TOKENS", "4194304", 1, 0x1p40,
     "prompt tokens that wait; more are answered 429"},
    {"queue-timeout", OPTION_SECONDS, AT(engine.queue_timeout), "SECONDS", "60", 0, 86400,
     "to be begun: later is a 503, a wait foreseen to be longer a 429; 0: any"},
    {"priority-aging", OPTION_SECONDS, AT(engine.priority_aging), "SECONDS", "10", 0, 86400,
     "that one step of a request's priority is worth in the queue"},

    GROUP("Server"),
    {"host", OPTION_STRING, AT(server.host), "ADDRESS", "127.0.0.1", 0, 0, "address to listen on; 0.0.0.0 or ::: all"},
    {"port", OPTION_UINT16, AT(server.port), "N", "8000", 0, 65535, "port to listen on; 0: any free one"},
    {"api-key", OPTION_STRING, AT(api_key), "KEY", NULL, 0, 0, "bearer token to ask for, but for /health and /ready; an admin's"},
    {"api-key-file", OPTION_STRING, AT(api_key_file), "FILE", NULL, 0, 0,
     "likewise these, a line each, with roles and limits; SIGHUP reads it again"},
    {"cors-origin", OPTION_STRING, AT(server.cors_origin), "ORIGIN", NULL, 0, 0,
     "pages that may call from a browser; *: all"},
    {"http-threads", OPTION_INT32, AT(server.http_threads), "N", "2", 1, 64, "event loops"},
    {"tokenizer-threads", OPTION_INT32, AT(server.tokenizer_threads), "N", "2", 1, 64, "workers for long prompts"},
    {"max-connections", OPTION_INT32, AT(server.max_connections), "N", "4096", 1, 65536,
     "open connections; more are answered 503"},

    GROUP("Limits of a request"),
    {"max-body-bytes", OPTION_BYTES, AT(server.max_body_bytes), "BYTES", "8M", 1024, 0x1p30,
     "of its body; more is a 413"},
    {"max-prompts", OPTION_INT32, AT(server.max_prompts), "N", "1024", 1, 65536, "prompts"},
    {"max-choices", OPTION_INT32, AT(server.max_choices), "N", "2048", 1, 65536, "prompts times best_of"},
    {"max-request-tokens", OPTION_INT64, AT(server.max_request_tokens), "TOKENS", "0", 0, 0x1p40,
     "prompt and max_tokens over all choices, with alternatives; 0: 256 contexts"},
    {"max-logprobs", OPTION_INT32, AT(engine.max_logprobs), "N", "20", 0, MAX_LOGPROBS,
     "largest logprobs, top_logprobs and prompt_logprobs"},
    {"request-timeout", OPTION_SECONDS, AT(server.request_timeout), "SECONDS", "600", 0, 86400,
     "from its body to its last token; 0: no limit"},
    {"header-timeout", OPTION_SECONDS, AT(server.header_timeout), "SECONDS", "10", 0.1, 3600,
     "for its headers to come"},
    {"body-timeout", OPTION_SECONDS, AT(server.body_timeout), "SECONDS", "60", 0.1, 3600, "for its body to come"},
    {"idle-timeout", OPTION_SECONDS, AT(server.idle_timeout), "SECONDS", "75", 0.1, 86400,
     "for a kept connection to bring the next one"},
    {"slow-client-timeout", OPTION_SECONDS, AT(engine.slow_client_timeout), "SECONDS", "30", 0.1, 86400,
     "for its client to take what waits"},

    GROUP("Health"),
    {"keep-alive-interval", OPTION_SECONDS, AT(server.keep_alive_interval), "SECONDS", "15", 0.1, 3600,
     "of silence on a stream before a comment line"},
    {"stall-timeout", OPTION_SECONDS, AT(server.stall_timeout), "SECONDS", "1.5", 0.1, 86400,
     "without progress of the engine's work; then /health fails"},
    {"drain-delay", OPTION_SECONDS, AT(server.drain_delay), "SECONDS", "2", 0, 3600,
     "after SIGTERM while requests are still taken and /ready fails"},
    {"drain-timeout", OPTION_SECONDS, AT(drain_timeout), "SECONDS", "0", 0, 86400,
     "that running requests then get; 0: until they end"},

    GROUP("Log"),
    {"log-format", OPTION_ENUM, AT(log_format), "text|json", "text", 0, 0, "lines on stderr"},
    {"log-level", OPTION_ENUM, AT(log_level), "error|warning|info|debug", "info", 0, 0, "least level to log"},
    {"log-prompts", OPTION_BOOL, AT(server.log_prompts), NULL, "false", 0, 0,
     "also what completions and chats ask: their bodies, cut at 3,900 bytes"},

    GROUP("Other"),
    {"config", OPTION_STRING, AT(config), "FILE", NULL, 0, 0, "JSON file of these options, without the dashes"},
    {"dry-run", OPTION_ACTION, AT(dry_run), NULL, NULL, 0, 0, "print the memory plan and end"},
    {"probe", OPTION_ACTION, AT(probe), NULL, NULL, 0, 0, "ask the server at --host and --port for its /health and end: 0 or 1"},
    {"version", OPTION_ACTION, AT(version), NULL, NULL, 0, 0, "print the version and end"},
    {"help", OPTION_ACTION, AT(help), NULL, NULL, 0, 0, "print this and end"},
};
// clang-format on

enum { N_OPTIONS = sizeof(options_table) / sizeof(options_table[0]), NAME_SIZE = 64 };

// What is being read.
struct loader {
    struct options *o;
    enum source source[N_OPTIONS]; // of the value that stands
    struct error *e;
};

union value {
    char *string;
    int64_t int64;
    uint64_t uint64;
    double seconds;
    bool boolean;
    unsigned index;
};

// ---- names ----------------------------------------------------------------------------------------------------------

// name as the table writes it: lower case, dashes. Cut at NAME_SIZE: no option is as long.
static void name_normalize(const char *name, size_t n, char out[NAME_SIZE])
{
    if (n > NAME_SIZE - 1) n = NAME_SIZE - 1;
    for (size_t i = 0; i < n; i++) out[i] = name[i] == '_' ? '-' : (char)tolower((unsigned char)name[i]);
    out[n] = '\0';
}

static const struct option *option_find(const char *name)
{
    for (const struct option *p = options_table; p < options_table + N_OPTIONS; p++)
        if (p->name && !strcmp(p->name, name)) return p;
    return NULL;
}

// Levenshtein's distance.
static int edit_distance(const char *a, const char *b)
{
    int row[NAME_SIZE + 1];
    int n = (int)strlen(b);
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int replaced = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            int shifted = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            row[j] = replaced < shifted ? replaced : shifted;
        }
    }
    return row[n];
}

// The option that was probably meant; NULL: none is near.
static const char *name_nearest(const char *name)
{
    const char *nearest = NULL;
    int best = 1 + (int)strlen(name) / 4;
    for (const struct option *p = options_table; p < options_table + N_OPTIONS; p++) {
        int distance = p->name ? edit_distance(name, p->name) : INT_MAX;
        if (distance <= best && (!nearest || distance < best)) nearest = p->name, best = distance;
    }
    return nearest;
}

// ---- values ---------------------------------------------------------------------------------------------------------

// Index of text among choices "a|b|c"; -1: not there.
static int choice_index(const char *choices, const char *text)
{
    size_t n = strlen(text);
    for (int i = 0;; i++) {
        size_t length = strcspn(choices, "|");
        if (length == n && !memcmp(choices, text, n)) return i;
        if (!choices[length]) return -1;
        choices += length + 1;
    }
}

static bool parse_uint64(const char *text, uint64_t *out, const char **end)
{
    if (!isdigit((unsigned char)*text)) return false;
    errno = 0;
    *out = strtoull(text, (char **)end, 10);
    return errno == 0;
}

static bool parse_int64(const char *text, int64_t *out)
{
    char *end;
    errno = 0;
    if (!isdigit((unsigned char)text[*text == '-'])) return false;
    *out = strtoll(text, &end, 10);
    return errno == 0 && !*end;
}

static bool parse_bytes(const char *text, uint64_t *out)
{
    static const char units[] = "KMGT";
    const char *end;
    if (!parse_uint64(text, out, &end)) return false;
    if (!*end) return true;
    const char *unit = strchr(units, toupper((unsigned char)*end));
    if (!unit || (end[1] && strcmp(end + 1, "iB") && strcmp(end + 1, "B"))) return false;
    return !__builtin_mul_overflow(*out, 1ull << 10 * (unit - units + 1), out);
}

static bool parse_seconds(const char *text, double *out)
{
    char *end;
    if (!isdigit((unsigned char)*text)) return false; // strtod takes spaces, signs, "inf" and "nan"
    *out = strtod(text, &end);
    return !*end && isfinite(*out);
}

static bool parse_bool(const char *text, bool *out)
{
    *out = !strcmp(text, "true") || !strcmp(text, "1");
    return *out || !strcmp(text, "false") || !strcmp(text, "0");
}

static const char *choices_of(const struct option *p)
{
    return p->argument && strchr(p->argument, '|') ? p->argument : NULL;
}

// Reads text as p's type; a number goes to *number too, for the range. index: of the choice that text is. Returns NULL,
// or what a value should be where text is not one. Out of memory shows as a NULL string.
static const char *value_parse(const struct option *p, const char *text, int index, union value *v, double *number)
{
    const char *end;
    switch (p->type) {
    case OPTION_STRING:
        if (!*text) return "not empty";
        v->string = strdup(text);
        return NULL;
    case OPTION_SWITCH: v->boolean = index; return NULL;
    case OPTION_ENUM: v->index = (unsigned)index; return NULL;
    case OPTION_UINT16:
    case OPTION_INT32:
    case OPTION_INT64:
        if (!parse_int64(text, &v->int64)) return "an integer";
        *number = (double)v->int64;
        return NULL;
    case OPTION_UINT64: return parse_uint64(text, &v->uint64, &end) && !*end ? NULL : "an integer from 0 to 2^64-1";
    case OPTION_BYTES:
        if (!parse_bytes(text, &v->uint64)) return "a number of bytes, such as 1048576, 512M or 4G";
        *number = (double)v->uint64;
        return NULL;
    case OPTION_SECONDS:
    case OPTION_SHARE:
        if (!parse_seconds(text, &v->seconds)) return p->type == OPTION_SHARE ? "a number" : "a number of seconds";
        *number = v->seconds;
        return NULL;
    case OPTION_BOOL:
    case OPTION_ACTION: break;
    }
    return parse_bool(text, &v->boolean) ? NULL : "true or false";
}

static void value_store(const struct option *p, struct options *o, const union value *v)
{
    void *field = (char *)o + p->offset;
    switch (p->type) {
    case OPTION_STRING:
        free(*(char **)field);
        *(char **)field = v->string;
        break;
    case OPTION_SWITCH:
    case OPTION_BOOL:
    case OPTION_ACTION: *(bool *)field = v->boolean; break;
    case OPTION_ENUM: *(unsigned *)field = v->index; break;
    case OPTION_UINT16: *(uint16_t *)field = (uint16_t)v->int64; break;
    case OPTION_INT32: *(int32_t *)field = (int32_t)v->int64; break;
    case OPTION_INT64: *(int64_t *)field = v->int64; break;
    case OPTION_UINT64: *(uint64_t *)field = v->uint64; break;
    case OPTION_BYTES: *(size_t *)field = v->uint64; break;
    case OPTION_SECONDS:
    case OPTION_SHARE: *(double *)field = v->seconds; break;
    }
}

// Checks text and, unless a higher source has spoken, makes it p's value. `where` is what error messages say: the flag,
// variable or key, with its source.
static int option_set(struct loader *l, const struct option *p, const char *text, enum source source, const char *where)
{
    union value v;
    double number = p->min;
    const char *choices = choices_of(p);
    int index = choices ? choice_index(choices, text) : 0;
    if (index < 0) return error_set(l->e, ERR_INVALID, "%s: must be one of %s", where, choices);
    const char *wanted = value_parse(p, text, index, &v, &number);
    if (wanted) return error_set(l->e, ERR_INVALID, "%s: must be %s", where, wanted);
    if (number < p->min || number > p->max)
        return error_set(l->e, ERR_INVALID, "%s: must be from %.15g to %.15g, is %s", where, p->min, p->max, text);
    if (p->type == OPTION_STRING && !v.string) return error_set(l->e, ERR_NOMEM, "out of memory");
    if (source < l->source[p - options_table]) {
        if (p->type == OPTION_STRING) free(v.string);
        return 0;
    }
    l->source[p - options_table] = source;
    value_store(p, l->o, &v);
    return 0;
}

// ---- sources --------------------------------------------------------------------------------------------------------

static int unknown(struct loader *l, const char *where, const char *name)
{
    const char *nearest = name_nearest(name);
    if (!nearest) return error_set(l->e, ERR_INVALID, "%s: no such option", where);
    return error_set(l->e, ERR_INVALID, "%s: no such option; nearest is \"%s\"", where, nearest);
}

// One flag with its value, which may be the next argument. Returns how many arguments it took, or an error.
static int flag_read(struct loader *l, const char *argument, const char *next)
{
    char name[NAME_SIZE], where[NAME_SIZE + 32];
    if (!strcmp(argument, "-h")) argument = "--help";
    size_t n = strcspn(argument, "=");
    if (strncmp(argument, "--", 2) || n == 2)
        return error_set(l->e, ERR_INVALID, "unexpected argument \"%s\" (command line)", argument);
    name_normalize(argument + 2, n - 2, name);
    snprintf(where, sizeof(where), "--%s (command line)", name);
    const char *value = argument[n] ? argument + n + 1 : NULL;
    const struct option *p = option_find(name);
    if (!p && !value && !strncmp(name, "no-", 3)) {
        p = option_find(name + 3);
        if (p && p->type != OPTION_BOOL) p = NULL;
        value = "false";
    }
    if (!p) return unknown(l, where, name);
    int taken = 1;
    if (!value && (p->type == OPTION_BOOL || p->type == OPTION_ACTION)) value = "true";
    if (!value) {
        if (!next || !strncmp(next, "--", 2)) return error_set(l->e, ERR_INVALID, "%s: needs a value", where);
        value = next;
        taken = 2;
    }
    int result = option_set(l, p, value, SOURCE_FLAG, where);
    return result ? result : taken;
}

static int flags_read(struct loader *l, int argc, char **argv)
{
    for (int i = 1; i < argc;) {
        int taken = flag_read(l, argv[i], i + 1 < argc ? argv[i + 1] : NULL);
        if (taken < 0) return taken;
        i += taken;
    }
    return 0;
}

static int variables_read(struct loader *l, char **environment)
{
    for (char **p = environment; *p; p++) {
        if (strncmp(*p, "GPTD_", 5)) continue;
        char name[NAME_SIZE], where[NAME_SIZE + 32];
        size_t n = strcspn(*p, "=");
        name_normalize(*p + 5, n - 5, name);
        snprintf(where, sizeof(where), "%.*s (environment)", (int)(n < NAME_SIZE ? n : NAME_SIZE), *p);
        const struct option *option = option_find(name);
        int result = option && option->type != OPTION_ACTION
                         ? option_set(l, option, (*p)[n] ? *p + n + 1 : "", SOURCE_VARIABLE, where)
                         : unknown(l, where, name);
        if (result && (strstr(*p, "_SERVICE_") || strstr(*p, "_TCP") || strstr(*p, "tcp://"))) {
            size_t used = strlen(l->e->message);
            snprintf(l->e->message + used, sizeof(l->e->message) - used,
                     " (Kubernetes sets it for a Service named gptd: set enableServiceLinks to false)");
        }
        if (result) return result;
    }
    return 0;
}

// One member of the file. Numbers are taken as they are written: a seed may have more digits than a double.
static int member_read(struct loader *l, const struct json_body *body, const cJSON *item, const char *path)
{
    char name[NAME_SIZE], where[NAME_SIZE + 288], number[JSON_MAX_NUMBER + 1];
    name_normalize(item->string, strlen(item->string), name);
    snprintf(where, sizeof(where), "\"%s\" (%.255s)", name, path);
    const struct option *p = option_find(name);
    if (!p || p->type == OPTION_ACTION || !strcmp(name, "config")) return unknown(l, where, name);
    if (l->source[p - options_table] == SOURCE_FILE) return error_set(l->e, ERR_INVALID, "%s: given twice", where);
    const char *text = item->valuestring;
    if (cJSON_IsBool(item)) text = cJSON_IsTrue(item) ? "true" : "false";
    if (cJSON_IsNumber(item)) {
        const struct json_member *m = json_scan_find(&body->scan, item->string);
        snprintf(number, sizeof(number), "%.*s", (int)m->value_length, m->value);
        text = number;
    }
    if (!text) return error_set(l->e, ERR_INVALID, "%s: must be a string, a number, true or false", where);
    return option_set(l, p, text, SOURCE_FILE, where);
}

static int config_read(struct loader *l, const char *path)
{
    char *text;
    size_t n;
    struct json_body body;
    struct json_error json_error;
    int result = text_file_read(path, "--config", &text, &n, l->e);
    if (result) return result;
    result = json_body_init(&body, text, n, NULL, &json_error);
    if (result) {
        error_set(l->e, ERR_FORMAT, "%s: %s", path, json_error.error.message);
        free(text);
        return result;
    }
    const cJSON *item;
    cJSON_ArrayForEach(item, body.root) if (!result) result = member_read(l, &body, item, path);
    json_body_deinit(&body);
    free(text);
    return result;
}

// ---- what needs more than one option --------------------------------------------------------------------------------

// Appends a copy of text[0..n) to *list, [*count] strings that this file allocates.
static int list_add(const char *const **list, size_t *count, const char *text, size_t n, struct error *e)
{
    const char **grown = realloc((void *)*list, (*count + 1) * sizeof(*grown));
    if (grown) *list = grown;
    char *copy = grown ? strndup(text, n) : NULL;
    if (!copy) return error_set(e, ERR_NOMEM, "out of memory");
    grown[(*count)++] = copy;
    return 0;
}

static void list_free(const char *const *list, size_t count)
{
    for (size_t i = 0; i < count; i++) free((char *)list[i]);
    free((void *)list);
}

// The names given, or the last part of the model's directory, wherever "." and links lead.
static int names_read(struct options *o, struct error *e)
{
    struct server_options *server = &o->server;
    if (!o->served_model_name) {
        char *real = realpath(o->model, NULL); // NULL: no such directory, which the engine will say
        const char *last = real ? strrchr(real, '/') + 1 : "";
        int result =
            list_add(&server->served_model_names, &server->n_served_model_names, *last ? last : "model", 255, e);
        free(real);
        return result;
    }
    for (const char *p = o->served_model_name;; p++) {
        size_t n = strcspn(p, ",");
        if (!n) return error_set(e, ERR_INVALID, "--served-model-name: a name must not be empty");
        if (list_add(&server->served_model_names, &server->n_served_model_names, p, n, e)) return e->code;
        p += n;
        if (!*p) return 0;
    }
}

static int options_finish(struct options *o, struct error *e)
{
    if (!o->model) return error_set(e, ERR_INVALID, "--model: is required, the directory of a checkpoint");
    o->engine.model_dir = o->model;
    o->server.max_logprobs = o->engine.max_logprobs;
    o->server.send_timeout = o->engine.slow_client_timeout;
    if (o->engine.max_num_batched_tokens && o->engine.max_num_batched_tokens < o->engine.max_num_seqs)
        return error_set(e, ERR_INVALID, "--max-num-batched-tokens: must be at least --max-num-seqs, %d, is %d",
                         o->engine.max_num_seqs, o->engine.max_num_batched_tokens);
    if (names_read(o, e)) return e->code;
    if (!o->api_key && !o->api_key_file) return 0;
    return api_keys_create(&o->server.api_keys, o->api_key, o->api_key_file, e);
}

int options_init(struct options *o, int argc, char **argv, char **environment, struct error *e)
{
    *o = (struct options){0};
    struct loader l = {.o = o, .e = e};
    int result = 0;
    for (const struct option *p = options_table; !result && p < options_table + N_OPTIONS; p++)
        if (p->initial) result = option_set(&l, p, p->initial, SOURCE_DEFAULT, p->name);
    if (result || (result = flags_read(&l, argc, argv))) goto fail;
    if (o->help || o->version) return 0;
    if ((result = variables_read(&l, environment))) goto fail;
    if (o->config && (result = config_read(&l, o->config))) goto fail;
    if (!o->probe && (result = options_finish(o, e))) goto fail;
    return 0;
fail:
    options_deinit(o);
    return result;
}

void options_deinit(struct options *o)
{
    for (const struct option *p = options_table; p < options_table + N_OPTIONS; p++)
        if (p->name && p->type == OPTION_STRING) free(*(char **)((char *)o + p->offset));
    api_keys_destroy(o->server.api_keys);
    list_free(o->server.served_model_names, o->server.n_served_model_names);
    *o = (struct options){0};
}

// ---- help -----------------------------------------------------------------------------------------------------------

static void option_help(const struct option *p, FILE *out)
{
    char flag[NAME_SIZE * 2];
    snprintf(flag, sizeof(flag), "--%s%s%s%s", p->type == OPTION_BOOL ? "[no-]" : "", p->name, p->argument ? " " : "",
             p->argument ? p->argument : "");
    const char *initial = p->type == OPTION_BOOL ? (!strcmp(p->initial, "true") ? "on" : "off") : p->initial;
    fprintf(out, "  %-38s %s", flag, p->help);
    fprintf(out, initial ? " [%s]\n" : "\n", initial);
}

void options_help(FILE *out)
{
    fputs("gptd " GPTD_VERSION ": serves a GPT checkpoint over HTTP as OpenAI's API\n"
          "Usage: gptd --model DIR [options]\n",
          out);
    for (const struct option *p = options_table; p < options_table + N_OPTIONS; p++) {
        if (p->name)
            option_help(p, out);
        else
            fprintf(out, "\n%s\n", p->help);
    }
    fputs("\nDefaults stand in brackets. --max-model-len 4096 may also be given as GPTD_MAX_MODEL_LEN=4096 or, in the\n"
          "file of --config, as {\"max-model-len\": 4096}. Flags win over variables over the file over defaults.\n"
          "\nSIGTERM and SIGINT drain: what runs is finished, then gptd ends; a second one ends it at once. SIGHUP reads\n"
          "--api-key-file again.\n"
          "Exit status: 0 done, 1 options, 2 model (or no room for it), 3 device (none that can be used, or it failed),\n"
          "4 address, 5 a weights file was cut short.\n",
          out);
}
