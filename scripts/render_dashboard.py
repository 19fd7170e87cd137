#!/usr/bin/env python3
"""Draws the Grafana dashboard's panels from a running Prometheus: the dashboard's own queries, without Grafana.

    python3 scripts/render_dashboard.py --prometheus http://127.0.0.1:9090 --seconds 300 --out dashboard.png

Needs matplotlib. Units, axes and legends follow what the dashboard says as far as a picture needs it.
"""
import argparse
import json
import os
import time
import urllib.parse
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DASHBOARD = os.path.join(ROOT, "configs", "grafana", "dashboards", "gptd.json")


def panels(rate_interval, path=DASHBOARD):
    """The dashboard's panels, with Grafana's variables in their queries replaced: all replicas."""
    with open(path) as f:
        dashboard = json.load(f)
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            target["expr"] = target["expr"].replace("$__rate_interval", rate_interval).replace("$instance", ".*")
            assert "$" not in target["expr"], target["expr"]
    return dashboard["panels"]


def ask(prometheus, path, **parameters):
    """The result of a query. Raises where Prometheus refuses it."""
    with urllib.request.urlopen(f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=60) as answer:
        return json.load(answer)["data"]["result"]


def label(target, metric):
    text = target["legendFormat"]
    for name, value in metric.items():
        text = text.replace("{{" + name + "}}", value)
    return text


# unit of a panel -> what the axis says, and by how much values are divided
UNITS = {"s": ("ms", 1e-3), "percentunit": ("%", 0.01), "bytes": ("MiB", 2**20), "reqps": ("requests/s", 1), "ops": ("a second", 1),
         "short": ("", 1)}


def draw_panel(axes, panel, series, span):
    """series: (label, times, values) of each line. span: the first and the last second."""
    defaults = panel["fieldConfig"]["defaults"]
    unit, divisor = UNITS[defaults["unit"]]
    scaled = [(name, [t - span[0] for t in times], [v / divisor for v in values]) for name, times, values in series]
    if defaults["custom"].get("stacking"):
        names, times, values = zip(*scaled)
        grid = sorted({t for one in times for t in one})
        rows = [[dict(zip(t, v)).get(at, 0) for at in grid] for t, v in zip(times, values)]
        axes.stackplot(grid, rows, labels=names, alpha=0.7)
    else:
        for name, times, values in scaled:
            axes.plot(times, values, label=name, linewidth=1)
    axes.set_title(panel["title"] + (f" [{unit}]" if unit else ""), fontsize=8, loc="left")
    axes.set_xlim(0, span[1] - span[0])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.tick_params(labelsize=6)
    axes.legend(fontsize=5, loc="upper left", ncols=3, frameon=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--rate-interval", default="20s", help="four times the scrape interval, as in Grafana")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown, end = panels(arguments.rate_interval), int(time.time())
    span = (end - arguments.seconds, end)
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in shown)
    figure = pyplot.figure(figsize=(14, height * 0.22))
    figure.suptitle(f"gptd.json, {arguments.seconds} s, drawn by scripts/render_dashboard.py", fontsize=9, y=0.998)
    for panel in shown:
        at = panel["gridPos"]
        top = 0.99 * (1 - at["y"] / height)
        if panel["type"] == "row":
            figure.text(0.01, top - 0.6 / height, panel["title"], fontsize=10, weight="bold", va="center")
            continue
        axes = figure.add_axes((at["x"] / 24 + 0.03, top - (at["h"] - 1.3) / height, at["w"] / 24 - 0.04, (at["h"] - 2.4) / height))
        series = []
        for target in panel["targets"]:
            for result in ask(arguments.prometheus, "query_range", query=target["expr"], start=span[0], end=span[1], step=2):
                values = [(float(t), float(v)) for t, v in result["values"] if v != "NaN"]  # NaN: nothing happened
                if values:
                    series.append((label(target, result["metric"]), *zip(*values)))
        draw_panel(axes, panel, series, span)
    figure.savefig(arguments.out, dpi=85, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
