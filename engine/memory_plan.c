#include "engine/memory_plan.h"

size_t kv_block_bytes(const struct kv_spec *spec, int32_t block_size)
{
    return (size_t)spec->n_layers * (size_t)spec->n_kv_heads * (size_t)block_size *
           (size_t)(spec->k_dim + spec->v_dim) * dtype_size(spec->dtype);
}

void tables_layout(struct scheduler *s, struct step *steps, int32_t depth, struct arena *arena,
                   const struct scheduler_config *config)
{
    scheduler_layout(s, arena, config);
    for (int32_t i = 0; i < depth; i++)
        step_layout(&steps[i], arena, s);
}

static size_t tables_bytes(const struct scheduler_config *config, int32_t depth)
{
    struct arena arena = {0};
    struct scheduler s = {0};
    struct step steps[2] = {0};
    tables_layout(&s, steps, depth, &arena, config);
    return arena.used + (size_t)depth * (size_t)config->max_logits_rows * sizeof(struct sample_result);
}

// What one sequence of n_tokens takes of all groups.
static size_t sequence_bytes(const struct request_limits *l, const size_t *block, int32_t n_tokens)
{
    size_t bytes = 0;
    for (int32_t g = 0; g < l->n_groups; g++)
        bytes += (size_t)request_blocks_needed(l, g, n_tokens) * block[g];
    return bytes;
}

// The longest sequence that takes no more than so many bytes; 0: none.
static int32_t longest_within(const struct request_limits *l, const size_t *block, size_t bytes)
{
    int32_t low = 0, high = l->max_model_len;
    while (low < high) {
        int32_t middle = low + (high - low + 1) / 2;
        if (sequence_bytes(l, block, middle) <= bytes)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// Slots are int32_t.
static size_t blocks_within(const struct request_limits *l, size_t n)
{
    size_t limit = (size_t)INT32_MAX / (size_t)l->block_size;
    return n < limit ? n : limit;
}

// Of several groups: blocks for one longest sequence, or where it does not fit for the longest that takes half, and of what is
// left for as many equally long ones as may run beside it. In proportion to the longest alone, windowed layers would have room
// for a few short sequences and no more.
static void share_among_groups(struct scheduler_config *config, const size_t *block, size_t bytes)
{
    struct request_limits *l = &config->limits;
    size_t others = (size_t)config->max_num_seqs - 1, all_groups = 0;
    int32_t longest = l->max_model_len, n_tokens = 0;
    if (sequence_bytes(l, block, longest) > bytes)
        longest = longest_within(l, block, others > 0 ? bytes / 2 : bytes);
    size_t rest = bytes - sequence_bytes(l, block, longest);
    if (others > 0)
        n_tokens = longest_within(l, block, rest / others);
    rest -= others * sequence_bytes(l, block, n_tokens);
    for (int32_t g = 0; g < l->n_groups; g++)
        all_groups += block[g];
    for (int32_t g = 0; g < l->n_groups; g++) {
        size_t n = (size_t)request_blocks_needed(l, g, longest) + others * (size_t)request_blocks_needed(l, g, n_tokens);
        l->n_blocks[g] = (int32_t)blocks_within(l, n + rest / all_groups);
    }
}

// Gives each group its blocks: at most `most` longest sequences' worth. Returns their bytes.
static size_t share_out(struct scheduler_config *config, const struct model_info *info, size_t bytes, size_t most)
{
    struct request_limits *l = &config->limits;
    size_t block[MAX_KV_GROUPS], used = 0;
    for (int32_t g = 0; g < l->n_groups; g++)
        block[g] = kv_block_bytes(&info->kv_groups[g], l->block_size);
    size_t longest = sequence_bytes(l, block, l->max_model_len);
    if (bytes / longest >= most) {
        for (int32_t g = 0; g < l->n_groups; g++)
            l->n_blocks[g] = (int32_t)blocks_within(l, most * (size_t)request_blocks_needed(l, g, l->max_model_len));
    } else if (l->n_groups > 1) {
        share_among_groups(config, block, bytes);
    } else {
        l->n_blocks[0] = (int32_t)blocks_within(l, bytes / block[0]);
    }
    for (int32_t g = 0; g < l->n_groups; g++)
        used += (size_t)l->n_blocks[g] * block[g];
    return used;
}

// The longest sequence whose blocks there are.
static int32_t longest_held(const struct request_limits *l)
{
    int32_t longest = l->max_model_len;
    for (int32_t g = 0; g < l->n_groups; g++) {
        int32_t low = 0, high = longest;
        while (low < high) {
            int32_t middle = low + (high - low + 1) / 2;
            if (request_blocks_needed(l, g, middle) <= l->n_blocks[g])
                low = middle;
            else
                high = middle - 1;
        }
        longest = low;
    }
    return longest;
}

static double gib(size_t bytes)
{
    return (double)bytes / (1 << 30);
}

static int refuse(const struct engine_plan *p, struct error *e)
{
    size_t sum = p->weights_bytes + p->workspace_bytes + p->history_bytes + p->scratch_bytes + p->kv_cache_bytes;
    return error_set(e, ERR_NOMEM,
                     "%.3f GiB are needed (weights %.3f, workspace %.3f, history %.3f, scratch %.3f, KV cache %.3f), "
                     "the device has %.3f GiB", gib(sum), gib(p->weights_bytes), gib(p->workspace_bytes),
                     gib(p->history_bytes), gib(p->scratch_bytes), gib(p->kv_cache_bytes), gib(p->memory_bytes));
}

static size_t bytes_left(struct engine_plan *plan, const struct scheduler_config *config, size_t device_scratch,
                         int32_t depth)
{
    plan->scratch_bytes = device_scratch + tables_bytes(config, depth);
    size_t fixed = plan->weights_bytes + plan->workspace_bytes + plan->history_bytes + plan->scratch_bytes;
    return plan->memory_bytes > fixed ? plan->memory_bytes - fixed : 0;
}

int memory_plan_fill(struct engine_plan *plan, struct scheduler_config *config, const struct model_info *info,
                     const struct engine_options *options, int32_t depth, struct error *e)
{
    size_t asked = options->kv_cache_memory_bytes, device_scratch = plan->scratch_bytes, left;
    size_t part = config->own_memory ? 1 : 2; // a machine's memory serves others, too: half of it is not ours to take
    plan->weights_bytes = info->weights_bytes;
    plan->workspace_bytes = info->workspace_bytes;
    plan->history_bytes = (size_t)config->max_num_seqs * (size_t)config->limits.max_model_len * sizeof(int32_t);
    // The tables grow with the number of blocks they share the memory with: the second pass has them in what is left.
    for (int32_t pass = 0; pass < 2; pass++) {
        left = bytes_left(plan, config, device_scratch, depth);
        plan->kv_cache_bytes = asked > 0 ? share_out(config, info, asked, SIZE_MAX)
                                         : share_out(config, info, left / part, (size_t)config->max_num_seqs);
    }
    left = bytes_left(plan, config, device_scratch, depth);
    if (plan->kv_cache_bytes > left || left == 0)
        return refuse(plan, e);
    _Static_assert(sizeof plan->kv_groups / sizeof *plan->kv_groups == MAX_KV_GROUPS, "a place for each group");
    plan->n_kv_groups = config->limits.n_groups;
    for (int32_t g = 0; g < config->limits.n_groups; g++) {
        size_t block = kv_block_bytes(&info->kv_groups[g], config->limits.block_size);
        plan->kv_groups[g] = (struct kv_group_plan){config->limits.windows[g], config->limits.n_blocks[g], block};
        if (config->limits.n_blocks[g] < 1)
            return error_set(e, ERR_NOMEM, "%zu bytes for the KV cache do not hold one block of %zu bytes a group",
                             asked > 0 ? asked : left / part, block);
    }
    plan->longest_request = longest_held(&config->limits);
    plan->kv_tokens = (int64_t)plan->kv_groups[0].n_blocks * config->limits.block_size;
    return 0;
}
