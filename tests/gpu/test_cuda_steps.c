/* test_cuda_steps.c: how a step's arrays come to the CUDA backend, and ops that run while the one before still does: staged
 * and loose arrays, graphs, steps in flight, blocks that are copied.
 */
#include "tests/gpu/pairs.h"

// Attention over a staged table whose entries change from step to step, recorded once: as without staging.
START_TEST(steps_are_staged_and_replayed)
{
    enum { SEQS = 5, KV = 2, DIM = 64, BLOCKS = 64, WIDTH = CONTEXT / BLOCK };
    struct tensor t = {NULL, DTYPE_BF16, 4, {BLOCKS, KV, BLOCK, DIM}};
    struct pair k = pair_of(DTYPE_BF16, BLOCKS * KV * BLOCK, DIM), v = pair_of(DTYPE_BF16, BLOCKS * KV * BLOCK, DIM);
    struct pair qkv = pair_of(DTYPE_BF16, SEQS, 6 * DIM + 2 * DIM), out = pair_of(DTYPE_BF16, SEQS, 4 * DIM);
    struct kv_layer cache = {t, t};
    static int32_t tables[2][SEQS * WIDTH], lens[2][SEQS], cu[2][SEQS + 1];
    static uint16_t want[SEQS * 4 * DIM], got[SEQS * 4 * DIM];
    cache.k.data = k.g.data, cache.v.data = v.g.data;
    qkv.g.shape[1] = (4 + 2 * KV) * DIM;
    for (int step = 0; step < 40; step++) {
        int32_t *table = tables[step % 2], *len = lens[step % 2];
        int32_t window = step < 20 ? 0 : 100;
        for (int32_t s = 0; s < SEQS; s++) {
            cu[step % 2][s] = s;
            len[s] = random_int(0, 5) ? random_int(1, CONTEXT) : 0; // or a row of padding
            if (window && len[s] > 0) len[s] = random_int(window + 1, CONTEXT);
            for (int32_t b = 0; b < WIDTH; b++)
                table[s * WIDTH + b] = random_int(0, 3) ? (s * WIDTH / 2 + b) % BLOCKS : random_int(0, BLOCKS - 1);
            for (int32_t b = 0; window && len[s] && b < (len[s] - window) / BLOCK; b++) table[s * WIDTH + b] = -1;
        }
        cu[step % 2][SEQS] = SEQS;
        struct attention_params p = {.out = out.g, .qkv = qkv.g, .cache = cache, .cu_seqlens_q = cu[step % 2],
            .context_lens = len, .block_table = table, .n_seqs = SEQS, .max_blocks = WIDTH, .block_size = BLOCK, .n_heads = 4,
            .n_kv_heads = KV, .head_dim = DIM, .window = window, .scale = 0.125f};
        check(gpu->stage(gpu_device, NULL, 0, NULL, &e));
        poison(&out);
        check(gpu->attention(gpu_device, &p, &e));
        check(gpu->copy_out(gpu_device, want, out.g.data, sizeof want, &e));
        const struct stage_array arrays[] = {{cu[step % 2], sizeof cu[0], 4096}, {len, sizeof lens[0], 512}};
        const struct stage_table staged = {table, cu[step % 2], len, SEQS, WIDTH, BLOCK, window, NULL};
        bool replayed, launched = true;
        poison(&out);
        check(gpu->stage(gpu_device, arrays, 2, &staged, &e));
        check(gpu->graph_begin(gpu_device, window ? &k : &v, SEQS, &replayed, &e));
        ck_assert_int_eq(replayed, step % 20 != 0);
        if (!replayed) check(gpu->attention(gpu_device, &p, &e)), check(gpu->graph_end(gpu_device, true, &launched, &e));
        ck_assert(launched);
        check(gpu->copy_out(gpu_device, got, out.g.data, sizeof got, &e));
        ck_assert_mem_eq(got, want, sizeof got);
    }
    // A record that failed leaves nothing behind.
    bool replayed, launched;
    check(gpu->graph_begin(gpu_device, &out, 1, &replayed, &e));
    ck_assert(!replayed);
    check(gpu->graph_end(gpu_device, false, &launched, &e));
    check(gpu->graph_begin(gpu_device, &out, 1, &replayed, &e));
    ck_assert(!replayed);
    check(gpu->graph_end(gpu_device, false, &launched, &e));
    pair_free(&k), pair_free(&v), pair_free(&qkv), pair_free(&out);
}
END_TEST

// As the engine does: a step's arrays are staged while the step before runs, in the buffers of the one before that.
START_TEST(two_steps_in_flight)
{
    enum { N = 24, SEQS = 40, KV = 2, DIM = 128, BLOCKS = 512, WIDTH = CONTEXT / BLOCK };
    struct batch { int32_t table[SEQS * WIDTH], len[SEQS], cu[SEQS + 1]; };
    static struct batch batches[N], buffers[2];
    static uint16_t want[N][SEQS * 4 * DIM], got[SEQS * 4 * DIM];
    struct tensor t = {NULL, DTYPE_BF16, 4, {BLOCKS, KV, BLOCK, DIM}};
    struct pair k = pair_of(DTYPE_BF16, BLOCKS * KV * BLOCK, DIM), v = pair_of(DTYPE_BF16, BLOCKS * KV * BLOCK, DIM);
    struct pair qkv = pair_of(DTYPE_BF16, SEQS, (4 + 2 * KV) * DIM), outs[N];
    struct kv_layer cache = {t, t};
    uint64_t tickets[N];
    cache.k.data = k.g.data, cache.v.data = v.g.data;
    for (int step = 0; step < 2 * N; step++) { // one by one, then again, in flight
        int i = step % N;
        struct batch *b = step < N ? &batches[i] : &buffers[i % 2];
        if (step < N) {
            outs[i] = pair_of(DTYPE_BF16, SEQS, 4 * DIM);
            for (int32_t s = 0; s < SEQS; s++) {
                b->cu[s + 1] = s + 1;
                b->len[s] = random_int(1, CONTEXT);
                for (int32_t j = 0; j < WIDTH; j++) b->table[s * WIDTH + j] = random_int(0, BLOCKS - 1);
            }
            check(gpu->stage(gpu_device, NULL, 0, NULL, &e));
        } else {
            if (i >= 2) check(gpu->wait(gpu_device, tickets[i - 2], &e));
            *b = batches[i];
            const struct stage_array arrays[] = {{b->cu, sizeof b->cu, 4096}, {b->len, sizeof b->len, 512}};
            const struct stage_table table = {b->table, b->cu, b->len, SEQS, WIDTH, BLOCK, 0, NULL};
            check(gpu->stage(gpu_device, arrays, 2, &table, &e));
        }
        struct attention_params p = {.out = outs[i].g, .qkv = qkv.g, .cache = cache, .cu_seqlens_q = b->cu,
            .context_lens = b->len, .block_table = b->table, .n_seqs = SEQS, .max_blocks = WIDTH, .block_size = BLOCK,
            .n_heads = 4, .n_kv_heads = KV, .head_dim = DIM, .scale = 0.0883883f};
        for (int j = 0; step % N == 0 && step > 0 && j < N; j++) poison(&outs[j]);
        check(gpu->attention(gpu_device, &p, &e));
        tickets[i] = gpu->record(gpu_device);
        if (step < N) check(gpu->copy_out(gpu_device, want[i], outs[i].g.data, sizeof want[i], &e));
    }
    for (int i = 0; i < N; i++) {
        check(gpu->copy_out(gpu_device, got, outs[i].g.data, sizeof got, &e));
        ck_assert_msg(!memcmp(got, want[i], sizeof got), "step %d", i);
        pair_free(&outs[i]);
    }
    pair_free(&k), pair_free(&v), pair_free(&qkv);
}
END_TEST

// Keys of earlier steps are read while the kernel before still writes the last ones: of layers on end, as alone.
START_TEST(attention_reads_ahead)
{
    enum { LAYERS = 6, SEQS = 20, KV = 2, HEADS = 8, WIDTH = CONTEXT / BLOCK, BLOCKS = SEQS * WIDTH };
    for (int round = 0; round < rounds(6); round++) {
        const size_t dim = round % 3 ? 64 : 128, rows = (size_t)BLOCKS * KV * BLOCK, bytes = rows * dim * 2;
        const int32_t n = round % 2 ? SEQS : random_int(1, 8);
        const size_t n_out = (size_t)n * HEADS * dim * 2;
        struct tensor t = {NULL, DTYPE_BF16, 4, {BLOCKS, KV, BLOCK, dim}};
        static int32_t table[SEQS * WIDTH], lens[SEQS], starts[SEQS + 1], slots[SEQS];
        struct { struct pair k, v, qkv, out; char *old[2], *want, *got; } layer[LAYERS];
        for (int32_t i = 0; i < SEQS * WIDTH; i++) table[i] = (i * 7) % BLOCKS; // 7 divides no number of blocks
        for (int32_t s = 0; s < n; s++) {
            int32_t last = (lens[s] = random_int(1, CONTEXT)) - 1;
            slots[s] = table[s * WIDTH + last / BLOCK] * BLOCK + last % BLOCK, starts[s + 1] = s + 1;
        }
        const struct stage_array arrays[] = {{starts, ((size_t)n + 1) * 4, sizeof starts}, {lens, (size_t)n * 4, sizeof lens},
                                             {slots, (size_t)n * 4, sizeof slots}};
        const struct stage_table staged = {table, starts, lens, n, WIDTH, BLOCK, 0, NULL};
        for (int i = 0; i < LAYERS; i++) {
            layer[i].k = pair_of(DTYPE_BF16, rows, dim), layer[i].v = pair_of(DTYPE_BF16, rows, dim);
            layer[i].qkv = pair_of(DTYPE_BF16, (size_t)n, (HEADS + 2 * KV) * dim);
            layer[i].out = pair_of(DTYPE_BF16, (size_t)n, HEADS * dim);
            layer[i].old[0] = malloc(bytes), layer[i].old[1] = malloc(bytes);
            layer[i].want = malloc(n_out), layer[i].got = malloc(n_out);
            check(gpu->copy_out(gpu_device, layer[i].old[0], layer[i].k.g.data, bytes, &e));
            check(gpu->copy_out(gpu_device, layer[i].old[1], layer[i].v.g.data, bytes, &e));
        }
        for (int pass = 0; pass < 2; pass++) {
            check(gpu->stage(gpu_device, arrays, pass ? 3 : 0, pass ? &staged : NULL, &e));
            for (int i = 0; i < LAYERS; i++) {
                struct kv_layer cache = {t, t};
                cache.k.data = layer[i].k.g.data, cache.v.data = layer[i].v.g.data;
                struct rope_kv_write_params r = {layer[i].qkv.g, {0}, cache, slots, HEADS, KV, (int32_t)dim, 0};
                struct attention_params p = {.out = layer[i].out.g, .qkv = layer[i].qkv.g, .cache = cache, .cu_seqlens_q = starts,
                    .context_lens = lens, .block_table = table, .n_seqs = n, .max_blocks = WIDTH, .block_size = BLOCK,
                    .n_heads = HEADS, .n_kv_heads = KV, .head_dim = (int32_t)dim, .scale = 0.1f};
                check(gpu->rope_kv_write(gpu_device, &r, &e));
                check(gpu->attention(gpu_device, &p, &e));
            }
            for (int i = 0; i < LAYERS; i++) {
                check(gpu->copy_out(gpu_device, pass ? layer[i].got : layer[i].want, layer[i].out.g.data, n_out, &e));
                check(gpu->copy_in(gpu_device, layer[i].k.g.data, layer[i].old[0], bytes, &e));
                check(gpu->copy_in(gpu_device, layer[i].v.g.data, layer[i].old[1], bytes, &e));
                poison(&layer[i].out);
            }
        }
        for (int i = 0; i < LAYERS; i++) {
            ck_assert_msg(!memcmp(layer[i].got, layer[i].want, n_out), "%d sequences, head_dim %zu: layer %d", n, dim, i);
            pair_free(&layer[i].k), pair_free(&layer[i].v), pair_free(&layer[i].qkv), pair_free(&layer[i].out);
            free(layer[i].old[0]), free(layer[i].old[1]), free(layer[i].want), free(layer[i].got);
        }
    }
}
END_TEST

START_TEST(blocks_are_copied)
{
    enum { N = 20, BYTES = 2 * 16 * 40 * 2 };
    struct tensor t = {NULL, DTYPE_BF16, 4, {N, 2, 16, 40}};
    struct kv_layer layer = {t, t};
    static unsigned char k[N][BYTES], v[N][BYTES], got[N][BYTES];
    for (int i = 0; i < N; i++)
        for (int j = 0; j < BYTES; j++) k[i][j] = (unsigned char)rand(), v[i][j] = (unsigned char)rand();
    layer.k.data = gpu->alloc(gpu_device, sizeof k), layer.v.data = gpu->alloc(gpu_device, sizeof v);
    check(gpu->copy_in(gpu_device, layer.k.data, k, sizeof k, &e));
    check(gpu->copy_in(gpu_device, layer.v.data, v, sizeof v, &e));
    int32_t from[] = {3, 0, 7}, to[] = {12, 19, 1};
    check(gpu->copy_blocks(gpu_device, layer, from, to, 3, &e));
    for (int i = 0; i < 3; i++) memcpy(k[to[i]], k[from[i]], BYTES), memcpy(v[to[i]], v[from[i]], BYTES);
    check(gpu->copy_out(gpu_device, got, layer.k.data, sizeof k, &e));
    ck_assert_mem_eq(got, k, sizeof k);
    check(gpu->copy_out(gpu_device, got, layer.v.data, sizeof v, &e));
    ck_assert_mem_eq(got, v, sizeof v);
    gpu->free(gpu_device, layer.k.data), gpu->free(gpu_device, layer.v.data);
}
END_TEST

// Staged arrays are read as they were when they were staged; loose ones as they are when the op is called.
START_TEST(host_arrays_are_copied_when_they_are_given)
{
    struct pair table = pair_of(DTYPE_BF16, VOCAB, 64), out = pair_of(DTYPE_BF16, 3, 64);
    struct history history = {gpu->alloc(gpu_device, 16), 1, 4};
    int32_t tokens[3] = {1, 2, 3}, zeros[3] = {0};
    struct embedding_params g = {.out = out.g, .token_table = table.g, .tokens = tokens, .positions = zeros,
                                 .history_rows = zeros, .history = history, .scale = 1}, c = g;
    c.out = out.c, c.token_table = table.c;
    check(cpu->embedding(cpu_device, &c, &e));
    check(gpu->stage(gpu_device, &(struct stage_array){tokens, sizeof tokens, 4096}, 1, NULL, &e));
    memset(tokens, 0, sizeof tokens);
    check(gpu->embedding(gpu_device, &g, &e));
    expect_close(&out, 1, "staged");
    check(gpu->stage(gpu_device, NULL, 0, NULL, &e));
    for (int32_t i = 0; i < rounds(2000); i++) { // many turns of the ring of loose arrays
        for (int32_t j = 0; j < 3; j++) tokens[j] = (i * 3 + j) % VOCAB;
        check(gpu->embedding(gpu_device, &g, &e));
        memset(tokens, 0, sizeof tokens);
    }
    for (int32_t j = 0; j < 3; j++) tokens[j] = ((rounds(2000) - 1) * 3 + j) % VOCAB;
    check(cpu->embedding(cpu_device, &c, &e));
    expect_close(&out, 1, "loose");
    pair_free(&table), pair_free(&out);
    gpu->free(gpu_device, history.tokens);
}
END_TEST

int main(void)
{
    open_devices();
    Suite *suite = suite_create("cuda_steps");
    TCase *tc = tcase_create("cuda_steps");
    tcase_set_timeout(tc, 0);
    tcase_add_test(tc, steps_are_staged_and_replayed);
    tcase_add_test(tc, two_steps_in_flight);
    tcase_add_test(tc, attention_reads_ahead);
    tcase_add_test(tc, blocks_are_copied);
    tcase_add_test(tc, host_arrays_are_copied_when_they_are_given);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
