#include "kernels/cpu/convert.h"

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

void dtype_convert(void *to, enum dtype to_dtype, const void *from, enum dtype from_dtype, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float x = element_get(from, from_dtype, i);
        if (to_dtype == DTYPE_F32) ((float *)to)[i] = x;
        else ((uint16_t *)to)[i] = to_dtype == DTYPE_BF16 ? f32_to_bf16(x) : f32_to_f16(x);
    }
}
