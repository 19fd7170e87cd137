/* flash_attention.h: Flash Attention on NVIDIA GPUs as plain C functions: prefill over dense or paged keys and values,
 * and split-KV decode over paged ones. Exported by libgptd_cuda.so, so that it can be called, tested and timed from
 * anywhere (C, C++, ctypes); the backend's attention op calls nothing else.
 *
 * Needs sm_80 or newer. Everything is enqueued on `stream`, nothing is allocated, memory used is O(1) in the lengths
 * beside the scratch of decode. Contexts of 128k tokens and caches beyond 4 GB work.
 *
 * The same answer every time: the result of a query row depends on its own query, position, context and the options
 * alone, bit for bit, never on what else is in the batch. Prefill also does not depend on how a prompt was cut into
 * chunks. Decode sums in another order than prefill: the two agree within rounding, not bit for bit.
 *
 * Shapes: S = n_seqs, T = n_tokens (query rows in all), H = n_heads, KV = n_kv_heads (divides H), D = head_dim.
 */
#ifndef GPTD_KERNELS_FLASH_ATTENTION_H
#define GPTD_KERNELS_FLASH_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st; // cudaStream_t is a pointer to it

enum flash_attention_dtype { FLASH_ATTENTION_BF16, FLASH_ATTENTION_F16 };

// Sequence s owns query rows cu_seqlens_q[s] .. cu_seqlens_q[s+1] - 1 and sees keys 0 .. L - 1, L = context_lens[s]
// (paged) or cu_seqlens_k[s+1] - cu_seqlens_k[s] (dense). Query i of n is at position p = L - n + i and sees key j if
//     j >= p - window_left (unless window_left is -1)   and   j <= p + window_right (unless -1; causal: j <= p).
// score = scale * q.k; then softcap * tanh(score / softcap) if softcap > 0; then + alibi_slopes[h] * (j - p).
// A row that sees no key gets zeros and an lse of -infinity.
struct flash_attention_params {
    void *out;                  // [T, H, D], rows of out_stride elements, heads of out_head_stride
    float *lse;                 // [T, H] natural logarithm of the sum of exp(score); NULL: not wanted
    const void *q;              // [T, H, D], rows of q_stride elements, heads of q_head_stride
    const void *k, *v;          // paged: [n_blocks, KV, block_size, D]; dense: [tokens, KV, D]; by the strides below
    // Elements, below 2^31; rows start at multiples of 16 bytes.
    size_t out_stride, out_head_stride, q_stride, q_head_stride;
    size_t kv_block_stride;     // elements from block to block, below 2^31; dense: not used
    size_t kv_head_stride;      // from head to head
    size_t kv_stride;           // from token to token, below 2^26 (decode is tuned for head_dim)
    const int32_t *cu_seqlens_q; // device [S + 1]; decode: may be NULL when row s is the one query of sequence s
    const int32_t *cu_seqlens_k; // device [S + 1], dense; paged: NULL
    const int32_t *context_lens; // device [S], paged, new tokens included; dense: NULL
    const int32_t *block_table;  // device [S, max_blocks], paged; entries of blocks no query sees may be anything
    const float *alibi_slopes;  // device [H]; NULL: none
    void *scratch;              // device, decode only: gptd_flash_attention_scratch_bytes, any content; not shared with
                                // what may run at the same time
    size_t scratch_bytes;
    int32_t *tickets;           // device, decode only: [S * H] (max_queries > 1: 4 times that) zeros before the first call, zeros
                                // again after each;
                                // NULL: the library's own, for one decode at a time on each GPU
    enum flash_attention_dtype dtype; // of q, k, v, out
    int32_t n_seqs;
    int32_t n_tokens;           // prefill: rows of q and out; no sequence's rows are beyond
    int32_t n_kv;               // prefill: blocks (paged) or tokens (dense) of k and v; nothing beyond is read
    int32_t n_heads, n_kv_heads;
    int32_t head_dim;           // a multiple of 8, at most 256; tuned: 64, 80, 96, 128, 256
    int32_t block_size;         // 16, 32 or 64 (tuned: 64); dense: not used
    int32_t max_blocks;         // row length of block_table
    int32_t max_context;        // decode: no context is longer (what is beyond is not seen)
    int32_t causal;             // 0 or 1
    int32_t window_left, window_right; // keys before and after the query's own; -1: unlimited
    int32_t skip_queries;       // prefill: sequences of 1 to so many queries are left to decode; 0: none
    int32_t max_queries;        // decode: sequences of up to so many queries are its own, 8 at most; 0 is 1
    float scale;                // > 0; usually 1 / sqrt(head_dim)
    float softcap;              // 0: none
    int32_t settled;            // decode: 1 says that what it reads, but q and the last key and value of each sequence, is
                                // complete and visible when it may begin: on Hopper, while the kernel before it still runs,
                                // if that lets the next one in early. It is then read at once. 0: nothing is known
};

// Each returns 0 or a cudaError_t: cudaErrorInvalidValue for shapes or options that do not fit, else what the launch
// said. Prefill takes dense or paged keys (block_table NULL or not).
int gptd_flash_attention_prefill(const struct flash_attention_params *p, struct CUstream_st *stream);

// Paged, one query per sequence, or up to max_queries, which then are the last tokens of the context; with cu_seqlens_q given,
// sequences that have another number of queries are left alone. A query's result has the same bits whether others of its sequence
// come with it or not.
// A launch depends on no length but max_context: captured in a graph it serves every context up to that. On Hopper the next
// kernel of the stream, if it is launched so that it may (programmatic dependent launch), begins before this one ends.
int gptd_flash_attention_decode(const struct flash_attention_params *p, struct CUstream_st *stream);

// What decode wants as scratch for p's n_seqs, n_heads, n_kv_heads, head_dim and max_context; bounded (320 MB, or one
// sequence's need if that is more). With less it runs as several launches; it needs room for one sequence.
size_t gptd_flash_attention_scratch_bytes(const struct flash_attention_params *p);

#ifdef __cplusplus
}
#endif
#endif
