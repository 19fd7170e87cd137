#include "tests/model_vectors.h"

#include <check.h>
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "models/safetensors.h"

#define VECTORS "tests/vectors"

static int32_t tensor_copy(const struct safetensors *st, const char *name, void *out, size_t max_bytes)
{
    for (size_t i = 0; i < st->n_tensors; i++) {
        const struct safetensors_tensor *t = &st->tensors[i];
        if (strcmp(t->name, name)) continue;
        ck_assert_uint_le(t->size, max_bytes);
        memcpy(out, t->data, t->size);
        return (int32_t)t->shape[t->n_dims - 1];
    }
    ck_abort_msg("%s: missing", name);
    return 0;
}

// The header's metadata is not for the reader of weights: found by its text.
static int32_t metadata_int(const struct safetensors *st, const char *key)
{
    const char *at = memmem(st->map, st->map_size, key, strlen(key));
    return at ? atoi(at + strlen(key)) : 0;
}

void expected_read(struct expected *x, const char *dir)
{
    char path[256];
    struct safetensors st;
    struct error e;
    static float logits[MAX_ROWS * MAX_VOCAB];
    memset(x, 0, sizeof *x);
    snprintf(path, sizeof path, "%s/expected.safetensors", dir);
    ck_assert_msg(safetensors_open(&st, path, &e) == 0, "%s", e.message);
    x->n_prompt = tensor_copy(&st, "prompt", x->ids, sizeof x->ids);
    x->n_ids = x->n_prompt + tensor_copy(&st, "generated", x->ids + x->n_prompt,
                                         sizeof x->ids - (size_t)x->n_prompt * sizeof(int32_t));
    x->n_rows = tensor_copy(&st, "rows", x->rows, sizeof x->rows);
    x->vocab_size = tensor_copy(&st, "logits", logits, sizeof logits);
    ck_assert_int_le(x->vocab_size, MAX_VOCAB);
    for (int32_t i = 0; i < x->n_rows; i++) {
        memcpy(x->logits[i], logits + i * x->vocab_size, (size_t)x->vocab_size * sizeof(float));
    }
    x->max_model_len = metadata_int(&st, "\"max_model_len\":\"");
    safetensors_close(&st);
}

double distance(const float *out, const float *ref, int32_t n)
{
    double difference = 0, norm = 0;
    for (int32_t i = 0; i < n; i++) {
        difference += pow((double)out[i] - ref[i], 2);
        norm += pow(ref[i], 2);
    }
    return sqrt(difference / norm);
}

int32_t argmax(const float *x, int32_t n)
{
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++) {
        if (x[i] > x[best]) best = i;
    }
    return best;
}

void teacher_force(struct rig *r, const struct expected *x, int32_t max_step, float logits[MAX_ROWS][MAX_VOCAB])
{
    int32_t at = 0, n_seen = 0;
    while (at < x->n_ids) {
        int32_t n = max_step ? 1 + (int32_t)(random() % max_step) : x->n_ids, rows[MAX_ROWS], n_rows = 0;
        if (n > x->n_ids - at) n = x->n_ids - at;
        while (n_seen + n_rows < x->n_rows && x->rows[n_seen + n_rows] < at + n) {
            rows[n_rows] = x->rows[n_seen + n_rows] - at;
            n_rows++;
        }
        static float out[MAX_ROWS * MAX_VOCAB];
        memset(out, 0xFF, sizeof out);
        rig_step(r, x->ids + at, n, rows, n_rows, out);
        for (int32_t i = 0; i < n_rows; i++) {
            memcpy(logits[n_seen++], out + i * x->vocab_size, (size_t)x->vocab_size * sizeof(float));
        }
        at += n;
    }
    ck_assert_int_eq(n_seen, x->n_rows);
}

// A directory of a checkpoint with its expectations; other things live there too.
static int is_case(const struct dirent *d)
{
    char path[512];
    snprintf(path, sizeof path, VECTORS "/%s/expected.safetensors", d->d_name);
    return access(path, F_OK) == 0;
}

int vectors_find(char cases[MAX_CASES][128])
{
    int n_cases = 0;
    struct dirent **list;
    int n = scandir(VECTORS, &list, is_case, alphasort);
    if (n > MAX_CASES) abort(); // none is left out silently
    for (int i = 0; i < n; i++) {
        snprintf(cases[n_cases++], sizeof *cases, VECTORS "/%.100s", list[i]->d_name);
        free(list[i]);
    }
    if (n >= 0) free(list);
    return n_cases;
}
