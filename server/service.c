#include "server/service.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { FIRST_FD = 3 }; // of those passed

// The number in a variable; -1: it is not there, or not one.
static long long variable(const char *name)
{
    const char *text = getenv(name);
    char *end;
    if (!text || *text < '0' || *text > '9') return -1;
    errno = 0;
    long long n = strtoll(text, &end, 10);
    return errno || *end ? -1 : n;
}

int service_socket(int *fd, struct error *e)
{
    long long n = variable("LISTEN_FDS");
    int listens = 0, domain = 0;
    socklen_t size = sizeof listens;
    *fd = 0;
    if (n < 1 || variable("LISTEN_PID") != getpid()) return 0;
    if (n > 1) return error_set(e, ERR_INVALID, "%lld sockets were passed (LISTEN_FDS); it takes one", n);
    if (getsockopt(FIRST_FD, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) ||
        getsockopt(FIRST_FD, SOL_SOCKET, SO_DOMAIN, &domain, &size) || !listens || (domain != AF_INET && domain != AF_INET6))
        return error_set(e, ERR_INVALID, "what was passed (LISTEN_FDS) is no socket that listens for TCP");
    fcntl(FIRST_FD, F_SETFD, FD_CLOEXEC);
    fcntl(FIRST_FD, F_SETFL, fcntl(FIRST_FD, F_GETFL) | O_NONBLOCK);
    *fd = FIRST_FD;
    return 0;
}

void service_notify(const char *format, ...)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = getenv("NOTIFY_SOCKET");
    char text[512];
    if (!path || (*path != '/' && *path != '@') || strlen(path) >= sizeof address.sun_path) return;
    memcpy(address.sun_path, path, strlen(path));
    if (*path == '@') address.sun_path[0] = '\0'; // of the abstract namespace
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return;
    socklen_t length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path));
    if (n > 0 && n < (int)sizeof text)
        (void)!sendto(fd, text, (size_t)n, MSG_NOSIGNAL | MSG_DONTWAIT, (struct sockaddr *)&address, length);
    close(fd);
}

double service_watchdog_interval(void)
{
    long long microseconds = variable("WATCHDOG_USEC"), pid = variable("WATCHDOG_PID");
    return microseconds > 0 && (pid < 0 || pid == getpid()) ? 1e-6 * (double)microseconds : 0;
}
