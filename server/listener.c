#include "server/listener.h"

#include "server/log.h"
#include "server/watchdog.h"

#include <errno.h>
#include <linux/filter.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    UNSENT = 64 << 10, // bytes that the kernel takes beyond what is under way, for a client that never reads: not megabytes
    BATCH = 16,        // connections between two looks at whether to end
    RETRY_MS = 100,    // until the next try where there was no room for a connection
    HANDSHAKE_MS = 20, // at the end, for a handshake that has begun
};

static const double LAST_HANDSHAKES = 0.2; // seconds for all of them
static const double WARNING_INTERVAL = 10; // seconds

struct listener {
    int fd;     // -1: closed
    int end_fd; // readable when the thread shall end
    uint16_t port;
    void (*accepted)(void *context, int fd, const struct sockaddr *address, socklen_t length);
    void *context;
    pthread_mutex_t lock; // of whoever stops
    pthread_t thread;
    bool started, passed;
    // the thread's own
    bool warned; // that there is no room, since there was
    double next_warning;
};

// ---- the socket ----

static int listen_on(int *out, const struct addrinfo *a)
{
    int fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    int one = 1, zero = 0;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (a->ai_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero); // "::" takes IPv4 too
    if (bind(fd, a->ai_addr, a->ai_addrlen) || listen(fd, SOMAXCONN)) {
        int failed = errno;
        close(fd);
        errno = failed;
        return -1;
    }
    *out = fd;
    return 0;
}

static uint16_t bound_port(int fd)
{
    struct sockaddr_storage bound = {0};
    socklen_t length = sizeof bound;
    getsockname(fd, (struct sockaddr *)&bound, &length);
    return ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                             : ((struct sockaddr_in *)&bound)->sin_port);
}

static int bind_port(struct listener *l, const char *host, uint16_t number, struct error *e)
{
    char port[8];
    snprintf(port, sizeof port, "%u", number);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV}, *list;
    int failed = getaddrinfo(host, port, &hints, &list);
    if (failed) return error_set(e, ERR_INVALID, "host %s: %s", host, gai_strerror(failed));
    failed = -1;
    for (struct addrinfo *a = list; a && failed; a = a->ai_next) failed = listen_on(&l->fd, a);
    int why = errno;
    freeaddrinfo(list);
    if (failed) return error_set(e, ERR_IO, "cannot listen on %s port %s: %s", host, port, strerror(why));
    l->port = bound_port(l->fd);
    return 0;
}

// ---- accepting ----

static void warn(struct listener *l, int why)
{
    double now = watchdog_now();
    if (l->warned || now < l->next_warning) return;
    log_message(LOG_LEVEL_WARNING, "cannot accept connections, which wait: %s", strerror(why));
    l->warned = true;
    l->next_warning = now + WARNING_INTERVAL;
}

// Accepts who waits, up to BATCH. False: there is no room, and no use in trying again at once.
static bool accept_waiting(struct listener *l)
{
    for (int32_t i = 0; i < BATCH; i++) {
        struct sockaddr_storage address;
        socklen_t length = sizeof address;
        int fd = accept4(l->fd, (struct sockaddr *)&address, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED || errno == EPROTO)) continue; // a client that has gone
        if (fd < 0 && errno != EAGAIN) {
            warn(l, errno);
            return false;
        }
        l->warned = false;
        if (fd < 0) return true;
        setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &(int){UNSENT}, sizeof(int));
        l->accepted(l->context, fd, (struct sockaddr *)&address, length);
    }
    return true;
}

// The kernel answers a handshake and queues the connection by itself, up to the moment of close, which resets what is in the
// queue. So handshakes are ended first: packets that would begin one are dropped. Their senders try again within a second,
// and are refused.
static void drop_handshakes(int fd)
{
    static struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 13), // of the TCP header: flags
        BPF_STMT(BPF_ALU | BPF_AND | BPF_K, TH_SYN | TH_ACK),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, TH_SYN, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, 0),
        BPF_STMT(BPF_RET | BPF_K, UINT32_MAX),
    };
    struct sock_fprog program = {.len = sizeof code / sizeof *code, .filter = code};
    setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program); // where it fails, the moment is short
}

// Returns when everyone has been accepted who could think that he is connected.
static void accept_last(struct listener *l)
{
    struct pollfd fd = {.fd = l->fd, .events = POLLIN};
    double end = watchdog_now() + LAST_HANDSHAKES;
    drop_handshakes(l->fd);
    while (accept_waiting(l) && watchdog_now() < end && poll(&fd, 1, HANDSHAKE_MS) > 0) continue;
}

static void *listener_run(void *arg)
{
    struct listener *l = arg;
    struct pollfd fds[2] = {{.fd = l->end_fd, .events = POLLIN}, {.fd = l->fd, .events = POLLIN}};
    while (!fds[0].revents) {
        bool room = accept_waiting(l);
        poll(fds, room ? 2 : 1, room ? -1 : RETRY_MS);
    }
    if (!l->passed) accept_last(l);
    return NULL;
}

// ---- life ----

int listener_create(struct listener **out, int passed, const char *host, uint16_t port,
                    void (*accepted)(void *context, int fd, const struct sockaddr *address, socklen_t length),
                    void *context, struct error *e)
{
    struct listener *l = calloc(1, sizeof *l);
    if (!l) {
        if (passed) close(passed);
        return error_set(e, ERR_NOMEM, "out of memory");
    }
    pthread_mutex_init(&l->lock, NULL);
    l->passed = passed > 0;
    l->fd = l->passed ? passed : -1;
    if (l->passed) l->port = bound_port(passed);
    l->accepted = accepted;
    l->context = context;
    l->end_fd = eventfd(0, EFD_CLOEXEC);
    int failed = l->end_fd < 0 ? error_set(e, ERR_IO, "eventfd: %s", strerror(errno)) : 0;
    if (!failed && !l->passed) failed = bind_port(l, host, port, e);
    if (failed) {
        listener_destroy(l);
        return failed;
    }
    *out = l;
    return 0;
}

uint16_t listener_port(const struct listener *l) { return l->port; }

int listener_start(struct listener *l, struct error *e)
{
    int failed = pthread_create(&l->thread, NULL, listener_run, l);
    if (failed) return error_set(e, ERR_NOMEM, "cannot start the listener's thread: %s", strerror(failed));
    l->started = true;
    return 0;
}

void listener_stop(struct listener *l)
{
    if (!l) return;
    pthread_mutex_lock(&l->lock);
    if (l->started) {
        uint64_t one = 1;
        while (write(l->end_fd, &one, sizeof one) < 0 && errno == EINTR) continue;
        pthread_join(l->thread, NULL);
        l->started = false;
    }
    if (l->fd >= 0) close(l->fd);
    l->fd = -1;
    pthread_mutex_unlock(&l->lock);
}

void listener_destroy(struct listener *l)
{
    if (!l) return;
    listener_stop(l);
    if (l->end_fd >= 0) close(l->end_fd);
    pthread_mutex_destroy(&l->lock);
    free(l);
}
