"""The pictures of a benchmark. Figures only, no pyplot: nothing global, no display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot(name: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Kernels: ratio to the best peer by format and shape. Decode: ms a step beside the floor and the peer."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if name == "kernels":
        shapes = list(dict.fromkeys((r["requests"], r["tokens"]) for r in rows))
        formats = list(dict.fromkeys(r["format"] for r in rows))
        for i, shape in enumerate(shapes):
            mine = {r["format"]: r["ratio"] for r in rows if (r["requests"], r["tokens"]) == shape}
            at = [j + 0.8 * i / len(shapes) for j in range(len(formats))]
            axes.bar(at, [mine.get(f, 0.0) for f in formats], 0.8 / len(shapes), label="{} x {}".format(*shape))
        axes.axhline(1.0, color="0.5", linewidth=0.8)
        axes.set_xticks([j + 0.3 for j in range(len(formats))], formats)
        axes.set(ylabel="times the speed of the best 16-bit peer", title="Decode attention")
    else:
        labels = [f"{r['shape']}\n{r['requests']} x {r['tokens']}\n{r['plan']}" for r in rows]
        series = {"ms": "adaptivekv", "transformers_ms": "transformers", "floor_ms": "bytes / copy bandwidth"}
        for i, (key, label) in enumerate(series.items()):
            axes.bar([j + 0.27 * i for j in range(len(rows))], [r.get(key, 0.0) for r in rows], 0.27, label=label)
        axes.set_xticks([j + 0.27 for j in range(len(rows))], labels, fontsize=8)
        axes.set(ylabel="ms a step", title="Decode step")
    axes.legend()
    figure.savefig(path, dpi=110)
