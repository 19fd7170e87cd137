/* sampling.h: the few types of sampling that travel through every layer, from a request's fields to the op and back.
 *
 * A leaf: engine.h includes it, so that server/, which fills and reads them, sees nothing else of kernels.h.
 */
#ifndef GPTD_KERNELS_SAMPLING_H
#define GPTD_KERNELS_SAMPLING_H

#include <stdint.h>

enum { MAX_LOGPROBS = 20 }; // most alternatives reported of a token

struct logit_bias { int32_t id; float bias; };
struct token_logprob { int32_t id; float logprob; };

#endif
