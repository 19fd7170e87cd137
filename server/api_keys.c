#include "server/api_keys.h"

#include "server/text_file.h"

#include <ctype.h>
#include <gnutls/crypto.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HASH_BYTES = 32, NAME_MAX_LENGTH = 63, MAX_LIMIT = 1000000000 };

struct api_key {
    unsigned char hash[HASH_BYTES];
    char id[2 * HASH_BYTES + 1];
    char name[NAME_MAX_LENGTH + 1];
    enum api_role role;
    struct rate_limits limits; // as the file has them
    struct rate_limit *limit;  // shared with the key's earlier and later selves
    atomic_int n_holders;
};

struct table {
    struct api_key **keys; // [n]
    size_t n;
};

struct api_keys {
    pthread_mutex_t lock;   // of table
    pthread_mutex_t reload; // one at a time
    struct table table;
    struct api_key *single; // of --api-key; NULL: none. In the table, too
    char *file;             // NULL: none
};

// ---- keys -----------------------------------------------------------------------------------------------------------

void api_key_release(struct api_key *key)
{
    if (!key || atomic_fetch_sub(&key->n_holders, 1) > 1) return;
    rate_limit_release(key->limit);
    free(key);
}

bool api_key_may(const struct api_key *key, enum api_role role) { return key->role == API_ROLE_ADMIN || key->role == role; }

const char *api_key_id(const struct api_key *key) { return key->id; }

const char *api_key_name(const struct api_key *key) { return key->name; }

struct rate_limit *api_key_limit(const struct api_key *key) { return key->limit; }

// A key is chosen at random, and long: one round of a fast hash is enough for it.
static bool hash_text(const char *text, size_t n, unsigned char hash[HASH_BYTES])
{
    return gnutls_hash_fast(GNUTLS_DIG_SHA256, text, n, hash) == 0;
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static bool hash_parse(const char *hex, size_t n, unsigned char hash[HASH_BYTES])
{
    if (n != 2 * HASH_BYTES) return false;
    for (size_t i = 0; i < HASH_BYTES; i++) {
        int high = hex_digit(hex[2 * i]), low = hex_digit(hex[2 * i + 1]);
        if (high < 0 || low < 0) return false;
        hash[i] = (unsigned char)(high * 16 + low);
    }
    return true;
}

// The key that text[0..n) names, by itself or by its hash. where: for errors, which must not hold the key.
static int key_create(struct api_key **out, const char *text, size_t n, const char *where, struct error *e)
{
    static const char prefix[] = "sha256:";
    size_t skip = sizeof prefix - 1;
    for (size_t i = 0; i < n; i++)
        if (!isgraph((unsigned char)text[i]))
            return error_set(e, ERR_INVALID, "%s: a key is made of visible ASCII characters", where);
    struct api_key *key = calloc(1, sizeof *key);
    if (!key) return error_set(e, ERR_NOMEM, "out of memory");
    key->n_holders = 1;
    bool hashed = n >= skip && !memcmp(text, prefix, skip);
    if (hashed ? !hash_parse(text + skip, n - skip, key->hash) : !hash_text(text, n, key->hash)) {
        free(key);
        return error_set(e, ERR_INVALID, "%s: after sha256: come 64 hexadecimal digits", where);
    }
    for (size_t i = 0; i < HASH_BYTES; i++) snprintf(key->id + 2 * i, 3, "%02x", key->hash[i]);
    snprintf(key->name, sizeof key->name, "key-%.8s", key->id);
    *out = key;
    return 0;
}

// ---- the file -------------------------------------------------------------------------------------------------------

static bool parse_limit(const char *text, size_t n, int64_t *out)
{
    *out = 0;
    for (size_t i = 0; i < n; i++) {
        if (!isdigit((unsigned char)text[i])) return false;
        *out = *out * 10 + text[i] - '0';
        if (*out > MAX_LIMIT) return false;
    }
    return *out > 0;
}

static bool parse_name(const char *text, size_t n, char name[NAME_MAX_LENGTH + 1])
{
    if (n < 1 || n > NAME_MAX_LENGTH) return false;
    for (size_t i = 0; i < n; i++)
        if (!isalnum((unsigned char)text[i]) && !strchr("._-", text[i])) return false;
    memcpy(name, text, n);
    name[n] = '\0';
    return true;
}

static bool parse_role(const char *text, size_t n, enum api_role *role)
{
    static const char *const names[] = {"user", "metrics", "admin"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strlen(names[i]) != n || memcmp(names[i], text, n)) continue;
        *role = (enum api_role)i;
        return true;
    }
    return false;
}

// NAME=VALUE. Returns NULL, or what is wrong with it. Says nothing of the text itself, which may be a key in a wrong place.
static const char *setting_read(struct api_key *key, const char *text, size_t n)
{
    const char *equals = memchr(text, '=', n);
    size_t length = equals ? (size_t)(equals - text) : 0, rest = n - length - (equals ? 1 : 0);
    const char *value = text + n - rest;
    struct { const char *name; int64_t *limit; } limits[] = {{"requests-per-minute", &key->limits.requests_per_minute},
                                                            {"tokens-per-minute", &key->limits.tokens_per_minute},
                                                            {"max-concurrent", &key->limits.max_concurrent}};
    if (length == 4 && !memcmp(text, "name", 4))
        return parse_name(value, rest, key->name) ? NULL : "a name is made of 1 to 63 letters, digits, and . _ -";
    if (length == 4 && !memcmp(text, "role", 4))
        return parse_role(value, rest, &key->role) ? NULL : "roles are user, metrics, admin";
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (strlen(limits[i].name) == length && !memcmp(text, limits[i].name, length))
            return parse_limit(value, rest, limits[i].limit) ? NULL : "a limit is a number from 1 to 1000000000";
    return "after a key may come name=, role=, requests-per-minute=, tokens-per-minute=, max-concurrent=";
}

static struct api_key *table_find(const struct table *t, const unsigned char hash[HASH_BYTES])
{
    struct api_key *found = NULL;
    for (size_t i = 0; i < t->n; i++) {
        unsigned char difference = 0;
        for (size_t j = 0; j < HASH_BYTES; j++) difference |= t->keys[i]->hash[j] ^ hash[j];
        if (!difference) found = t->keys[i];
    }
    return found;
}

// Takes key.
static int table_add(struct table *t, struct api_key *key, const char *where, struct error *e)
{
    struct api_key **grown = NULL;
    int failed = 0;
    if (table_find(t, key->hash)) failed = error_set(e, ERR_INVALID, "%s: this key is there already", where);
    else if (!(grown = realloc(t->keys, (t->n + 1) * sizeof *grown))) failed = error_set(e, ERR_NOMEM, "out of memory");
    if (failed) {
        api_key_release(key);
        return failed;
    }
    t->keys = grown;
    grown[t->n++] = key;
    return 0;
}

static int line_read(struct table *t, char *line, const char *where, struct error *e)
{
    static const char blanks[] = " \t\r";
    char *p = line + strspn(line, blanks);
    size_t n = strcspn(p, blanks);
    struct api_key *key;
    if (!*p || *p == '#') return 0;
    int failed = key_create(&key, p, n, where, e);
    if (failed) return failed;
    for (p += n; *(p += strspn(p, blanks)); p += n) {
        const char *wrong = setting_read(key, p, n = strcspn(p, blanks));
        if (!wrong) continue;
        api_key_release(key);
        return error_set(e, ERR_INVALID, "%s: %s", where, wrong);
    }
    return table_add(t, key, where, e);
}

static int file_read(struct table *t, const char *path, struct error *e)
{
    char *text, where[320];
    size_t size, n_before = t->n;
    int number = 0, failed = text_file_read(path, "--api-key-file", &text, &size, e);
    if (failed) return failed;
    if (strlen(text) != size) failed = error_set(e, ERR_INVALID, "--api-key-file: %s is not text", path);
    for (char *p = text, *end; !failed && p; p = end) {
        end = strchr(p, '\n');
        if (end) *end++ = '\0';
        snprintf(where, sizeof where, "--api-key-file: %.255s, line %d", path, ++number);
        failed = line_read(t, p, where, e);
    }
    explicit_bzero(text, size);
    free(text);
    if (!failed && t->n == n_before) failed = error_set(e, ERR_INVALID, "--api-key-file: %s holds no key", path);
    return failed;
}

// ---- the table ------------------------------------------------------------------------------------------------------

static void table_free(struct table *t)
{
    for (size_t i = 0; i < t->n; i++) api_key_release(t->keys[i]);
    free(t->keys);
    *t = (struct table){0};
}

static int table_read(struct table *t, const struct api_keys *k, struct error *e)
{
    int failed = 0;
    if (k->single) {
        atomic_fetch_add(&k->single->n_holders, 1);
        failed = table_add(t, k->single, "--api-key", e);
    }
    return failed || !k->file ? failed : file_read(t, k->file, e);
}

// Gives each key that was there before its limit, with what is used of it; the others new ones. Changes nothing if it fails.
static int limits_attach(struct table *t, const struct table *before, struct error *e)
{
    for (size_t i = 0; i < t->n; i++) {
        struct api_key *key = t->keys[i], *old = table_find(before, key->hash);
        if (key->limit) continue; // the single one
        if (old) rate_limit_hold(old->limit);
        key->limit = old ? old->limit : rate_limit_create(&key->limits);
        if (!key->limit) return error_set(e, ERR_NOMEM, "out of memory");
    }
    for (size_t i = 0; i < t->n; i++) rate_limit_set(t->keys[i]->limit, &t->keys[i]->limits);
    return 0;
}

int api_keys_reload(struct api_keys *keys, struct error *e)
{
    struct table t = {0}, before;
    pthread_mutex_lock(&keys->reload); // from here on nobody else replaces the table
    int failed = table_read(&t, keys, e);
    if (!failed) failed = limits_attach(&t, &keys->table, e);
    if (!failed) {
        pthread_mutex_lock(&keys->lock);
        before = keys->table;
        keys->table = t;
        pthread_mutex_unlock(&keys->lock);
        t = before;
    }
    pthread_mutex_unlock(&keys->reload);
    table_free(&t);
    return failed;
}

int api_keys_create(struct api_keys **out, const char *key, const char *file, struct error *e)
{
    struct api_keys *k = calloc(1, sizeof *k);
    *out = NULL;
    if (!k) return error_set(e, ERR_NOMEM, "out of memory");
    pthread_mutex_init(&k->lock, NULL);
    pthread_mutex_init(&k->reload, NULL);
    int failed = key ? key_create(&k->single, key, strlen(key), "--api-key", e) : 0;
    if (!failed && key) k->single->role = API_ROLE_ADMIN;
    if (!failed && file && !(k->file = strdup(file))) failed = error_set(e, ERR_NOMEM, "out of memory");
    if (!failed) failed = api_keys_reload(k, e);
    if (failed) api_keys_destroy(k);
    else *out = k;
    return failed;
}

size_t api_keys_count(struct api_keys *keys)
{
    pthread_mutex_lock(&keys->lock);
    size_t n = keys->table.n;
    pthread_mutex_unlock(&keys->lock);
    return n;
}

struct api_key *api_keys_find(struct api_keys *keys, const char *given, size_t n)
{
    unsigned char hash[HASH_BYTES];
    if (!hash_text(given, n, hash)) return NULL;
    pthread_mutex_lock(&keys->lock);
    struct api_key *key = table_find(&keys->table, hash);
    if (key) atomic_fetch_add(&key->n_holders, 1);
    pthread_mutex_unlock(&keys->lock);
    return key;
}

void api_keys_destroy(struct api_keys *keys)
{
    if (!keys) return;
    table_free(&keys->table);
    api_key_release(keys->single);
    pthread_mutex_destroy(&keys->lock);
    pthread_mutex_destroy(&keys->reload);
    free(keys->file);
    free(keys);
}
