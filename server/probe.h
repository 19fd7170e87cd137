/* probe.h: asks a running server whether it is well, for container images that have no other program to ask it with.
 *
 * Called by main. Needs nothing but the options that say where the server listens.
 */
#ifndef GPTD_SERVER_PROBE_H
#define GPTD_SERVER_PROBE_H

#include <stdint.h>

#include "kernels/error.h"

// GET /health at host and port. 0 when the answer is 200; ERR_IO, with what came instead, when it is not or takes 3 s.
int probe(const char *host, uint16_t port, struct error *e);

#endif
