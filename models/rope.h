/* rope.h: rotary frequencies and their scalings, as transformers' modeling_rope_utils.py computes them.
 *
 * Read by config.c, used by model.c once at load. Frequencies never depend on a sequence's length at run time, so that
 * answers do not depend on chunking: "dynamic" (NTK) takes max_model_len, the longest sequence there can be, which is
 * max_position_embeddings unless --max-model-len asks for more (up to the factor times as much). That
 * equals transformers for every sequence while max_model_len is within max_position_embeddings, and beyond it for a
 * sequence of exactly max_model_len tokens in one pass. Likewise "longrope" takes its short factors while max_model_len is
 * within the original context and its long ones beyond, as vLLM does, where transformers decides by each sequence's length.
 */
#ifndef GPTD_MODELS_ROPE_H
#define GPTD_MODELS_ROPE_H

#include <stdbool.h>
#include <stdint.h>

enum rope_type { ROPE_DEFAULT, ROPE_LINEAR, ROPE_DYNAMIC, ROPE_LLAMA3, ROPE_YARN, ROPE_LONGROPE };

enum { ROPE_MAX_DIM = 256 };

struct rope_config {
    enum rope_type type;
    int32_t dim;                     // elements of a head that rotate
    double theta;
    double factor;                   // of the context's length
    int32_t max_positions;           // max_position_embeddings
    int32_t original_max_positions;  // llama3, yarn, longrope
    double low_freq_factor, high_freq_factor; // llama3
    double beta_fast, beta_slow;     // yarn: rotations
    bool truncate;                   // yarn: whole dimensions as the ramp's ends
    double attention_factor;         // multiplies cos and sin
    float short_factors[ROPE_MAX_DIM / 2], long_factors[ROPE_MAX_DIM / 2]; // longrope: [dim / 2], of the wave lengths
};

// inv_freq [dim / 2], radians per token.
void rope_inv_freq(const struct rope_config *config, int32_t max_model_len, float *inv_freq);

#endif
