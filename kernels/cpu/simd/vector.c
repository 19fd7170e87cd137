#include "kernels/cpu/simd/vector.h"

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/philox.h"
#include "kernels/cpu/simd/vec.h"

// Calls body(i, n) for each vector: n = VEC_LANES but at the tail.
#define FOR_VECTORS(i, lanes, n)                                                                                       \
    for (size_t i = 0, lanes = (n) < VEC_LANES ? (n) : VEC_LANES; i < (n);                                             \
         i += lanes, lanes = (n) - i < VEC_LANES ? (n) - i : VEC_LANES)

static inline vec get(const float *p, size_t lanes)
{
    return lanes == VEC_LANES ? vec_load(p) : vec_load_n(p, lanes);
}

static inline void put(float *p, vec x, size_t lanes)
{
    if (lanes == VEC_LANES)
        vec_store(p, x);
    else
        vec_store_n(p, x, lanes);
}

static inline vec get_any(const void *array, enum dtype dtype, size_t i, size_t lanes)
{
    return lanes == VEC_LANES ? vec_load_any(array, dtype, i) : vec_load_any_n(array, dtype, i, lanes);
}

// ---- conversions, norm ----------------------------------------------------------------------------------------------

static void load(float *out, const void *x, enum dtype dtype, size_t n)
{
    FOR_VECTORS(i, lanes, n) put(out + i, get_any(x, dtype, i, lanes), lanes);
}

static void store(void *out, enum dtype dtype, const float *x, size_t n)
{
    uint16_t *half = out;
    if (dtype == DTYPE_F32)
        memcpy(out, x, 4 * n);
    else if (dtype == DTYPE_BF16)
        for (size_t i = 0; i < n; i++) half[i] = f32_to_bf16(x[i]);
    else
        for (size_t i = 0; i < n; i++) half[i] = f32_to_f16(x[i]);
}

static void add(float *x, const void *y, enum dtype dtype, size_t n)
{
    FOR_VECTORS(i, lanes, n) put(x + i, get(x + i, lanes) + get_any(y, dtype, i, lanes), lanes);
}

static void scale(float *x, float factor, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] *= factor;
}

static float sum(const float *x, size_t n)
{
    vec total = {0};
    FOR_VECTORS(i, lanes, n) total += get(x + i, lanes);
    return vec_sum(total);
}

static float sum_squares(const float *x, float shift, size_t n)
{
    vec total = {0};
    size_t i = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES) {
        vec d = vec_load(x + i) - shift;
        total = vec_fma(d, d, total);
    }
    float result = vec_sum(total);
    for (; i < n; i++) result += (x[i] - shift) * (x[i] - shift);
    return result;
}

static void normalize(float *out, const float *x, const struct normalization *how, size_t n)
{
    const struct tensor *weight = how->weight, *bias = how->bias;
    FOR_VECTORS(i, lanes, n) {
        vec y = (get(x + i, lanes) - how->shift) * how->scale * (get_any(weight->data, weight->dtype, i, lanes) + how->offset);
        if (bias) y += get_any(bias->data, bias->dtype, i, lanes);
        if (how->accumulate) y += get(out + i, lanes);
        put(out + i, y, lanes);
    }
}

// ---- activation, rotation -------------------------------------------------------------------------------------------

// 1 + erf(x), within 4e-7 relative even where it is close to 0: 1 + x p(x^2) near 0, e^-q(|x|) or 2 - e^-q(|x|) beyond
// (own minimax fits; q grows up to 10, where e^-q is below 1e-36).
static inline vec vec_one_plus_erf(vec x)
{
    vec a = (vec)((ivec)x & 0x7fffffff), z = x * x;
    vec p = vec_set(-0.000595386023633182f);
    p = vec_fma(p, z, vec_set(0.004985969513654709f));
    p = vec_fma(p, z, vec_set(-0.026761746034026146f));
    p = vec_fma(p, z, vec_set(0.11281683295965195f));
    p = vec_fma(p, z, vec_set(-0.3761247992515564f));
    p = vec_fma(p, z, vec_set(0.12837915122509003f));
    vec near = 1.0f + vec_fma(p, x, x);
    vec t = vec_select(a > 10.0f, vec_set(10.0f), a);
    vec q = vec_set(-2.397732146164344e-07f);
    q = vec_fma(q, t, vec_set(4.030187938042218e-06f));
    q = vec_fma(q, t, vec_set(-1.1376899237802718e-05f));
    q = vec_fma(q, t, vec_set(-0.0002700649492908269f));
    q = vec_fma(q, t, vec_set(0.0036127236671745777f));
    q = vec_fma(q, t, vec_set(-0.023852046579122543f));
    q = vec_fma(q, t, vec_set(0.10641583055257797f));
    q = vec_fma(q, t, vec_set(0.6350291967391968f));
    q = vec_fma(q, t, vec_set(1.128677487373352f));
    vec tail = vec_exp(-q * t);
    return vec_select(a < 0.8f, near, vec_select(x < 0, tail, 2.0f - tail));
}

static inline __attribute__((always_inline)) vec activation_of(vec x, enum activation kind)
{
    switch (kind) {
    case ACT_GELU_ERF: return 0.5f * x * vec_one_plus_erf(x * 0.70710678118654752f);
    case ACT_GELU_TANH: // 0.5 x (1 + tanh(u)) = x / (1 + e^-2u), without its cancellation
        return x / (1.0f + vec_exp(-1.5957691216057308f * vec_fma(0.044715f * x * x, x, x)));
    case ACT_SILU: return x / (1.0f + vec_exp(-x));
    case ACT_RELU: return vec_max(vec_set(0), x);
    }
    return x;
}

static inline __attribute__((always_inline)) void activate_kind(float *out, const float *gate, const float *up,
                                                                enum activation kind, size_t n)
{
    FOR_VECTORS(i, lanes, n) {
        vec y = activation_of(get(gate + i, lanes), kind);
        put(out + i, up ? y * get(up + i, lanes) : y, lanes);
    }
}

static void activate(float *out, const float *gate, const float *up, enum activation kind, size_t n)
{
    switch (kind) {
    case ACT_GELU_ERF: activate_kind(out, gate, up, ACT_GELU_ERF, n); break;
    case ACT_GELU_TANH: activate_kind(out, gate, up, ACT_GELU_TANH, n); break;
    case ACT_SILU: activate_kind(out, gate, up, ACT_SILU, n); break;
    case ACT_RELU: activate_kind(out, gate, up, ACT_RELU, n); break;
    }
}

static void softcap(float *x, float cap, size_t n)
{
    FOR_VECTORS(i, lanes, n) put(x + i, cap * vec_tanh(get(x + i, lanes) / cap), lanes);
}

static void rotate(float *low, float *high, const float *cos, const float *sin, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float a = low[i], b = high[i];
        low[i] = a * cos[i] - b * sin[i];
        high[i] = b * cos[i] + a * sin[i];
    }
}

// ---- sampling -------------------------------------------------------------------------------------------------------

static float highest(const float *x, size_t n, bool *broken)
{
    vec top = vec_set(-INFINITY);
    ivec bad = {0};
    FOR_VECTORS(i, lanes, n) {
        vec y = get(x + i, lanes);
        if (lanes < VEC_LANES)
            for (int j = (int)lanes; j < VEC_LANES; j++) y[j] = -INFINITY;
        bad |= ~(ivec)(y < INFINITY); // also true of NaN
        top = vec_max(y, top);
    }
    *broken = false;
    for (int j = 0; j < VEC_LANES; j++) *broken |= bad[j] != 0;
    return vec_highest(top);
}

// Index of the first lane of 64 elements that satisfies, else n: the scan costs one compare an element.
static size_t find(const float *x, float value, size_t n)
{
    size_t i = 0;
    for (; i + 64 <= n; i += 64) {
        int32_t any = 0;
        for (size_t j = 0; j < 64; j++) any |= x[i + j] == value;
        if (any) break;
    }
    while (i < n && !(x[i] == value)) i++;
    return i;
}

static size_t find_above(const float *x, float bound, size_t from, size_t n)
{
    size_t i = from;
    for (; i < n && i % 64; i++)
        if (x[i] > bound) return i;
    for (; i + 64 <= n; i += 64) {
        int32_t any = 0;
        for (size_t j = 0; j < 64; j++) any |= x[i + j] > bound;
        if (any) break;
    }
    while (i < n && !(x[i] > bound)) i++;
    return i;
}

static size_t rank(const float *x, size_t id, size_t n)
{
    float value = x[id];
    int32_t before = 0;
    for (size_t i = 0; i < id; i++) before += x[i] >= value;
    for (size_t i = id; i < n; i++) before += x[i] > value;
    return (size_t)before + 1;
}

static double sum_exp(const float *x, float shift, size_t n)
{
    double total = 0;
    for (size_t start = 0; start < n; start += 1024) { // few enough for single precision
        size_t end = start + 1024 < n ? start + 1024 : n, i = start;
        vec part = {0};
        for (; i + VEC_LANES <= end; i += VEC_LANES) part += vec_exp(vec_load(x + i) - shift);
        if (i < end) {
            float e[VEC_LANES];
            vec_store(e, vec_exp(vec_load_n(x + i, end - i) - shift));
            part += vec_load_n(e, end - i);
        }
        total += vec_sum(part);
    }
    return total;
}

static void exps(float *out, const float *x, size_t n)
{
    FOR_VECTORS(i, lanes, n) put(out + i, vec_exp(get(x + i, lanes)), lanes);
}

static void temper(float *out, const float *x, float shift, float divisor, size_t n)
{
    for (size_t i = 0; i < n; i++) out[i] = (x[i] - shift) / divisor;
}

// Words of the ids first_id .. first_id + 4 * VEC_LANES - 1, in order of the ids; first_id divides by 4.
static inline void philox_words(uint32_t *words, uint32_t first_id, uint64_t seed, int32_t position, int32_t choice)
{
    uvec c0, c1 = (uvec){0} + (uint32_t)position, c2 = (uvec){0} + (uint32_t)choice, c3 = {0};
    for (int j = 0; j < VEC_LANES; j++) c0[j] = first_id / 4 + (uint32_t)j;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        uvec high0, low0, high1, low1;
        vec_multiply_wide(c0, PHILOX_M0, &high0, &low0);
        vec_multiply_wide(c2, PHILOX_M1, &high1, &low1);
        c0 = high1 ^ c1 ^ k0, c2 = high0 ^ c3 ^ k1;
        c1 = low1, c3 = low0;
        k0 += PHILOX_W0, k1 += PHILOX_W1;
    }
    uint32_t c[4][VEC_LANES];
    memcpy(c[0], &c0, sizeof(c0)), memcpy(c[1], &c1, sizeof(c1));
    memcpy(c[2], &c2, sizeof(c2)), memcpy(c[3], &c3, sizeof(c3));
    for (int j = 0; j < VEC_LANES; j++)
        for (int k = 0; k < 4; k++) words[4 * j + k] = c[k][j];
}

// g = -log(-log(u)) with u = 1 - w, w = (word + 1/2) / 2^32: so the large g, which win, have the finest steps.
static inline vec gumbel(const uint32_t *words)
{
    uvec word;
    memcpy(&word, words, sizeof(word));
    vec w = vec_fma(__builtin_convertvector(word, vec), vec_set(0x1p-32f), vec_set(0x1p-33f));
    w = vec_select(w > 0x1.fffffep-1f, vec_set(0x1.fffffep-1f), w);
    vec u = 1.0f - w, lost = (1.0f - u) - w; // log1p(-w) = log(u + lost)
    return -vec_log(-(vec_log(u) + lost / u));
}

static int32_t gumbel_argmax(const float *x, size_t n, uint64_t seed, int32_t position, int32_t choice)
{
    enum { STEP = 4 * VEC_LANES };
    uint32_t words[STEP];
    vec best = vec_set(-INFINITY);
    ivec best_start = {0}; // x index of the vector where the lane's best stands
    for (size_t i = 0; i < n; i += STEP) {
        int32_t any = 0;
        size_t end = i + STEP < n ? i + STEP : n;
        if (end - i == STEP)
            for (size_t j = 0; j < STEP; j++) any |= x[i + j] > -INFINITY;
        if (end - i == STEP && !any) continue;
        philox_words(words, (uint32_t)i, seed, position, choice);
        for (size_t j = i; j < end; j += VEC_LANES) {
            vec y;
            if (end - j >= VEC_LANES) {
                y = vec_load(x + j);
            } else {
                y = vec_set(-INFINITY);
                memcpy(&y, x + j, 4 * (end - j));
            }
            y += gumbel(words + (j - i));
            ivec better = y > best;
            best = vec_select(better, y, best);
            best_start = (better & (int32_t)j) | (~better & best_start);
        }
    }
    int32_t id = -1;
    float value = -INFINITY;
    for (int j = 0; j < VEC_LANES; j++) {
        int32_t lane_id = best_start[j] + j;
        if (best[j] > value || (best[j] == value && value > -INFINITY && lane_id < id)) value = best[j], id = lane_id;
    }
    return id;
}

const struct simd_vector SIMD_NAME(simd_vector) = {
    .load = load, .store = store, .add = add, .scale = scale, .sum = sum, .sum_squares = sum_squares,
    .normalize = normalize, .activate = activate, .softcap = softcap, .rotate = rotate, .highest = highest, .find = find,
    .find_above = find_above, .rank = rank, .sum_exp = sum_exp, .exps = exps, .temper = temper,
    .gumbel_argmax = gumbel_argmax,
};
