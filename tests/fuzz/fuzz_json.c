// Whatever the scan accepts, cJSON reads, and reads again when written out; the raw members agree with cJSON's.
#include "server/json_get.h"

#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static void check_round_trip(const cJSON *root)
{
    char *text = cJSON_PrintUnformatted(root);
    assert(text);
    struct json_body again;
    struct json_error e;
    int err = json_body_init(&again, text, strlen(text), NULL, &e);
    assert(!err && cJSON_Compare(root, again.root, true));
    json_body_deinit(&again);
    free(text);
}

static void check_members(const struct json_body *body)
{
    assert(cJSON_GetArraySize(body->root) == (int)body->scan.n_members);
    const cJSON *value;
    cJSON_ArrayForEach(value, body->root)
    {
        assert(cJSON_GetObjectItemCaseSensitive(body->root, value->string) == value);
        if (strchr(value->string, '\\')) continue; // json_scan_find takes plain names
        const struct json_member *m = json_scan_find(&body->scan, value->string);
        assert(m);
        int64_t integer;
        if (json_member_int64(m, &integer)) assert((double)integer == value->valuedouble);
    }
}

static void call_getters(const struct json_body *body)
{
    struct json_error e = {0};
    const cJSON *value;
    cJSON_ArrayForEach(value, body->root)
    {
        const char *name = value->string, *string = NULL, *strings[4];
        bool flag = false, present = false;
        int32_t i = 1, *list = NULL, n_list = 0;
        int64_t big = 0;
        float f = 1;
        size_t n = 0;
        const cJSON *object = NULL;
        json_require(body->root, name, &e);
        json_get_bool(body->root, name, &flag, &e);
        json_get_int32(body->root, name, 0, 100, &i, &e);
        assert(i >= 0 && i <= 100);
        json_get_float(body->root, name, -2, 2, &f, &e);
        assert(f >= -2 && f <= 2);
        json_get_string(body->root, name, 1, 8, &string, &e);
        json_get_strings(body->root, name, 1, 4, 1, 8, strings, &n, &e);
        json_get_object(body->root, name, &object, &e);
        if (!strchr(name, '\\')) json_body_int64(body, name, &present, &big, &e);
        if (json_get_int32s(body->root, name, -5, 5, 16, &list, &n_list, &e) == 0)
            for (int32_t k = 0; k < n_list; k++) assert(list[k] >= -5 && list[k] <= 5);
        free(list);
        if (i == 7) break; // enough of large objects: the getters are linear
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1); // exactly size bytes: reads beyond the end are seen
    memcpy(text, data, size);
    text = realloc(text, size ? size : 1);
    struct json_body body;
    struct json_error e;
    if (json_body_init(&body, text, size, "prompt", &e)) {
        assert(e.error.code < 0 && e.error.message[0]);
    } else {
        if (body.has_ids)
            for (size_t i = 0; i < body.ids.offsets[body.ids.n_lists]; i++) assert(body.ids.ids[i] >= 0);
        check_members(&body);
        check_round_trip(body.root);
        call_getters(&body);
        json_body_deinit(&body);
    }
    free(text);
    return 0;
}
