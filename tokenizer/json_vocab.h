/* json_vocab.h: the vocabulary of a tokenizer.json, its merges and scores. Called by json_tokenizer.c. */
#ifndef GPTD_TOKENIZER_JSON_VOCAB_H
#define GPTD_TOKENIZER_JSON_VOCAB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cjson/cJSON.h>

#include "tokenizer/bpe.h"
#include "tokenizer/tokens.h"
#include "tokenizer/unigram.h"
#include "tokenizer/vocab.h"

struct json_vocab {
    struct token *tokens;    // [n_tokens], what ids stand for in text
    int32_t n_tokens;
    bool byte_level;         // names are bytes, each written as a character that can be seen
    struct vocab *names;     // as the file has them, added tokens' too
    struct vocab *pieces;    // as they occur in words: the model's alone
    int32_t byte_ids[256];   // of <0x00> to <0xFF>; -1: none
};

// model: the "model" of a tokenizer.json; added: its "added_tokens", or NULL. Each of these has an id within n_tokens afterwards.
// Returns 0, or -1 with a message.
int json_vocab_load(struct json_vocab *v, const cJSON *model, const cJSON *added, bool byte_level, char *error, size_t error_size);
void json_vocab_deinit(struct json_vocab *v);

int32_t json_vocab_id(const struct json_vocab *v, const char *name); // -1: none
// Whether the model is Unigram, not BPE.
bool json_vocab_is_unigram(const cJSON *model);
// The model with its merges, or its scores; v outlives it. NULL with a message.
struct bpe *json_vocab_bpe(const struct json_vocab *v, const cJSON *model, char *error, size_t error_size);
struct unigram *json_vocab_unigram(const struct json_vocab *v, const cJSON *model, char *error, size_t error_size);

#endif
