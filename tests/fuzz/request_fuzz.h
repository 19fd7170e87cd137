// request_fuzz.h: what the fuzz targets of both kinds of request share: limits, and what a request that was taken must keep to.
#ifndef GPTD_TESTS_FUZZ_REQUEST_FUZZ_H
#define GPTD_TESTS_FUZZ_REQUEST_FUZZ_H

#include "server/completion_request.h"

#include <assert.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { CONTEXT = 128 };

static const char *const names[] = {"m"};
static struct server_options options;
static struct engine_plan plan;
static struct completion_limits limits;

static void setup(void)
{
    char error[256];
    struct tokenizer *tokenizer;
    int failed = tokenizer_create(&tokenizer, "tests/vectors/tokenizer/unigram_bytes", error, sizeof error);
    assert(!failed);
    options = (struct server_options){.served_model_names = names, .n_served_model_names = 1, .max_prompts = 8,
                                      .max_choices = 64, .max_logprobs = 5};
    plan = (struct engine_plan){.vocab_size = tokenizer_vocab_size(tokenizer), .max_model_len = CONTEXT,
                                .longest_request = CONTEXT};
    limits = (struct completion_limits){.options = &options, .plan = &plan, .tokenizer = tokenizer, .max_token_bytes = 64,
                                        .infill = {.found = true, .prefix_id = 5, .suffix_id = 6, .middle_id = 7,
                                                   .end_ids = {5, 6, 7}, .n_ends = 3}};
}

static void check_request(const struct completion_request *r)
{
    const struct sampling_params *p = &r->params;
    assert(r->n_prompts >= 1 && r->n_prompts <= options.max_prompts);
    assert(r->n >= 1 && p->n >= r->n && (int64_t)p->n * r->n_prompts <= options.max_choices);
    assert(p->max_tokens >= 0 && p->min_tokens >= 0 && p->min_tokens <= p->max_tokens);
    assert(p->temperature >= 0 && p->temperature <= 2 && p->top_p > 0 && p->top_p <= 1);
    assert(p->min_p >= 0 && p->min_p <= 1 && p->top_k >= 0 && p->repetition_penalty > 0);
    assert(fabsf(p->frequency_penalty) <= 2 && fabsf(p->presence_penalty) <= 2);
    assert(p->logprobs <= options.max_logprobs && p->prompt_logprobs <= options.max_logprobs);
    for (int32_t i = 0; i < r->n_prompts; i++) {
        assert(r->prompts[i].n_ids >= 1 && r->prompts[i].n_ids + p->max_tokens <= CONTEXT);
        for (int32_t j = 0; j < r->prompts[i].n_ids; j++)
            assert(r->prompts[i].ids[j] >= 0 && r->prompts[i].ids[j] < plan.vocab_size);
    }
    for (int32_t i = 0; i < p->n_logit_bias; i++)
        assert(p->logit_bias[i].id >= 0 && p->logit_bias[i].id < plan.vocab_size && fabsf(p->logit_bias[i].bias) <= 100);
}

typedef int parse_function(struct completion_request *r, char *body, size_t length, const char *api_key,
                           const struct completion_limits *limits, struct http_error *e);

static void check_body(parse_function *parse, const uint8_t *data, size_t size)
{
    char *body = malloc(size + 1);
    memcpy(body, data, size);
    body[size] = '\0';
    struct completion_request r;
    struct http_error e = {0};
    if (parse(&r, body, size, NULL, &limits, &e) == 0) {
        check_request(&r);
        completion_request_deinit(&r);
    } else {
        assert(e.status >= 400 && e.status < 600 && e.message[0] != '\0');
    }
    free(body);
}

#endif
