/* failing_io.c: loaded before a gptd's libraries (LD_PRELOAD), makes one call of its, or of libmicrohttpd's, fail: the one and
 * with the error that the file FAILING_IO says, which tests write while the server runs.
 *
 * They are made directly, as system calls, so that a sanitizer's own versions lie neither before nor behind them. What the
 * kernel would not do is left out: with edge-triggered epoll an EAGAIN or a short read where there is more would stall any
 * program.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

// As test_failing_io.py numbers them.
enum call {
    ACCEPT, RECV, SEND, SENDMSG, EPOLL_CTL, EPOLL_WAIT, POLL, READ, WRITE, SHUTDOWN, SETSOCKOPT, // while it runs
    SOCKET, BIND, LISTEN, EVENTFD, EPOLL_CREATE, THREAD, OPEN,                                    // at its start
};

static struct control {
    atomic_int call;   // which
    atomic_int error;  // an errno; 0: a write is cut short
    atomic_int before; // calls that succeed first; -1: none fails
    atomic_int failed; // how many have
} none = {.before = -1}, *control = &none;

static int (*thread_create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("FAILING_IO");
    thread_create = (int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *))dlsym(RTLD_NEXT, "pthread_create");
    int fd = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0) : -1;
    if (fd < 0) return;
    void *map = mmap(NULL, sizeof none, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED) control = map;
}

static bool is_next(enum call call)
{
    if (atomic_load(&control->before) < 0 || atomic_load(&control->call) != (int)call) return false;
    if (atomic_fetch_sub(&control->before, 1) != 0) return false;
    atomic_fetch_add(&control->failed, 1);
    return true;
}

static bool fails(enum call call)
{
    if (!is_next(call)) return false;
    errno = atomic_load(&control->error);
    return true;
}

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    return fails(ACCEPT) ? -1 : (int)syscall(SYS_accept4, fd, address, length, flags);
}

ssize_t recv(int fd, void *buffer, size_t n, int flags)
{
    return fails(RECV) ? -1 : syscall(SYS_recvfrom, fd, buffer, n, flags, NULL, NULL);
}

ssize_t send(int fd, const void *buffer, size_t n, int flags)
{
    return fails(SEND) ? -1 : syscall(SYS_sendto, fd, buffer, n, flags, NULL, 0);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    return fails(SENDMSG) ? -1 : syscall(SYS_sendmsg, fd, message, flags);
}

int epoll_ctl(int epoll, int op, int fd, struct epoll_event *event)
{
    return op != EPOLL_CTL_DEL && fails(EPOLL_CTL) ? -1 : (int)syscall(SYS_epoll_ctl, epoll, op, fd, event);
}

int epoll_wait(int epoll, struct epoll_event *events, int n, int timeout)
{
    return fails(EPOLL_WAIT) ? -1 : (int)syscall(SYS_epoll_pwait, epoll, events, n, timeout, NULL, _NSIG / 8);
}

int poll(struct pollfd *fds, nfds_t n, int timeout)
{
    struct timespec t = {timeout / 1000, timeout % 1000 * 1000000L};
    return fails(POLL) ? -1 : (int)syscall(SYS_ppoll, fds, n, timeout < 0 ? NULL : &t, NULL, _NSIG / 8);
}

ssize_t read(int fd, void *buffer, size_t n) { return fails(READ) ? -1 : syscall(SYS_read, fd, buffer, n); }

// Not those of 8 bytes: the kernel never lets go wrong what wakes another thread through an eventfd.
ssize_t write(int fd, const void *buffer, size_t n)
{
    if (n == 8 || !is_next(WRITE)) return syscall(SYS_write, fd, buffer, n);
    errno = atomic_load(&control->error);
    return errno ? -1 : syscall(SYS_write, fd, buffer, n / 2);
}

int shutdown(int fd, int how) { return fails(SHUTDOWN) ? -1 : (int)syscall(SYS_shutdown, fd, how); }

int setsockopt(int fd, int level, int name, const void *value, socklen_t n)
{
    return fails(SETSOCKOPT) ? -1 : (int)syscall(SYS_setsockopt, fd, level, name, value, n);
}

int socket(int domain, int type, int protocol)
{
    return fails(SOCKET) ? -1 : (int)syscall(SYS_socket, domain, type, protocol);
}

int bind(int fd, const struct sockaddr *address, socklen_t n) { return fails(BIND) ? -1 : (int)syscall(SYS_bind, fd, address, n); }

int listen(int fd, int backlog) { return fails(LISTEN) ? -1 : (int)syscall(SYS_listen, fd, backlog); }

int eventfd(unsigned count, int flags) { return fails(EVENTFD) ? -1 : (int)syscall(SYS_eventfd2, count, flags); }

int epoll_create1(int flags) { return fails(EPOLL_CREATE) ? -1 : (int)syscall(SYS_epoll_create1, flags); }

int open(const char *path, int flags, ...)
{
    return fails(OPEN) ? -1 : (int)syscall(SYS_openat, AT_FDCWD, path, flags, 0); // the server creates no files
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *arg)
{
    return fails(THREAD) ? errno : thread_create(thread, attributes, run, arg);
}
