#!/usr/bin/env python3
"""Times the attention kernels of libgptd_cuda.so beside PyTorch's FlashAttention-2; scripts/bench_attention.py has more of both.

    attention_times.py [build/libgptd_cuda.so]
"""
import statistics
import sys
import warnings

import torch

import attention_check as ac


def captured(function, n=1):
    """A graph of n calls, after two uncaptured ones"""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(0)
        function(0)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    result = torch.cuda.CUDAGraph()
    with torch.cuda.graph(result):
        for i in range(n):
            function(i)
    return result


def medians(graphs, repeats):
    """Milliseconds of each graph, taken in turn"""
    times = [[] for _ in graphs]
    for _ in range(repeats):
        for graph_, list_ in zip(graphs, times):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph_.replay()
            end.record()
            end.synchronize()
            list_.append(begin.elapsed_time(end))
    return [statistics.median(x) for x in times]


def dense_params(q, k, v, out, n_seqs, cu, heads):
    p = ac.Params()
    p.out, p.q, p.k, p.v = (x.data_ptr() for x in (out, q, k, v))
    p.out_stride = p.q_stride = heads.q * heads.dim
    p.out_head_stride = p.q_head_stride = p.kv_head_stride = heads.dim
    p.kv_stride = heads.kv * heads.dim
    p.cu_seqlens_q = p.cu_seqlens_k = cu.data_ptr()
    p.dtype, p.n_seqs, p.n_tokens, p.n_kv = ac.DTYPES[heads.dtype], n_seqs, q.shape[0], k.shape[0]
    p.n_heads, p.n_kv_heads = heads.q, heads.kv
    p.head_dim, p.causal, p.window_left, p.window_right, p.scale = heads.dim, 1, -1, -1, heads.dim ** -0.5
    return p


def time_prefill(library, heads, total, s):
    """[ours ms, FlashAttention-2 ms, FLOPs]"""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    n_seqs = total // s
    q = torch.randn(total, heads.q, heads.dim, device=ac.DEVICE).to(heads.dtype)
    k, v = (torch.randn(total, heads.kv, heads.dim, device=ac.DEVICE).to(heads.dtype) for _ in range(2))
    out, cu = torch.empty_like(q), ac.device_ints([i * s for i in range(n_seqs + 1)])
    p = dense_params(q, k, v, out, n_seqs, cu, heads)
    group = heads.q // heads.kv
    theirs = [x.view(n_seqs, s, heads.q, heads.dim).transpose(1, 2)
              for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))]

    def flash(_):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=True)

    ours, other = medians([captured(lambda _: library.run("prefill", p)), captured(flash)], 15)
    return ours, other, 2 * s * s * heads.q * heads.dim * n_seqs


def time_decode(library, heads, batch, length, block_size=64, settled=0):
    """[µs, bytes of K and V]: calls of a graph, one after another, their pages in turn from sets beyond L2 in all;
    settled: as struct flash_attention_params has it"""
    n_pages = (length + block_size - 1) // block_size
    n_bytes = 2 * batch * length * heads.kv * heads.dim * 2
    n_sets = max(1, min(64, (256 << 20) // n_bytes + 1))
    n_calls = max(n_sets, 16)
    shape = (n_sets * batch * n_pages, heads.kv, block_size, heads.dim)
    k, v = (torch.randn(*shape, device=ac.DEVICE, dtype=heads.dtype) for _ in range(2))
    tables = torch.randperm(shape[0], device=ac.DEVICE).to(torch.int32).view(n_sets, batch, n_pages).contiguous()
    q = torch.randn(batch, heads.q, heads.dim, device=ac.DEVICE).to(heads.dtype)
    out, lens = torch.empty_like(q), ac.device_ints([length] * batch)
    p = dense_params(q, k, v, out, batch, lens, heads)
    p.cu_seqlens_q = p.cu_seqlens_k = None
    p.kv_stride, p.kv_head_stride = heads.dim, block_size * heads.dim
    p.kv_block_stride = heads.kv * block_size * heads.dim
    p.context_lens, p.block_size, p.max_blocks, p.max_context = lens.data_ptr(), block_size, n_pages, max(length, 32768)
    scratch = library.scratch(p)
    p.scratch, p.scratch_bytes, p.settled = scratch.data_ptr(), scratch.numel(), settled

    def ours(i):
        p.block_table = tables[i % n_sets].data_ptr()
        library.run("decode", p)

    return medians([captured(ours, n_calls)], 15)[0] * 1e3 / n_calls, n_bytes


def times(library):
    """A table, on stdout"""
    print(f"{torch.cuda.get_device_name()}, bf16; prefill causal: TFLOP/s of 2 s^2 H D, FA2 in the same run")
    print(f"{'prefill':24} {'s':>6} {'ms':>9} {'TFLOP/s':>9} {'FA2':>9} {'ratio':>6}")
    cases = [(ac.Heads(torch.bfloat16, 128, 16, 16), 16384, s) for s in (512, 1024, 2048, 4096, 8192, 16384)]
    cases += [(ac.Heads(torch.bfloat16, 64, 32, 32), 16384, s) for s in (1024, 16384)]
    cases += [(ac.Heads(torch.bfloat16, 256, 8, 8), 16384, s) for s in (1024, 16384)]
    cases += [(ac.Heads(torch.bfloat16, 128, 32, 8), s, s) for s in (512, 1024, 2048, 8192)]
    for heads, total, s in cases:
        name = f"d{heads.dim} {heads.q}/{heads.kv} b{total // s}"
        try:
            ours, other, flops = time_prefill(library, heads, total, s)
            rates = f"{flops / ours / 1e9:9.1f} {flops / other / 1e9:9.1f}"
            print(f"{name:24} {s:6} {ours:9.3f} {rates} {other / ours:6.2f}", flush=True)
        except Exception as e:
            print(f"{name:24} {s:6} FAILED {str(e)[:120]}", flush=True)
    print(f"{'paged decode':24} {'length':>6} {'us':>9} {'GB/s of KV':>11}")
    for heads, batch, length in [(ac.Heads(torch.bfloat16, 128, 32, 8), b, n) for b, n in (
            (1, 1024), (1, 4096), (1, 8192), (1, 32768), (8, 1024), (64, 2048), (256, 1024))] + \
            [(ac.Heads(torch.bfloat16, 128, 64, 8), 64, 2048), (ac.Heads(torch.bfloat16, 64, 32, 32), 32, 2048)]:
        name = f"d{heads.dim} {heads.q}/{heads.kv} b{batch}"
        try:
            us, n_bytes = time_decode(library, heads, batch, length)
            print(f"{name:24} {length:6} {us:9.1f} {n_bytes / us / 1e3:11.0f}", flush=True)
        except Exception as e:
            print(f"{name:24} {length:6} FAILED {str(e)[:120]}", flush=True)
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # of backends that do not fit
    times(ac.Library(sys.argv[1] if len(sys.argv) > 1 else "build/libgptd_cuda.so"))
