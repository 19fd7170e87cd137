#include "server/plan.h"

#include <inttypes.h>

size_t plan_total(const struct engine_plan *plan)
{
    return plan->weights_bytes + plan->workspace_bytes + plan->history_bytes + plan->scratch_bytes +
           plan->kv_cache_bytes;
}

const char *plan_bytes(size_t bytes, char text[32])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    int unit = 0;
    for (; value >= 1024 && unit < 4; unit++) value /= 1024;
    snprintf(text, 32, unit ? "%.1f %s" : "%.0f %s", value, units[unit]);
    return text;
}

static void print_bytes(FILE *out, const char *name, size_t bytes)
{
    char text[32];
    fprintf(out, "  %-10s %15zu  %10s\n", name, bytes, plan_bytes(bytes, text));
}

// Of windowed layers no more of a context is kept than they see.
static void print_group(const struct kv_group_plan *g, const struct engine_plan *p, FILE *out)
{
    int64_t tokens = (int64_t)g->n_blocks * p->block_size;
    fprintf(out, "KV cache  %d blocks of %d tokens, %zu bytes each: %" PRId64 " tokens", g->n_blocks, p->block_size,
            g->block_bytes, tokens);
    if (g->window)
        fprintf(out, " of layers that see %d\n", g->window);
    else
        fprintf(out, ", %.1f full contexts\n", (double)tokens / p->max_model_len);
}

static void print_table(const struct engine_plan *p, FILE *out)
{
    fprintf(out, "model     %s, %" PRIu64 " parameters, %s, vocabulary %d\n", p->architecture, p->n_parameters,
            p->dtype, p->vocab_size);
    fprintf(out, "device    %s\n", p->device);
    fprintf(out, "limits    context %d tokens, %d sequences at once, %d tokens a step\n", p->max_model_len,
            p->max_num_seqs, p->max_num_batched_tokens);
    fprintf(out, "memory              bytes\n");
    print_bytes(out, "weights", p->weights_bytes);
    print_bytes(out, "workspace", p->workspace_bytes);
    print_bytes(out, "history", p->history_bytes);
    print_bytes(out, "scratch", p->scratch_bytes);
    print_bytes(out, "KV cache", p->kv_cache_bytes);
    print_bytes(out, "total", plan_total(p));
    print_bytes(out, "there is", p->memory_bytes);
    for (int32_t g = 0; g < p->n_kv_groups; g++)
        print_group(&p->kv_groups[g], p, out);
}

static void print_json(const struct engine_plan *p, FILE *out)
{
    fprintf(out, "{\"architecture\":\"%s\",\"dtype\":\"%s\",\"device\":\"%s\",\"n_parameters\":%" PRIu64,
            p->architecture, p->dtype, p->device, p->n_parameters);
    fprintf(out, ",\"vocab_size\":%d,\"max_model_len\":%d,\"max_num_seqs\":%d,\"max_num_batched_tokens\":%d",
            p->vocab_size, p->max_model_len, p->max_num_seqs, p->max_num_batched_tokens);
    fprintf(out, ",\"weights_bytes\":%zu,\"workspace_bytes\":%zu,\"history_bytes\":%zu", p->weights_bytes,
            p->workspace_bytes, p->history_bytes);
    fprintf(out, ",\"scratch_bytes\":%zu,\"kv_cache_bytes\":%zu", p->scratch_bytes, p->kv_cache_bytes);
    fprintf(out, ",\"total_bytes\":%zu,\"memory_bytes\":%zu", plan_total(p), p->memory_bytes);
    fprintf(out, ",\"block_size\":%d,\"kv_tokens\":%" PRId64 ",\"kv_groups\":[", p->block_size, p->kv_tokens);
    for (int32_t g = 0; g < p->n_kv_groups; g++)
        fprintf(out, "%s{\"window\":%d,\"n_blocks\":%d,\"block_bytes\":%zu}", g ? "," : "", p->kv_groups[g].window,
                p->kv_groups[g].n_blocks, p->kv_groups[g].block_bytes);
    fprintf(out, "]}\n");
}

void plan_print(const struct engine_plan *plan, bool json, FILE *out)
{
    if (json)
        print_json(plan, out);
    else
        print_table(plan, out);
}
