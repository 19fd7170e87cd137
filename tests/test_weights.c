/* test_weights.c: what a model plans is what it takes; weights in place, copied and made up; checkpoints that do not
 * fit their configuration. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "models/model_impl.h"

#define VECTORS "tests/vectors/"

enum { MAX_FILE = 1 << 18 };

static unsigned seed;

// ---- a backend that counts, and fails on demand ---------------------------------------------------------------------

static struct kernels counting;
static size_t allocated;     // bytes asked for and not refused
static int n_live, fail_at;  // allocations held; the one to refuse, counted from 1; 0: none

static void *counting_alloc(struct device *device, size_t bytes)
{
    if (fail_at && --fail_at == 0) return NULL;
    allocated += bytes;
    n_live++;
    return kernels_cpu()->alloc(device, bytes);
}

static void counting_free(struct device *device, void *memory)
{
    n_live -= memory != NULL;
    kernels_cpu()->free(device, memory);
}

static struct device *device_make(void)
{
    struct device *device;
    struct error e;
    struct device_options o = {.n_threads = 1, .max_vocab_size = 1024, .max_context = 512, .max_dim = 1024,
                               .max_tokens = 64};
    ck_assert_msg(kernels_cpu()->device_create(&device, &o, &e) == 0, "%s", e.message);
    counting = *kernels_cpu();
    counting.alloc = counting_alloc, counting.free = counting_free;
    allocated = 0, n_live = 0, fail_at = 0;
    return device;
}

static struct model_options options(const char *dir)
{
    return (struct model_options){.dir = dir, .max_num_batched_tokens = 16, .max_logits_rows = 2, .tp_size = 1,
                                  .seed = seed};
}

static struct model *create(const struct model_options *o)
{
    struct model *m;
    struct error e = {0};
    ck_assert_msg(model_create(&m, o, &e) == 0, "%s", e.message);
    return m;
}

// ---- checkpoints made from another's --------------------------------------------------------------------------------

static char dir[64];

static size_t read_whole(const char *path, char *out)
{
    FILE *f = fopen(path, "rb");
    ck_assert_msg(f != NULL, "%s", path);
    size_t n = fread(out, 1, MAX_FILE - 1, f);
    fclose(f);
    out[n] = 0;
    return n;
}

static void write_whole(const char *name, const char *bytes, size_t size)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(bytes, 1, size, f), size);
    fclose(f);
}

// text [n] with the first `from` replaced by `to`; returns the new size. from "" appends.
static size_t replace(char *text, size_t n, const char *from, const char *to)
{
    char *at = *from ? memmem(text, n, from, strlen(from)) : text + n;
    ck_assert_msg(at != NULL, "no %s", from);
    memmove(at + strlen(to), at + strlen(from), (size_t)(text + n - at) - strlen(from));
    memcpy(at, to, strlen(to));
    return n + strlen(to) - strlen(from);
}

// A new checkpoint in `dir`: `like`, with one replacement in the weights' header or in config.json (NULL: none).
static void derive(const char *like, const char *header_from, const char *header_to, const char *config_from,
                   const char *config_to)
{
    static char text[MAX_FILE], file[MAX_FILE + 256];
    char path[256];
    strcpy(dir, "/tmp/gptd-weights-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(path, sizeof path, VECTORS "%s/config.json", like);
    size_t n = read_whole(path, text);
    if (config_from) n = replace(text, n, config_from, config_to);
    write_whole("config.json", text, n);
    snprintf(path, sizeof path, VECTORS "%s/model.safetensors", like);
    size_t size = read_whole(path, text);
    uint64_t n_header, n_new;
    memcpy(&n_header, text, 8);
    memcpy(file, text, 8 + n_header);
    n_new = header_from ? replace(file + 8, n_header, header_from, header_to) : n_header;
    memcpy(file, &n_new, 8);
    memcpy(file + 8 + n_new, text + 8 + n_header, size - 8 - n_header);
    write_whole("model.safetensors", file, size - n_header + n_new);
}

static void derived_remove(void)
{
    char path[256];
    snprintf(path, sizeof path, "%s/config.json", dir);
    unlink(path);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    unlink(path);
    rmdir(dir);
}

// ---- bytes ----------------------------------------------------------------------------------------------------------

static const char *const all[] = {"flashgpt", "flashgpt-head-bf16", "gpt2", "gpt2-bare-f16", "llama-mha-sharded",
                                  "llama-gqa-biases-tied", "llama-mixed-types", "mistral-window"};

static void bytes_check(const char *name, enum load_format format)
{
    char path[128];
    struct error e = {0};
    struct device *device = device_make();
    snprintf(path, sizeof path, VECTORS "%s", name);
    struct model_options o = options(path);
    o.load_format = format;
    struct model *m = create(&o);
    struct model_info planned = *model_info_get(m);
    struct weights plan = m->weights;
    ck_assert_msg(model_load(m, &counting, device, &e) == 0, "%s", e.message);
    ck_assert_uint_eq(allocated + m->weights.mapped_bytes, planned.weights_bytes + planned.workspace_bytes);
    ck_assert_uint_eq(m->weights.arena_bytes, plan.arena_bytes);
    ck_assert_uint_eq(m->weights.mapped_bytes, plan.mapped_bytes);
    ck_assert_int_eq(memcmp(&planned, model_info_get(m), sizeof planned), 0);
    ck_assert_uint_ge(planned.weights_bytes, planned.n_parameters * 2);
    bool copies = format == LOAD_DUMMY || m->config.family->transposed;
    ck_assert_int_eq(n_live, copies ? 2 : 1);
    model_destroy(m);
    ck_assert_int_eq(n_live, 0);
    kernels_cpu()->device_destroy(device);
}

START_TEST(plan_is_what_is_taken) { bytes_check(all[_i], LOAD_AUTO); }
END_TEST

START_TEST(plan_is_what_is_taken_by_dummies) { bytes_check(all[_i], LOAD_DUMMY); }
END_TEST

// As for a device that cannot read the map: everything in one allocation, matrices in one type, vectors as they are.
static void part_check(const struct weight_part *copy, const struct weight_part *original, size_t n_cols, enum dtype dtype)
{
    size_t n = original->n_rows * n_cols;
    uint16_t *expected = malloc(n * sizeof *expected);
    dtype_convert(expected, dtype, original->data, original->dtype, n);
    ck_assert_int_eq(copy->dtype, dtype);
    ck_assert_mem_eq(copy->data, expected, n * sizeof *expected);
    ck_assert_int_eq(copy->bias.dtype, original->bias.dtype);
    if (original->bias.data)
        ck_assert_mem_eq(copy->bias.data, original->bias.data, original->n_rows * dtype_size(original->bias.dtype));
    free(expected);
}

START_TEST(copied_weights)
{
    char path[128];
    struct error e = {0};
    struct device *device = device_make();
    snprintf(path, sizeof path, VECTORS "%s", all[_i / 3]);
    struct model_options o = options(path);
    struct model *original = create(&o);
    ck_assert_msg(model_load(original, &counting, device, &e) == 0, "%s", e.message);
    o.copies_weights = true, o.dtype = (enum dtype)(_i % 3);
    struct model *copy = create(&o);
    size_t planned = model_info_get(copy)->weights_bytes, before = allocated;
    int live_before = n_live;
    ck_assert_msg(model_load(copy, &counting, device, &e) == 0, "%s", e.message);
    enum dtype dtype = o.dtype != DTYPE_F32 ? o.dtype : original->config.dtype == DTYPE_F16 ? DTYPE_F16 : DTYPE_BF16;
    ck_assert_int_eq(model_info_get(copy)->dtype, dtype);
    ck_assert_uint_eq(copy->weights.mapped_bytes, 0);
    ck_assert_uint_eq(allocated - before, planned + model_info_get(copy)->workspace_bytes);
    ck_assert_int_eq(n_live - live_before, 2);
    for (int32_t i = 0; i < original->config.n_layers; i++) {
        const struct layer_weights *a = &copy->weights.layers[i], *b = &original->weights.layers[i];
        for (int32_t j = 0; j < b->qkv.n_parts; j++) part_check(&a->qkv.part[j], &b->qkv.part[j], b->qkv.n_cols, dtype);
        for (int32_t j = 0; j < b->mlp_in.n_parts; j++)
            part_check(&a->mlp_in.part[j], &b->mlp_in.part[j], b->mlp_in.n_cols, dtype);
        part_check(&a->mlp_out.part[0], &b->mlp_out.part[0], b->mlp_out.n_cols, dtype);
    }
    part_check(&copy->weights.lm_head.part[0], &original->weights.lm_head.part[0], original->weights.lm_head.n_cols, dtype);
    model_destroy(copy);
    model_destroy(original);
    ck_assert_int_eq(n_live, 0);
    kernels_cpu()->device_destroy(device);
}
END_TEST

START_TEST(out_of_memory)
{
    for (int which = 1; which <= 2; which++) {
        struct error e = {0};
        struct device *device = device_make();
        struct model_options o = options(VECTORS "gpt2");
        struct model *m = create(&o);
        fail_at = which;
        ck_assert_int_eq(model_load(m, &counting, device, &e), ERR_NOMEM);
        ck_assert_msg(strstr(e.message, which == 1 ? "of weights" : "of workspace"), "%s", e.message);
        model_destroy(m);
        ck_assert_int_eq(n_live, 0);
        kernels_cpu()->device_destroy(device);
    }
}
END_TEST

// ---- one step, for comparisons --------------------------------------------------------------------------------------

// Logits [vocab_size] after five tokens of a loaded model. Returns model_forward's answer.
static int logits_of(struct model *m, struct device *device, int32_t n_tokens, float *out, struct error *e)
{
    int32_t tokens[32] = {5, 9, 2, 7, 1}, positions[32], slots[32], rows[32] = {0}, table = 0, last = n_tokens - 1;
    const struct model_info *info = model_info_get(m);
    size_t bytes = (size_t)info->n_kv_heads * 32 * (size_t)info->head_dim * 4;
    struct kv_layer layers[4];
    for (int32_t i = 0; i < 32; i++) positions[i] = slots[i] = i;
    for (int32_t i = 0; i < info->n_layers; i++) {
        struct tensor t = {kernels_cpu()->alloc(device, bytes), info->kv_groups[0].dtype, 4,
                           {1, (size_t)info->n_kv_heads, 32, (size_t)info->head_dim}};
        layers[i].k = t;
        t.data = kernels_cpu()->alloc(device, bytes);
        layers[i].v = t;
    }
    struct batch b = {.n_tokens = n_tokens, .n_seqs = 1, .n_logits_rows = 1, .max_blocks = 1, .block_size = 32,
                      .tokens = tokens, .positions = positions, .history_rows = rows, .slot_mapping = {slots},
                      .cu_seqlens_q = (int32_t[]){0, n_tokens}, .context_lens = &n_tokens, .block_tables = {&table},
                      .logits_rows = &last};
    struct kv_cache kv = {.layers = {layers}, .n_blocks = {1}};
    struct tensor logits;
    int rc = model_forward(m, &b, &kv, &logits, e);
    if (!rc) memcpy(out, logits.data, (size_t)info->vocab_size * sizeof(float));
    for (int32_t i = 0; i < info->n_layers; i++) {
        kernels_cpu()->free(device, layers[i].k.data);
        kernels_cpu()->free(device, layers[i].v.data);
    }
    return rc;
}

static void logits_of_checkpoint(const struct model_options *o, float *out)
{
    struct error e = {0};
    struct device *device = device_make();
    struct model *m = create(o);
    ck_assert_msg(model_load(m, &counting, device, &e) == 0, "%s", e.message);
    ck_assert_msg(logits_of(m, device, 5, out, &e) == 0, "%s", e.message);
    model_destroy(m);
    kernels_cpu()->device_destroy(device);
}

// A header one byte longer puts every tensor at an odd address: copied, and the answers stay the same.
START_TEST(misaligned_data)
{
    float aligned[512], moved[512];
    struct model_options o = options(VECTORS "llama-mqa");
    logits_of_checkpoint(&o, aligned);
    derive("llama-mqa", "", " ", NULL, NULL);
    o.dir = dir;
    logits_of_checkpoint(&o, moved);
    ck_assert_mem_eq(aligned, moved, 101 * sizeof(float));
    struct model *m = create(&o);
    ck_assert_uint_eq(m->weights.mapped_bytes, 0);
    ck_assert_uint_ge(m->weights.arena_bytes, 4 * m->info.n_parameters);
    model_destroy(m);
    derived_remove();
}
END_TEST

START_TEST(step_too_large)
{
    float logits[512];
    struct error e = {0};
    struct device *device = device_make();
    struct model_options o = options(VECTORS "llama-mqa");
    struct model *m = create(&o);
    ck_assert_int_eq(model_load(m, &counting, device, &e), 0);
    ck_assert_int_eq(logits_of(m, device, 16, logits, &e), 0);
    ck_assert_int_eq(logits_of(m, device, 17, logits, &e), ERR_INVALID);
    model_destroy(m);
    kernels_cpu()->device_destroy(device);
}
END_TEST

// ---- dummy weights --------------------------------------------------------------------------------------------------

static float value_at(const struct tensor *t, size_t i)
{
    if (t->dtype == DTYPE_F32) return ((const float *)t->data)[i];
    uint16_t bits = ((const uint16_t *)t->data)[i];
    if (t->dtype == DTYPE_BF16) {
        uint32_t wide = (uint32_t)bits << 16;
        float x;
        memcpy(&x, &wide, sizeof x);
        return x;
    }
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float magnitude = exponent ? ldexpf((float)(1024 + fraction), exponent - 25) : ldexpf((float)fraction, -24);
    return bits >> 15 ? -magnitude : magnitude;
}

static const char *const dummy_types[] = {"float32", "float16", "bfloat16"};

START_TEST(dummy_weights)
{
    float logits[512];
    char to[64];
    struct error e = {0};
    snprintf(to, sizeof to, "\"dtype\": \"%s\"", dummy_types[_i]);
    derive("gpt2", NULL, NULL, "\"dtype\": \"float32\"", to);
    struct device *device = device_make();
    struct model_options o = options(dir);
    o.load_format = LOAD_DUMMY;
    struct model *m = create(&o);
    ck_assert_int_eq(model_load(m, &counting, device, &e), 0);
    const struct tensor *table = &m->weights.token_embed;
    size_t n = table->shape[0] * table->shape[1];
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++) {
        double x = value_at(table, i);
        sum += x, squares += x * x;
    }
    double std = sqrt(squares / (double)n - pow(sum / (double)n, 2));
    ck_assert_msg(fabs(sum / (double)n) < 0.02 * 5 / sqrt((double)n) && fabs(std - 0.02) < 0.002, "%g, %g", sum, std);
    for (size_t i = 0; i < (size_t)m->info.hidden_dim; i++) {
        ck_assert_float_eq(value_at(&m->weights.layers[1].norm2.weight, i), 1);
        ck_assert_float_eq(value_at(&m->weights.layers[1].norm2.bias, i), 0);
        ck_assert_float_eq(value_at(&m->weights.layers[0].mlp_out.part[0].bias, i), 0);
    }
    ck_assert(memcmp(m->weights.layers[0].qkv.part[0].data, m->weights.layers[1].qkv.part[0].data, 64) != 0);
    ck_assert_int_eq(logits_of(m, device, 5, logits, &e), 0);
    for (int i = 0; i < m->info.vocab_size; i++) ck_assert(isfinite(logits[i]));
    model_destroy(m);
    kernels_cpu()->device_destroy(device);
    derived_remove();
}
END_TEST

START_TEST(dummy_weights_follow_the_seed)
{
    float first[512], again[512], other[512];
    struct model_options o = options(VECTORS "llama-mqa");
    o.load_format = LOAD_DUMMY;
    logits_of_checkpoint(&o, first);
    logits_of_checkpoint(&o, again);
    o.seed++;
    logits_of_checkpoint(&o, other);
    ck_assert_mem_eq(first, again, 101 * sizeof(float));
    ck_assert(memcmp(first, other, 101 * sizeof(float)) != 0);
}
END_TEST

// ---- what is refused ------------------------------------------------------------------------------------------------

static const struct {
    const char *like, *header_from, *header_to, *config_from, *config_to, *message;
} unfit[] = {
    {"llama-mqa", "model.norm.weight", "model.norm.weighx", NULL, NULL, "model.norm.weight: missing"},
    {"llama-mqa", "lm_head.weight", "ln_head.weight", NULL, NULL, "lm_head.weight: missing"},
    {"llama-mqa", "model.embed_tokens.weight", "model.token_embed.weight", NULL, NULL, "embed_tokens.weight: missing"},
    {"llama-mqa", "\"shape\":[44,32]", "\"shape\":[32,44]", NULL, NULL, "its shape is not [44, 32]"},
    {"llama-mqa", "\"shape\":[32]", "\"shape\":[4,8]", NULL, NULL, "its shape is not [32]"},
    {"llama-mqa", "\"F32\"", "\"I32\"", NULL, NULL, "I32 is none of F32, F16, BF16"},
    {"llama-mqa", NULL, NULL, "\"vocab_size\": 101", "\"vocab_size\": 102", "its shape is not [102, 32]"},
    {"llama-mqa", NULL, NULL, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", "model.layers.2.input_layernorm"},
    {"llama-mqa", NULL, NULL, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", "model.layers.1."},
    {"llama-mqa", NULL, NULL, "\"attention_bias\": false", "\"attention_bias\": true", "q_proj.bias: missing"},
    {"llama-gqa-biases-tied", NULL, NULL, "\"mlp_bias\": true", "\"mlp_bias\": false",
     ".bias: no place for it in the LlamaForCausalLM"},
    {"llama-gqa-biases-tied", NULL, NULL, "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false",
     "lm_head.weight: missing"},
    {"gpt2", "\"shape\":[32,96]", "\"shape\":[96,32]", NULL, NULL, "c_attn.weight: its shape is not [32, 96]"},
    {"flashgpt", NULL, NULL, "\"max_seq_len\": 139", "\"max_seq_len\": 140",
     "pos_embed.weight: its shape is not [140, 40]"},
};

START_TEST(checkpoint_that_does_not_fit)
{
    struct model *m;
    struct error e = {0};
    derive(unfit[_i].like, unfit[_i].header_from, unfit[_i].header_to, unfit[_i].config_from, unfit[_i].config_to);
    struct model_options o = options(dir);
    ck_assert_int_lt(model_create(&m, &o, &e), 0);
    ck_assert_ptr_null(m);
    ck_assert_msg(strstr(e.message, unfit[_i].message), "%s", e.message);
    derived_remove();
}
END_TEST

START_TEST(options_out_of_range)
{
    struct model *m;
    struct error e = {0};
    struct model_options o = options(VECTORS "llama-mqa");
    o.max_model_len = 160;
    m = create(&o);
    ck_assert_int_eq(model_info_get(m)->max_model_len, 160);
    model_destroy(m);
    o.max_model_len = 161;
    ck_assert_int_eq(model_create(&m, &o, &e), ERR_INVALID);
    ck_assert_msg(strstr(e.message, "161") && strstr(e.message, "160"), "%s", e.message);
    o = options(VECTORS "llama-dynamic"); // stretched only if asked for
    m = create(&o);
    ck_assert_int_eq(model_info_get(m)->max_model_len, 160);
    model_destroy(m);
    o.max_model_len = 320;
    m = create(&o);
    ck_assert_int_eq(model_info_get(m)->max_model_len, 320);
    model_destroy(m);
    o = options(VECTORS "llama-mqa");
    o.max_model_len = -1;
    ck_assert_int_eq(model_create(&m, &o, &e), ERR_INVALID);
    o = options(VECTORS "llama-mqa"), o.max_num_batched_tokens = 0;
    ck_assert_int_eq(model_create(&m, &o, &e), ERR_INVALID);
    o = options(VECTORS "llama-mqa"), o.max_logits_rows = 0;
    ck_assert_int_eq(model_create(&m, &o, &e), ERR_INVALID);
    o = options(VECTORS "llama-mqa"), o.tp_size = 2;
    ck_assert_int_eq(model_create(&m, &o, &e), ERR_UNSUPPORTED);
    o = options("tests/no-such-directory");
    ck_assert_int_eq(model_create(&m, &o, &e), ERR_IO);
    ck_assert_msg(strstr(e.message, "config.json: cannot be opened: No such file"), "%s", e.message);
}
END_TEST

START_TEST(file_cut_before_it_is_loaded)
{
    char path[256];
    struct error e = {0};
    struct device *device = device_make();
    derive("llama-mqa", NULL, NULL, NULL, NULL);
    struct model_options o = options(dir);
    struct model *m = create(&o);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    ck_assert_int_eq(truncate(path, 8192), 0);
    ck_assert_int_eq(model_load(m, &counting, device, &e), ERR_IO);
    ck_assert_msg(strstr(e.message, path), "%s", e.message);
    const char *named = model_file_at(m->weights.token_embed.data);
    ck_assert_ptr_nonnull(named);
    ck_assert_str_eq(named, path);
    model_destroy(m);
    kernels_cpu()->device_destroy(device);
    derived_remove();
}
END_TEST

int main(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = (unsigned)now.tv_nsec;
    printf("seed %u\n", seed);
    fflush(stdout);
    Suite *suite = suite_create("weights");
    TCase *tc = tcase_create("load");
    tcase_set_timeout(tc, 30);
    tcase_add_loop_test(tc, plan_is_what_is_taken, 0, sizeof all / sizeof *all);
    tcase_add_loop_test(tc, plan_is_what_is_taken_by_dummies, 0, sizeof all / sizeof *all);
    tcase_add_loop_test(tc, copied_weights, 0, 3 * sizeof all / sizeof *all);
    tcase_add_test(tc, out_of_memory);
    tcase_add_test(tc, misaligned_data);
    tcase_add_test(tc, step_too_large);
    tcase_add_loop_test(tc, dummy_weights, 0, sizeof dummy_types / sizeof *dummy_types);
    tcase_add_test(tc, dummy_weights_follow_the_seed);
    tcase_add_loop_test(tc, checkpoint_that_does_not_fit, 0, sizeof unfit / sizeof *unfit);
    tcase_add_test(tc, options_out_of_range);
    tcase_add_test(tc, file_cut_before_it_is_loaded);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
