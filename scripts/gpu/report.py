"""What bench_gpu.py found, against what was asked: the summary and the Markdown. From its tables alone."""

# (number, what is asked of it): printed beside the figure.
DECODE_SHARE, PREFILL_RATIO, DECODE_US = 0.85, 0.95, {1024: 9.0, 4096: 12.0}
BATCH1_SHARE, STREAMS_SHARE, TTFT_RATIO = (0.80, 0.65), 0.70, 1.08
PLAIN_SPEED, PLAIN_MEMORY, PLAIN_S = 10.0, 20.0, 8192
LARGE_KV_MB = 256


class Line:
    """A line of the summary. met: None where nothing was asked, or nothing measured."""

    def __init__(self, what, asked, measured="not measured", against="", met=None):
        self.what, self.asked, self.measured, self.against, self.met = what, asked, measured, against, met

    def cells(self):
        return [self.what, self.asked, self.measured, self.against, {None: "", True: "met", False: "NOT met"}[self.met]]


def number(value):
    """Three figures or so, for people."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def percent(value):
    return f"{100 * value:.1f} %"


def prefill_line(rows):
    rows = [r for r in rows if r["heads"] == "d128 16/16"]
    line = Line("prefill attention, d128 16 heads, 16k tokens, over FA2", f">= {PREFILL_RATIO}")
    if rows:
        ratios = [r["ours / FA2"] for r in rows]
        line.measured = " ".join(f"{r:.2f}" for r in ratios)
        line.against = "s " + " ".join(str(r["s"]) for r in rows) + "; FA2 TFLOP/s " + \
            " ".join(f"{r['FA2 TFLOP/s']:.0f}" for r in rows)
        line.met = min(ratios) >= PREFILL_RATIO
    return line


def plain_line(rows):
    """Against the faster of the standard ones for time, the one that takes less for memory."""
    rows = [r for r in rows if r["s"] == PLAIN_S and r["attention"] != "ours"]
    line = Line(f"b4, 16 heads of 64, s {PLAIN_S}: over standard attention", f">= {PLAIN_SPEED:g}x, 1/{PLAIN_MEMORY:g} of memory")
    if rows:
        speed, memory = min(r["ours faster by"] for r in rows), min(r["takes more by"] for r in rows)
        line.measured, line.against = f"{speed:.1f}x, 1/{memory:.0f}", f"{min(r['ms'] for r in rows):.2f} ms"
        line.met = speed >= PLAIN_SPEED and memory >= PLAIN_MEMORY
    return line


def decode_lines(rows, bandwidth):
    large = [r for r in rows if r["KV MB"] >= LARGE_KV_MB]
    for column, what, asked in (("settled GB/s", "as the engine calls it", f">= {percent(DECODE_SHARE)}"),
                                ("GB/s", "nothing settled", "")):
        line = Line(f"paged decode attention, {what}, KV >= 256 MB, share of bandwidth", asked)
        if large and bandwidth:
            shares = [r[column] * 1e9 / bandwidth for r in large]
            line.measured, line.against = " ".join(percent(s) for s in shares), \
                "b x s: " + " ".join(f"{r['sequences']}x{r['context']}" for r in large)
            line.met = min(shares) >= DECODE_SHARE if asked else None
        yield line
    for context, limit in DECODE_US.items():
        line = Line(f"paged decode attention, batch 1, {context} tokens", f"<= {limit:g} us")
        for r in rows:
            if (r["sequences"], r["context"], r["heads"]) == (1, context, "d128 32/8"):
                line.measured, line.met = f"{r['us']:.1f} us", r["us"] <= limit
                line.against = f"as the engine calls it {r['settled us']:.1f} us"
        yield line


def batch1_line(rows, name, asked):
    line = Line(f"{name}, batch 1, share of bandwidth", f">= {percent(asked)}")
    for r in rows:
        if r["model"] == name:
            line.measured = f"{r['decode tokens/s']:.1f} tokens/s"
            if r["share of bandwidth"] is not None:
                line.measured, line.met = f"{percent(r['share of bandwidth'])}, {line.measured}", r["share of bandwidth"] >= asked
    return line


def streams_lines(rows, asked_streams):
    for n in asked_streams:
        row = next((r for r in rows if r["streams"] == n), None)
        for kind, unit in (("steady", "steady tokens/s"), ("whole", "whole tokens/s")):
            line = Line(f"{n} streams, {kind}, share of roofline", f">= {percent(STREAMS_SHARE)}")
            if row and row[unit]:
                share = row[f"{kind} share"]
                line.measured = (f"{percent(share)}, " if share is not None else "") + f"{row[unit]:,.0f} tokens/s"
                line.met = share >= STREAMS_SHARE if share is not None else None
                line.against = f"step {number(row['step ms'])} ms, roofline {number(row['roofline step ms'])}" \
                    if kind == "steady" else \
                    f"{number(row['whole s'])} s, roofline {number(row['whole roofline s'])}; " \
                    f"the load took {number(row['generator cores'])} cores"
            yield line


def ttft_lines(rows, theirs):
    for r in rows or [None]:
        line = Line(f"TTFT, {r['tokens']} tokens" if r else "TTFT", f"<= {TTFT_RATIO:.2f}x floor")
        if r:
            line.measured = f"{r['TTFT s']:.3f} s"
            if r["times the floor"] is not None:
                line.measured, line.met = f"{r['times the floor']:.2f}x, {line.measured}", r["times the floor"] <= TTFT_RATIO
                line.against = f"floor {r['floor s']:.3f} s"
        yield line
    for r in rows:
        for other in theirs:
            if other["tokens"] == r["tokens"]:
                times = other["TTFT s"] / r["TTFT s"]
                line = Line(f"TTFT, {r['tokens']} tokens, transformers' over ours", "> 1.00")
                line.measured, line.met, line.against = f"{times:.2f}", times > 1, f"transformers {other['TTFT s']:.3f} s"
                yield line


def other_lines(tables):
    for r in tables.get("idle", []):
        yield Line(f"{r['streams']} streams: GPU busy; idle a step; gap before a step", "", f"{percent(r['busy share'])}; "
                   f"{number(r['idle us per step'])} us; p50 {number(r['gap us p50'])}, p90 {number(r['gap us p90'])} us")
    if not tables.get("idle"):
        yield Line("GPU busy share, idle gap between steps", "")
    rows = [r for r in tables.get("batch1", [])[:1] + tables.get("streams", []) if r["host us"] is not None]
    streams = "streams " + " ".join(str(r.get("streams", 1)) for r in rows)
    for column, what in (("host us", "host work a decode step"), ("launch us", "enqueueing a decode step")):
        yield Line(f"{what}, us", "", " ".join(number(r[column]) for r in rows) or "not measured", streams if rows else "")
    for r in tables.get("deterministic", []):
        yield Line(f"--deterministic, {r['streams']} streams, decoding", "", f"{number(r['tokens/s'])} tokens/s",
                   f"{percent(r['share'])} of {number(r['without'])} without" if r["share"] is not None else "")
    for r in tables.get("start", []):
        yield Line(f"exec to ready: {r['what']}", "", f"{r['exec to ready, s']:.2f} s")
    for r in tables.get("sizes", []):
        yield Line(f"size of {r['file']}", "", f"{r['MB']:.1f} MB")
    for r in tables.get("transformers", []):
        ours = tables.get("batch1") or [{}]
        speed = ours[0].get("decode tokens/s")
        yield Line("transformers, eager, batch 1", "", f"{r['tokens/s']:.1f} tokens/s",
                   f"ours {speed / r['tokens/s']:.1f}x" if speed else "")


def summary(tables, ceilings, models, asked_streams):
    """Lines for all that was asked, measured or not. models: names of the large and the small one."""
    best = ceilings.gemm and max(r["TFLOP/s"] for r in tables["gemm"])
    yield Line("ceilings: read bandwidth; best GEMM", "", f"{ceilings.bandwidth / 1e12:.2f} TB/s; {number(best or None)} TFLOP/s"
               if ceilings.bandwidth else "not measured")
    yield prefill_line(tables.get("prefill", []))
    yield plain_line(tables.get("plain", []))
    yield from decode_lines(tables.get("decode", []), ceilings.bandwidth)
    for name, asked in zip(models, BATCH1_SHARE):
        yield batch1_line(tables.get("batch1", []), name, asked)
    yield from streams_lines(tables.get("streams", []), asked_streams)
    yield from ttft_lines(tables.get("ttft", []), tables.get("transformers_ttft", []))
    yield from other_lines(tables)


HEADS = ["what", "asked", "measured", "against", ""]


def text_table(lines):
    rows = [HEADS] + [line.cells() for line in lines]
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEADS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(r, widths)).rstrip() for r in rows)


def markdown_table(rows):
    """Of dicts: a column for every key, in order of first use."""
    keys = list(dict.fromkeys(key for r in rows for key in r))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return "\n".join(lines + ["| " + " | ".join(number(r.get(key)) for key in keys) + " |" for r in rows])


EXPLAINED = {
    "bandwidth": "Read bandwidth; the best counts.",
    "gemm": "cuBLAS through torch.matmul, BF16, weights in turn beyond twice L2; TFLOP/s over a layer's four products.",
    "attention": "Causal, the model's heads. FA2 and cuDNN: PyTorch SDPA, keys and values repeated beforehand.",
    "prefill": "Causal, BF16; FlashAttention-2 and cuDNN are PyTorch SDPA's, in the same run.",
    "plain": "Batch 4, 16 heads of 64. Standard: scores in full. Memory: what a call takes beside its inputs.",
    "decode": "CUDA graphs of launches over caches in turn, pages of 64. Settled: as the engine calls it, the kernel before does "
              "not write what is read but q and the last key and value of each sequence (flash_attention.h).",
    "batch1": "Over HTTP. Share: bytes of all weights but the embedding's and of KV, by TPOT, of the read bandwidth.",
    "itl": "Small batches over HTTP.",
    "streams": "Over HTTP. Roofline step: max(weights / bandwidth, FLOPs / GEMM rate at that T) + KV / bandwidth; whole: the "
               "prompts' GEMMs at the rate for a chunk, their attention at the fastest kernel's rate, then full decode steps.",
    "ttft": "One request at a time, random ids. Floor: GEMMs at cuBLAS's rate for a chunk, attention at the fastest kernel's.",
    "transformers_ttft": "transformers' generate of one token, eager but for PyTorch SDPA, the same model and lengths.",
    "deterministic": "With --deterministic; without: batch1's or streams' in this run.",
    "families": "Over HTTP, random weights, 128 tokens in and out. GB a token: layers (of experts the chosen) and output layer.",
    "idle": "From a trace of the end of a run. A graph counts as busy as a whole.",
    "kernels": "One stream, every kernel traced. A moment counts for the kernel that ends next.",
}


def markdown(title, facts, lines, tables, troubles):
    parts = [f"# {title}", "\n".join(f"- {name}: {value}" for name, value in facts.items()),
             markdown_table([dict(zip(["what", "asked", "measured", "against", "met"], line.cells())) for line in lines])]
    for name, rows in tables.items():
        parts += [f"## {name}", *([EXPLAINED[name]] if name in EXPLAINED else []), markdown_table(rows)]
    if troubles:
        parts += ["## not measured", "\n".join(f"- {t}" for t in troubles)]
    return "\n\n".join(parts) + "\n"
