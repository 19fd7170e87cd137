/* model_impl.h: what a model holds. For model.c, which makes it, and forward.c, which runs it. */
#ifndef GPTD_MODELS_MODEL_IMPL_H
#define GPTD_MODELS_MODEL_IMPL_H

#include "models/checkpoint.h"
#include "models/config.h"
#include "models/weights.h"
#include "models/workspace.h"

struct model {
    struct model_options options;   // dir is not kept
    struct model_config config;
    struct model_info info;
    struct checkpoint checkpoint;   // empty with dummy weights
    struct weights weights;
    struct workspace workspace;
    const struct kernels *kernels;  // from model_load on
    struct device *device;
};

#endif
