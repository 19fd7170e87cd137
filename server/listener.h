/* listener.h: the listening socket, and the thread that accepts connections from it.
 *
 * Called by http.c alone. libmicrohttpd could listen itself, but cannot stop: MHD_quiesce_daemon and the event loops both
 * take the socket out of the loops' epoll sets, without a lock between them, and where the second finds it gone, the process
 * aborts (0.9.75 to 1.0.1). So it never sees this socket, and is given connections one by one.
 *
 * What a connection is allowed is the caller's: here everything is accepted. Where files or memory run out, connections
 * wait in the kernel until there is room, and this thread sleeps meanwhile.
 */
#ifndef GPTD_SERVER_LISTENER_H
#define GPTD_SERVER_LISTENER_H

#include "kernels/error.h"

#include <stdint.h>
#include <sys/socket.h>

struct listener;

// passed: a socket that listens already, which others may share; this struct owns it from now on, also on failure. 0: none.
// Otherwise binds host (numeric or a name) and port (0: any free one): from now on clients are connected, and wait in the kernel.
// accepted is called on the listener's thread with each connection. fd is non-blocking, close-on-exec, and its own from then on.
int listener_create(struct listener **out, int passed, const char *host, uint16_t port,
                    void (*accepted)(void *context, int fd, const struct sockaddr *address, socklen_t length),
                    void *context, struct error *e);
uint16_t listener_port(const struct listener *l);
int listener_start(struct listener *l, struct error *e);
// Accepts whoever is connected already, then closes the socket: further clients are refused. Of a socket that was passed nobody
// more is accepted: those who wait in it are for others. Returns when `accepted` has been
// called for the last time, after some 20 ms. Any thread may call it, and more than once.
void listener_stop(struct listener *l);
void listener_destroy(struct listener *l);

#endif
