/* test_cuda_deterministic.c: what `deterministic` promises, bit for bit: a row of linear and of attention alone, in any
 * batch and in any chunk; a model's logits likewise, and after preemption, on every checkpoint under tests/vectors.
 */
#include "tests/kernel_helpers.h"
#include "tests/model_vectors.h"

enum { MAX_TOKENS = 4096, HEAD_DIM = 256, CONTEXT = 1500 };

static const struct kernels *gpu;
static struct device *device;
static struct error e;

static void check(int rc)
{
    CHECK_MSG(rc == 0, "%s", e.message);
}

static void open_device(void)
{
    struct device_options o = {.deterministic = true, .max_vocab_size = 1000, .max_context = CONTEXT, .max_dim = 16384,
                               .max_tokens = MAX_TOKENS, .max_seqs = 64, .n_heads = 16, .n_kv_heads = 16,
                               .head_dim = HEAD_DIM, .block_size = 16};
    check(kernels_open(&gpu, "cuda", &e));
    check(gpu->device_create(&device, &o, &e));
    printf("%s\n", gpu->device_description(device));
}

static void close_device(void)
{
    gpu->device_destroy(device);
}

// n elements that differ: pieces of a few random ones, since drawing tens of millions takes long.
static void *some_elements(enum dtype dtype, size_t n)
{
    enum { DRAWN = 1 << 18 };
    static void *drawn[2];
    void **from = &drawn[dtype == DTYPE_F16];
    size_t size = dtype_size(dtype);
    if (!*from) *from = random_elements(dtype, DRAWN);
    char *data = malloc(n * size);
    for (size_t i = 0; i < n;) {
        size_t first = (size_t)rng_below(DRAWN / 2), piece = (size_t)rng_below(DRAWN / 2) + 1;
        if (piece > n - i) piece = n - i;
        memcpy(data + i * size, (char *)*from + first * size, piece * size);
        i += piece;
    }
    return data;
}

static struct tensor device_matrix(enum dtype dtype, size_t rows, size_t cols, const void *values)
{
    struct tensor t = matrix(gpu->alloc(device, rows * cols * dtype_size(dtype)), dtype, rows, cols);
    CHECK_MSG(t.data != NULL, "no memory for [%zu, %zu]", rows, cols);
    if (values) check(gpu->copy_in(device, t.data, values, rows * cols * dtype_size(dtype), &e));
    return t;
}

static void device_free(const struct tensor *t)
{
    gpu->free(device, t->data);
}

// ---- linear ---------------------------------------------------------------------------------------------------------

struct product {
    size_t K, parts[3];
    bool bias, accumulate, wide; // wide: F32 out
};

static const struct product products[] = {
    {64, {40}, .bias = true}, {64, {97}, .wide = true}, {192, {192, 64, 64}, .bias = true},
    {44, {30}, .bias = false}, {264, {1000, 1000}, .bias = false}, {1000, {264}, .accumulate = true},
    {2048, {32000}, .wide = true}, {4096, {4096, 1024, 1024}, .bias = false}, {4096, {4096}, .accumulate = true},
    {4096, {14336, 14336}, .bias = false}, {14336, {4096}, .accumulate = true},
    {1024, {6144}, .bias = true}, {1000, {97}, .accumulate = true}, {512, {256}, .bias = true, .accumulate = true},
    {192, {36}, .accumulate = true},
};
enum { N_PRODUCTS = sizeof products / sizeof *products, ALONE = 300 };

struct trial {
    const struct product *p;
    struct weight weight;
    struct tensor x, row, out;   // [MAX_TOKENS, K], [1, K], [MAX_TOKENS, N]
    char *before, *got;          // host, [MAX_TOKENS, N]: what out holds before the call, and after
    size_t row_bytes;            // of out
};

static void trial_open(struct trial *b, const struct product *p, enum dtype dtype)
{
    size_t n = 0;
    *b = (struct trial){.p = p, .weight.n_cols = p->K};
    for (; b->weight.n_parts < 3 && p->parts[b->weight.n_parts]; b->weight.n_parts++) {
        size_t rows = p->parts[b->weight.n_parts];
        struct weight_part *part = &b->weight.part[b->weight.n_parts];
        void *w = some_elements(dtype, rows * p->K), *bias = some_elements(dtype, rows);
        *part = (struct weight_part){.data = device_matrix(dtype, rows, p->K, w).data, .dtype = dtype, .n_rows = rows};
        if (p->bias) part->bias = vector(device_matrix(dtype, 1, rows, bias).data, dtype, rows);
        free(w), free(bias);
        n += rows;
    }
    enum dtype out = p->wide ? DTYPE_F32 : dtype;
    void *x = some_elements(dtype, MAX_TOKENS * p->K);
    b->x = device_matrix(dtype, MAX_TOKENS, p->K, x), b->row = device_matrix(dtype, 1, p->K, NULL);
    b->out = device_matrix(out, MAX_TOKENS, n, NULL);
    b->row_bytes = n * dtype_size(out);
    b->before = p->accumulate ? some_elements(dtype, MAX_TOKENS * n) : memset(malloc(MAX_TOKENS * b->row_bytes), 0xFF,
                                                                              MAX_TOKENS * b->row_bytes);
    b->got = malloc(MAX_TOKENS * b->row_bytes);
    free(x);
}

static void trial_close(struct trial *b)
{
    for (int32_t i = 0; i < b->weight.n_parts; i++) {
        gpu->free(device, (void *)b->weight.part[i].data);
        gpu->free(device, b->weight.part[i].bias.data);
    }
    device_free(&b->x), device_free(&b->row), device_free(&b->out);
    free(b->before), free(b->got);
}

// `got` becomes the product of T rows; `before`: what is added to.
static void multiply(struct trial *b, struct tensor x, size_t T, const char *before, char *got)
{
    struct tensor out = b->out;
    x.shape[0] = out.shape[0] = T;
    check(gpu->copy_in(device, out.data, before, T * b->row_bytes, &e));
    check(gpu->linear(device, &(struct linear_params){out, x, &b->weight, b->p->accumulate}, &e));
    check(gpu->copy_out(device, got, out.data, T * b->row_bytes, &e));
}

START_TEST(linear_rows_do_not_depend_on_their_number)
{
    const struct product *p = &products[_i / 2];
    enum dtype dtype = _i % 2 ? DTYPE_F16 : DTYPE_BF16;
    struct trial b;
    trial_open(&b, p, dtype);
    char *alone = malloc(MAX_TOKENS * b.row_bytes);
    for (size_t r = 0; r < ALONE; r++) {
        const int32_t row = (int32_t)r;
        check(gpu->gather_rows(device, &(struct gather_rows_params){b.row, b.x, &row, 1}, &e));
        multiply(&b, b.row, 1, b.before + r * b.row_bytes, alone + r * b.row_bytes);
    }
    const size_t more[] = {301, 512, 1000, 1024, 2047, MAX_TOKENS};
    size_t n_wrong = 0, worst = 0;
    for (size_t i = 0; i < ALONE + sizeof more / sizeof *more; i++) {
        size_t T = i < ALONE ? i + 1 : more[i - ALONE], n = T < ALONE ? T : ALONE;
        if (p->K > 1000 && T > 40 && T < ALONE && T % 9) continue; // hundreds of megabytes each
        multiply(&b, b.x, T, b.before, b.got);
        if (memcmp(b.got, alone, n * b.row_bytes)) n_wrong++, worst = T;
    }
    // Rows that were not computed alone: those of all against those of half.
    multiply(&b, b.x, MAX_TOKENS, b.before, alone);
    multiply(&b, b.x, MAX_TOKENS / 2, b.before, b.got);
    bool same_halves = !memcmp(b.got, alone, MAX_TOKENS / 2 * b.row_bytes);
    trial_close(&b);
    free(alone);
    CHECK_MSG(n_wrong == 0 && same_halves, "%s, K %zu, N %zu: %zu numbers of rows, %zu for one, change a row's bits%s",
              dtype_name(dtype), p->K, p->parts[0], n_wrong, worst, same_halves ? "" : "; so do 2048 and 4096");
}
END_TEST

// ---- attention ------------------------------------------------------------------------------------------------------

enum { MAX_QUERIES = 70, SEQS = 5, MAX_BLOCKS = (CONTEXT + 15) / 16 };

struct attention_case {
    struct attention_params p;
    int32_t cu[SEQS + 1], context[SEQS], table[SEQS * MAX_BLOCKS];
    size_t out_bytes, qkv_width; // a row's
};

static void case_open(struct attention_case *a, enum dtype dtype)
{
    static const int32_t heads[][2] = {{4, 2}, {8, 1}, {3, 3}, {16, 4}}, dims[] = {64, 80, 96, 128, 256, 40};
    int32_t i = rng_below(4), n_blocks = SEQS * MAX_BLOCKS, n = 0;
    struct attention_params *p = &a->p;
    *p = (struct attention_params){.n_seqs = SEQS, .max_blocks = MAX_BLOCKS, .n_heads = heads[i][0], .n_kv_heads = heads[i][1],
                                   .head_dim = dims[rng_below(6)], .block_size = 16 << rng_below(3),
                                   .window = rng_below(2) ? 1 + rng_below(300) : 0, .softcap = rng_below(3) ? 0 : 30};
    p->scale = 1 / sqrtf((float)p->head_dim);
    for (int32_t s = 0; s < n_blocks; s++) { // in random order, no block twice
        int32_t j = rng_below(s + 1);
        a->table[s] = a->table[j], a->table[j] = s;
    }
    for (int32_t s = 0; s < SEQS; s++) {
        int32_t n_q = rng_below(3) ? 1 + rng_below(MAX_QUERIES) : 1;
        a->cu[s] = n, a->context[s] = n_q + rng_below(CONTEXT - n_q);
        n += n_q;
    }
    a->cu[SEQS] = n;
    size_t dim = (size_t)p->head_dim, width = (size_t)(p->n_heads + 2 * p->n_kv_heads) * dim;
    size_t cache = (size_t)(n_blocks * p->n_kv_heads * p->block_size) * dim;
    void *qkv = some_elements(dtype, (size_t)n * width), *k = some_elements(dtype, cache), *v = some_elements(dtype, cache);
    p->qkv = device_matrix(dtype, (size_t)n, width, qkv);
    p->out = device_matrix(dtype, (size_t)n, (size_t)p->n_heads * dim, NULL);
    struct tensor tile = {NULL, dtype, 4, {(size_t)n_blocks, (size_t)p->n_kv_heads, (size_t)p->block_size, dim}};
    p->cache = (struct kv_layer){tile, tile};
    p->cache.k.data = device_matrix(dtype, 1, cache, k).data, p->cache.v.data = device_matrix(dtype, 1, cache, v).data;
    p->cu_seqlens_q = a->cu, p->context_lens = a->context, p->block_table = a->table;
    a->out_bytes = (size_t)p->n_heads * dim * dtype_size(dtype), a->qkv_width = width;
    free(qkv), free(k), free(v);
}

static void case_close(struct attention_case *a)
{
    device_free(&a->p.qkv), device_free(&a->p.out), device_free(&a->p.cache.k), device_free(&a->p.cache.v);
}

// Queries first .. end - 1 of sequence s as a batch of their own; got: their rows of out.
static void attend_part(const struct attention_case *a, int32_t s, int32_t first, int32_t end, char *got)
{
    struct attention_params p = a->p;
    int32_t cu[2] = {0, end - first}, n_q = a->cu[s + 1] - a->cu[s], context = a->context[s] - n_q + end;
    size_t size = dtype_size(p.out.dtype);
    p.n_seqs = 1, p.cu_seqlens_q = cu, p.context_lens = &context, p.block_table = a->table + (size_t)s * MAX_BLOCKS;
    p.qkv.shape[0] = p.out.shape[0] = (size_t)(end - first);
    p.qkv.data = (char *)p.qkv.data + (size_t)(a->cu[s] + first) * a->qkv_width * size;
    check(gpu->attention(device, &p, &e));
    check(gpu->copy_out(device, got, p.out.data, (size_t)(end - first) * a->out_bytes, &e));
}

START_TEST(attention_rows_do_not_depend_on_their_batch)
{
    for (int32_t round = 0; round < 30; round++) {
        struct attention_case a;
        case_open(&a, round % 2 ? DTYPE_F16 : DTYPE_BF16);
        size_t n = (size_t)a.cu[SEQS];
        char *together = malloc(n * a.out_bytes), *apart = malloc(n * a.out_bytes);
        check(gpu->attention(device, &a.p, &e));
        check(gpu->copy_out(device, together, a.p.out.data, n * a.out_bytes, &e));
        for (int32_t most = 1; most <= 64; most += 9) { // chunks of 1, 10, ... queries
            for (int32_t s = 0; s < SEQS; s++)
                for (int32_t q = 0, end; q < a.cu[s + 1] - a.cu[s]; q = end) {
                    end = q + most < a.cu[s + 1] - a.cu[s] ? q + most : a.cu[s + 1] - a.cu[s];
                    attend_part(&a, s, q, end, apart + (size_t)(a.cu[s] + q) * a.out_bytes);
                }
            for (size_t r = 0; r < n; r++)
                CHECK_MSG(!memcmp(apart + r * a.out_bytes, together + r * a.out_bytes, a.out_bytes),
                          "round %d, head_dim %d, window %d, chunks of %d: row %zu of %zu differs", round, a.p.head_dim,
                          a.p.window, most, r, n);
        }
        case_close(&a);
        free(together), free(apart);
    }
}
END_TEST

// ---- models ---------------------------------------------------------------------------------------------------------

enum { COMPANY = 3, COMPANY_CHUNK = 20 };

struct sequence {
    const int32_t *ids;
    int32_t n_context, n_new;
    int32_t table[MAX_LEN / 16];
};

struct models {
    struct rig rig;
    struct expected x;
    struct sequence main, company[COMPANY];
    int32_t company_ids[COMPANY][MAX_LEN];
    float logits[MAX_ROWS * MAX_VOCAB], first[MAX_ROWS * MAX_VOCAB]; // first: of the whole sequence in one step
};

static char cases[MAX_CASES][128];
static int n_cases;

static void sequence_reset(struct sequence *s)
{
    s->n_context = 0;
    memset(s->table, 0xFF, sizeof s->table);
}

static void models_reset(struct models *m)
{
    rig_reset(&m->rig);
    sequence_reset(&m->main);
    for (int32_t i = 0; i < COMPANY; i++) sequence_reset(&m->company[i]);
}

// One step of the sequences, in the order given; logits of the rows that x wants of the main one go to their place.
static void step(struct models *m, struct sequence **seqs, int32_t n_seqs)
{
    enum { MOST = MAX_LEN + COMPANY * COMPANY_CHUNK, TABLE = (COMPANY + 1) * (MAX_LEN / 16) };
    int32_t tokens[MOST], positions[MOST], zeros[MOST] = {0}, cu[COMPANY + 2] = {0}, context[COMPANY + 1];
    int32_t slots[MAX_KV_GROUPS][MOST], tables[MAX_KV_GROUPS][TABLE], rows[MAX_ROWS], n = 0, n_rows = 0, first_row = 0;
    struct rig *r = &m->rig;
    for (int32_t i = 0; i < n_seqs; i++) {
        struct sequence *s = seqs[i];
        for (int32_t j = 0; j < s->n_new; j++, n++) {
            int32_t position = s->n_context + j, *block = &s->table[position / r->block_size];
            if (*block < 0) *block = r->groups[0].free_blocks[--r->groups[0].n_free];
            tokens[n] = s->ids[position], positions[n] = position;
            slots[0][n] = *block * r->block_size + position % r->block_size;
        }
        for (int32_t k = 0; s == &m->main && k < m->x.n_rows; k++) {
            int32_t at = m->x.rows[k] - s->n_context;
            if (at < 0) first_row++;
            else if (at < s->n_new) rows[n_rows++] = cu[i] + at;
        }
        s->n_context += s->n_new;
        cu[i + 1] = n, context[i] = s->n_context;
        memcpy(tables[0] + i * r->max_blocks, s->table, (size_t)r->max_blocks * sizeof **tables);
    }
    struct batch batch = {.n_tokens = n, .n_seqs = n_seqs, .n_logits_rows = n_rows, .max_blocks = r->max_blocks,
                          .block_size = r->block_size, .tokens = tokens, .positions = positions, .history_rows = zeros,
                          .cu_seqlens_q = cu, .context_lens = context, .logits_rows = rows};
    struct kv_cache kv = {0};
    for (int32_t g = 0; g < r->info->n_kv_groups; g++) { // the same blocks in the cache of each group
        memmove(slots[g], slots[0], sizeof *slots), memmove(tables[g], tables[0], sizeof *tables);
        batch.slot_mapping[g] = slots[g], batch.block_tables[g] = tables[g];
        kv.layers[g] = r->groups[g].layers, kv.n_blocks[g] = r->n_blocks;
    }
    struct tensor out;
    check(model_forward(r->model, &batch, &kv, &out, &e));
    size_t width = (size_t)m->x.vocab_size;
    if (n_rows)
        check(r->kernels->copy_out(r->device, m->logits + (size_t)first_row * width, out.data,
                                   (size_t)n_rows * width * sizeof(float), &e));
    check(r->kernels->wait(r->device, r->kernels->record(r->device), &e));
}

// The main sequence up to `end` in steps of `most`, alone or among others that take 1 to COMPANY_CHUNK tokens a step.
static void run_to(struct models *m, int32_t end, int32_t most, bool company)
{
    while (m->main.n_context < end) {
        struct sequence *seqs[COMPANY + 1];
        int32_t n = 0, place = company ? rng_below(COMPANY + 1) : 0;
        m->main.n_new = end - m->main.n_context < most ? end - m->main.n_context : most;
        for (int32_t i = 0; company && i < COMPANY; i++) {
            struct sequence *s = &m->company[i];
            s->n_new = rng_below(2) ? 1 : 1 + rng_below(COMPANY_CHUNK);
            if (s->n_context + s->n_new > m->x.n_ids) s->n_context = 0; // again, over its own blocks
            if (s->n_new > m->x.n_ids) s->n_new = m->x.n_ids;
        }
        for (int32_t i = 0; i < (company ? COMPANY + 1 : 1); i++)
            seqs[n++] = i == place ? &m->main : &m->company[i - (i > place)];
        step(m, seqs, n);
    }
}

static void expect_first(const struct models *m, const char *dir, const char *what)
{
    size_t width = (size_t)m->x.vocab_size;
    for (int32_t i = 0; i < m->x.n_rows; i++)
        CHECK_MSG(!memcmp(m->logits + (size_t)i * width, m->first + (size_t)i * width, width * sizeof(float)),
                  "%s in %s, %s: logits of token %d differ from those of one pass", dir, dtype_name(m->rig.info->dtype), what,
                  m->x.rows[i]);
}

static void poison_logits(struct models *m)
{
    memset(m->logits, 0xFF, sizeof m->logits);
    models_reset(m);
}

START_TEST(logits_do_not_depend_on_how_they_came)
{
    static struct models m;
    const char *dir = cases[_i / 2];
    expected_read(&m.x, dir);
    rig_init(&m.rig, &(struct rig_options){.dir = dir, .max_model_len = m.x.max_model_len, .max_len = m.x.n_ids,
                                           .max_tokens = m.x.n_ids + COMPANY * COMPANY_CHUNK, .max_seqs = COMPANY + 1,
                                           .block_size = 16 << rng_below(3), .backend = "cuda", .deterministic = true,
                                           .dtype = _i % 2 ? DTYPE_F16 : DTYPE_BF16, .seed = (unsigned)rng_next()});
    m.main.ids = m.x.ids;
    for (int32_t i = 0; i < COMPANY; i++) {
        m.company[i].ids = m.company_ids[i];
        for (int32_t j = 0; j < MAX_LEN; j++) m.company_ids[i][j] = rng_below(m.x.vocab_size);
    }
    poison_logits(&m);
    run_to(&m, m.x.n_ids, m.x.n_ids, false);
    memcpy(m.first, m.logits, sizeof m.first);
    static const struct { int32_t most; bool company; const char *what; } ways[] = {
        {1, false, "a token a step"}, {7, false, "chunks of 7"}, {64, false, "chunks of 64"},
        {MAX_LEN, true, "in one step among others"}, {1, true, "a token a step among others"},
        {13, true, "chunks of 13 among others"},
    };
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        poison_logits(&m);
        run_to(&m, m.x.n_ids, ways[i].most, ways[i].company);
        expect_first(&m, dir, ways[i].what);
    }
    poison_logits(&m);
    int32_t middle = m.x.n_prompt + (m.x.n_ids - m.x.n_prompt) / 2;
    run_to(&m, m.x.n_prompt, m.x.n_prompt, true);
    run_to(&m, middle, 1, true);
    models_reset(&m); // preempted: all of it is computed anew, what was generated as a prompt
    run_to(&m, middle, m.x.n_ids, true);
    run_to(&m, m.x.n_ids, 1, true);
    expect_first(&m, dir, "preempted");
    rig_deinit(&m.rig);
}
END_TEST

int main(void)
{
    n_cases = vectors_find(cases);
    if (n_cases < 20) {
        fprintf(stderr, "tests/vectors: %d checkpoints\n", n_cases);
        return EXIT_FAILURE;
    }
    Suite *suite = suite_create("cuda deterministic");
    TCase *ops = tcase_create("ops"), *models = tcase_create("models");
    tcase_set_timeout(ops, 0), tcase_set_timeout(models, 0);
    tcase_add_unchecked_fixture(ops, open_device, close_device);
    tcase_add_loop_test(ops, linear_rows_do_not_depend_on_their_number, 0, 2 * N_PRODUCTS);
    tcase_add_test(ops, attention_rows_do_not_depend_on_their_batch);
    tcase_add_loop_test(models, logits_do_not_depend_on_how_they_came, 0, 2 * n_cases);
    suite_add_tcase(suite, ops);
    suite_add_tcase(suite, models);
    return suite_run(suite);
}
