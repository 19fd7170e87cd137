/* layer_kinds.h: which layers of a model see how far, and how their positions turn: windows and rotary frequencies, layer by
 * layer, from config.json.
 *
 * Called by config.c alone, after it has read the model's sizes. What is wrong is recorded in the reader.
 */
#ifndef GPTD_MODELS_LAYER_KINDS_H
#define GPTD_MODELS_LAYER_KINDS_H

#include "models/config.h"
#include "models/json.h"

enum { CONFIG_MAX_POSITIONS = 1 << 24 }; // float counts exactly up to here

// Fills c->kinds, n_kinds, kind_of_layer and, for rotary positions, max_model_len.
void layer_kinds_parse(struct model_config *c, struct json_reader *r);

// Of two names the first that is there; else the first.
const char *config_key(const struct json_reader *r, const char *const keys[2]);

#endif
