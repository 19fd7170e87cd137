/* api_keys.h: who may ask for what: API keys with their roles and limits, and the file they come from.
 *
 * options.c makes the table, http.c looks keys up, completion_route.c keeps to their limits, main.c reads the file again on SIGHUP.
 * Of a key its SHA-256 is kept, nothing else; the file may hold that as well. A line of the file:
 *
 *   KEY or sha256:HEX   [name=NAME] [role=user|metrics|admin] [requests-per-minute=N] [tokens-per-minute=N] [max-concurrent=N]
 *
 * Empty lines and those that begin with # are passed over. name: for the log [key- and 8 digits of the hash]. Any thread.
 */
#ifndef GPTD_SERVER_API_KEYS_H
#define GPTD_SERVER_API_KEYS_H

#include "kernels/error.h"
#include "server/rate_limit.h"

#include <stdbool.h>
#include <stddef.h>

enum api_role {
    API_ROLE_USER,    // everything but what is the others'
    API_ROLE_METRICS, // /metrics alone
    API_ROLE_ADMIN,   // everything
};

// A key of the table, shared by those who hold it.
struct api_key;

struct api_keys;

// key: one more, an admin's; NULL: none. file: NULL: none. ERR_INVALID (a line is wrong, or there is no key at all), ERR_IO,
// ERR_NOMEM. Errors name lines, never keys.
int api_keys_create(struct api_keys **out, const char *key, const char *file, struct error *e);
// Reads the file again. Keys that have gone serve those who hold them; those that stay keep what they have used of their
// limits. On failure everything is as before.
int api_keys_reload(struct api_keys *keys, struct error *e);
size_t api_keys_count(struct api_keys *keys);
void api_keys_destroy(struct api_keys *keys);

// The key that given[0..n) is, held for the caller until api_key_release; NULL: none. Takes as long for any.
struct api_key *api_keys_find(struct api_keys *keys, const char *given, size_t n);
void api_key_release(struct api_key *key); // NULL is fine
bool api_key_may(const struct api_key *key, enum api_role role);
const char *api_key_id(const struct api_key *key); // its hash, 64 hexadecimal digits
const char *api_key_name(const struct api_key *key);
struct rate_limit *api_key_limit(const struct api_key *key);

#endif
