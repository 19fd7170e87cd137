#!/usr/bin/env python3
"""Checks the attention kernels of libgptd_cuda.so (kernels/flash_attention.h) against PyTorch on a GPU.

    attention_check.py [build/libgptd_cuda.so]          every group of cases; a line each, then "N passed, N failed"

Inputs are random and fresh (the seed is printed; --seed repeats a run), outputs poisoned, unused cache slots NaN. The
error ||out - ref|| / ||ref|| against float64 must be at most 1.25 times (in "peaks" 1.5 times) that of PyTorch in the same
type: SDPA's flash backend where it has the feature, else a plain softmax in float32 with weights in the type. What must be
equal bit for bit (alone or in a batch, whole or in chunks, any block table) is compared so.
"""
import argparse
import ctypes
import random
import sys
import time
import traceback
import warnings

import torch

DEVICE = "cuda"
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
ERROR_RATIO = 1.25
PEAKED_RATIO = 1.5  # rows that one key rules: its weight is rounded like any other, PyTorch's is exactly 1
LSE_TOLERANCE = 5e-4
MATRIX_BYTES = 1 << 28  # of one part of a reference's scores


class Params(ctypes.Structure):
    """struct flash_attention_params"""
    _fields_ = [(name, ctypes.c_void_p) for name in ("out", "lse", "q", "k", "v")] + \
               [(name, ctypes.c_size_t) for name in ("out_stride", "out_head_stride", "q_stride", "q_head_stride",
                                                     "kv_block_stride", "kv_head_stride", "kv_stride")] + \
               [(name, ctypes.c_void_p) for name in ("cu_seqlens_q", "cu_seqlens_k", "context_lens", "block_table",
                                                     "alibi_slopes", "scratch")] + \
               [("scratch_bytes", ctypes.c_size_t), ("tickets", ctypes.c_void_p)] + \
               [(name, ctypes.c_int32) for name in ("dtype", "n_seqs", "n_tokens", "n_kv", "n_heads", "n_kv_heads",
                                                    "head_dim", "block_size", "max_blocks", "max_context", "causal",
                                                    "window_left", "window_right", "skip_queries", "max_queries")] + \
               [("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("settled", ctypes.c_int32)]


class Library:
    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        for name in ("prefill", "decode"):
            function = getattr(self.lib, "gptd_flash_attention_" + name)
            function.argtypes, function.restype = [ctypes.POINTER(Params), ctypes.c_void_p], ctypes.c_int
        scratch = self.lib.gptd_flash_attention_scratch_bytes
        scratch.argtypes, scratch.restype = [ctypes.POINTER(Params)], ctypes.c_size_t

    def run(self, name, params):
        stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else None
        status = getattr(self.lib, "gptd_flash_attention_" + name)(ctypes.byref(params), stream)
        if status:
            raise RuntimeError(f"{name}: CUDA error {status}")

    def scratch(self, params):
        return torch.empty(self.lib.gptd_flash_attention_scratch_bytes(ctypes.byref(params)), dtype=torch.uint8,
                           device=DEVICE)


class Options:
    def __init__(self, causal=True, left=-1, right=-1, slopes=None, softcap=0.0, scale=None):
        self.causal, self.left, self.right, self.slopes = causal, left, right, slopes
        self.softcap, self.scale = softcap, scale

    def plain(self):
        return self.left < 0 and self.right < 0 and self.slopes is None and self.softcap == 0


class Heads:
    def __init__(self, dtype=torch.bfloat16, dim=128, q=8, kv=2):
        self.dtype, self.dim, self.q, self.kv = dtype, dim, q, kv


class Sequence:
    """n queries at the end of a context of `length`: q [n, H, D], k, v [length, KV, D]"""
    def __init__(self, heads, n, length, spread=1.0):
        self.heads, self.n, self.length = heads, n, length
        def fresh(*shape):
            return torch.randn(*shape, device=DEVICE).to(heads.dtype)
        self.q = (fresh(n, heads.q, heads.dim).float() * spread).to(heads.dtype)
        self.k, self.v = fresh(length, heads.kv, heads.dim), fresh(length, heads.kv, heads.dim)

    def part(self, first, end):
        """queries first .. end - 1, with the context that ends with them"""
        part = object.__new__(Sequence)
        part.heads, part.n, part.length = self.heads, end - first, self.length - self.n + end
        part.q, part.k, part.v = self.q[first:end], self.k[:part.length], self.v[:part.length]
        return part


def device_ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def sums(values):
    return [sum(values[:i]) for i in range(len(values) + 1)]


# ---- references -----------------------------------------------------------------------------------------------------

def scores_of(s, o, kv_head, first, end, dtype):
    """[group, end - first, length] scores of queries first .. end - 1, and whether each is seen"""
    heads, group = s.heads, s.heads.q // s.heads.kv
    q = s.q[first:end, kv_head * group:(kv_head + 1) * group].to(dtype).transpose(0, 1)
    x = torch.matmul(q, s.k[:, kv_head].to(dtype).t()) * (o.scale or heads.dim ** -0.5)
    if o.softcap:
        x = torch.tanh(x / o.softcap) * o.softcap
    position = torch.arange(s.length - s.n + first, s.length - s.n + end, device=DEVICE)[:, None]
    key = torch.arange(s.length, device=DEVICE)[None, :]
    if o.slopes is not None:
        slopes = o.slopes[kv_head * group:(kv_head + 1) * group].to(dtype)
        x = x + slopes[:, None, None] * (key - position).to(dtype)
    seen = key >= position - o.left if o.left >= 0 else torch.ones_like(key >= position)
    right = 0 if o.causal else o.right
    return x, seen & (key <= position + right) if right >= 0 else seen


def attend(s, o, exact):
    """out [n, H, D], lse [n, H]: in float64 if exact, else softmax in float32, weights and output in the type"""
    heads, group = s.heads, s.heads.q // s.heads.kv
    dtype = torch.float64 if exact else torch.float32
    out = torch.zeros(s.n, heads.q, heads.dim, dtype=dtype, device=DEVICE)
    lse = torch.full((s.n, heads.q), -torch.inf, dtype=dtype, device=DEVICE)
    if s.length == 0:
        return out, lse
    step = max(1, MATRIX_BYTES // (8 * group * s.length))
    for kv_head in range(heads.kv):
        these = slice(kv_head * group, (kv_head + 1) * group)
        for first in range(0, s.n, step):
            end = min(first + step, s.n)
            x, seen = scores_of(s, o, kv_head, first, end, dtype)
            x = x.masked_fill(~seen, -torch.inf)
            lse[first:end, these] = torch.logsumexp(x, -1).transpose(0, 1)
            weights = torch.softmax(x, -1).nan_to_num(0.0)
            v = s.v[:, kv_head]
            if exact:
                y = torch.matmul(weights, v.double())
            else:
                y = torch.matmul(weights.to(heads.dtype), v).float()
            out[first:end, these] = y.transpose(0, 1)
    return out, lse


def sdpa(s, o):
    """PyTorch's FlashAttention-2, or None where it does not do this"""
    if DEVICE != "cuda" or not o.plain() or (o.causal and s.n != s.length) or s.length == 0:
        return None
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        group = s.heads.q // s.heads.kv
        q, k, v = (x.transpose(0, 1)[None] for x in (s.q, s.k.repeat_interleave(group, 1),
                                                     s.v.repeat_interleave(group, 1)))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=o.causal, scale=o.scale)
        return out[0].transpose(0, 1).double()
    except RuntimeError:
        return None


def relative(x, reference):
    return float((x.double() - reference).norm() / reference.norm().clamp_min(1e-30))


# ---- running the kernels --------------------------------------------------------------------------------------------

def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


class Run:
    """A batch in device memory, paged (block_size > 0) or dense, q in fused rows; keeps what the pointers point to. by_token:
    a page has the heads of a token together, not the tokens of a head"""
    def __init__(self, sequences, options, block_size=64, spare=3, by_token=False):
        self.sequences, self.options, heads = sequences, options, sequences[0].heads
        self.heads, self.block_size = heads, block_size
        n_tokens, p = sum(s.n for s in sequences), Params()
        self.qkv = poisoned(max(n_tokens, 1), (heads.q + 2 * heads.kv) * heads.dim, dtype=heads.dtype)
        self.qkv[:n_tokens, :heads.q * heads.dim] = torch.cat([s.q.reshape(s.n, -1) for s in sequences])
        self.out = poisoned(max(n_tokens, 1), heads.q, heads.dim, dtype=heads.dtype)
        self.lse = poisoned(max(n_tokens, 1), heads.q, dtype=torch.float32)
        self.cu_q = device_ints(sums([s.n for s in sequences]))
        self.slopes = None if options.slopes is None else options.slopes.float().contiguous()
        p.out, p.lse, p.q = self.out.data_ptr(), self.lse.data_ptr(), self.qkv.data_ptr()
        p.out_stride, p.out_head_stride = heads.q * heads.dim, heads.dim
        p.q_stride, p.q_head_stride = (heads.q + 2 * heads.kv) * heads.dim, heads.dim
        p.cu_seqlens_q = self.cu_q.data_ptr()
        p.alibi_slopes = None if self.slopes is None else self.slopes.data_ptr()
        p.dtype, p.n_seqs, p.n_tokens = DTYPES[heads.dtype], len(sequences), n_tokens
        p.n_heads, p.n_kv_heads, p.head_dim = heads.q, heads.kv, heads.dim
        p.causal, p.window_left, p.window_right = int(options.causal), options.left, options.right
        p.scale, p.softcap = options.scale or heads.dim ** -0.5, options.softcap
        p.max_context = max(max(s.length for s in sequences), 1)
        p.settled = random.randint(0, 1)
        self.p = p
        if block_size:
            self.place_pages(spare, by_token)
        else:
            self.place_dense()

    def place_pages(self, spare, by_token):
        heads, size, p = self.heads, self.block_size, self.p
        counts = [(s.length + size - 1) // size for s in self.sequences]
        n_blocks, max_blocks = sum(counts) + spare, max(counts) + 2
        ids = torch.randperm(n_blocks).tolist()
        shape = (n_blocks, size, heads.kv, heads.dim) if by_token else (n_blocks, heads.kv, size, heads.dim)
        self.k, self.v = (poisoned(*shape, dtype=heads.dtype) for _ in range(2))
        if by_token:
            self.k, self.v = self.k.transpose(1, 2), self.v.transpose(1, 2)
        table = [[-1] * max_blocks for _ in self.sequences]
        for row, s, count in zip(table, self.sequences, counts):
            mine = [ids.pop() for _ in range(count)]
            where = torch.tensor(mine, dtype=torch.int64, device=DEVICE)
            for cache, x in ((self.k, s.k), (self.v, s.v)):
                tiles = poisoned(count * size, heads.kv, heads.dim, dtype=heads.dtype)
                tiles[:s.length] = x
                if count:
                    cache[where] = tiles.view(count, size, heads.kv, heads.dim).transpose(1, 2)
            behind = max(0, s.length - s.n - self.options.left) if self.options.left >= 0 else 0
            row[:count] = [-1 if (i + 1) * size <= behind else block for i, block in enumerate(mine)]
            for i in range(min(behind // size, count)):
                self.k[mine[i]], self.v[mine[i]] = float("nan"), float("nan")
        self.table, self.lens = device_ints(table), device_ints([s.length for s in self.sequences])
        p.k, p.v = self.k.data_ptr(), self.v.data_ptr()
        p.kv_block_stride, p.kv_head_stride, p.kv_stride, _ = self.k.stride()
        p.block_size, p.max_blocks = size, max_blocks
        p.block_table, p.context_lens, p.n_kv = self.table.data_ptr(), self.lens.data_ptr(), n_blocks

    def place_dense(self):
        heads, p = self.heads, self.p
        rows = sum(s.length for s in self.sequences)
        self.kv = poisoned(rows + 64, 2 * heads.kv, heads.dim, dtype=heads.dtype)
        self.kv[:rows, :heads.kv] = torch.cat([s.k for s in self.sequences])
        self.kv[:rows, heads.kv:] = torch.cat([s.v for s in self.sequences])
        self.cu_k = device_ints(sums([s.length for s in self.sequences]))
        p.k = self.kv.data_ptr()
        p.v = self.kv.data_ptr() + heads.kv * heads.dim * self.kv.element_size()
        p.kv_stride, p.kv_head_stride = 2 * heads.kv * heads.dim, heads.dim
        p.cu_seqlens_k, p.n_kv = self.cu_k.data_ptr(), rows

    def prefill(self, library):
        library.run("prefill", self.p)
        return self.results()

    def decode(self, library, scratch=None, max_queries=0):
        self.p.scratch_bytes, self.p.max_queries = 0, max_queries
        self.scratch = library.scratch(self.p) if scratch is None else scratch
        self.scratch.fill_(255)
        self.p.scratch, self.p.scratch_bytes = self.scratch.data_ptr(), self.scratch.numel()
        if self.p.settled:
            torch.cuda.synchronize()  # what PyTorch wrote is there before the call, not only before its wait
        library.run("decode", self.p)
        return self.results()

    def results(self):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        cuts = sums([s.n for s in self.sequences])
        return [(self.out[a:b].clone(), self.lse[a:b].clone()) for a, b in zip(cuts, cuts[1:])]


class Failure(Exception):
    pass


def check(condition, what):
    if not condition:
        raise Failure(what)


def check_close(run, results, worst, limit=ERROR_RATIO):
    """All rows of the batch together against float64; notes the worst ratio to PyTorch's error"""
    outs, exact, other, lse, lse_exact, names = [], [], [], [], [], set()
    for s, (out, sums_) in zip(run.sequences, results):
        reference, reference_lse = attend(s, run.options, True)
        theirs = sdpa(s, run.options)
        names.add("plain" if theirs is None else "sdpa")
        other.append((attend(s, run.options, False)[0].to(s.heads.dtype) if theirs is None else theirs).double())
        outs.append(out)
        exact.append(reference)
        lse.append(sums_.double())
        lse_exact.append(reference_lse)
    out, exact, other, lse, lse_exact = (torch.cat(x) for x in (outs, exact, other, lse, lse_exact))
    check(bool(torch.isfinite(out).all()), "NaN or infinity in the output (unwritten, or read where it should not)")
    floor = 1e-6  # a single key comes out exact
    ratio = relative(out, exact) / max(relative(other, exact), floor)
    worst["ratio"] = max(worst.get("ratio", 0), ratio)
    worst["error"] = max(worst.get("error", 0), relative(out, exact))
    worst.setdefault("against", set()).update(names)
    check(ratio <= limit, f"error {relative(out, exact):.2e}, PyTorch's {relative(other, exact):.2e}")
    empty = torch.isinf(lse_exact)
    check(bool((torch.isinf(lse) == empty).all()), "lse is infinite in other places")
    if bool((~empty).any()):
        difference = float((lse - lse_exact)[~empty].abs().max())
        worst["lse"] = max(worst.get("lse", 0), difference)
        check(difference <= LSE_TOLERANCE, f"lse differs by {difference:.2e}")


def same_bits(a, b):
    return all(torch.equal(x.view(torch.int16 if x.element_size() == 2 else torch.int32),
                           y.view(torch.int16 if y.element_size() == 2 else torch.int32)) for x, y in zip(a, b))


def alibi(n_heads):
    return torch.tensor([2.0 ** (-8 * (i + 1) / n_heads) for i in range(n_heads)], device=DEVICE)


def whole(heads, length):
    return Sequence(heads, length, length)


def ragged(heads, pairs, spread=1.0):
    return [Sequence(heads, n, length, spread) for n, length in pairs]


EDGES = [(1, 1), (63, 63), (64, 64), (65, 65), (3, 130), (1, 200), (17, 17), (130, 333)]


# ---- groups of cases: each yields functions; one that raises is one that failed --------------------------------------

def head_dims(library, worst):
    for dtype in DTYPES:
        for dim in (64, 80, 96, 128, 256, 40, 72, 8, 248):
            heads = Heads(dtype, dim, 4, 2)
            yield f"{dtype} d{dim}", lambda heads=heads: both(library, ragged(heads, EDGES), Options(), 64, worst)


def both(library, sequences, options, block_size, worst, limit=ERROR_RATIO, by_token=False):
    """Prefill of all, and decode of each one's last query"""
    run = Run(sequences, options, block_size, by_token=by_token)
    check_close(run, run.prefill(library), worst, limit)
    if options.right < 0 or options.causal:
        run = Run([s.part(s.n - 1, s.n) for s in sequences], options, block_size, by_token=by_token)
        check_close(run, run.decode(library), worst, limit)


def gqa(library, worst):
    for q, kv in ((4, 4), (8, 4), (8, 2), (16, 2), (8, 1), (10, 2), (17, 1), (40, 1), (71, 1)):
        for dim in (64, 128):
            heads = Heads(random.choice(list(DTYPES)), dim, q, kv)
            yield f"{q}/{kv} d{dim}", lambda heads=heads: both(library, ragged(heads, EDGES), Options(), 64, worst)


def block_sizes(library, worst):
    for size in (16, 32, 64):
        pairs = [(n, n) for n in (1, size - 1, size, size + 1, 1000)] + [(5, 777), (100, 2 * size + 1)]
        for dim in (64, 80, 128, 256):
            heads = Heads(random.choice(list(DTYPES)), dim, 8, 2)
            yield f"blocks of {size} d{dim}", lambda heads=heads, pairs=pairs, size=size: \
                both(library, ragged(heads, pairs), Options(), size, worst)
            yield f"blocks of {size} by token d{dim}", lambda heads=heads, pairs=pairs, size=size: \
                both(library, ragged(heads, pairs), Options(), size, worst, by_token=True)


def lengths(library, worst):
    for dtype in DTYPES:
        heads = Heads(dtype, 128, 8, 2)
        yield f"{dtype} 1000, 4097", lambda heads=heads: \
            both(library, ragged(heads, [(1000, 1000), (4097, 4097)]), Options(), 64, worst)
        yield f"{dtype} 100k", lambda heads=heads: \
            both(library, ragged(heads, [(70, 100_003), (2, 9), (1, 16_385), (1, 8_193)]), Options(), 64, worst)
    yield "peaked scores", lambda: both(library, ragged(Heads(), EDGES, 6.0), Options(), 64, worst)


def windows(library, worst):
    pairs = EDGES + [(700, 700), (100, 1000), (2, 1500)]
    for left in (0, 16, 63, 64, 100, 500):
        for size in (16, 64):
            heads = Heads(random.choice(list(DTYPES)), random.choice((64, 96, 128)), 8, 2)
            yield f"window {left + 1}, blocks of {size}", lambda left=left, size=size, heads=heads: \
                both(library, ragged(heads, pairs), Options(left=left), size, worst)
    for left, right in ((30, 10), (-1, 5), (100, -1), (0, 0), (64, 64)):
        yield f"window {left}, {right}", lambda left=left, right=right: both(
            library, ragged(Heads(), pairs), Options(causal=False, left=left, right=right), 32, worst)


def scores(library, worst):
    for name, make in (("alibi", lambda h: Options(slopes=alibi(h.q))), ("softcap", lambda h: Options(softcap=20.0)),
                       ("softcap + alibi", lambda h: Options(softcap=5.0, slopes=alibi(h.q))),
                       ("alibi + window", lambda h: Options(left=99, slopes=alibi(h.q))),
                       ("softcap + window", lambda h: Options(left=40, softcap=30.0)),
                       ("scale", lambda h: Options(scale=0.3)),
                       ("alibi not causal", lambda h: Options(causal=False, slopes=alibi(h.q)))):
        for heads in (Heads(torch.bfloat16, 128, 8, 2), Heads(torch.float16, 64, 6, 6),
                      Heads(torch.float16, 256, 34, 2)):
            yield f"{name} d{heads.dim}", lambda heads=heads, make=make: both(
                library, ragged(heads, EDGES + [(300, 900)], 3.0), make(heads), 64, worst)

    for dim, q, kv in ((64, 71, 1), (128, 80, 8)):  # more slopes than a warp's lanes keep
        heads = Heads(torch.bfloat16, dim, q, kv)
        yield f"alibi {q}/{kv} d{dim}", lambda heads=heads: \
            both(library, ragged(heads, EDGES, 3.0), Options(slopes=alibi(heads.q)), 64, worst)


def not_causal(library, worst):
    for dim in (64, 128, 256):
        heads = Heads(random.choice(list(DTYPES)), dim, 8, 2)
        yield f"d{dim}", lambda heads=heads: both(library, ragged(heads, EDGES), Options(causal=False), 64, worst)


def prefill_only(library, sequences, options, block_size, worst):
    run = Run(sequences, options, block_size)
    check_close(run, run.prefill(library), worst)


def dense(library, worst):
    pairs = EDGES + [(1000, 1000), (100, 40), (5, 0), (65, 64)]
    for dim in (64, 80, 128, 256):
        for causal in (True, False):
            heads = Heads(random.choice(list(DTYPES)), dim, 8, random.choice((8, 2)))
            yield f"d{dim} causal {causal}", lambda heads=heads, causal=causal: \
                prefill_only(library, ragged(heads, pairs), Options(causal), 0, worst)
    for dim in (64, 128, 256):
        heads = Heads(torch.bfloat16, dim, 8, 2)
        yield f"window, alibi d{dim}", lambda heads=heads: \
            prefill_only(library, ragged(heads, pairs), Options(left=50, slopes=alibi(8)), 0, worst)
        # Queries without keys between others, in blocks that have several tiles.
        heads = Heads(torch.bfloat16, dim, 16, 16)
        yield f"gaps d{dim}", lambda heads=heads: \
            prefill_only(library, ragged(heads, [(130, 333), (5, 0), (300, 40), (70, 70)] * 10), Options(), 0, worst)


def chunk_bits(library, s, options, block_size):
    length = s.length
    together = Run([s], options, block_size).prefill(library)[0]
    cuts = sorted({0, length, *(random.randrange(1, length) for _ in range(6))})
    parts = [s.part(a, b) for a, b in zip(cuts, cuts[1:])]
    pieces = Run(parts, options, block_size).prefill(library)  # all chunks in one batch, each with its own copy
    for a, b, piece in zip(cuts, cuts[1:], pieces):
        check(same_bits(piece, (together[0][a:b], together[1][a:b])), f"queries {a} .. {b - 1} differ from the whole's")


def chunked(library, worst):
    for dim, q, kv in ((64, 8, 8), (80, 8, 2), (96, 8, 2), (128, 16, 4), (128, 12, 2), (256, 8, 1), (72, 4, 2)):
        for options in (Options(), Options(left=300), Options(slopes=alibi(q)), Options(softcap=10.0, left=77)):
            heads = Heads(random.choice(list(DTYPES)), dim, q, kv)
            yield f"{q}/{kv} d{dim}", lambda heads=heads, options=options: \
                chunk_bits(library, whole(heads, random.randrange(900, 1300)), options, random.choice((16, 32, 64)))
    # Tiles of 128 rows for the whole, of 64 for the chunks.
    for dim in (64, 80, 128, 256):
        yield f"4097 d{dim}", lambda dim=dim: \
            chunk_bits(library, whole(Heads(torch.bfloat16, dim, 16, 16), 4097), Options(), 64)


def climbing(heads, length):
    """Scores that jump at some keys, the more the further back, in the end by more than a float's range; not in all rows"""
    s = whole(heads, length)
    way = torch.randn(heads.dim, device=DEVICE).sign()
    rows = torch.tensor([1.0, 0.0, 1.0, -1.0], device=DEVICE).repeat(length)[:length, None, None]
    s.q = (s.q.float() + 4 * rows * way).to(heads.dtype)
    for part, height in ((0.75, 0.25), (0.5, 0.6), (0.35, 1.6), (0.2, 5)):
        s.k[int(part * length)] = (height * way).to(heads.dtype)
    return s


def climb(library, s, options, block_size, worst):
    both(library, [s], options, block_size, worst, PEAKED_RATIO)
    chunk_bits(library, s, options, block_size)


def peaks(library, worst):
    for dtype in DTYPES:
        for dim in (64, 80, 128, 256):
            heads = Heads(dtype, dim, 8, random.choice((8, 2)))
            for name, options in (("plain", Options()), ("alibi", Options(slopes=alibi(8))), ("window", Options(left=400)),
                                  ("softcap", Options(softcap=500.0))):
                yield f"{name} {dtype} d{dim}", lambda heads=heads, options=options: \
                    climb(library, climbing(heads, random.randrange(900, 1300)), options, random.choice((16, 32, 64)), worst)


def few_queries_alike(library, heads, pairs, options, block_size, worst):
    """Decode of several queries a sequence, and of each alone: the same bits"""
    sequences = ragged(heads, pairs)
    run = Run(sequences, options, block_size)
    together = run.decode(library, max_queries=8)
    check_close(run, together, worst)
    ones = [(i, j, s.part(j, j + 1)) for i, s in enumerate(sequences) for j in range(max(0, s.n - s.length), s.n)]
    alone = Run([one for _, _, one in ones], options, block_size).decode(library)
    for (i, j, _), result in zip(ones, alone):
        check(same_bits(result, tuple(x[j:j + 1] for x in together[i])), f"query {j} of {pairs[i]} differs from it alone")


def few_queries(library, worst):
    pairs = [(8, 1027), (5, 4099), (3, 3), (8, 5), (1, 700), (8, 8), (2, 33), (7, 2049), (4, 130), (8, 16390)]
    for dim, q, kv in ((64, 8, 8), (80, 8, 2), (128, 8, 2), (128, 14, 2), (256, 8, 1)):
        heads = Heads(random.choice(list(DTYPES)), dim, q, kv)
        for name, options in (("plain", Options()), ("window", Options(left=40)), ("window", Options(left=1022)),
                              ("alibi", Options(slopes=alibi(q))), ("softcap", Options(softcap=20.0))):
            yield f"{name} {q}/{kv} d{dim}", lambda heads=heads, options=options: few_queries_alike(
                library, heads, random.sample(pairs, len(pairs)), options, random.choice((16, 32, 64)), worst)
    heads = Heads(torch.bfloat16, 128, 8, 2)
    yield "many", lambda: few_queries_alike(library, heads, [(random.randrange(1, 9), random.randrange(1, 3000))
                                                            for _ in range(70)], Options(), 64, worst)
    # a share that begins in a sequence's second run, whose keys end in another page than the first's
    pairs = [(8, random.randrange(4, 9) * 64 + random.randrange(1, 7)) for _ in range(264)]
    yield "runs of two pages", lambda: few_queries_alike(library, heads, pairs, Options(left=127), 64, worst)


def batch_bits(library, sequences, options, name):
    together = getattr(Run(sequences, options), name)(library)
    order = list(range(len(sequences)))
    random.shuffle(order)
    shuffled = getattr(Run([sequences[i] for i in order], options), name)(library)
    for i, s in enumerate(sequences):
        alone = getattr(Run([s], options), name)(library)[0]
        check(same_bits(alone, together[i]), f"sequence {i} ({s.n} of {s.length}) alone differs from it in the batch")
        check(same_bits(shuffled[order.index(i)], together[i]), f"sequence {i} differs in another order of the batch")


def batched(library, worst):
    many = [(random.randrange(1, 400), 0) for _ in range(70)]
    for dim in (64, 128, 256):
        for options in (Options(), Options(left=100)):
            heads = Heads(random.choice(list(DTYPES)), dim, 8, 2)
            pairs = [(n, n + random.randrange(0, 300)) for n, _ in many]
            yield f"prefill d{dim}", lambda heads=heads, pairs=pairs, options=options: \
                batch_bits(library, ragged(heads, pairs), options, "prefill")
            lens = [random.choice((1, 63, 64, 65, 128, 129, 500, 1025, 4097, 9000)) for _ in range(70)] + [20_000]
            yield f"decode d{dim}", lambda heads=heads, lens=lens, options=options: \
                batch_bits(library, ragged(heads, [(1, n) for n in lens]), options, "decode")

    for dim in (64, 128, 256):  # rows that are alike and as many as warps, or nearly: whole rows to each, or cut
        heads = Heads(random.choice(list(DTYPES)), dim, 32, 8)
        n_warps = 4 * torch.cuda.get_device_properties(0).multi_processor_count
        for n_seqs in (n_warps // heads.kv, n_warps * 3 // 4 // heads.kv, n_warps // 2 // heads.kv):
            length = random.randrange(300, 700)
            yield f"alike d{dim} {n_seqs} of {length}", lambda heads=heads, n_seqs=n_seqs, length=length: \
                batch_bits(library, ragged(heads, [(1, length)] * n_seqs), Options(), "decode")


def mixed_batch(library, heads, worst):
    """As the op calls them: decode leaves sequences with several queries alone, prefill those with one"""
    sequences = ragged(heads, [(1, 100), (1, 1), (40, 40), (1, 999), (130, 500), (2, 2), (1, 64)])
    run = Run(sequences, Options())
    run.p.skip_queries = 1
    run.prefill(library)
    for s, (out, _) in zip(sequences, run.results()):
        check(bool(torch.isnan(out).all()) == (s.n == 1), "prefill wrote a row of decode, or left one of its own")
    check_close(run, run.decode(library), worst)


def empty_rows(library):
    heads = Heads()
    run = Run(ragged(heads, [(1, 0), (1, 70), (1, 0)]), Options())
    results = run.decode(library)
    for i in (0, 2):
        check(bool((results[i][0] == 0).all()) and bool(torch.isneginf(results[i][1]).all()), "no keys: not zero")
    check(bool(torch.isfinite(results[1][0]).all()), "a row beside it is wrong")


def small_scratch(library):
    run = Run(ragged(Heads(), [(1, n) for n in (3000, 64, 1500, 2900, 1, 700, 2999)]), Options())
    whole = run.decode(library)
    scratch = run.scratch[:run.scratch.numel() // 7 * 2 // 16 * 16]
    again = Run(run.sequences, Options())
    check(all(same_bits(a, b) for a, b in zip(again.decode(library, scratch), whole)), "in several launches: differs")
    rows = Run(run.sequences, Options())
    rows.p.cu_seqlens_q = None
    check(all(same_bits(a, b) for a, b in zip(rows.decode(library, scratch), whole)), "without cu_seqlens_q: differs")


def repeated(library):
    run = Run(ragged(Heads(), [(1, n) for n in (5000, 64, 1500, 130, 8192)]), Options())
    first = run.decode(library)
    for _ in range(20):
        run.out.fill_(float("nan"))
        check(all(same_bits(a, b) for a, b in zip(run.decode(library, run.scratch), first)), "a repeated call differs")


def concurrent(library):
    """Calls on several streams at once, more of them than the library has counters"""
    runs = [Run(ragged(Heads(dim=random.choice((64, 128, 256))), [(n, n + 100) for n in (random.randrange(1, 900), 64)]), Options())
            for _ in range(12)]
    want = [run.prefill(library) for run in runs]
    streams = [torch.cuda.Stream() for _ in runs]
    for run in runs:
        run.out.fill_(float("nan"))
    torch.cuda.synchronize()
    for _ in range(40):
        for run, stream in zip(runs, streams):
            with torch.cuda.stream(stream):
                library.run("prefill", run.p)
    for run, expected in zip(runs, want):
        check(all(same_bits(a, b) for a, b in zip(run.results(), expected)), "a call beside others differs from it alone")


def graph(library):
    """One captured launch serves every context: lengths change in place"""
    lens = [3000, 200, 64, 5000]
    run = Run(ragged(Heads(), [(1, n) for n in lens]), Options())
    want = run.decode(library)
    captured = torch.cuda.CUDAGraph()
    run.lens.fill_(1)
    with torch.cuda.graph(captured):
        library.run("decode", run.p)
    for factor in (1.0, 0.5, 0.01):
        now = [max(1, int(n * factor)) for n in lens]
        run.lens.copy_(device_ints(now))
        run.out.fill_(float("nan"))
        captured.replay()
        got = run.results()
        for s, (out, _), n, whole in zip(run.sequences, got, now, want):
            short = s.part(0, 1)
            short.length, short.k, short.v = n, s.k[:n], s.v[:n]
            expected = whole if n == s.length else Run([short], Options()).decode(library)[0]
            check(same_bits((out,), (expected[0],)), f"replayed at {n} tokens: differs")


def refusals(library):
    def refused(change, name="prefill"):
        run = Run(ragged(Heads(), [(3, 3)] if name == "prefill" else [(1, 3)]), Options())
        change(run.p)
        try:
            getattr(run, name)(library)
        except RuntimeError:
            return
        raise Failure("was not refused")
    refused(lambda p: setattr(p, "head_dim", 100))
    refused(lambda p: setattr(p, "head_dim", 264))
    refused(lambda p: setattr(p, "n_kv_heads", 3))
    refused(lambda p: setattr(p, "block_size", 48))
    refused(lambda p: setattr(p, "scale", 0.0))
    refused(lambda p: setattr(p, "k", p.k + 2))
    refused(lambda p: setattr(p, "q_stride", 1 << 31))
    refused(lambda p: setattr(p, "n_tokens", 1 << 29))
    refused(lambda p: setattr(p, "block_table", None), "decode")


def far_heads(library, name, worst):
    """A cache by heads, one 2^32 elements after the other"""
    heads = Heads(torch.bfloat16, 128, 8, 2)
    run = Run(ragged(heads, [(5 if name == "prefill" else 1, n) for n in (100, 1000)]), Options())
    kept = []
    for part in ("k", "v"):
        cache = getattr(run, part)  # [n_blocks, KV, block_size, D]
        far, n = torch.empty((1 << 32) + cache[:, 0].numel(), dtype=heads.dtype, device=DEVICE), cache[:, 0].numel()
        for head in range(2):
            far[head << 32:(head << 32) + n] = cache[:, head].reshape(-1)
        setattr(run.p, part, far.data_ptr())
        kept.append(far)
    run.p.kv_head_stride, run.p.kv_block_stride = 1 << 32, 64 * heads.dim
    check_close(run, getattr(run, name)(library), worst)


def calls(library, worst):
    for dtype in DTYPES:
        yield f"mixed batch {dtype}", lambda dtype=dtype: mixed_batch(library, Heads(dtype), worst)
    yield "rows without keys", lambda: empty_rows(library)
    yield "small scratch", lambda: small_scratch(library)
    yield "repeated", lambda: repeated(library)
    yield "refusals", lambda: refusals(library)
    if DEVICE == "cuda":
        yield "graph", lambda: graph(library)
        yield "concurrent", lambda: concurrent(library)
        for name in ("prefill", "decode"):
            yield f"far heads {name}", lambda name=name: far_heads(library, name, worst)


GROUPS = [head_dims, gqa, block_sizes, lengths, windows, scores, peaks, not_causal, dense, chunked, batched, few_queries,
          calls]


def run_group(group, library):
    """(passed, failed), with one line for the group and one for each failure"""
    worst, passed, failures, begin = {}, 0, [], time.time()
    for name, case in group(library, worst):
        try:
            case()
            passed += 1
        except Exception as e:
            where = "" if isinstance(e, Failure) else f" ({traceback.extract_tb(e.__traceback__)[-1].name})"
            words = str(e).splitlines()[0][:200] if str(e) else ""
            failures.append(f"  FAILED {name}: {type(e).__name__}: {words}{where}")
            if "CUDA error: an illegal" in str(e) or "unspecified launch failure" in str(e):
                failures.append("  the device is lost: the rest of the run means nothing")
                break
    figures = "".join(f"  {key} {worst[key]:.2e}" if key != "ratio" else f"  worst ratio {worst[key]:.3f}"
                      for key in ("ratio", "error", "lse") if key in worst)
    against = " of " + "+".join(sorted(worst["against"])) if worst.get("against") else ""
    counts = f"{passed:3} passed {len(failures):3} failed"
    print(f"{group.__name__:13} {counts}{figures}{against}  {time.time() - begin:.1f} s", flush=True)
    print("\n".join(failures), flush=True) if failures else None
    return passed, len(failures)


# ---- all of them ----------------------------------------------------------------------------------------------------

def checks(library, only):
    total = [0, 0]
    for group in GROUPS:
        if only and group.__name__ not in only:
            continue
        for i, n in enumerate(run_group(group, library)):
            total[i] += n
    print(f"{total[0]} passed, {total[1]} failed")
    return 1 if total[1] or not total[0] else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", default="build/libgptd_cuda.so")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", nargs="*", help="groups: " + " ".join(g.__name__ for g in GROUPS))
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 31) if arguments.seed is None else arguments.seed
    random.seed(seed)
    torch.manual_seed(seed)
    if DEVICE == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    warnings.filterwarnings("ignore")  # of backends that do not fit
    print(f"seed {seed}")
    return checks(Library(arguments.library), arguments.only)


if __name__ == "__main__":
    sys.exit(main())
