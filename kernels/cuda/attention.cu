/* attention.cu: the attention op and the C interface of kernels/flash_attention.h: checks, where the arrays lie, which
 * kernel. No kernels here: sequences with one query go to attention_decode.cu, others to attention_prefill.cu, wherever
 * in the batch they are, so that a row's result does not depend on its neighbours. Where it must not depend on how many
 * queries its own sequence has either (`deterministic`), all go to attention_prefill.cu.
 */
#include <string.h>

#include "kernels/cuda/attention.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

// ---- the C interface ------------------------------------------------------------------------------------------------

static bool are_rows(size_t stride)
{
    return stride % 8 == 0; // elements of 2 bytes: rows start at multiples of 16 bytes
}

static bool is_short(size_t stride)
{
    return stride < (size_t)1 << 31;
}

static bool shapes_fit(const struct flash_attention_params *p)
{
    return p->n_seqs >= 1 && p->n_kv_heads >= 1 && p->n_heads >= 1 && p->n_heads % p->n_kv_heads == 0 &&
           p->head_dim >= 8 && p->head_dim <= MAX_HEAD_DIM && p->head_dim % 8 == 0 && p->scale > 0 && p->softcap >= 0 &&
           p->window_left >= -1 && p->window_right >= -1 &&
           (p->dtype == FLASH_ATTENTION_BF16 || p->dtype == FLASH_ATTENTION_F16);
}

static bool arrays_fit(const struct flash_attention_params *p)
{
    return p->out && p->q && p->k && p->v && is_aligned(p->out) && is_aligned(p->q) && is_aligned(p->k) &&
           is_aligned(p->v) && are_rows(p->out_stride) && are_rows(p->out_head_stride) && are_rows(p->q_stride) &&
           are_rows(p->q_head_stride) && are_rows(p->kv_head_stride) && are_rows(p->kv_stride) &&
           is_short(p->q_stride) && is_short(p->q_head_stride) && is_short(p->out_stride) &&
           is_short(p->out_head_stride) && p->kv_stride < (size_t)1 << 26; // a page's offsets are 32 bits
}

static bool pages_fit(const struct flash_attention_params *p)
{
    return p->block_table && p->context_lens && p->max_blocks >= 1 && are_rows(p->kv_block_stride) &&
           p->kv_block_stride < (size_t)1 << 31 &&
           (p->block_size == 16 || p->block_size == 32 || p->block_size == 64);
}

EXPORT int gptd_flash_attention_prefill(const struct flash_attention_params *p, struct CUstream_st *stream)
{
    if (!shapes_fit(p) || !arrays_fit(p) || p->n_tokens < 0 || p->n_kv < 0 || !p->cu_seqlens_q) return cudaErrorInvalidValue;
    if (p->block_table ? !pages_fit(p) : !p->cu_seqlens_k) return cudaErrorInvalidValue;
    if (p->n_tokens == 0) return cudaSuccess;
    return launch_prefill(p, stream);
}

EXPORT int gptd_flash_attention_decode(const struct flash_attention_params *p, struct CUstream_st *stream)
{
    if (!shapes_fit(p) || !arrays_fit(p) || !pages_fit(p) || p->max_context < 1) return cudaErrorInvalidValue;
    if (!p->scratch || !is_aligned(p->scratch) || p->max_queries < 0 || p->max_queries > 8 ||
        (p->max_queries > 1 && !p->cu_seqlens_q))
        return cudaErrorInvalidValue;
    return launch_decode(p, stream);
}

EXPORT size_t gptd_flash_attention_scratch_bytes(const struct flash_attention_params *p)
{
    return shapes_fit(p) && p->max_context >= 1 ? decode_scratch_bytes(p) : 0;
}

// ---- the op ---------------------------------------------------------------------------------------------------------

size_t cuda_attention_scratch_bytes(const struct device *d)
{
    const struct device_options *o = &d->options;
    if (o->deterministic) return 0; // it is decode's
    struct flash_attention_params p = {};
    p.n_seqs = o->max_seqs;
    p.n_heads = o->n_heads;
    p.n_kv_heads = o->n_kv_heads;
    p.head_dim = o->head_dim;
    p.max_context = o->max_context;
    return decode_scratch_bytes(&p);
}

static bool is_matrix(const struct tensor *x, enum dtype dtype, size_t rows, size_t cols)
{
    return x->data && x->dtype == dtype && x->n_dims == 2 && x->shape[0] == rows && x->shape[1] == cols;
}

static int check_shapes(const struct attention_params *p, const struct device_options *o, struct error *e)
{
    const struct tensor *k = &p->cache.k, *v = &p->cache.v;
    size_t n_tokens = p->out.shape[0], dim = (size_t)p->head_dim;
    enum dtype dtype = p->out.dtype;
    if (dtype != DTYPE_BF16 && dtype != DTYPE_F16)
        return error_set(e, ERR_INVALID, "attention: %s rows: only BF16 and F16 here", dtype_name(dtype));
    if (p->n_kv_heads < 1 || p->n_heads < 1 || p->n_heads % p->n_kv_heads || p->head_dim < 8 ||
        p->head_dim > MAX_HEAD_DIM || p->head_dim % 8 || n_tokens > (size_t)o->max_tokens ||
        !is_matrix(&p->out, dtype, n_tokens, (size_t)p->n_heads * dim) ||
        !is_matrix(&p->qkv, dtype, n_tokens, (size_t)(p->n_heads + 2 * p->n_kv_heads) * dim))
        return error_set(e, ERR_INVALID, "attention: shapes do not fit (%d heads, %d KV heads, head_dim %d)",
                         p->n_heads, p->n_kv_heads, p->head_dim);
    if ((p->block_size != 16 && p->block_size != 32 && p->block_size != 64) || !k->data || !v->data || k->n_dims != 4 ||
        v->n_dims != 4 || k->dtype != dtype || v->dtype != dtype || memcmp(k->shape, v->shape, sizeof(k->shape)) ||
        k->shape[1] != (size_t)p->n_kv_heads || k->shape[2] != (size_t)p->block_size || k->shape[3] != dim)
        return error_set(e, ERR_INVALID, "attention: the cache's shape does not fit (blocks of %d)", p->block_size);
    return 0;
}

static int check_sequence(const struct attention_params *p, int32_t s, int32_t max_context, struct error *e)
{
    int32_t n_q = p->cu_seqlens_q[s + 1] - p->cu_seqlens_q[s], context = p->context_lens[s];
    if (n_q == 1 && context == 0) return 0; // padding
    if (n_q < 1 || context < n_q || context > max_context || (context - 1) / p->block_size >= p->max_blocks)
        return error_set(e, ERR_INVALID, "attention: sequence %d: %d queries, context %d", s, n_q, context);
    int32_t position = context - n_q, first = p->window > 0 && position >= p->window ? position - p->window + 1 : 0;
    for (int32_t block = first / p->block_size; block <= (context - 1) / p->block_size; block++) {
        int32_t id = p->block_table[(size_t)s * (size_t)p->max_blocks + (size_t)block];
        if (id < 0 || (size_t)id >= p->cache.k.shape[0])
            return error_set(e, ERR_INVALID, "attention: sequence %d: block %d is %d", s, block, id);
    }
    return 0;
}

// All but the arrays of the batch.
static struct flash_attention_params params_of(const struct device *d, const struct attention_params *p)
{
    size_t dim = (size_t)p->head_dim, heads = (size_t)p->n_heads, kv_heads = (size_t)p->n_kv_heads;
    struct flash_attention_params f = {};
    f.out = p->out.data;
    f.q = p->qkv.data;
    f.k = p->cache.k.data;
    f.v = p->cache.v.data;
    f.out_stride = heads * dim;
    f.q_stride = (heads + 2 * kv_heads) * dim;
    f.out_head_stride = f.q_head_stride = f.kv_stride = dim;
    f.kv_head_stride = (size_t)p->block_size * dim;
    f.kv_block_stride = kv_heads * f.kv_head_stride;
    f.alibi_slopes = p->alibi_slopes;
    f.scratch = d->scratch;
    f.scratch_bytes = d->scratch_bytes;
    f.dtype = p->out.dtype == DTYPE_BF16 ? FLASH_ATTENTION_BF16 : FLASH_ATTENTION_F16;
    f.n_seqs = p->n_seqs;
    f.n_tokens = (int32_t)p->out.shape[0];
    f.n_kv = (int32_t)p->cache.k.shape[0];
    f.n_heads = p->n_heads;
    f.n_kv_heads = p->n_kv_heads;
    f.head_dim = p->head_dim;
    f.block_size = p->block_size;
    f.max_blocks = p->max_blocks;
    f.max_context = d->options.max_context;
    f.causal = 1;
    f.window_left = p->window > 0 ? p->window - 1 : -1;
    f.window_right = -1;
    f.scale = p->scale;
    f.softcap = p->softcap > 0 ? p->softcap : 0;
    return f;
}

static int place_arrays(struct device *d, const struct attention_params *p, struct flash_attention_params *f,
                        struct error *e)
{
    size_t seqs = (size_t)p->n_seqs, size = sizeof(int32_t);
    f->cu_seqlens_q = (const int32_t *)device_array(d, p->cu_seqlens_q, (seqs + 1) * size, e);
    if (!f->cu_seqlens_q) return ERR_DEVICE;
    f->context_lens = (const int32_t *)device_array(d, p->context_lens, seqs * size, e);
    if (!f->context_lens) return ERR_DEVICE;
    f->block_table = (const int32_t *)device_array(d, p->block_table, seqs * (size_t)p->max_blocks * size, e);
    return f->block_table ? 0 : ERR_DEVICE;
}

// f without the first n sequences, which have one query each.
static struct flash_attention_params after(const struct flash_attention_params *f, int32_t n)
{
    struct flash_attention_params rest = *f;
    rest.cu_seqlens_q += n;
    rest.context_lens += n;
    rest.block_table += (size_t)n * (size_t)f->max_blocks;
    rest.n_seqs -= n;
    return rest;
}

int cuda_attention(struct device *d, const struct attention_params *p, struct error *e)
{
    if (check_shapes(p, &d->options, e)) return ERR_INVALID;
    if (p->n_seqs < 1 || p->cu_seqlens_q[0] != 0 || (size_t)p->cu_seqlens_q[p->n_seqs] != p->out.shape[0])
        return error_set(e, ERR_INVALID, "attention: %d sequences do not make %zu rows", p->n_seqs, p->out.shape[0]);
    int32_t n_first = 0, n_single = 0; // sequences for decode: how many the batch begins with, how many in all
    bool checked = array_is_checked(d, p->block_table);
    for (int32_t s = 0; s < p->n_seqs; s++) {
        if (!checked && check_sequence(p, s, d->options.max_context, e)) return ERR_INVALID;
        n_single += !d->options.deterministic && p->cu_seqlens_q[s + 1] - p->cu_seqlens_q[s] == 1;
        n_first += n_single == s + 1;
    }
    struct flash_attention_params f = params_of(d, p);
    if (place_arrays(d, p, &f, e)) return ERR_DEVICE;
    if (n_single > 0) {
        struct flash_attention_params decode = f;
        decode.settled = array_is_staged(d, p->block_table);
        if (n_first == n_single) { // row s is the query of sequence s
            decode.n_seqs = n_first;
            decode.cu_seqlens_q = NULL;
        }
        int status = gptd_flash_attention_decode(&decode, d->stream);
        if (cuda_check((cudaError_t)status, "attention", e)) return ERR_DEVICE;
    }
    if (n_single < p->n_seqs) {
        struct flash_attention_params prefill = after(&f, n_first);
        prefill.skip_queries = !d->options.deterministic;
        int status = gptd_flash_attention_prefill(&prefill, d->stream);
        if (cuda_check((cudaError_t)status, "attention", e)) return ERR_DEVICE;
    }
    return 0;
}
