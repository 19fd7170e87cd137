"""The figures of bench_serve.py: from a run's records to what its JSON holds, its table and its plot."""
import bisect

LATENCIES = {"ttft_ms": "TTFT", "itl_ms": "ITL", "tpot_ms": "TPOT", "e2e_ms": "E2E"}
STATISTICS = ("mean", "p50", "p90", "p99")


def percentile(ordered, p):
    """The p-th percentile (0..100) of a sorted list, between neighbours where it falls there."""
    place = (len(ordered) - 1) * p / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def describe(values):
    """{mean, p50, p90, p99}, or None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return {"mean": sum(ordered) / len(ordered), **{f"p{p}": percentile(ordered, p) for p in (50, 90, 99)}}


def all_decoding(records, n_streams):
    """The times in which n_streams requests were between first and last chunk: [(begin, end)].

    The shortest are left out: of a window of a few steps only the short steps show whole. Short is under a quarter of
    the median, by time, so that one stall does not make all the others short.
    """
    changes = sorted([(r.chunks[0], 1) for r in records] + [(r.chunks[-1], -1) for r in records])
    running, windows = 0, []
    for (now, change), (later, _) in zip(changes, changes[1:]):
        running += change
        if running >= n_streams and later > now:
            windows.append((now, later))
    least = median_by_time(end - begin for begin, end in windows) / 4
    return [(begin, end) for begin, end in windows if end - begin >= least]


def median_by_time(lengths):
    """The length such that half of the whole time is in lengths up to it; 0 of nothing."""
    ordered = sorted(lengths)
    half, passed = sum(ordered) / 2, 0.0
    for length in ordered:
        passed += length
        if passed >= half:
            return length
    return 0.0


def steady_decode(records, n_streams):
    """The decode rate while all streams were decoding: {tokens_per_second, window_seconds, windows}, or None.

    Each stream is timed from its first chunk in a window to its last, over the tokens after the first: a window
    begins and ends with a chunk, so counting what falls into it would lose the step that is cut off.
    """
    windows = all_decoding(records, n_streams)
    begins, ends = [begin for begin, _ in windows], [end for _, end in windows]
    tokens = seconds = 0.0
    for r in records:
        within = slice(bisect.bisect_left(begins, r.chunks[0]), bisect.bisect_right(ends, r.chunks[-1]))
        for begin, end in windows[within]:
            first, last = bisect.bisect_left(r.chunks, begin), bisect.bisect_right(r.chunks, end) - 1
            if first < last:
                tokens += (last - first) * r.tokens_per_chunk()
                seconds += r.chunks[last] - r.chunks[first]
    if not seconds:
        return None
    return {"tokens_per_second": n_streams * tokens / seconds, "windows": len(windows),
            "window_seconds": sum(end - begin for begin, end in windows)}


def summarize(load, records, warmup, facts):
    """The figures of one run, as they stand in the JSON."""
    good = [r for r in records if not r.failure]
    wall = max(r.end for r in records) - min(r.start for r in records)
    n_input, n_output = sum(r.input_tokens for r in good), sum(r.output_tokens for r in good)
    latencies = [r.latencies() for r in good]
    samples = {"itl_ms": [gap for v in latencies for gap in v["itl_ms"]]}
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        samples[name] = [v[name] for v in latencies if name in v]
    cpu = facts["cpu_seconds"]
    n_chunks = sum(len(r.chunks) for r in good)
    return {
        "name": load.name(), "concurrency": load.concurrency, "rate": load.rate, "processes": load.n_processes,
        "n_requests": len(records), "completed": len(good), "failed": len(records) - len(good),
        "failures": count_failures(records), "warmup_failures": count_failures(warmup), "wall_seconds": wall,
        "input_tokens": n_input, "output_tokens": n_output,
        "requests_per_second": len(good) / wall, "input_tokens_per_second": n_input / wall,
        "output_tokens_per_second": n_output / wall, "total_tokens_per_second": (n_input + n_output) / wall,
        "steady_decode": steady_decode(good, min(load.concurrency, len(records))) if load.concurrency else None,
        **{name: describe(samples[name]) for name in LATENCIES},
        "tokens_per_chunk": n_output / n_chunks if n_chunks else None,
        "prefix_cache_hit_tokens": facts["hits"],
        "late_ms_max": max(r.late for r in records) * 1e3 if load.rate else None,
        "generator": {"cpu_seconds": sum(cpu), "share_of_a_core": sum(cpu) / wall,
                      "busiest_process_share": max(cpu) / wall},
        "requests": [request_figures(r, facts["start"]) for r in records],
    }


def count_failures(records):
    """{kind: {"count", "example"}}"""
    failures = {}
    for r in records:
        if r.failure:
            failures.setdefault(r.failure, {"count": 0, "example": r.detail})["count"] += 1
    return failures


def request_figures(r, start):
    """One request as the JSON has it: `start` in seconds from the run's, latencies in ms, null where it failed."""
    figures = {"index": r.index, "start": r.start - start, "failure": r.failure, "detail": r.detail,
               "input_tokens": r.input_tokens, "output_tokens": r.output_tokens, "chunks": len(r.chunks)}
    values = {} if r.failure else r.latencies()
    return {**figures, **{name: values.get(name) for name in ("ttft_ms", "tpot_ms", "e2e_ms")}}


# ---- the report ----

def table_rows(run):
    """(label, text) of one run, in the table's order; None where there is nothing to show."""
    def number(value, form):
        return None if value is None else format(value, form)
    steady, generator = run["steady_decode"], run["generator"]
    yield "requests", str(run["n_requests"])
    yield "failed", str(run["failed"])
    yield "seconds", number(run["wall_seconds"], ".2f")
    yield "requests/s", number(run["requests_per_second"], ",.2f")
    for kind in ("input", "output", "total"):
        yield f"{kind} tokens/s", number(run[f"{kind}_tokens_per_second"], ",.0f")
    yield "steady decode, output tokens/s", number(steady and steady["tokens_per_second"], ",.0f")
    yield "  all streams decoding for, ms", number(steady and steady["window_seconds"] * 1e3, ",.0f")
    for key, label in LATENCIES.items():
        for statistic in STATISTICS:
            yield f"{label} {statistic}, ms", number(run[key] and run[key][statistic], ",.2f")
    yield "tokens per chunk", number(run["tokens_per_chunk"], ".2f")
    yield "prefix cache hits, tokens", number(run["prefix_cache_hit_tokens"], ",d")
    yield "sent late by at most, ms", number(run["late_ms_max"], ".2f")
    yield "generator: processes", str(run["processes"])
    yield "generator: CPU seconds", number(generator["cpu_seconds"], ".2f")
    yield "generator: share of a core", number(generator["share_of_a_core"], ".0%")
    yield "generator: its busiest process", number(generator["busiest_process_share"], ".0%")


def print_table(runs):
    """A row for each figure, a column for each run. A row that no run has is left out."""
    columns = [dict(table_rows(run)) for run in runs]
    widths = [max(12, len(run["name"])) for run in runs]
    print(" " * 32 + "".join(f"  {run['name']:>{w}}" for run, w in zip(runs, widths)))
    for label in columns[0]:
        cells = [column[label] for column in columns]
        if any(cell is not None for cell in cells):
            print(f"{label:32}" + "".join(f"  {'-' if c is None else c:>{w}}" for c, w in zip(cells, widths)))
    for run in runs:
        print_troubles(run)


def print_troubles(run):
    for when, failures in (("", run["failures"]), (" in the warm-up", run["warmup_failures"])):
        for kind, failure in failures.items():
            print(f"FAILED: {run['name']}: {failure['count']} x {kind}{when} ({failure['example']})")
    if run["generator"]["busiest_process_share"] > 0.8 and run["wall_seconds"] > 1:
        print(f"{run['name']}: a process of the generator used over 80 % of a core: raise --processes, or read the "
              "latencies as the generator's")


def draw(pyplot, path, title, runs, records_of_runs):
    """Six panels: throughput by run, output over time, and the distribution of each latency."""
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    figure.suptitle(title)
    draw_throughput(axes[0][0], runs)
    good = [[r for r in records if not r.failure] for records in records_of_runs]
    draw_output(axes[0][1], runs, good)
    for axis, (key, label) in zip((axes[0][2], *axes[1]), LATENCIES.items()):
        draw_distribution(axis, key, label, runs, good)
    figure.savefig(path, dpi=120)


def draw_throughput(axis, runs):
    places = range(len(runs))
    steady = [run["steady_decode"]["tokens_per_second"] if run["steady_decode"] else 0 for run in runs]
    axis.bar([p - 0.2 for p in places], [run["output_tokens_per_second"] for run in runs], 0.4, label="whole run")
    axis.bar([p + 0.2 for p in places], steady, 0.4, label="all streams decoding")
    axis.set_xticks(places, [run["name"] for run in runs])
    axis.set(ylabel="output tokens/s", title="throughput")
    axis.legend()


def draw_output(axis, runs, records_of_runs, n_bins=60):
    """Output tokens/s over the run's time, in n_bins."""
    for run, records in zip(runs, records_of_runs):
        begin, width = min((r.start for r in records), default=0), run["wall_seconds"] / n_bins
        bins = [0.0] * n_bins
        for r in records:
            for t in r.chunks:
                bins[min(max(int((t - begin) / width), 0), n_bins - 1)] += r.tokens_per_chunk() / width
        axis.plot([(i + 0.5) * width for i in range(n_bins)], bins, label=run["name"])
    axis.set(xlabel="s", ylabel="output tokens/s", title="output over time")
    axis.legend()


def draw_distribution(axis, key, label, runs, records_of_runs, n_points=500):
    """Share of the samples at or below each value, for every run."""
    for run, records in zip(runs, records_of_runs):
        values = []
        for latencies in (r.latencies() for r in records):
            value = latencies.get(key, [])
            values += value if isinstance(value, list) else [value]
        if values:
            ordered = sorted(values)
            shares = [100 * i / n_points for i in range(n_points + 1)]
            axis.plot([percentile(ordered, share) for share in shares], shares, label=run["name"])
            axis.legend()
    axis.set(xlabel="ms", ylabel="% at or below", title=label, ylim=(0, 100))
