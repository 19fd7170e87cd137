/* fake_model.h: a model and a backend without weights, for the engine's tests.
 *
 * Its KV cache stores what the forward pass wrote (token and position of each slot), and its logits are a hash of the
 * sequence's whole visible context read back through the block tables, of every group. So any mistake in paging, copy on
 * write, prefix reuse, window freeing, preemption or history changes what is generated.
 *
 * model_options.dir: "fake:key=value,..." with
 *   vocab (64), len (4096) longest context, groups (1), window (0; of the last group), eos (0; -1: none),
 *   nan (-1: token id after which logits are NaN), us (0: time of a step),
 *   wait_us (0: time of each wait)
 * Backends: "fake", and "fake-async", which delivers results no earlier than wait() and poisons them until then.
 */
#ifndef GPTD_TESTS_FAKE_MODEL_H
#define GPTD_TESTS_FAKE_MODEL_H

#include "models/model.h"

extern _Atomic int fake_fail_forward, fake_fail_sample; // > 0: the call that many on fails

#endif
