"""What bench_attention.py measured, against what was asked: the summary's lines, and the plot. From its tables alone."""
import json

from gpu.report import Line, percent

# What is asked: how many times as fast as the other, at least.
GQA_FA3, GQA_CUDNN, GQA_SHORT, GQA_LONG = 0.97, 1.1, 1.0, 2048  # tokens from which a prompt is long
MHA_FA3, MHA_CUDNN, OTHER_DIMS = 0.97, 1.0, 1.0
PAGED_DENSE, PAGED_FA3, WINDOW_FA3, ALIBI_PLAIN, ALIBI_FLEX = 0.95, 1.1, 1.0, 1 / 1.05, 2.0
# Decode: share of the read bandwidth by MB of keys and values [from, below); microseconds of one sequence by its context.
DECODE_SHARES = {(512, float("inf")): 0.92, (256, 512): 0.88}
DECODE_US = {1024: 7, 4096: 9, 8192: 13, 32768: 38}


def bandwidth(tables):
    """GB/s, the best of the table; None of nothing"""
    return max((r["GB/s"] for r in tables.get("bandwidth", [])), default=None)


def ratio_line(what, rows, column, asked):
    line = Line(what, f">= {asked:.2f}")
    rows = [r for r in rows if column in r]
    if rows:
        line.measured, line.against = " ".join(f"{r[column]:.3f}" for r in rows), "s " + " ".join(str(r["s"]) for r in rows)
        line.met = min(r[column] for r in rows) >= asked
    return line


def prefill_lines(tables):
    def rows(group):
        return tables.get(group, [])
    long = [r for r in rows("gqa") if r["s"] >= GQA_LONG]
    short = [{**r, "over both": min(r["over cuDNN"], r["over FA3"])} for r in rows("gqa")
             if r["s"] < GQA_LONG and "over cuDNN" in r and "over FA3" in r]
    yield ratio_line("causal, d128 32/8, long, over FA3", long, "over FA3", GQA_FA3)
    yield ratio_line("causal, d128 32/8, long, over cuDNN", long, "over cuDNN", GQA_CUDNN)
    yield ratio_line("causal, d128 32/8, short, over the better of both", short, "over both", GQA_SHORT)
    yield ratio_line("causal, d128 16/16, over FA3", rows("mha"), "over FA3", MHA_FA3)
    yield ratio_line("causal, d128 16/16, over cuDNN", rows("mha"), "over cuDNN", MHA_CUDNN)
    yield ratio_line("causal, d64 32/32, over cuDNN", rows("d64"), "over cuDNN", OTHER_DIMS)
    yield ratio_line("causal, d256 8/8, over cuDNN", rows("d256"), "over cuDNN", OTHER_DIMS)
    yield ratio_line("2048 new tokens over pages, over our dense", rows("paged"), "over dense", PAGED_DENSE)
    yield ratio_line("2048 new tokens over pages, over FA3", rows("paged"), "over FA3", PAGED_FA3)
    yield ratio_line("window of 4096, over FA3", rows("window"), "over FA3", WINDOW_FA3)
    yield alibi_line(rows("alibi"))
    yield ratio_line("ALiBi, over flex_attention", rows("alibi"), "over flex", ALIBI_FLEX)


def alibi_line(rows):
    line = ratio_line("ALiBi, time more than plain", rows, "over plain", ALIBI_PLAIN)
    line.asked = f"<= {percent(1 / ALIBI_PLAIN - 1)}"
    if line.met is not None:
        line.measured = " ".join(percent(1 / r["over plain"] - 1) for r in rows if "over plain" in r)
    return line


def place(row):
    """Which decode row: sequences x context, and the head_dim where it is not the usual one"""
    return ("" if row["heads"] == "d128 32/8" else row["heads"].split()[0] + " ") + f"{row['sequences']}x{row['s']}"


def decode_lines(rows, best):
    for (least, below), asked in DECODE_SHARES.items():
        these = [r for r in rows if least <= r["KV MB"] < below]
        words = f">= {least} MB" if below == float("inf") else f"{least} to {below} MB"
        for name, what in (("settled", "as the engine calls it"), ("ours", "nothing settled")):
            line = Line(f"decode, {what}, KV {words}, share of bandwidth", f">= {percent(asked)}" if name == "settled" else "")
            if these and best:
                shares = [r[f"{name} GB/s"] / best for r in these]
                line.measured, line.against = " ".join(percent(s) for s in shares), ", ".join(place(r) for r in these)
                line.met = min(shares) >= asked if name == "settled" else None
            yield line
    theirs = [r for r in rows if "FA3 us" in r]
    line = Line("decode, as the engine calls it, over FA3", "> 1.00")
    if theirs:
        line.measured = " ".join(f"{r['settled over FA3']:.2f}" for r in theirs)
        least = min(r["ours over FA3"] for r in theirs)
        line.against = ", ".join(place(r) for r in theirs) + f"; nothing settled: {least:.2f} or more"
        line.met = min(r["settled over FA3"] for r in theirs) > 1
    yield line
    for context, limit in DECODE_US.items():
        line = Line(f"decode, as the engine calls it, one sequence of {context}", f"<= {limit} us")
        for r in rows:
            if place(r) == f"1x{context}":
                line.measured, line.met = f"{r['settled us']:.1f} us", r["settled us"] <= limit
                line.against = f"nothing settled {r['ours us']:.1f} us" + (f", FA3 {r['FA3 us']:.1f} us" if "FA3 us" in r else "")
        yield line


def summary(tables):
    """Lines for all that was asked, measured or not."""
    best = bandwidth(tables)
    yield Line("read bandwidth", "", f"{best / 1e3:.2f} TB/s" if best else "not measured")
    yield from prefill_lines(tables)
    yield from decode_lines(tables.get("decode", []), best)


# ---- the plot -------------------------------------------------------------------------------------------------------

STYLES = {"ours": ("ours", "C3", "o"), "settled": ("ours", "C3", "o"), "FA3": ("FlashAttention-3", "C0", "s"),
          "cuDNN": ("cuDNN", "C2", "^"), "FA2": ("FlashAttention-2", "C7", "v")}  # contender -> label, color, marker


def tokens(s):
    return f"{s // 1024}k" if s >= 1024 else str(s)


def draw_prefill(axes, tables):
    group = "gqa" if tables.get("gqa") else "mha"
    rows = sorted(tables.get(group, []), key=lambda r: r["s"])
    for name in ("ours", "FA3", "cuDNN", "FA2"):
        label, color, marker = STYLES[name]
        points = [(r["s"], r[f"{name} TFLOP/s"]) for r in rows if f"{name} TFLOP/s" in r]
        if points:
            axes.plot(*zip(*points), color=color, marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks([r["s"] for r in rows], [tokens(r["s"]) for r in rows])
    axes.set(title="Causal prefill, head_dim 128, " + {"gqa": "32 q / 8 kv heads", "mha": "16 heads, 16k tokens in all"}[group],
             xlabel="tokens of a prompt", ylabel="TFLOP/s")


def draw_decode(axes, tables):
    rows = sorted((r for r in tables.get("decode", []) if r["heads"] == "d128 32/8"), key=lambda r: r["KV MB"])
    for name in ("settled", "FA3"):
        label, color, marker = STYLES[name]
        points = [(r["KV MB"], r[f"{name} GB/s"]) for r in rows if f"{name} GB/s" in r]
        if points:
            axes.plot(*zip(*points), color=color, marker=marker, linestyle="none", label=label)
    if bandwidth(tables):
        axes.axhline(bandwidth(tables), color="black", linestyle="--", linewidth=1, label="read bandwidth, measured")
    axes.set_xscale("log", base=2)
    ticks = [4 ** i * 2 ** 22 / 1e6 for i in range(5)]
    axes.set_xticks(ticks, [f"{x:.0f}" for x in ticks])
    axes.set(title="Paged decode, head_dim 128, 32 q / 8 kv heads", xlabel="MB of keys and values", ylabel="GB/s")


def plot(source, target):
    """Draws a run's JSON into an image file."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as pyplot
    except ImportError:
        raise SystemExit("--plot needs matplotlib, which is not installed (pip install matplotlib)") from None
    with open(source) as f:
        measured = json.load(f)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    draw_prefill(left, measured["tables"])
    draw_decode(right, measured["tables"])
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right")
    figure.suptitle(f"{measured['facts']['GPU']}, BF16, {measured['facts']['date'][:10]}")
    figure.savefig(target, dpi=150)
