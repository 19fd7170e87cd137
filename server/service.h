/* service.h: what a service manager such as systemd gives us and is told: a listening socket, readiness, a watchdog.
 *
 * Called by main.c alone. Protocols: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3). Without such a manager nothing
 * happens.
 */
#ifndef GPTD_SERVER_SERVICE_H
#define GPTD_SERVER_SERVICE_H

#include "kernels/error.h"

// *fd: the listening TCP socket that was passed (LISTEN_FDS), made non-blocking and close-on-exec; 0: none.
// ERR_INVALID: not one socket, or not one that listens for TCP.
int service_socket(int *fd, struct error *e);
// Lines such as "READY=1"; never blocks, and what cannot be said is not said.
void service_notify(const char *format, ...) __attribute__((format(printf, 1, 2)));
// Seconds within which "WATCHDOG=1" is to be said again and again; 0: it is not asked for.
double service_watchdog_interval(void);

#endif
