#include "models/dummy.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "models/parallel.h"

enum { CHUNK = 1 << 16 };

struct dummy {
    enum dtype dtype;
    uint64_t seed;
    union { uint32_t wide[DRAW_TABLE_SIZE]; uint16_t narrow[DRAW_TABLE_SIZE]; } table; // bits of the type
};

// Bits of x rounded to nearest even; x is finite and its magnitude at most 1.
static uint32_t half_bits(float x)
{
    uint32_t sign = x < 0 ? 0x8000 : 0;
    int exponent;
    float fraction = frexpf(fabsf(x), &exponent); // |x| = fraction * 2^exponent, fraction in [0.5, 1)
    if (fraction == 0 || exponent < -13) return sign | (uint32_t)lrintf(ldexpf(fabsf(x), 24)); // zero, subnormal
    return sign | (((uint32_t)(exponent + 13) << 10) + (uint32_t)lrintf(ldexpf(fraction, 11)));
}

static uint32_t float_bits(enum dtype dtype, float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (dtype == DTYPE_F16) return half_bits(x);
    if (dtype == DTYPE_BF16) return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return bits;
}

struct dummy *dummy_create(enum dtype dtype, uint64_t seed)
{
    struct dummy *d = malloc(sizeof *d);
    if (!d) return NULL;
    d->dtype = dtype, d->seed = seed;
    for (int i = 0; i < DRAW_TABLE_SIZE; i++) { // Box-Muller on a lattice: a golden-ratio sequence against a regular one
        double u = (i + 0.5) / DRAW_TABLE_SIZE, v = fmod(i * 0.6180339887498949, 1);
        uint32_t bits = float_bits(dtype, (float)(0.02 * sqrt(-2 * log(u)) * cos(2 * M_PI * v)));
        if (dtype == DTYPE_F32) d->table.wide[i] = bits;
        else d->table.narrow[i] = (uint16_t)bits;
    }
    return d;
}

void dummy_destroy(struct dummy *d) { free(d); }

// SplitMix64's output function: https://prng.di.unimi.it/splitmix64.c
static uint64_t mix(uint64_t z)
{
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

// Elements first .. first + n of a tensor, n a multiple of 4: each draw of 64 bits picks four (struct draw_params).
static void draw(const struct dummy *d, uint64_t key, size_t first, size_t n, void *out)
{
    uint16_t *out16 = out;
    uint32_t *out32 = out;
    for (size_t i = 0; i < n; i += 4) {
        uint64_t bits = mix(key + (first + i) / 4 * 0x9E3779B97F4A7C15u);
        for (size_t j = 0; j < 4; j++, bits >>= 16) {
            if (d->dtype == DTYPE_F32) out32[i + j] = d->table.wide[bits & 0xFFFF];
            else out16[i + j] = d->table.narrow[bits & 0xFFFF];
        }
    }
}

struct fill {
    const struct dummy *dummy;
    const struct kernels *kernels;
    struct device *device;
    char *to;
    size_t n;              // elements
    uint64_t key;
    atomic_size_t next;    // element that nobody has taken yet
    atomic_int status;
};

static void *fill_chunks(void *arg)
{
    struct fill *f = arg;
    size_t element_size = dtype_size(f->dummy->dtype);
    void *chunk = malloc(CHUNK * element_size);
    if (!chunk) atomic_store(&f->status, ERR_NOMEM);
    size_t first;
    while (chunk && (first = atomic_fetch_add(&f->next, CHUNK)) < f->n) {
        size_t n = f->n - first < CHUNK ? f->n - first : CHUNK;
        draw(f->dummy, f->key, first, (n + 3) & ~(size_t)3, chunk);
        int rc = f->kernels->copy_in(f->device, f->to + first * element_size, chunk, n * element_size, NULL);
        if (rc) atomic_store(&f->status, rc);
    }
    free(chunk);
    return NULL;
}

int dummy_fill_normal(const struct dummy *d, uint64_t tensor, const struct kernels *kernels, struct device *device,
                      void *to, size_t n, struct error *e)
{
    struct fill f = {d, kernels, device, to, n, mix(d->seed + mix(tensor + 1)), 0, 0};
    if (kernels->draw && d->dtype != DTYPE_F32)
        return kernels->draw(device, &(struct draw_params){to, n, f.key, d->table.narrow}, e);
    parallel_run(parallel_width(n / CHUNK), fill_chunks, &f);
    int rc = atomic_load(&f.status);
    return rc ? error_set(e, (enum err)rc, "dummy weights cannot be stored") : 0;
}

int dummy_fill_value(const struct dummy *d, float value, const struct kernels *kernels, struct device *device, void *to,
                     size_t n, struct error *e)
{
    size_t element_size = dtype_size(d->dtype);
    char *values = malloc(n * element_size);
    if (!values) return error_set(e, ERR_NOMEM, "out of memory for %zu values", n);
    uint32_t bits = float_bits(d->dtype, value);
    for (size_t i = 0; i < n; i++) {
        if (element_size == 4) ((uint32_t *)values)[i] = bits;
        else ((uint16_t *)values)[i] = (uint16_t)bits;
    }
    int rc = kernels->copy_in(device, to, values, n * element_size, e);
    free(values);
    return rc;
}
