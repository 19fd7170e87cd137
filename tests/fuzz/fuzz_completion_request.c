// Any body is a request within its limits or an error with a status, a message and, where it applies, a field.
#include "tests/fuzz/request_fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (limits.plan == NULL) setup();
    check_body(completion_request_parse, data, size);
    return 0;
}
