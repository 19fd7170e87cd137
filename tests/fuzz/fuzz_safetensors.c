// Whatever the reader accepts lies inside the file, every byte of it in one tensor.
#include "models/safetensors.h"

#include <assert.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    struct safetensors st;
    struct error e = {0};
    int rc = safetensors_parse(&st, bytes, size, &e);
    if (rc) {
        assert(rc == (int)e.code && e.message[0] && !st.tensors && !st.names);
        return 0;
    }
    const uint8_t *at = st.n_tensors ? st.tensors[0].data : bytes + size;
    for (size_t i = 0; i < st.n_tensors; i++) {
        const struct safetensors_tensor *t = &st.tensors[i];
        assert(t->data == at && at >= bytes + 8 && t->size <= (size_t)(bytes + size - at) && strlen(t->type) > 0);
        size_t n = t->dtype >= 0 ? dtype_size((enum dtype)t->dtype) : 1;
        for (int32_t d = 0; d < t->n_dims && d < MAX_DIMS; d++) n *= t->shape[d];
        assert(t->dtype < 0 || t->n_dims > MAX_DIMS || n == t->size);
        at += t->size;
    }
    assert(at == bytes + size);
    safetensors_close(&st);
    return 0;
}
