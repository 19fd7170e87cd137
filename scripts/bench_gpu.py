#!/usr/bin/env python3
"""`make bench-gpu`: what a GPU can do, and what ours does with it, in one run on a machine with a GPU and PyTorch.

    python3 scripts/bench_gpu.py --bundle build/gpu --out $OUT          everything but families, under 9 minutes
    python3 scripts/bench_gpu.py --bundle build/gpu --out $OUT --only ceilings families     a few shapes of each family
    python3 scripts/bench_gpu.py --quick --only ceilings batch1         less of it

Sections run in the order below, each within its budget of seconds; what fails or finds no time is reported and ends no
other. Those in PyTorch run in processes of their own, those that ask a server start gptd from the bundle. Writes
YYYY-MM-DD-gpu.md and .json into --out, prints a summary last: what was asked, what was measured, met or not.

Exit status: 0 if every section gave what it should (met or not), 1 otherwise.
"""
import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time

from gpu import cost, report, serving

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = {False: 520, True: 170}  # seconds of the whole run; by --quick


class Section:
    def __init__(self, budget, quick_budget, run):
        self.budget, self.quick_budget, self.run = budget, quick_budget, run


def in_torch(part):
    return lambda bench: bench.torch_part(part)


# In this order. Budgets are upper bounds in seconds (full, --quick).
SECTIONS = {
    "ceilings": Section(100, 60, in_torch("ceilings")),
    "prefill": Section(50, 30, in_torch("prefill")),
    "decode": Section(50, 30, in_torch("decode")),
    "plain": Section(50, 30, in_torch("plain")),
    "batch1": Section(60, 40, serving.batch1),
    "itl": Section(60, 30, serving.itl),
    "streams": Section(180, 70, serving.streams),
    "deterministic": Section(60, 40, serving.deterministic),
    "families": Section(200, 150, serving.families),
    "small": Section(40, 25, serving.small),
    "ttft": Section(100, 40, serving.ttft),
    "idle": Section(70, 40, serving.idle),
    "kernels": Section(40, 0, serving.kernels),
    "start": Section(60, 40, serving.start),
    "sizes": Section(5, 5, serving.sizes),
    "transformers": Section(100, 0, in_torch("transformers")),
}


class Bench:
    def __init__(self, arguments):
        self.arguments = arguments
        self.model, self.small = (cost.Model.load(path) for path in arguments.models)
        self.tables, self.troubles, self.seconds = {}, [], {}
        self.begin, self.section_end, self.section = time.monotonic(), 0.0, None
        self.served = serving.Served(self)
        self.date = datetime.datetime.now().astimezone()
        self.facts = {"GPU": gpu_name(), "date": self.date.isoformat(timespec="seconds"), "commit": commit(),
                      "command": " ".join(["python3", *sys.argv])}
        os.makedirs(arguments.out, exist_ok=True)

    # ---- what the sections use ----

    def left(self):
        """Seconds that the section has left."""
        seconds = self.section_end - time.monotonic()
        if seconds <= 1:
            raise RuntimeError("its time is over")
        return seconds

    def add(self, table, **row):
        self.tables.setdefault(table, []).append(row)

    def trouble(self, what):
        self.troubles.append(f"{self.section}: {what}")
        print(f"  FAILED {self.troubles[-1]}", flush=True)

    def attempt(self, case, function, *arguments):
        """A part of a section whose failure does not end it."""
        try:
            function(*arguments)
        except Exception as error:
            self.trouble(f"{case}: {type(error).__name__}: {str(error)[-400:]}")

    def ceilings(self):
        return cost.Ceilings(self.tables)

    def torch_part(self, part):
        self.served.stop()  # its memory is needed
        a = self.arguments
        command = [sys.executable, os.path.join(ROOT, "scripts", "gpu", "torch_parts.py"), part, "--model", self.model.path,
                   "--library", os.path.join(a.bundle, "libgptd_cuda.so"), *(["--quick"] if a.quick else []),
                   "--tokens", *map(str, a.streams)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        late = False
        try:
            out, errors = process.communicate(timeout=self.left())
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
            late = True
        finally:
            process.kill()
        for line in out.splitlines():
            if line.startswith("ROW "):
                _, table, values = line.split(" ", 2)
                self.add(table, **json.loads(values))
            elif line.startswith("FAILED"):
                self.trouble(line[7:])
        if late:
            self.trouble("its time is over")
        elif process.returncode and "FAILED:" not in out:
            self.trouble(f"ended with {process.returncode}: " + " / ".join(errors.strip().splitlines()[-2:])[-400:])

    # ---- running ----

    def run(self, name):
        section = SECTIONS[name]
        budget = section.quick_budget if self.arguments.quick else section.budget
        begin = time.monotonic()
        self.section = name
        self.section_end = min(begin + budget, self.begin + self.arguments.limit)
        if budget and self.section_end - begin < 5:
            return self.trouble("no time left for it")
        if budget:
            self.attempt("all", section.run, self)
            self.seconds[name] = round(time.monotonic() - begin, 1)
            print(f"{name}: {self.seconds[name]} s", flush=True)
            self.save()  # what there is, should the run be ended from outside

    def run_all(self):
        try:
            for name in SECTIONS:
                if name in self.arguments.only:
                    self.run(name)
        finally:
            self.attempt("the end of the server", self.served.stop)

    def path(self, extension):
        return os.path.join(self.arguments.out, f"{self.date:%Y-%m-%d}-gpu.{extension}")

    def save(self, lines=()):
        """The JSON; returns the facts of the run."""
        facts = {**self.facts, "seconds of each section": ", ".join(f"{k} {v:g}" for k, v in self.seconds.items())}
        with open(self.path("json"), "w") as f:
            json.dump({"facts": facts, "tables": self.tables, "troubles": self.troubles,
                       "summary": [line.cells() for line in lines]}, f, indent=1)
        return facts

    def report(self):
        names = [m.name() for m in (self.model, self.small)]
        lines = list(report.summary(self.tables, self.ceilings(), names, self.arguments.streams))
        facts, title = self.save(lines), f"{' and '.join(names)} on {self.facts['GPU']}"
        with open(self.path("md"), "w") as f:
            f.write(report.markdown(title, facts, lines, self.tables, self.troubles))
        print(report.text_table(lines))
        print(f"{time.monotonic() - self.begin:.0f} s; {self.path('md')}, .json; {len(self.troubles)} failed")


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def gpu_name():
    query = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "-i", "0")
    return query.replace(", ", ", driver ") or "no GPU"


def commit():
    """Empty in a copy without its history."""
    return output_of("git", "-C", ROOT, "rev-parse", "--short", "HEAD") or "unknown"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    here = [os.path.join(ROOT, "tests", "bench", "models", name) for name in ("llama-3-8b", "llama-3.2-1b")]
    add("--bundle", default=os.path.join(ROOT, "build", "gpu"), help="of make gpu-bundle [build/gpu]")
    add("--out", default=os.path.join(ROOT, "build"), help="directory of the results [build]")
    add("--only", nargs="+", choices=SECTIONS, default=[name for name in SECTIONS if name != "families"],
        metavar="SECTION", help=" ".join(SECTIONS) + " [all but families]")
    add("--skip", nargs="+", choices=SECTIONS, default=[], metavar="SECTION")
    add("--quick", action="store_true", help="fewer cases, under 3 minutes")
    add("--limit", type=float, metavar="SECONDS", help=f"for all of it [{LIMIT[False]}; with --quick {LIMIT[True]}]")
    add("--streams", type=int, nargs="+", metavar="N", help="[64 128 256; with --quick 64 256]")
    add("--chunk", type=int, default=8192, metavar="TOKENS", help="--max-num-batched-tokens of the server [%(default)s]")
    add("--server-flags", default="", metavar="FLAGS", help="more for every gptd, in one string")
    add("--backend", default="cuda", help="of gptd [%(default)s]")
    add("--models", nargs=2, default=here, metavar="DIR", help="the large and the small one, served with random weights")
    add("--demo", default=os.path.join(ROOT, "models", "demo"), metavar="DIR", help="[models/demo]")
    arguments = parser.parse_args()
    arguments.server_flags = arguments.server_flags.split()
    arguments.limit = arguments.limit or LIMIT[arguments.quick]
    arguments.streams = arguments.streams or ([64, 256] if arguments.quick else [64, 128, 256])
    arguments.only = [name for name in arguments.only if name not in arguments.skip]
    if not os.access(os.path.join(arguments.bundle, "gptd"), os.X_OK):
        parser.error(f"{arguments.bundle}: has no gptd (make gpu-bundle)")
    return arguments


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left
    bench = Bench(parse_arguments())
    try:
        bench.run_all()
    finally:
        bench.report()
    return 1 if bench.troubles else 0


if __name__ == "__main__":
    sys.exit(main())
