#include "server/crash.h"

#include "engine/engine.h"

#include <execinfo.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_FRAMES = 64 };

static bool log_is_json;
static int status_of_cut_file;
static char alternate_stack[64 << 10]; // main's, whose own may be what is full

// ---- what signal handlers may call ----

static void say(const char *text)
{
    if (write(STDERR_FILENO, text, strlen(text)) < 0) return; // nothing else can be done about it here
}

static void say_number(uint64_t n, unsigned base)
{
    char text[24];
    size_t i = sizeof text - 1;
    text[i] = '\0';
    do text[--i] = "0123456789abcdef"[n % base];
    while ((n /= base) > 0);
    say(text + i);
}

static void begin_line(void) { say(log_is_json ? "{\"level\":\"error\",\"message\":\"" : "gptd: "); }
static void end_line(void) { say(log_is_json ? "\"}\n" : "\n"); }

static const char *name_of(int signal)
{
    switch (signal) {
    case SIGSEGV: return "SIGSEGV";
    case SIGBUS: return "SIGBUS";
    case SIGILL: return "SIGILL";
    case SIGFPE: return "SIGFPE";
    default: return "SIGABRT";
    }
}

// A weights file that became shorter than its map: its pages are gone, and with them the model.
static void end_if_cut(const void *address)
{
    const char *path = engine_file_at(address);
    if (!path) return;
    begin_line();
    say(path);
    say(" was cut short while it was in use");
    end_line();
    _exit(status_of_cut_file);
}

static void on_crash(int signal, siginfo_t *info, void *context)
{
    void *frames[MAX_FRAMES];
    int32_t layer;
    (void)context;
    if (signal == SIGBUS) end_if_cut(info->si_addr);
    const char *op = engine_progress(&layer);
    begin_line();
    say("crashed: gptd " GPTD_VERSION ", ");
    say(name_of(signal));
    if (signal != SIGABRT) {
        say(" at address 0x");
        say_number((uint64_t)(uintptr_t)info->si_addr, 16);
    }
    say(op ? ", the engine at " : ", the engine idle");
    if (op) say(op);
    if (op && layer >= 0) {
        say(" of layer ");
        say_number((uint64_t)layer, 10);
    }
    end_line();
    backtrace_symbols_fd(frames, backtrace(frames, MAX_FRAMES), STDERR_FILENO);
    // SA_RESETHAND: the same fault, or this, ends the process as it would have, with its core.
    if (signal == SIGABRT || info->si_code <= 0) raise(signal);
}

// ---- setting up ----

// Sanitizers have handlers of their own, which say more.
static bool is_sanitized(void)
{
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
    return true;
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return true;
#endif
    return false;
}

void crash_init(bool json, int file_cut)
{
    static const int signals[] = {SIGBUS, SIGSEGV, SIGILL, SIGFPE, SIGABRT};
    struct sigaction action = {.sa_sigaction = on_crash, .sa_flags = SA_SIGINFO | SA_RESETHAND | SA_ONSTACK};
    stack_t stack = {.ss_sp = alternate_stack, .ss_size = sizeof alternate_stack};
    void *frame;
    log_is_json = json;
    status_of_cut_file = file_cut;
    backtrace(&frame, 1); // loads what it needs, which a handler could not
    sigaltstack(&stack, NULL);
    for (size_t i = 0; i < (is_sanitized() ? 1 : sizeof signals / sizeof *signals); i++) sigaction(signals[i], &action, NULL);
}
