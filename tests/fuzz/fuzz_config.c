// Whatever config.json is accepted has the shapes that the forward pass relies on, and finite frequencies.
#include <assert.h>
#include <math.h>

#include "models/json.h"
#include "models/workspace.h"

static void check_kind(const struct model_config *c, const struct layer_kind *kind, int32_t n_layers)
{
    float inv_freq[ROPE_MAX_DIM / 2];
    assert(kind->n_layers == n_layers && n_layers > 0 && kind->window >= 0);
    if (c->family->positions != POSITIONS_ROPE) return;
    assert(kind->rope.dim >= 2 && kind->rope.dim % 2 == 0 && kind->rope.dim <= c->head_dim);
    rope_inv_freq(&kind->rope, c->max_model_len, inv_freq);
    for (int32_t i = 0; i < kind->rope.dim / 2; i++) assert(isfinite(inv_freq[i]));
    assert(isfinite(kind->rope.attention_factor));
}

static void check(const struct model_config *c)
{
    assert(c->family && c->vocab_size > 0 && c->n_layers > 0 && c->hidden_dim > 0 && c->intermediate_dim > 0);
    assert(c->n_heads > 0 && c->n_kv_heads > 0 && c->n_heads % c->n_kv_heads == 0);
    assert(c->head_dim >= 8 && c->head_dim <= 256 && c->head_dim % 8 == 0);
    assert(c->max_positions > 0 && c->max_model_len > 0 && c->norm_eps > 0 && isfinite(c->attn_scale));
    assert(c->bos_token_id >= -1 && c->bos_token_id < c->vocab_size);
    assert(c->n_eos_token_ids >= 0 && c->n_eos_token_ids <= MAX_EOS_IDS);
    for (int32_t i = 0; i < c->n_eos_token_ids; i++) {
        assert(c->eos_token_ids[i] >= 0 && c->eos_token_ids[i] < c->vocab_size);
    }
    assert(c->n_kinds >= 1 && c->n_kinds <= MAX_LAYER_KINDS);
    int32_t n_layers[MAX_LAYER_KINDS] = {0};
    for (int32_t i = 0; i < c->n_layers; i++) n_layers[c->kind_of_layer[i]]++;
    for (int32_t i = 0; i < c->n_kinds; i++) check_kind(c, &c->kinds[i], n_layers[i]);
    assert(c->n_experts == 0 || (c->n_chosen >= 1 && c->n_chosen <= c->n_experts && c->expert_dim > 0));
    struct workspace w = {.max_tokens = INT32_MAX, .max_logits_rows = INT32_MAX};
    workspace_layout(&w, c);
    assert(w.size < SIZE_MAX / 4 && w.size >= (size_t)INT32_MAX * (size_t)c->vocab_size * sizeof(float));
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    struct model_config c;
    struct error e = {0};
    cJSON *root;
    int rc = json_parse(&root, (const char *)bytes, size, &e);
    if (!rc) rc = config_parse(&c, root, root, &e); // the same text stands for generation_config.json
    if (rc) assert(rc == (int)e.code && e.message[0]);
    else check(&c);
    cJSON_Delete(root);
    return 0;
}
