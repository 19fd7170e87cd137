/* main.c: from options to exit status. Everything else is someone else's; the signals are handled here.
 *
 * SIGTERM, SIGINT and SIGHUP are blocked in every thread and waited for by one, so that they interrupt no system call and work
 * for PID 1 as well: while loading the first two end the process, once serving the first one drains and the second one ends it;
 * SIGHUP reads the API keys again.
 */
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "engine/engine.h"
#include "server/crash.h"
#include "server/log.h"
#include "server/options.h"
#include "server/plan.h"
#include "server/probe.h"
#include "server/server.h"
#include "server/service.h"
#include "tokenizer/chat_template.h"
#include "tokenizer/tokenizer.h"

// What scripts and orchestrators see; --help documents it.
enum exit_status { EXIT_DONE, EXIT_OPTIONS, EXIT_MODEL, EXIT_DEVICE, EXIT_NETWORK, EXIT_FILE_CUT };

extern char **environ;

static sem_t stop_requested; // posted by the first signal
static atomic_bool serving;
static pthread_mutex_t keys_lock = PTHREAD_MUTEX_INITIALIZER;
static struct api_keys *keys; // what SIGHUP reads again; NULL: none, or the end
static bool log_is_json;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- signals --------------------------------------------------------------------------------------------------------

static void awaited_signals(sigset_t *set)
{
    sigemptyset(set);
    sigaddset(set, SIGHUP);
    sigaddset(set, SIGTERM);
    sigaddset(set, SIGINT);
}

static void reload_keys(void)
{
    struct error e;
    pthread_mutex_lock(&keys_lock);
    bool ready = atomic_load(&serving); // else there is more to wait for than this
    if (ready) service_notify("RELOADING=1\nMONOTONIC_USEC=%lld", (long long)(now() * 1e6));
    if (!keys) log_message(LOG_LEVEL_INFO, "SIGHUP: there are no API keys to read again");
    else if (api_keys_reload(keys, &e)) log_message(LOG_LEVEL_ERROR, "the API keys stay as they were: %s", e.message);
    else log_message(LOG_LEVEL_INFO, "API keys read again: %zu", api_keys_count(keys));
    if (ready) service_notify("READY=1");
    pthread_mutex_unlock(&keys_lock);
}

static void set_keys(struct api_keys *k)
{
    pthread_mutex_lock(&keys_lock);
    keys = k;
    pthread_mutex_unlock(&keys_lock);
}

static void *signals_run(void *unused)
{
    (void)unused;
    sigset_t set;
    int signal;
    awaited_signals(&set);
    for (bool stopping = false;;) {
        sigwait(&set, &signal);
        if (signal == SIGHUP) {
            reload_keys();
            continue;
        }
        if (stopping || !atomic_load(&serving)) _exit(128 + signal);
        sem_post(&stop_requested);
        stopping = true;
    }
}

static int signals_init(void)
{
    sigset_t set;
    pthread_t thread;
    awaited_signals(&set);
    sem_init(&stop_requested, 0, 0);
    signal(SIGPIPE, SIG_IGN);
    crash_init(log_is_json, EXIT_FILE_CUT);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    return pthread_create(&thread, NULL, signals_run, NULL) || pthread_detach(thread);
}

// ---- one run --------------------------------------------------------------------------------------------------------

// Room for the connections and the few files beside them; fewer connections where the system does not allow it.
static void raise_file_limit(struct server_options *o)
{
    enum { OTHER_FILES = 192 };
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) return;
    rlim_t wanted = (rlim_t)o->max_connections + OTHER_FILES;
    if (limit.rlim_cur >= wanted) return;
    limit.rlim_cur = limit.rlim_max < wanted ? limit.rlim_max : wanted;
    if (setrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur >= wanted) return;
    int32_t room = limit.rlim_cur > 2 * OTHER_FILES ? (int32_t)limit.rlim_cur - OTHER_FILES : OTHER_FILES;
    log_message(LOG_LEVEL_WARNING, "--max-connections: %d instead of %d: this process may open %llu files", room,
                o->max_connections, (unsigned long long)limit.rlim_cur);
    o->max_connections = room;
}

static void log_plan(const struct engine_plan *p, const struct options *o)
{
    char weights[32], kv[32], total[32];
    int64_t n_blocks = 0;
    for (int32_t g = 0; g < p->n_kv_groups; g++) n_blocks += p->kv_groups[g].n_blocks;
    log_message(LOG_LEVEL_INFO, "gptd " GPTD_VERSION ": %s: %s, %.1f M parameters, %s, context %d, on %s",
                o->engine.model_dir, p->architecture, (double)p->n_parameters / 1e6, p->dtype, p->max_model_len,
                p->device);
    log_message(LOG_LEVEL_INFO, "memory: weights %s, KV cache %s (%" PRId64 " blocks of %d tokens), %s in all",
                plan_bytes(p->weights_bytes, weights), plan_bytes(p->kv_cache_bytes, kv), n_blocks, p->block_size,
                plan_bytes(plan_total(p), total));
}

static void log_ready(const struct options *o, struct engine *engine, const struct server *server, double started)
{
    struct engine_stats stats;
    engine_stats_get(engine, &stats);
    const char *host = o->server.listen_fd ? "*" : o->server.host; // *: whatever address the passed socket has
    bool ipv6 = strchr(host, ':');
    log_message(LOG_LEVEL_INFO, "ready after %.0f ms (device %.0f, weights %.0f, warm-up %.0f): model \"%s\" at http://%s%s%s:%u",
                1e3 * (now() - started), 1e3 * stats.device_seconds, 1e3 * stats.weights_seconds, 1e3 * stats.warm_up_seconds,
                o->server.served_model_names[0], ipv6 ? "[" : "", host, ipv6 ? "]" : "", server_port(server));
}

// While draining, so many --stall-timeouts without progress are the end: nothing will come of what is waited for.
static const double STALLS_TO_END = 10;

// True when the device failed, or, `draining`, when it hangs.
static bool device_lost(const struct options *o, const struct engine *engine, bool draining)
{
    struct engine_stats stats;
    engine_stats_get(engine, &stats);
    if (stats.failure) {
        log_message(LOG_LEVEL_ERROR, "the device failed: %s", stats.failure);
        return true;
    }
    if (!draining || now() - stats.last_beat <= STALLS_TO_END * o->server.stall_timeout) return false;
    log_message(LOG_LEVEL_ERROR, "the engine has made no progress for %.0f s", now() - stats.last_beat);
    return true;
}

// Says that all is well three times per interval of the service manager's watchdog, if there is one, while it is so.
struct heart {
    double interval, next; // seconds
};

static void beat(struct heart *h, const struct server *server)
{
    if (h->interval <= 0 || now() < h->next) return;
    if (!server_trouble(server)) service_notify("WATCHDOG=1");
    h->next = now() + h->interval / 3;
}

static struct timespec in_seconds(double seconds)
{
    double then = now() + seconds;
    return (struct timespec){(time_t)then, (long)(1e9 * (then - floor(then)))};
}

// Waits for a signal, then for the drain it starts, and for either only while the device works.
static enum exit_status run_until_stopped(const struct options *o, struct engine *engine, struct server *server)
{
    struct heart heart = {.interval = service_watchdog_interval()};
    struct timespec wake;
    service_notify("READY=1\nSTATUS=serving %s", o->server.served_model_names[0]);
    do {
        if (device_lost(o, engine, false)) return EXIT_DEVICE;
        beat(&heart, server);
        wake = in_seconds(heart.interval > 0 ? fmin(1, heart.interval / 3) : 1);
    } while (sem_clockwait(&stop_requested, CLOCK_MONOTONIC, &wake));

    service_notify("STOPPING=1\nSTATUS=draining");
    log_message(LOG_LEVEL_INFO, "draining: what runs is finished; a second signal ends at once");
    double deadline = o->drain_timeout > 0 ? now() + o->server.drain_delay + o->drain_timeout : 0;
    server_drain(server);
    while (true) {
        bool drained = server_drained(server); // asked first: what fails with the device is drained, too
        if (device_lost(o, engine, true)) return EXIT_DEVICE;
        if (drained) return EXIT_DONE;
        beat(&heart, server);
        if (deadline > 0 && now() >= deadline) {
            log_message(LOG_LEVEL_WARNING, "--drain-timeout is over: cancelling what still runs");
            return EXIT_DONE;
        }
        usleep(10000);
    }
}

// The tokenizer and the chat template, which are loaded while the engine looks for its device: a large tokenizer.json takes a third
// of a second.
struct text_load {
    const char *dir;
    pthread_t thread;
    bool begun;
    struct tokenizer *tokenizer;
    struct chat_template *chat_template;
    int rc;
    struct error error, template_error; // the second: code is ERR_FORMAT if there is one
};

static enum exit_status serve(const struct options *o, struct engine *engine, const struct text_load *text, double started)
{
    struct error e;
    struct server *server = NULL;
    enum exit_status status = EXIT_NETWORK;
    if (server_create(&server, &o->server, engine, text->tokenizer, text->chat_template, &e)) goto fail;
    if (server_start(server, &e)) goto fail;
    status = EXIT_MODEL;
    if (engine_start(engine, &e)) goto fail;
    atomic_store(&serving, true);
    if (server_open(server, &e)) goto fail;
    log_ready(o, engine, server, started);
    status = run_until_stopped(o, engine, server);
    server_stop(server);
    // A lost device's driver may hold for ever whoever gives something back to it.
    if (status == EXIT_DEVICE) _exit(EXIT_DEVICE);
    server_destroy(server);
    log_message(LOG_LEVEL_INFO, "ended");
    return status;
fail:
    log_message(LOG_LEVEL_ERROR, "%s", e.message);
    if (server) server_stop(server);
    server_destroy(server);
    return e.code == ERR_DEVICE ? EXIT_DEVICE : status;
}

static void *load_text(void *arg)
{
    struct text_load *l = arg;
    struct error *e = &l->error, *broken = &l->template_error;
    l->rc = tokenizer_create(&l->tokenizer, l->dir, e->message, sizeof e->message);
    if (l->rc == 0 && chat_template_create(&l->chat_template, l->dir, broken->message, sizeof broken->message) < 0)
        broken->code = ERR_FORMAT;
    return NULL;
}

// Returns 0, TOKENIZER_ABSENT, or -1 with e.
static int end_load(struct text_load *l, struct error *e)
{
    if (l->begun) pthread_join(l->thread, NULL);
    else load_text(l);
    l->begun = false;
    if (l->rc < 0) *e = l->error;
    if (l->rc > 0)
        log_message(LOG_LEVEL_WARNING, "no tokenizer.model or tokenizer.json: prompts and answers are token ids");
    if (l->template_error.code)
        log_message(LOG_LEVEL_WARNING, "no chat, since its template is broken: %s", l->template_error.message);
    return l->rc;
}

static void text_load_deinit(struct text_load *l)
{
    if (l->begun) pthread_join(l->thread, NULL);
    tokenizer_destroy(l->tokenizer);
    chat_template_destroy(l->chat_template);
}

// Plans, and serves what was planned.
static enum exit_status run(struct options *o, double started)
{
    struct error e;
    struct engine *engine = NULL;
    struct text_load load = {.dir = o->engine.model_dir};
    enum exit_status status = EXIT_MODEL;
    load.begun = !o->dry_run && pthread_create(&load.thread, NULL, load_text, &load) == 0;
    if (engine_create(&engine, &o->engine, &e)) {
        const char *dir = o->engine.model_dir;
        if (e.code == ERR_DEVICE)
            status = EXIT_DEVICE; // whatever the model
        else if (strncmp(e.message, dir, strlen(dir)) != 0) error_prefix(&e, "%s", dir); // a file's error has its path
        goto fail;
    }
    const struct engine_plan *plan = engine_plan_get(engine);
    if (plan->note[0]) log_message(LOG_LEVEL_WARNING, "%s", plan->note);
    if (o->dry_run) {
        plan_print(plan, log_is_json, stdout);
        engine_destroy(engine);
        return EXIT_DONE;
    }
    log_plan(plan, o);
    if (end_load(&load, &e) < 0) goto fail;
    raise_file_limit(&o->server);
    status = serve(o, engine, &load, started);
    text_load_deinit(&load);
    engine_destroy(engine);
    return status;
fail:
    text_load_deinit(&load);
    log_message(LOG_LEVEL_ERROR, "%s", e.message);
    engine_destroy(engine);
    return status;
}

int main(int argc, char **argv)
{
    double started = now();
    struct options options;
    struct error e;
    if (options_init(&options, argc, argv, environ, &e)) {
        fprintf(stderr, "gptd: %s\nTry --help.\n", e.message);
        return EXIT_OPTIONS;
    }
    if (options.help || options.version) {
        if (options.help)
            options_help(stdout);
        else
            puts("gptd " GPTD_VERSION);
        options_deinit(&options);
        return EXIT_DONE;
    }
    if (options.probe) {
        int failed = probe(options.server.host, options.server.port, &e);
        if (failed) fprintf(stderr, "gptd: %s\n", e.message);
        options_deinit(&options);
        return failed ? EXIT_OPTIONS : EXIT_DONE; // 1: what Docker calls unhealthy
    }
    log_is_json = options.log_format == LOG_FORMAT_JSON;
    log_init(STDERR_FILENO, options.log_format, options.log_level);
    set_keys(options.server.api_keys);
    if (signals_init()) {
        fputs("gptd: cannot start a thread\n", stderr);
        set_keys(NULL);
        options_deinit(&options);
        return EXIT_OPTIONS;
    }
    if (service_socket(&options.server.listen_fd, &e)) {
        log_message(LOG_LEVEL_ERROR, "%s", e.message);
        options_deinit(&options);
        return EXIT_NETWORK;
    }
    enum exit_status status = run(&options, started);
    set_keys(NULL);
    options_deinit(&options);
    return (int)status;
}
