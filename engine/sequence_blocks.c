#include "engine/sequence_blocks.h"

static struct block_hash hash_at(const struct sequence *seq, int32_t i, int32_t block_size)
{
    int32_t n_prompt_blocks = seq->n_prompt / block_size;
    return i < n_prompt_blocks ? seq->request->prompt_hashes[i] : seq->hashes[i - n_prompt_blocks];
}

// First block of group g that a query at `position` sees.
static int32_t first_visible(const struct scheduler *s, int32_t g, int32_t position)
{
    int32_t window = s->config.limits.windows[g];
    return window > 0 && position >= window ? (position - window + 1) / s->config.limits.block_size : 0;
}

void sequence_match_prefix(const struct scheduler *s, const struct sequence *seq, struct prefix_match *match)
{
    const struct request_limits *l = &s->config.limits;
    const struct request *r = seq->request;
    int32_t run[MAX_KV_GROUPS] = {0}; // blocks found in a row up to block i
    *match = (struct prefix_match){0};
    // Every prompt position gives a row of logits when its log-probabilities are wanted: nothing can be skipped.
    bool rows_wanted = seq->index == 0 && r->prompt_logprobs != NULL && r->n_prompt_logprobs < r->n_prompt;
    if (!s->config.prefix_caching || rows_wanted)
        return;
    int32_t most = (sequence_known(seq) - 1) / l->block_size; // the last token is always computed, for its logits
    for (int32_t i = 0; i < most && i < seq->n_hashed; i++) {
        bool usable = true, hopeless = false;
        for (int32_t g = 0; g < l->n_groups; g++) {
            bool found = block_manager_find(&s->blocks[g], hash_at(seq, i, l->block_size)) >= 0;
            run[g] = found ? run[g] + 1 : 0;
            usable = usable && run[g] >= i + 1 - first_visible(s, g, (i + 1) * l->block_size);
            hopeless = hopeless || (!found && l->windows[g] == 0);
        }
        if (hopeless)
            break;
        if (usable)
            match->n_blocks = i + 1;
    }
    for (int32_t g = 0; g < l->n_groups; g++) {
        match->first[g] = first_visible(s, g, match->n_blocks * l->block_size);
        for (int32_t i = match->first[g]; i < match->n_blocks; i++) {
            int32_t block = block_manager_find(&s->blocks[g], hash_at(seq, i, l->block_size));
            match->revived[g] += s->blocks[g].blocks[block].refs == 0;
        }
    }
}

void sequence_take_prefix(struct scheduler *s, struct sequence *seq, const struct prefix_match *match)
{
    const struct request_limits *l = &s->config.limits;
    for (int32_t g = 0; g < l->n_groups; g++) {
        int32_t *table = sequence_table(s, seq, g);
        seq->first_block[g] = match->first[g];
        for (int32_t i = 0; i < match->first[g]; i++)
            table[i] = -1;
        for (int32_t i = match->first[g]; i < match->n_blocks; i++) {
            table[i] = block_manager_find(&s->blocks[g], hash_at(seq, i, l->block_size));
            block_manager_ref(&s->blocks[g], table[i]);
        }
    }
    seq->n_blocks = match->n_blocks;
    seq->n_registered = match->n_blocks;
    seq->n_computed = match->n_blocks * l->block_size;
}

static bool all_groups_have_a_block(const struct scheduler *s)
{
    for (int32_t g = 0; g < s->config.limits.n_groups; g++) {
        if (s->blocks[g].n_free == 0)
            return false;
    }
    return true;
}

bool sequence_grow(struct scheduler *s, struct sequence *seq, int32_t end)
{
    while (seq->n_blocks * s->config.limits.block_size < end) {
        if (!all_groups_have_a_block(s))
            return false;
        for (int32_t g = 0; g < s->config.limits.n_groups; g++)
            sequence_table(s, seq, g)[seq->n_blocks] = block_manager_alloc(&s->blocks[g]);
        seq->n_blocks++;
    }
    return true;
}

static bool is_shared(const struct scheduler *s, const struct sequence *seq, int32_t g, int32_t at)
{
    return at < seq->n_blocks && s->blocks[g].blocks[sequence_table(s, seq, g)[at]].refs > 1;
}

bool sequence_own_block(struct scheduler *s, struct sequence *seq, struct block_copies *copies)
{
    if (seq->is_alone) // only choices of one request share a block that is not full
        return true;
    int32_t at = seq->n_computed / s->config.limits.block_size;
    for (int32_t g = 0; g < s->config.limits.n_groups; g++) {
        if (is_shared(s, seq, g, at) && s->blocks[g].n_free == 0)
            return false;
    }
    for (int32_t g = 0; g < s->config.limits.n_groups; g++) {
        if (!is_shared(s, seq, g, at))
            continue;
        int32_t *entry = &sequence_table(s, seq, g)[at];
        int32_t i = copies[g].n++, own = block_manager_alloc(&s->blocks[g]);
        copies[g].sequence[i] = seq;
        copies[g].from[i] = *entry;
        copies[g].to[i] = own;
        block_manager_unref(&s->blocks[g], *entry);
        *entry = own;
    }
    return true;
}

void sequence_share_blocks(struct scheduler *s, const struct sequence *from, struct sequence *to)
{
    for (int32_t g = 0; g < s->config.limits.n_groups; g++) {
        const int32_t *source = sequence_table(s, from, g);
        int32_t *table = sequence_table(s, to, g);
        to->first_block[g] = from->first_block[g];
        for (int32_t i = 0; i < from->n_blocks; i++) {
            table[i] = source[i];
            if (i >= from->first_block[g])
                block_manager_ref(&s->blocks[g], table[i]);
        }
    }
    to->n_blocks = from->n_blocks;
    to->n_registered = from->n_registered;
    to->n_computed = from->n_computed;
}

void sequence_free_behind_window(struct scheduler *s, struct sequence *seq)
{
    for (int32_t g = 0; g < s->config.limits.n_groups; g++) {
        int32_t visible = first_visible(s, g, seq->n_computed);
        int32_t *table = sequence_table(s, seq, g);
        for (; seq->first_block[g] < visible; seq->first_block[g]++) {
            block_manager_unref(&s->blocks[g], table[seq->first_block[g]]);
            table[seq->first_block[g]] = -1;
        }
    }
}

void sequence_free_blocks(struct scheduler *s, struct sequence *seq, bool forget)
{
    for (int32_t g = 0; g < s->config.limits.n_groups; g++) {
        const int32_t *table = sequence_table(s, seq, g);
        // Last first: a chain is evicted from its end.
        for (int32_t i = seq->n_blocks; i-- > seq->first_block[g];) {
            if (forget)
                block_manager_forget(&s->blocks[g], table[i]);
            block_manager_unref(&s->blocks[g], table[i]);
        }
        seq->first_block[g] = 0;
    }
    seq->n_blocks = seq->n_registered = seq->n_computed = 0;
}

static void hash_next_block(const struct scheduler *s, struct sequence *seq)
{
    const struct request_limits *l = &s->config.limits;
    int32_t tokens[MAX_BLOCK_SIZE], at = seq->n_hashed, bs = l->block_size;
    struct block_hash parent = {{seq->request->params.cache_salt, UINT64_MAX}};
    for (int32_t i = 0; i < bs; i++)
        tokens[i] = sequence_token(seq, at * bs + i);
    if (at > 0)
        parent = hash_at(seq, at - 1, bs);
    seq->hashes[at - seq->n_prompt / bs] = block_hash_next(l->hash_key, parent, tokens, bs);
    seq->n_hashed++;
}

void sequence_register_blocks(struct scheduler *s, struct sequence *seq)
{
    const struct request_limits *l = &s->config.limits;
    int32_t known = sequence_known(seq);
    int32_t n_full = (seq->n_computed < known ? seq->n_computed : known) / l->block_size;
    for (; s->config.prefix_caching && seq->n_registered < n_full; seq->n_registered++) {
        int32_t i = seq->n_registered;
        if (i == seq->n_hashed)
            hash_next_block(s, seq);
        for (int32_t g = 0; g < l->n_groups; g++) {
            if (i >= seq->first_block[g])
                block_manager_register(&s->blocks[g], sequence_table(s, seq, g)[i], hash_at(seq, i, l->block_size));
        }
    }
}
