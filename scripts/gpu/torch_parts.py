"""The parts of bench_gpu.py that run in PyTorch, each in a process of its own: ceilings, and our attention beside PyTorch's.

    python3 scripts/gpu/torch_parts.py PART --model DIR --library FILE [--tokens T ...] [--quick]

Every row is printed as soon as it is measured: "ROW table {json}". A case that fails is a row "FAILED". Inputs are normal
random numbers; what is shorter than a millisecond is timed as a CUDA graph of several calls, over inputs beyond L2.
"""
import argparse
import json
import math
import os
import sys
import time
import warnings

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(ROOT, "tests", "gpu")]
import attention_check as ac  # noqa: E402
import attention_times  # noqa: E402
from gpu import cost  # noqa: E402

DTYPE = torch.bfloat16
GEMM_TOKENS = (1, 64, 128, 256, 512, 2048, 4096, 8192)
MOST_LOGITS = 512  # rows that lm_head is timed with


def row(table, **values):
    print(f"ROW {table} {json.dumps(values)}", flush=True)


def attempt(table, case, function, *arguments):
    """A case whose failure does not end the part."""
    try:
        function(*arguments)
    except Exception as error:
        words = (str(error).splitlines() or [""])[0][:160]
        print(f"FAILED {table} {case}: {type(error).__name__}: {words}", flush=True)
    finally:
        torch.cuda.empty_cache()


def repeats(milliseconds):
    """So many that they take half a second, 3 to 15."""
    return max(3, min(15, int(500 / max(milliseconds, 1e-3))))


def once(function):
    """Milliseconds of one call, after one that warms up"""
    function()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def median_ms(function):
    estimate = once(function)
    return attention_times.medians([Plain(function)], repeats(estimate))[0]


class Plain:
    """A call where attention_times.medians takes a graph"""
    def __init__(self, function):
        self.replay = function


def graph_ms(function, n=1, estimate=1.0):
    """Milliseconds of a call of function(i), i below n, in a graph of n"""
    return attention_times.medians([attention_times.captured(function, n)], repeats(estimate * n))[0] / n


# ---- ceilings -------------------------------------------------------------------------------------------------------

def bandwidth(quick, n_bytes=4 << 30):
    x = torch.randint(-1 << 31, (1 << 31) - 1, (n_bytes // 4,), dtype=torch.int32, device="cuda")
    out = torch.empty(n_bytes // 4 // 2048, dtype=torch.int32, device="cuda")

    def with_triton(block, rounds, n_warps):
        from gpu.read_kernel import launcher
        ms = median_ms(launcher(x, out, block, rounds, n_warps))
        row("bandwidth", by=f"Triton, {block} x {rounds}, {n_warps} warps", **{"GB/s": n_bytes / ms / 1e6})

    shapes = [(2048, 4, 4), (4096, 4, 8), (4096, 8, 8), (8192, 4, 8), (8192, 8, 16), (2048, 16, 4)]
    for shape in shapes[:4] if quick else shapes:
        attempt("bandwidth", f"Triton {shape}", with_triton, *shape)

    def for_seconds(seconds, shape):
        from gpu.read_kernel import launcher
        launch, n, begin = launcher(x, out, *shape), 0, time.monotonic()
        while time.monotonic() - begin < seconds:
            for _ in range(50):
                launch()
            torch.cuda.synchronize()
            n += 50
        rate = n * n_bytes / (time.monotonic() - begin) / 1e9
        row("bandwidth", by="Triton, {} x {}, {} warps, for {} s".format(*shape, seconds), **{"GB/s": rate})
    # As long as a server reads its weights: clocks may come down.
    attempt("bandwidth", "a longer run", for_seconds, 2, shapes[0])

    def with_sum():
        wide = x.view(torch.int64)
        row("bandwidth", by="torch.sum of int64", **{"GB/s": n_bytes / median_ms(lambda: wide.sum()) / 1e6})
    attempt("bandwidth", "torch.sum", with_sum)


def gemm_us(n, k, t):
    """Microseconds of x [T, K] times W [N, K] transposed in cuBLAS, over weights of more than twice L2"""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    n_sets = max(1, math.ceil(2 * l2 / (2 * n * k))) + 1
    weights = [torch.randn(n, k, device="cuda", dtype=DTYPE) * k ** -0.5 for _ in range(n_sets)]
    x, out = torch.randn(t, k, device="cuda", dtype=DTYPE), torch.empty(t, n, device="cuda", dtype=DTYPE)
    estimate = max(2 * n * k / 3e9, 2 * n * k * t / 6e11)  # ms
    n_calls = max(n_sets, min(64, math.ceil(2 / estimate)))
    return 1e3 * graph_ms(lambda i: torch.mm(x, weights[i % n_sets].t(), out=out), n_calls, estimate)


def gemm(model, t, head):
    shapes = dict(model.linears())
    if head:
        shapes["lm_head"] = (model.vocab_size, model.hidden_dim)
    times = {f"{name} us": gemm_us(n, k, t) for name, (n, k) in shapes.items()}
    layer = sum(times[f"{name} us"] for name in model.linears())
    row("gemm", T=t, **times, **{"TFLOP/s": model.linear_flops(t) / model.n_layers / layer / 1e6})
    if t == 1 and head:  # the matrix-vector product reads its weights once
        read = 2 * model.vocab_size * model.hidden_dim
        row("bandwidth", by="cuBLAS, lm_head times a vector", **{"GB/s": read / times["lm_head us"] / 1e3})


def sdpa_rate(heads, n_seqs, s, backend):
    """FLOP/s of PyTorch's causal attention; keys and values repeated beforehand, so that any backend takes them"""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    q, k, v = (torch.randn(n_seqs, s, heads.q, heads.dim, device="cuda", dtype=DTYPE).transpose(1, 2) for _ in range(3))

    def call(_=0):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    ms = graph_ms(call, 1, once(call))
    return 2 * s * s * heads.q * heads.dim * n_seqs / ms * 1e3


def our_rate(library, heads, n_seqs, s):
    """The same of our prefill attention"""
    q = torch.randn(n_seqs * s, heads.q, heads.dim, device="cuda").to(heads.dtype)
    k, v = (torch.randn(n_seqs * s, heads.kv, heads.dim, device="cuda").to(heads.dtype) for _ in range(2))
    out, cu = torch.empty_like(q), ac.device_ints([i * s for i in range(n_seqs + 1)])
    p = attention_times.dense_params(q, k, v, out, n_seqs, cu, heads)

    def call(_=0):
        library.run("prefill", p)
    ms = graph_ms(call, 1, once(call))
    return 2 * s * s * heads.q * heads.dim * n_seqs / ms * 1e3


def attention_rates(library, heads, s):
    n_seqs, rates = max(1, 8192 // s), {}
    for name, rate in (("ours", lambda: our_rate(library, heads, n_seqs, s)),
                       ("FA2", lambda: sdpa_rate(heads, n_seqs, s, "FLASH_ATTENTION")),
                       ("cuDNN", lambda: sdpa_rate(heads, n_seqs, s, "CUDNN_ATTENTION"))):
        try:
            rates[f"{name} TFLOP/s"] = rate() / 1e12
        except Exception as error:
            rates[f"{name} TFLOP/s"] = None
            print(f"FAILED attention {name} s {s}: {str(error)[:120]!r}", flush=True)
        torch.cuda.empty_cache()
    row("attention", s=s, sequences=n_seqs, **rates)


def ceilings(arguments, model):
    attempt("bandwidth", "all", bandwidth, arguments.quick)
    sizes = {1, 64, 256, 2048, 8192} if arguments.quick else set(GEMM_TOKENS)
    for t in sorted(sizes | set(arguments.tokens)):
        attempt("gemm", f"T {t}", gemm, model, t, t <= MOST_LOGITS)
    heads, library = ac.Heads(DTYPE, model.head_dim, model.n_heads, model.n_kv_heads), ac.Library(arguments.library)
    for s in (1024, 8192, 32768) if arguments.quick else (512, 1024, 2048, 8192, 32768, 131072):
        attempt("attention", f"s {s}", attention_rates, library, heads, s)


# ---- our attention --------------------------------------------------------------------------------------------------

def prefill_case(library, heads, total, s):
    ours, theirs, flops = attention_times.time_prefill(library, heads, total, s)
    try:
        cudnn = sdpa_rate(heads, total // s, s, "CUDNN_ATTENTION") / 1e12
    except Exception:
        cudnn = None
    row("prefill", heads=f"d{heads.dim} {heads.q}/{heads.kv}", s=s, sequences=total // s, ms=ours,
        **{"TFLOP/s": flops / ours / 1e9, "FA2 TFLOP/s": flops / theirs / 1e9, "cuDNN TFLOP/s": cudnn,
           "ours / FA2": theirs / ours})


def prefill(arguments, _model):
    library = ac.Library(arguments.library)
    cases = [(ac.Heads(DTYPE, 128, 16, 16), 16384, s) for s in (512, 1024, 2048, 4096, 8192, 16384)]
    if not arguments.quick:
        cases += [(ac.Heads(DTYPE, 64, 32, 32), 16384, s) for s in (1024, 16384)]
        cases += [(ac.Heads(DTYPE, 256, 8, 8), 16384, s) for s in (1024, 16384)]
        cases += [(ac.Heads(DTYPE, 128, 32, 8), s, s) for s in (512, 2048, 8192, 32768)]
    for case in cases:
        attempt("prefill", f"d{case[0].dim} s {case[2]}", prefill_case, library, *case)


def standard(q, k, v, softmax_dtype):
    """What a plain user writes. q, k, v: [batch, heads, s, dim]"""
    s = q.shape[2]
    scores = q @ k.transpose(-2, -1) * q.shape[3] ** -0.5
    future = torch.triu(torch.ones(s, s, dtype=torch.bool, device=q.device), 1)
    scores = scores.masked_fill(future, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=softmax_dtype).to(q.dtype) @ v


def with_memory(function):
    """(milliseconds, GB that a call takes beside its inputs, its output included)"""
    function()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return median_ms(function), peak / 1e9


def plain_case(library, s, batch=4, n_heads=16, dim=64):
    heads = ac.Heads(DTYPE, dim, n_heads, n_heads)
    q, k, v = (torch.randn(batch * s, n_heads, dim, device="cuda", dtype=DTYPE) for _ in range(3))
    cu = ac.device_ints([i * s for i in range(batch + 1)])

    def ours():  # allocates its output alone: the library takes no memory of its own (flash_attention.h)
        out = torch.empty_like(q)
        library.run("prefill", attention_times.dense_params(q, k, v, out, batch, cu, heads))
        return out
    split = [x.view(batch, s, n_heads, dim).transpose(1, 2) for x in (q, k, v)]
    error = ac.relative(ours().view(batch, s, n_heads, dim).transpose(1, 2), standard(*split, torch.float32).double())
    if not error < 0.02:
        raise RuntimeError(f"ours is {error:.1e} from standard attention")
    fast_ms, fast_gb = with_memory(ours)
    row("plain", s=s, attention="ours", ms=fast_ms, **{"extra GB": fast_gb, "tokens/s": batch * s / fast_ms * 1e3})
    for name, dtype in (("standard, softmax in BF16", DTYPE), ("standard, softmax in F32", torch.float32)):
        ms, gb = with_memory(lambda: standard(*split, dtype))
        row("plain", s=s, attention=name, ms=ms, **{"extra GB": gb, "tokens/s": batch * s / ms * 1e3,
                                                    "ours faster by": ms / fast_ms, "takes more by": gb / fast_gb})


def plain(arguments, _model):
    library = ac.Library(arguments.library)
    for s in (2048, 8192) if arguments.quick else (512, 1024, 2048, 4096, 8192):
        attempt("plain", f"s {s}", plain_case, library, s)


def decode_case(library, heads, batch, length):
    us, n_bytes = attention_times.time_decode(library, heads, batch, length)
    settled, _ = attention_times.time_decode(library, heads, batch, length, settled=1)
    row("decode", heads=f"d{heads.dim} {heads.q}/{heads.kv}", sequences=batch, context=length, us=us,
        **{"KV MB": n_bytes / 1e6, "GB/s": n_bytes / us / 1e3, "settled us": settled, "settled GB/s": n_bytes / settled / 1e3})


def decode(arguments, _model):
    library, heads = ac.Library(arguments.library), ac.Heads(DTYPE, 128, 32, 8)
    cases = [(heads, b, n) for b, n in ((1, 1024), (1, 4096), (64, 2048), (256, 1024))]
    if not arguments.quick:
        cases += [(heads, b, n) for b, n in ((1, 32768), (1, 131072), (8, 1024), (16, 8192), (64, 1024), (128, 4096))]
        cases += [(ac.Heads(DTYPE, 64, 32, 8), 128, 4096), (ac.Heads(DTYPE, 64, 32, 8), 1, 4096)]
    for case in cases:
        attempt("decode", f"{case[1]} of {case[2]}", decode_case, library, *case)


# ---- transformers ---------------------------------------------------------------------------------------------------

def transformers(arguments, model):
    from transformers import LlamaConfig, LlamaForCausalLM
    with open(os.path.join(arguments.model, "config.json")) as f:
        config = LlamaConfig(**json.load(f))
    torch.set_default_dtype(DTYPE)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        llama = LlamaForCausalLM(config).eval()
        prompt = torch.randint(0, config.vocab_size, (1, 128))
    n_tokens = 64

    def seconds(n):
        begin = time.monotonic()
        out = llama.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n,
                             do_sample=False, pad_token_id=0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if out.shape[1] != prompt.shape[1] + n:
            raise RuntimeError(f"{out.shape[1] - prompt.shape[1]} tokens generated, not {n}")
        return time.monotonic() - begin
    seconds(4)
    step = (min(seconds(n_tokens + 1) for _ in range(2)) - seconds(1)) / n_tokens
    row("transformers", **{"streams": 1, "in": 128, "out": n_tokens, "TPOT ms": step * 1e3, "tokens/s": 1 / step})

    def first_token(length):
        nonlocal prompt
        prompt = torch.randint(0, config.vocab_size, (1, length), device=prompt.device)
        n = 3 if length <= 8192 else 1
        if n > 1:
            seconds(1)  # warms up
        row("transformers_ttft", tokens=length, requests=n, **{"TTFT s": min(seconds(1) for _ in range(n))})
    for length in model.prompt_lengths(arguments.quick):
        attempt("transformers_ttft", f"{length} tokens", first_token, length)


PARTS = {f.__name__: f for f in (ceilings, prefill, plain, decode, transformers)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--library", required=True)
    parser.add_argument("--tokens", type=int, nargs="*", default=[])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # of backends that do not fit
    if not torch.cuda.is_available() and arguments.part != "transformers":
        print("FAILED: this PyTorch sees no GPU")
        return 1
    PARTS[arguments.part](arguments, cost.Model.load(arguments.model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
