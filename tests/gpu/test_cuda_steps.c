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
        check(gpu->stage(gpu_device, NULL, 0, NULL, 0, &e));
        poison(&out);
        check(gpu->attention(gpu_device, &p, &e));
        check(gpu->copy_out(gpu_device, want, out.g.data, sizeof want, &e));
        const struct stage_array arrays[] = {{cu[step % 2], sizeof cu[0], 4096}, {len, sizeof lens[0], 512}};
        const struct stage_table staged = {table, cu[step % 2], len, SEQS, WIDTH, BLOCK, window, NULL};
        bool replayed, launched = true;
        poison(&out);
        check(gpu->stage(gpu_device, arrays, 2, &staged, 1, &e));
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
            check(gpu->stage(gpu_device, NULL, 0, NULL, 0, &e));
        } else {
            if (i >= 2) check(gpu->wait(gpu_device, tickets[i - 2], &e));
            *b = batches[i];
            const struct stage_array arrays[] = {{b->cu, sizeof b->cu, 4096}, {b->len, sizeof b->len, 512}};
            const struct stage_table table = {b->table, b->cu, b->len, SEQS, WIDTH, BLOCK, 0, NULL};
            check(gpu->stage(gpu_device, arrays, 2, &table, 1, &e));
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

enum { AHEAD_LAYERS = 6, AHEAD_SEQS = 20, HEADS = 8, KV_HEADS = 2, HIDDEN = 256, WIDTH = CONTEXT / BLOCK };

struct ahead_layer {
    struct pair k, v, w, norm, x, normed, qkv, cos_sin, out;
    char *old[2], *want, *got;
};

struct ahead_step {
    int32_t n, table[AHEAD_SEQS * WIDTH], lens[AHEAD_SEQS], starts[AHEAD_SEQS + 1], slots[AHEAD_SEQS];
};

static void layer_make(struct ahead_layer *l, size_t n, size_t dim)
{
    const size_t rows = (size_t)AHEAD_SEQS * WIDTH * KV_HEADS * BLOCK, width = (HEADS + 2 * KV_HEADS) * dim;
    l->k = pair_of(DTYPE_BF16, rows, dim), l->v = pair_of(DTYPE_BF16, rows, dim);
    l->w = pair_of(DTYPE_BF16, width, HIDDEN), l->norm = pair_of(DTYPE_BF16, 1, HIDDEN);
    l->norm.g.n_dims = 1, l->norm.g.shape[0] = HIDDEN;
    l->x = pair_of(DTYPE_BF16, n, HIDDEN), l->normed = pair_of(DTYPE_BF16, n, HIDDEN);
    l->qkv = pair_of(DTYPE_BF16, n, width), l->cos_sin = pair_of(DTYPE_F32, n, dim), l->out = pair_of(DTYPE_BF16, n, HEADS * dim);
    for (int i = 0; i < 2; i++) {
        l->old[i] = malloc(rows * dim * 2);
        check(gpu->copy_out(gpu_device, l->old[i], i ? l->v.g.data : l->k.g.data, rows * dim * 2, &e));
    }
    l->want = malloc(n * HEADS * dim * 2), l->got = malloc(n * HEADS * dim * 2);
}

static void layer_end(struct ahead_layer *l)
{
    pair_free(&l->k), pair_free(&l->v), pair_free(&l->w), pair_free(&l->norm), pair_free(&l->x), pair_free(&l->normed);
    pair_free(&l->qkv), pair_free(&l->cos_sin), pair_free(&l->out);
    free(l->old[0]), free(l->old[1]), free(l->want), free(l->got);
}

// What a decode step does in a layer up to attention: q, k and v are made, the last two written, then attended to.
static void layer_run(const struct ahead_layer *l, const struct ahead_step *s, size_t dim)
{
    struct tensor t = {NULL, DTYPE_BF16, 4, {AHEAD_SEQS * WIDTH, KV_HEADS, BLOCK, dim}};
    struct kv_layer cache = {t, t};
    struct weight w = {.n_parts = 1, .n_cols = HIDDEN};
    w.part[0] = (struct weight_part){.data = l->w.g.data, .dtype = DTYPE_BF16, .n_rows = l->w.g.shape[0]};
    cache.k.data = l->k.g.data, cache.v.data = l->v.g.data;
    struct norm_params norm = {.out = l->normed.g, .x = l->x.g, .weight = l->norm.g, .eps = 1e-5f};
    struct linear_params linear = {l->qkv.g, l->normed.g, &w, false};
    struct rope_kv_write_params rope = {.qkv = l->qkv.g, .cos_sin = l->cos_sin.g, .cache = cache, .slot_mapping = s->slots,
        .n_heads = HEADS, .n_kv_heads = KV_HEADS, .head_dim = (int32_t)dim, .rope_dim = (int32_t)dim};
    struct attention_params p = {.out = l->out.g, .qkv = l->qkv.g, .cache = cache, .cu_seqlens_q = s->starts,
        .context_lens = s->lens, .block_table = s->table, .n_seqs = s->n, .max_blocks = WIDTH, .block_size = BLOCK,
        .n_heads = HEADS, .n_kv_heads = KV_HEADS, .head_dim = (int32_t)dim, .scale = 0.01f};
    check(gpu->norm_linear_rope(gpu_device, &norm, &linear, &rope, &e));
    check(gpu->attention(gpu_device, &p, &e));
}

// The results, and everything as it was before.
static void layer_take(struct ahead_layer *l, char *to)
{
    size_t bytes = l->k.g.shape[0] * l->k.g.shape[1] * 2;
    check(gpu->copy_out(gpu_device, to, l->out.g.data, l->out.g.shape[0] * l->out.g.shape[1] * 2, &e));
    check(gpu->copy_in(gpu_device, l->k.g.data, l->old[0], bytes, &e));
    check(gpu->copy_in(gpu_device, l->v.g.data, l->old[1], bytes, &e));
    poison(&l->out), poison(&l->qkv);
}

// Keys of earlier steps are read while the kernel before still makes q and the last keys: layers on end in a graph have the
// bits that they have op by op, with arrays that nobody staged.
START_TEST(attention_reads_ahead)
{
    static const char owners[6];
    const bool is_short = rounds(6) < 6; // then without cuBLASLt, which has the products of many
    for (int round = 0; round < (is_short ? 2 : 6); round++) {
        static struct ahead_step s;
        struct ahead_layer layers[AHEAD_LAYERS];
        const size_t dim = round % 3 ? 64 : 128;
        s.n = round % 2 && !is_short ? AHEAD_SEQS : random_int(1, 8);
        for (int i = 0; i < AHEAD_LAYERS; i++) layer_make(&layers[i], (size_t)s.n, dim);
        for (int step = 0; step < 5; step++) {
            for (int32_t i = 0; i < AHEAD_SEQS * WIDTH; i++) s.table[i] = (i * 7 + step) % (AHEAD_SEQS * WIDTH); // all of them
            for (int32_t i = 0; i < s.n; i++) {
                int32_t last = (s.lens[i] = random_int(1, CONTEXT)) - 1;
                s.slots[i] = s.table[i * WIDTH + last / BLOCK] * BLOCK + last % BLOCK, s.starts[i + 1] = i + 1;
            }
            const size_t n = (size_t)s.n * sizeof(int32_t);
            const struct stage_array arrays[] = {{s.starts, n + sizeof(int32_t), sizeof s.starts}, {s.lens, n, sizeof s.lens},
                                                 {s.slots, n, sizeof s.slots}};
            const struct stage_table table = {s.table, s.starts, s.lens, s.n, WIDTH, BLOCK, 0, NULL};
            bool replayed, launched = true;
            check(gpu->stage(gpu_device, NULL, 0, NULL, 0, &e));
            for (int i = 0; i < AHEAD_LAYERS; i++) layer_run(&layers[i], &s, dim);
            for (int i = 0; i < AHEAD_LAYERS; i++) layer_take(&layers[i], layers[i].want);
            check(gpu->stage(gpu_device, arrays, 3, &table, 1, &e));
            check(gpu->graph_begin(gpu_device, &owners[round], s.n, &replayed, &e));
            ck_assert_int_eq(replayed, step > 0);
            for (int i = 0; !replayed && i < AHEAD_LAYERS; i++) layer_run(&layers[i], &s, dim);
            if (!replayed) check(gpu->graph_end(gpu_device, true, &launched, &e));
            ck_assert(launched);
            for (int i = 0; i < AHEAD_LAYERS; i++) layer_take(&layers[i], layers[i].got);
            for (int i = 0; i < AHEAD_LAYERS; i++)
                ck_assert_msg(!memcmp(layers[i].got, layers[i].want, (size_t)s.n * HEADS * dim * 2),
                              "%d sequences, head_dim %zu, step %d: layer %d", s.n, dim, step, i);
        }
        for (int i = 0; i < AHEAD_LAYERS; i++) layer_end(&layers[i]);
    }
}
END_TEST

// Two groups of layers, one with a window, on two staged tables, recorded once: as without staging. A device of one table, and
// any device of a table too many, refuse.
START_TEST(tables_have_their_places)
{
    enum { SEQS = 6, KV = 2, DIM = 64, BLOCKS = 64, WINDOW = 150, N_TABLES = 2 };
    struct device_options options = device_options();
    struct device *d;
    options.n_tables = N_TABLES;
    check(gpu->device_create(&d, &options, &e));
    struct tensor t = {NULL, DTYPE_BF16, 4, {BLOCKS, KV, BLOCK, DIM}};
    struct pair k = pair_of(DTYPE_BF16, BLOCKS * KV * BLOCK, DIM), v = pair_of(DTYPE_BF16, BLOCKS * KV * BLOCK, DIM);
    struct pair qkv = pair_of(DTYPE_BF16, SEQS, (4 + 2 * KV) * DIM), out = pair_of(DTYPE_BF16, N_TABLES * SEQS, 4 * DIM);
    struct kv_layer cache = {t, t};
    static int32_t tables[2][N_TABLES][SEQS * WIDTH], lens[2][SEQS], cu[SEQS + 1];
    static uint16_t want[N_TABLES * SEQS * 4 * DIM], got[N_TABLES * SEQS * 4 * DIM];
    static const char owner;
    cache.k.data = k.g.data, cache.v.data = v.g.data;
    for (int32_t s = 0; s <= SEQS; s++) cu[s] = s;
    for (int step = 0; step < 30; step++) {
        int32_t *len = lens[step % 2];
        struct stage_table staged[N_TABLES];
        struct attention_params p[N_TABLES];
        for (int32_t s = 0; s < SEQS; s++) len[s] = step % 5 == 4 ? random_int(1, CONTEXT) : lens[(step + 1) % 2][s] % CONTEXT + 1;
        for (int i = 0; i < N_TABLES; i++) {
            int32_t *table = tables[step % 2][i];
            memcpy(table, tables[(step + 1) % 2][i], sizeof tables[0][0]);
            for (int32_t j = 0; j < SEQS * WIDTH; j++) // the first step: all; then some
                if (step == 0 || random_int(0, 20) == 0) table[j] = random_int(0, BLOCKS - 1);
            staged[i] = (struct stage_table){table, cu, len, SEQS, WIDTH, BLOCK, i ? WINDOW : 0, NULL};
            struct tensor rows = out.g;
            rows.shape[0] = SEQS, rows.data = (char *)out.g.data + (size_t)i * SEQS * 4 * DIM * 2;
            p[i] = (struct attention_params){.out = rows, .qkv = qkv.g, .cache = cache, .cu_seqlens_q = cu, .context_lens = len,
                .block_table = table, .n_seqs = SEQS, .max_blocks = WIDTH, .block_size = BLOCK, .n_heads = 4, .n_kv_heads = KV,
                .head_dim = DIM, .window = i ? WINDOW : 0, .scale = 0.125f};
        }
        const struct stage_array arrays[] = {{cu, sizeof cu, 4096}, {len, sizeof lens[0], 512}};
        bool replayed, launched = true;
        check(gpu->stage(d, NULL, 0, NULL, 0, &e));
        poison(&out);
        for (int i = 0; i < N_TABLES; i++) check(gpu->attention(d, &p[i], &e));
        check(gpu->copy_out(d, want, out.g.data, sizeof want, &e));
        poison(&out);
        check(gpu->stage(d, arrays, 2, staged, N_TABLES, &e));
        check(gpu->graph_begin(d, &owner, SEQS, &replayed, &e));
        ck_assert_int_eq(replayed, step > 0);
        for (int i = 0; !replayed && i < N_TABLES; i++) check(gpu->attention(d, &p[i], &e));
        if (!replayed) check(gpu->graph_end(d, true, &launched, &e));
        ck_assert(launched);
        check(gpu->copy_out(d, got, out.g.data, sizeof got, &e));
        ck_assert_msg(!memcmp(got, want, sizeof got), "step %d", step);
        const struct stage_table many[] = {staged[0], staged[1], staged[0]};
        if (step < 29) continue;
        ck_assert_int_eq(gpu->stage(d, arrays, 2, many, N_TABLES + 1, &e), ERR_INVALID);
        ck_assert_int_eq(gpu->stage(gpu_device, arrays, 2, many, 2, &e), ERR_INVALID);
    }
    gpu->device_destroy(d);
    options.n_tables = 1000;
    ck_assert_int_eq(gpu->device_create(&d, &options, &e), ERR_INVALID);
    check(gpu->stage(gpu_device, NULL, 0, NULL, 0, &e));
    pair_free(&k), pair_free(&v), pair_free(&qkv), pair_free(&out);
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
    check(gpu->stage(gpu_device, &(struct stage_array){tokens, sizeof tokens, 4096}, 1, NULL, 0, &e));
    memset(tokens, 0, sizeof tokens);
    check(gpu->embedding(gpu_device, &g, &e));
    expect_close(&out, 1, "staged");
    check(gpu->stage(gpu_device, NULL, 0, NULL, 0, &e));
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
    tcase_add_test(tc, tables_have_their_places);
    tcase_add_test(tc, blocks_are_copied);
    tcase_add_test(tc, host_arrays_are_copied_when_they_are_given);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
