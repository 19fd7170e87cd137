#include "kernels/kernels.h"

size_t dtype_size(enum dtype dtype)
{
    return dtype == DTYPE_F16 || dtype == DTYPE_BF16 ? 2 : 4;
}

const char *dtype_name(enum dtype dtype)
{
    static const char *const names[] = {
        [DTYPE_F32] = "F32", [DTYPE_F16] = "F16", [DTYPE_BF16] = "BF16", [DTYPE_I32] = "I32"};
    return names[dtype];
}
