"""How busy the GPU was, from the lines that libgptd_trace.so (tests/gpu/trace.c) wrote: `kind start end name`, in ns.

A graph is one interval, from its first kernel to its last, so gaps inside graphs count as busy.
"""
import collections
import re

PAUSE = 0.5e9  # ns of nothing that part one load from the next


def parse(lines):
    """[(start, end, kind, name)] by start. Lines that are cut off, and records without times, are left out."""
    records = []
    for line in lines:
        kind, *rest = line.rstrip("\n").split(" ", 3)
        if len(rest) == 3 and rest[0].isdigit() and rest[1].isdigit() and 0 < int(rest[0]) <= int(rest[1]):
            records.append((int(rest[0]), int(rest[1]), kind, rest[2]))
    return sorted(records)


def loads(records):
    """The records in parts, cut where the GPU had a pause."""
    parts, end = [], None
    for record in records:
        if end is None or record[0] - end > PAUSE:
            parts.append([])
            end = record[1]
        parts[-1].append(record)
        end = max(end, record[1])
    return parts


def percentile(ordered, p):
    return ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))] if ordered else None


def begins_step(records):
    """Which records begin a step: graphs where there are any, else the embedding's kernel."""
    graphs = any(kind == "g" for _, _, kind, _ in records)
    return lambda kind, name: kind == "g" if graphs else kind == "k" and "embed" in name


def idle(records, window):
    """Of the last `window` seconds: {busy share, steps, idle us per step, gap us p50, p90: nothing ran before a step}."""
    last = max((end for _, end, _, _ in records), default=0)
    records = [r for r in records if r[0] >= last - window * 1e9]
    if not records:
        raise ValueError("the trace holds nothing of the GPU's work")
    is_begin, begin = begins_step(records), records[0][0]
    busy_until, nothing, gaps, steps = begin, 0, [], 0
    for start, end, kind, name in records:
        gap = max(0, start - busy_until)
        nothing += gap
        if is_begin(kind, name):
            steps += 1
            gaps.append(gap / 1e3)
        busy_until = max(busy_until, end)
    gaps.sort()
    return {"busy share": 1 - nothing / max(1, busy_until - begin), "steps": steps,
            "idle us per step": nothing / 1e3 / steps if steps else None,
            "gap us p50": percentile(gaps, 50), "gap us p90": percentile(gaps, 90), "records": len(records)}


def short_name(name):
    """Of one of our kernels, without where it lies, with its template's arguments; of others as they are."""
    ours = re.search(r"\d([a-z][a-z_]*_kernel)(I\S*?E)?(?:E+v|$)", name)
    return " ".join(filter(None, ours.groups())) if ours else name[:60]


def kernels(records, window):
    """Of the last `window` seconds: [{kernel, a step, us a step}], where a moment counts for the kernel that ends next:
    kernels begin, and wait, before those that they follow have ended."""
    last = max((end for _, end, _, _ in records), default=0)
    records = [r for r in records if r[0] >= last - window * 1e9]
    steps = sum(1 for _, _, _, name in records if "embed" in name)
    if not steps:
        raise ValueError("the trace holds no step")
    spent, counts, until = collections.Counter(), collections.Counter(), records[0][0]
    for _, end, kind, name in sorted(records, key=lambda r: r[1]):
        key = short_name(name) if kind == "k" else {"c": "copy", "s": "memset", "g": "graph"}.get(kind, kind)
        spent[key] += max(0, end - until)
        counts[key] += 1
        until = max(until, end)
    return [{"kernel": key, "a step": counts[key] / steps, "us a step": ns / 1e3 / steps} for key, ns in spent.most_common()]
