/* GET /debug/state: what the server and its engine are at, for whoever has to find out why. Nothing of any request's text. */
#include "server/context.h"

#include <string.h>
#include <time.h>

static void write_string(struct text_buffer *out, const char *text)
{
    if (text) text_json_string(out, text, strlen(text));
    else text_string(out, "null");
}

static void write_server(struct text_buffer *out, const struct server *s)
{
    text_printf(out, "{\"version\":\"" GPTD_VERSION "\",\"uptime_seconds\":%lld,\"open\":%s,\"draining\":%s,\"trouble\":",
                (long long)(time(NULL) - s->created), atomic_load(&s->open) ? "true" : "false",
                atomic_load(&s->draining) ? "true" : "false");
    write_string(out, server_trouble(s));
    text_printf(out, ",\"connections\":%d,\"connections_without_request\":%d,\"exchanges\":%d", http_n_connections(s->http),
                http_n_new(s->http), http_n_active(s->http));
}

static void write_blocks(struct text_buffer *out, const struct engine_plan *plan, const struct engine_stats *stats)
{
    for (int32_t g = 0; g < plan->n_kv_groups; g++)
        text_printf(out, "%s{\"total\":%d,\"free\":%d}", g ? "," : "", plan->kv_groups[g].n_blocks, stats->group_free[g]);
}

static void write_engine(struct text_buffer *out, const struct server *s)
{
    struct engine_stats stats;
    int32_t layer;
    engine_stats_get(s->engine, &stats);
    text_printf(out, ",\"engine\":{\"busy\":%s,\"op\":", stats.busy ? "true" : "false");
    write_string(out, engine_progress(&layer));
    text_printf(out, ",\"layer\":%d,\"seconds_since_progress\":%.6f,\"failure\":", layer, watchdog_now() - stats.last_beat);
    write_string(out, stats.failure);
    text_printf(out, ",\"sequences_running\":%d,\"requests_waiting\":%d,\"tokens_waiting\":%lld,\"preemptions\":%llu",
                stats.n_running, stats.n_waiting, (long long)stats.n_waiting_tokens, (unsigned long long)stats.n_preemptions);
    text_printf(out, ",\"last_step\":{\"tokens\":%d,\"sequences\":%d},\"steps\":{\"count\":%llu,\"seconds\":%.6f,"
                "\"host_seconds\":%.6f,\"launch_seconds\":%.6f},\"block_size\":%d,\"blocks\":[",
                stats.step_tokens, stats.step_seqs, (unsigned long long)stats.n_steps, stats.step_seconds, stats.host_seconds,
                stats.launch_seconds, s->limits.plan->block_size);
    write_blocks(out, s->limits.plan, &stats);
    text_string(out, "]}}");
}

enum exchange_next debug_state_handle(struct exchange *x)
{
    struct text_buffer out = {0};
    write_server(&out, x->server);
    write_engine(&out, x->server);
    return exchange_reply_json(x, &out);
}
