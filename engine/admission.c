#include "engine/admission.h"

#include <math.h>

// ---- the rate -------------------------------------------------------------------------------------------------------

// Of waiting. In less than the first nothing is measured that anybody is refused for. Less than the second counts as so much:
// before anything is known ten are said to be begun each second. Who comes too early is told again; who comes too late lost time.
static const double MEASURED = 1, LEAST = 0.1;

void admission_note(struct admission *a, int64_t n_tokens, int64_t n_bytes)
{
    a->n_begun++;
    a->n_begun_tokens += n_tokens;
    a->n_begun_bytes += n_bytes;
}

static double load(const _Atomic double *x)
{
    return atomic_load_explicit(x, memory_order_relaxed);
}

static void decay_and_add(_Atomic double *x, double share, double more)
{
    atomic_store_explicit(x, load(x) * share + more, memory_order_relaxed);
}

void admission_measure(struct admission *a, bool waiting, double now)
{
    bool waited = atomic_load_explicit(&a->waiting, memory_order_relaxed);
    if (waited || waiting) {
        double share = exp(-(now - load(&a->at)) / ADMISSION_MEMORY);
        decay_and_add(&a->requests, share, waited ? a->n_begun : 0);
        decay_and_add(&a->tokens, share, waited ? (double)a->n_begun_tokens : 0);
        decay_and_add(&a->bytes, share, waited ? (double)a->n_begun_bytes : 0);
        decay_and_add(&a->seconds, share, waited ? ADMISSION_MEMORY * (1 - share) : 0);
        atomic_store_explicit(&a->at, now, memory_order_relaxed);
    }
    if (waited != waiting)
        atomic_store_explicit(&a->waiting, waiting, memory_order_relaxed);
    a->n_begun = 0;
    a->n_begun_tokens = a->n_begun_bytes = 0;
}

struct admission_rate admission_rate_get(const struct admission *a, int64_t n_tokens, int64_t n_bytes, double now)
{
    double share = exp(-fmax(0, now - load(&a->at)) / ADMISSION_MEMORY), n = load(&a->requests) * share;
    double seconds = load(&a->seconds) * share;
    if (atomic_load_explicit(&a->waiting, memory_order_relaxed))
        seconds += ADMISSION_MEMORY * (1 - share);
    return (struct admission_rate){
        .requests = fmax(n, 1) / fmax(seconds, LEAST),
        .at_most = (n + 1) / fmax(seconds, LEAST),
        .tokens = n >= 1 ? load(&a->tokens) * share / n : (double)n_tokens,
        .bytes = n >= 1 ? load(&a->bytes) * share / n : (double)n_bytes,
        .measured = seconds >= MEASURED,
    };
}

// ---- promises -------------------------------------------------------------------------------------------------------

enum { PROBES = 8, N_DUE = sizeof ((struct admission *)0)->due / sizeof ((struct admission *)0)->due[0] };

static uint64_t key_of(uint64_t prompt, int64_t second)
{
    uint64_t key = (prompt ^ (uint64_t)second * 0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9;
    return key ^ key >> 32;
}

// The promise of that key, or a place for it: where nothing is, or what is over, or another's, which is lost (its place is
// still kept, for whoever comes first).
static struct promise *find_promise(struct admission *a, uint64_t key, int64_t over)
{
    struct promise *place = &a->promises[key % ADMISSION_PROMISES];
    for (uint64_t i = 0; i < PROBES; i++) {
        struct promise *p = &a->promises[(key + i) % ADMISSION_PROMISES];
        if (p->key == key)
            return p;
        if (place->n > 0 && place->second >= over && (p->n == 0 || p->second < over))
            place = p;
    }
    return place;
}

int32_t admission_promise(struct admission *a, uint64_t prompt, double seconds, double hold, bool ahead, double now)
{
    double first = now + seconds, at = ahead ? first : fmax(first, a->next_place);
    a->next_place = fmin(fmax(a->next_place, at) + hold, now + ADMISSION_MAX_RETRY);
    int32_t wait = (int32_t)fmin(fmax(ceil(at - now), 1), ADMISSION_MAX_RETRY);
    int64_t second = (int64_t)now + wait;
    if (a->due[second % N_DUE].second != second) {
        a->due[second % N_DUE].second = second;
        a->due[second % N_DUE].n = 0;
    }
    a->due[second % N_DUE].n++;
    struct promise *p = find_promise(a, key_of(prompt, second), (int64_t)now - ADMISSION_GRACE);
    if (p->key != key_of(prompt, second))
        *p = (struct promise){.key = key_of(prompt, second), .second = second};
    p->n++;
    return wait;
}

void admission_shorten(struct admission *a, double hold)
{
    a->next_place -= hold;
}

bool admission_redeem(struct admission *a, uint64_t prompt, double now)
{
    for (int64_t second = (int64_t)now - ADMISSION_GRACE; second <= (int64_t)now; second++) {
        struct promise *p = find_promise(a, key_of(prompt, second), (int64_t)now - ADMISSION_GRACE);
        if (p->key != key_of(prompt, second) || p->n == 0)
            continue;
        p->n--;
        if (a->due[second % N_DUE].second == second && a->due[second % N_DUE].n > 0)
            a->due[second % N_DUE].n--;
        return true;
    }
    return false;
}

int32_t admission_held(const struct admission *a, double now)
{
    uint32_t n = 0;
    for (int64_t second = (int64_t)now - ADMISSION_GRACE; second <= (int64_t)now + 1; second++) {
        if (second >= 0 && a->due[second % N_DUE].second == second)
            n += a->due[second % N_DUE].n;
    }
    return n < INT32_MAX ? (int32_t)n : INT32_MAX;
}
