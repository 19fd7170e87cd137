#include "models/model.h"
#include "models/safetensors.h"

const char *model_file_at(const void *address) { return safetensors_file_at(address); }
