#!/usr/bin/env python3
"""Our attention kernels beside cuDNN's, FlashAttention-2 and -3 and flex_attention, in one run on one H100 or H200.

    python3 scripts/bench_attention.py --library build/gpu/libgptd_cuda.so --fa3 DIR --out $OUT    every case
    python3 scripts/bench_attention.py --quick --only gqa decode                                   a few of two groups
    python3 scripts/bench_attention.py --plot FILE.json OUT.png         draws what a run measured; needs no GPU

Every contender of a case is first checked (gpu/attention_contenders.py), then timed in a CUDA graph of several calls, the
graphs replayed in turn: ratios are of one run. FlashAttention-3 is timed where its flash_attn_interface can be imported.
Prints a line a case and, last, what was asked, what was measured, met or not; writes YYYY-MM-DD-attention.md and .json.

Exit status: 0 if every case that was begun gave a right result and its times (met or not), 1 otherwise.
"""
import argparse
import datetime
import json
import os
import signal
import sys
import time

from bench_gpu import ROOT, commit, gpu_name
from gpu import attention_plot, report

HEADS = {"gqa": (128, 32, 8), "mha": (128, 16, 16), "d64": (64, 32, 32), "d256": (256, 8, 8)}  # dim, q heads, kv heads
N_TOKENS, N_NEW, WINDOW = 16384, 2048, 4096
DECODE = [(1, 1024), (1, 4096), (1, 8192), (1, 32768), (1, 131072), (8, 1024), (8, 8192), (16, 8192), (32, 1024), (32, 4096),
          (64, 1024), (64, 2048), (128, 1024), (128, 4096), (256, 1024), (256, 2048)]  # sequences, context
REPLAYS = {False: 15, True: 3}  # by --quick

FACTS = {
    "rates": "BF16. TFLOP/s: 4 x pairs of query and key seen x heads x head_dim, of whole prompts without a window 2 s^2 x heads "
             "x head_dim a prompt. \"over X\": how many times as fast as X ours is, in this run",
    "contenders": "cuDNN and FA2 are PyTorch SDPA's, their keys and values repeated beforehand; FA3 over pages of 64, in decode "
                  "with its scheduler's metadata computed beforehand; dense: ours without pages; plain: ours without ALiBi",
    "checked": "before the timing, each against ours and ours against float64 in some rows, relative error at most 1e-2",
}


class Case:
    """n_seqs sequences of `length` keys, the last n_queries of which ask: all (a prompt), 1 (decode) or between."""

    def __init__(self, group, heads, n_seqs, length, n_queries=None, window_left=-1):
        self.group, self.n_seqs, self.length, self.window_left = group, n_seqs, length, window_left
        self.dim, self.q, self.kv = heads
        self.n_queries = n_queries or length

    def heads(self):
        return f"d{self.dim} {self.q}/{self.kv}"

    def flops(self):
        """As FACTS has it."""
        if self.n_queries == self.length and self.window_left < 0:
            pairs = self.length ** 2 / 2
        else:
            left = self.window_left if self.window_left >= 0 else self.length
            pairs = sum(min(position, left) + 1 for position in range(self.length - self.n_queries, self.length))
        return 4 * pairs * self.q * self.dim * self.n_seqs

    def kv_bytes(self):
        return 2 * 2 * self.n_seqs * self.length * self.kv * self.dim

    def row(self, us):
        """For the tables. us: contender -> microseconds of a call, ours among them."""
        row = {"heads": self.heads(), "sequences": self.n_seqs, "s": self.length}
        if self.group == "decode":
            row.update({"KV MB": self.kv_bytes() / 1e6, **{f"{name} us": t for name, t in us.items()}})
            row.update({f"{name} GB/s": self.kv_bytes() / t / 1e3 for name, t in us.items()})
            row.update({f"{name} over FA3": us["FA3"] / us[name] for name in ("ours", "settled") if "FA3" in us})
        else:
            row.update({"ours us": us["ours"], **{f"{name} TFLOP/s": self.flops() / t / 1e6 for name, t in us.items()}})
            row.update({f"over {name}": t / us["ours"] for name, t in us.items() if name != "ours"})
        return row


def all_cases():
    """Group -> its cases, in the order they run in."""
    gqa, sizes = HEADS["gqa"], (512, 1024, 2048, 4096, 8192, 16384)
    groups = {"gqa": [Case("gqa", gqa, 1, s) for s in (512, 1024, 2048, 4096, 8192, 32768, 131072)]}
    for group in ("mha", "d64", "d256"):
        groups[group] = [Case(group, HEADS[group], N_TOKENS // s, s) for s in sizes]
    groups["paged"] = [Case("paged", gqa, 1, s, N_NEW) for s in (8192, 32768, 131072)]
    groups["window"] = [Case("window", gqa, 1, s, window_left=WINDOW - 1) for s in (8192, 32768)]
    groups["alibi"] = [Case("alibi", gqa, 1, s) for s in (2048, 8192)]
    groups["decode"] = [Case("decode", gqa, *shape, 1) for shape in DECODE]
    groups["decode"] += [Case("decode", heads, *shape, 1) for heads in ((64, 32, 8), (96, 32, 32), (256, 32, 8))
                         for shape in ((128, 4096), (64, 2048))]
    return groups


def chosen_cases(only, quick):
    quick_length = {"paged": 8192, "window": 8192}  # others: 2048
    return [case for group, cases in all_cases().items() if group in only for case in cases
            if not quick or case.length == quick_length.get(group, 2048)]


class Bench:
    def __init__(self, arguments):
        self.arguments, self.begin, self.date = arguments, time.monotonic(), datetime.datetime.now().astimezone()
        self.tables, self.failures, self.notes = {}, [], []
        self.facts = {"GPU": gpu_name(), "date": self.date.isoformat(timespec="seconds"), "commit": arguments.commit or commit(),
                      "command": " ".join(["python3", *sys.argv]), **FACTS}
        from gpu import attention_contenders  # PyTorch: what --plot does without
        self.rig = attention_contenders.Rig(arguments.library, arguments.fa3, REPLAYS[arguments.quick], self.note)
        self.facts["PyTorch"] = self.rig.versions()
        os.makedirs(arguments.out, exist_ok=True)

    def note(self, what):
        """What could not be measured, and is no fault of ours."""
        if what not in self.notes:
            self.notes.append(what)
            print(f"  note: {what}", flush=True)

    def measure(self, case):
        if case.group == "decode" and "bandwidth" not in self.tables:
            self.tables["bandwidth"] = self.rig.bandwidth()
        row = case.row(self.rig.measure(case))
        best = attention_plot.bandwidth(self.tables)
        if case.group == "decode" and best:
            row["share of bandwidth"] = row["settled GB/s"] / best
        self.tables.setdefault(case.group, []).append(row)
        figures = "  ".join(f"{key} {report.number(value)}" for key, value in list(row.items())[3:])
        print(f"{case.group:6} {case.heads():10} {case.n_seqs:3} x {case.length:6}  {figures}", flush=True)

    def run(self):
        limit = self.arguments.limit
        for case in chosen_cases(self.arguments.only, self.arguments.quick):
            what = f"{case.group} {case.heads()}, {case.n_seqs} x {case.length}"
            if time.monotonic() - self.begin > limit:
                self.note(f"{what}: not begun, {limit:g} s are over")
                continue
            try:
                self.measure(case)
            except Exception as error:
                words = (str(error).splitlines() or [""])[0][:200]
                self.failures.append(f"{what}: {type(error).__name__}: {words}")
                print(f"FAILED {self.failures[-1]}", flush=True)
            if not self.rig.free():
                self.failures.append(f"the device is lost after {what}")
                print(f"FAILED {self.failures[-1]}", flush=True)
                break
            self.save()  # what there is, should the run be ended from outside

    def path(self, extension):
        return os.path.join(self.arguments.out, f"{self.date:%Y-%m-%d}-attention.{extension}")

    def save(self, lines=()):
        with open(self.path("json"), "w") as f:
            json.dump({"facts": self.facts, "tables": self.tables, "failures": self.failures, "notes": self.notes,
                       "summary": [line.cells() for line in lines]}, f, indent=1)

    def report(self):
        lines = list(attention_plot.summary(self.tables))
        self.save(lines)
        tables = {name: rows for name, rows in self.tables.items() if rows}
        troubles = [f"FAILED {what}" for what in self.failures] + self.notes
        with open(self.path("md"), "w") as f:
            f.write(report.markdown(f"Attention on {self.facts['GPU']}", self.facts, lines, tables, troubles))
        print(report.text_table(lines))
        print(f"{time.monotonic() - self.begin:.0f} s; {self.path('md')}, .json; {len(self.failures)} failed")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, groups = parser.add_argument, list(all_cases())
    add("--library", default=os.path.join(ROOT, "build", "gpu", "libgptd_cuda.so"), help="[build/gpu/libgptd_cuda.so]")
    add("--fa3", metavar="DIR", help="where flash_attn_interface is, if not where Python looks anyway")
    add("--only", nargs="+", choices=groups, default=groups, metavar="GROUP", help=" ".join(groups) + " [all]")
    add("--quick", action="store_true", help="a size or two of each group, 3 replays")
    add("--out", default=os.path.join(ROOT, "build"), metavar="DIR", help="directory of the results [build]")
    add("--limit", type=float, default=500, metavar="SECONDS", help="after which no case is begun [%(default)g]")
    add("--commit", metavar="NAME", help="what is measured, where the repository's history is not [HEAD]")
    add("--plot", nargs=2, metavar=("FILE.json", "OUT.png"), help="draw the figures of a run and measure nothing")
    arguments = parser.parse_args()
    if not arguments.plot and not os.path.exists(arguments.library):
        parser.error(f"{arguments.library}: no such file (make gpu-bundle)")
    return arguments


def main():
    arguments = parse_arguments()
    if arguments.plot:
        attention_plot.plot(*arguments.plot)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what there is gets written
    bench = Bench(arguments)
    try:
        bench.run()
    finally:
        bench.report()
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
