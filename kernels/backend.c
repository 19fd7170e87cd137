#include "kernels/kernels.h"

#include <string.h>

int kernels_open(const struct kernels **out, const char *backend, struct error *e)
{
    *out = NULL;
    if (strcmp(backend, "cpu") && strcmp(backend, "auto"))
        return error_set(e, ERR_UNSUPPORTED, "backend \"%.32s\" is not in this build: \"cpu\" is, which \"auto\" chooses",
                         backend);
    *out = kernels_cpu();
    return 0;
}
