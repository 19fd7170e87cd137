#include "server/probe.h"

#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

static const char request[] = "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

// A connected socket whose calls take 3 s at most, or -1 with errno. 0.0.0.0 and :: reach this machine itself.
static int probe_connect(const char *host, uint16_t port)
{
    char service[8];
    struct addrinfo *list, hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    struct timeval limit = {.tv_sec = 3};
    snprintf(service, sizeof(service), "%u", port);
    if (getaddrinfo(host, service, &hints, &list)) return errno = EADDRNOTAVAIL, -1;
    int fd = socket(list->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)) ||
                    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) ||
                    connect(fd, list->ai_addr, list->ai_addrlen))) {
        int failure = errno;
        close(fd);
        errno = failure;
        fd = -1;
    }
    freeaddrinfo(list);
    return fd;
}

int probe(const char *host, uint16_t port, struct error *e)
{
    char line[] = "HTTP/1.1 200";
    int fd = probe_connect(host, port);
    if (fd < 0) return error_set(e, ERR_IO, "%s:%u: %s", host, port, strerror(errno));
    ssize_t n = send(fd, request, sizeof(request) - 1, MSG_NOSIGNAL);
    if (n > 0) n = recv(fd, line, sizeof(line) - 1, MSG_WAITALL);
    int failure = errno;
    close(fd);
    if (n < 0) return error_set(e, ERR_IO, "%s:%u: %s", host, port, strerror(failure));
    line[n] = '\0';
    return strcmp(line, "HTTP/1.1 200") ? error_set(e, ERR_IO, "%s:%u: /health: %s", host, port, line) : 0;
}
