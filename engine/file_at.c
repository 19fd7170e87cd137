#include "engine/engine.h"
#include "models/model.h"

const char *engine_file_at(const void *address) { return model_file_at(address); }
