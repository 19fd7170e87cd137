/* metrics.h: counters and histograms of the server, rendered as Prometheus text (format 0.0.4).
 *
 * Called by server/ from any thread, never by the engine: its gauges and counters are read from engine_stats_get at
 * each scrape. Names are vLLM's under the prefix gptd_, with its model_name label, so that its dashboards carry over.
 * A call takes one short mutex; nothing allocates but metrics_render.
 */
#ifndef GPTD_SERVER_METRICS_H
#define GPTD_SERVER_METRICS_H

#include <stddef.h>
#include <stdint.h>

#include "engine/engine.h"

struct metrics;

// model_name labels every series (copied). max_model_len bounds the buckets of token counts. NULL: out of memory.
struct metrics *metrics_create(const char *model_name, int32_t max_model_len);
void metrics_destroy(struct metrics *m);

// An HTTP answer has been given. route: a string constant of the route table ("/v1/completions"; "other" where no route
// matched), kept by address; method likewise; status 0: the client left before there was one.
void metrics_http(struct metrics *m, const char *method, const char *route, int32_t status);

// n tokens of one choice came to the reader within that many seconds since the ones before: n observations of
// seconds / n. The first token of a choice is not one of them.
void metrics_inter_token(struct metrics *m, int32_t n, double seconds);

// A request of the engine has ended. times as the engine gives them (0: never got there, not observed);
// generation_tokens over all choices; reason: FINISH_STOP, _LENGTH count as such, _CANCELLED, _EXPIRED and _SLOW as "abort", _ERROR
// as "error".
void metrics_request(struct metrics *m, const struct request_times *times, enum finish_reason reason,
                     int32_t prompt_tokens, int32_t generation_tokens);

// The whole exposition; malloc'd, *length bytes, NUL-terminated. NULL: out of memory.
// Content type: METRICS_CONTENT_TYPE.
char *metrics_render(struct metrics *m, const struct engine_stats *stats, size_t *length);

#define METRICS_CONTENT_TYPE "text/plain; version=0.0.4; charset=utf-8"

#endif
