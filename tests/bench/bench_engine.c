/* bench_engine.c: what the engine itself costs a step: planning, batch, bookkeeping, publishing.
 *
 *   bench_engine [--json FILE]
 *
 * 64 sequences decode at once on a one-layer model with random weights; host time is the engine's own measure (wall
 * clock) of each step outside the backend and the model, over the steady part of the run. Twice: with a reader that looks
 * every 20 ms, which is the engine's work alone, and with one that every step wakes, which on a machine whose cores are
 * all computing takes the engine's core while it reads.
 */
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine.h"

enum { N_SEQS = 64, N_TOKENS = 2000, PROMPT = 100 };

static void die(const struct error *e)
{
    fprintf(stderr, "bench_engine: %s\n", e->message);
    exit(1);
}

static void write_config(const char *dir, char path[64])
{
    snprintf(path, 64, "%s/config.json", dir);
    FILE *f = fopen(path, "w");
    if (!f) exit(1);
    fputs("{\"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 128,"
          "\"num_hidden_layers\": 1, \"num_attention_heads\": 2, \"num_key_value_heads\": 1, \"vocab_size\": 512,"
          "\"max_position_embeddings\": 4096, \"rms_norm_eps\": 1e-5, \"hidden_act\": \"silu\"}\n", f);
    fclose(f);
}

static void drain(struct request **requests, int event_fd, bool each_step)
{
    for (int left = N_SEQS; left > 0;) {
        struct pollfd p = {.fd = event_fd, .events = POLLIN};
        if (each_step) poll(&p, 1, 1000);
        else usleep(20000);
        uint64_t count;
        if (read(event_fd, &count, sizeof count) < 0) continue;
        left = 0;
        for (int i = 0; i < N_SEQS; i++) {
            struct token_out tokens[64];
            while (request_read(requests[i], 0, tokens, 64) > 0) {}
            if (choice_finish(requests[i], 0, NULL) == FINISH_NONE) left++;
        }
    }
}

static void run(struct engine *engine, bool each_step, FILE *json)
{
    struct error e = {0};
    struct request *requests[N_SEQS];
    struct engine_stats before, after;
    engine_stats_get(engine, &before);
    uint64_t warm = before.generation_tokens + N_SEQS * 50;
    for (int i = 0; i < N_SEQS; i++) {
        int32_t prompt[PROMPT];
        for (int j = 0; j < PROMPT; j++) prompt[j] = rand() % 512;
        requests[i] = request_create(prompt, PROMPT);
        struct sampling_params *params = request_params(requests[i]);
        params->max_tokens = N_TOKENS;
        params->ignore_eos = true;
        if (engine_submit(engine, requests[i], &e)) die(&e);
    }
    do {
        usleep(1000);
        engine_stats_get(engine, &before);
    } while (before.generation_tokens < warm);
    drain(requests, engine_event_fd(engine), each_step);
    engine_stats_get(engine, &after);
    for (int i = 0; i < N_SEQS; i++) request_release(requests[i]);

    double steps = (double)(after.n_steps - before.n_steps);
    double host = (after.host_seconds - before.host_seconds) / steps;
    double step = (after.step_seconds - before.step_seconds) / steps;
    const char *name = each_step ? "host work a step, reader each step" : "host work a step, 64 sequences";
    printf("%-34s %9.1f us (of a step of %.0f us; %.0f steps)\n", name, host * 1e6, step * 1e6, steps);
    if (json) fprintf(json, "{\"name\": \"%s\", \"seconds\": %.4g}\n", name, host);
}

int main(int argc, char **argv)
{
    FILE *json = argc == 3 && !strcmp(argv[1], "--json") ? fopen(argv[2], "w") : NULL;
    char dir[] = "/tmp/gptd-bench-XXXXXX";
    if (!mkdtemp(dir)) return 1;
    char config[64];
    write_config(dir, config);
    struct engine_options options = {
        .model_dir = dir, .backend = "cpu", .dummy_weights = true, .prefix_caching = true, .max_num_seqs = N_SEQS,
        .max_num_batched_tokens = 512, .block_size = 64, .max_queue_requests = 2 * N_SEQS,
        .max_queue_tokens = 1 << 20, .max_logprobs = 5, .slow_client_timeout = 30, .seed = 1};
    struct error e = {0};
    struct engine *engine;
    if (engine_create(&engine, &options, &e) || engine_start(engine, &e)) die(&e);
    unlink(config);
    rmdir(dir);
    run(engine, false, json);
    run(engine, true, json);
    engine_destroy(engine);
    if (json) fclose(json);
    return 0;
}
