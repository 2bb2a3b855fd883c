"""The pictures of a training run. Figures only, no pyplot: nothing global, no display."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adaptivekv.selector import LOSS_FLOOR, Prediction
from adaptivekv.trainer.dataset import Rows
from adaptivekv.trainer.scoring import QUALITIES, Choice, Request


def figure(title: str, x: str, y: str, size: tuple[float, float] = (7, 4.5)) -> tuple[Figure, Any]:
    made = Figure(figsize=size, layout="constrained")
    axes = made.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    return made, axes


def frontier(requests: list[Request], path: Path) -> Path:
    """Mean bytes against mean loss of every plan, each by the request's full cache."""
    made, axes = figure("Plans: bytes against loss", "bytes / full cache", "loss, nats per token (+1e-6)")
    points: dict[str, list[tuple[float, float]]] = {}
    for request in requests:
        share = request.price / max(request.price[request.full], 1e-9)
        for plan, x, y in zip(request.rows.plan, share, request.rows.loss, strict=True):
            points.setdefault(str(plan), []).append((x, y))
    for plan, pairs in points.items():
        x, y = np.array(pairs).mean(axis=0)
        axes.scatter(x, y + LOSS_FLOOR)
        axes.annotate(plan, (x, y + LOSS_FLOOR), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set_yscale("log")
    for quality in QUALITIES:
        axes.axhline(quality, color="0.8", linewidth=0.8, zorder=0)
    made.savefig(path, dpi=110)
    return path


def calibration(rows: Rows, predicted: Prediction, path: Path) -> Path:
    """Predicted against measured loss."""
    made, axes = figure("Calibration on the select split", "predicted loss, nats (+1e-6)", "measured (+1e-6)")
    for name, x in (("mean model", predicted.loss), ("high quantile", predicted.loss_high)):
        axes.loglog(x + LOSS_FLOOR, rows.loss + LOSS_FLOOR, ".", markersize=3, alpha=0.6, label=name)
    ends = [LOSS_FLOOR, max(rows.loss.max(), predicted.loss_high.max()) + LOSS_FLOOR]
    axes.loglog(ends, ends, color="0.6", linewidth=0.8)
    axes.legend()
    made.savefig(path, dpi=110)
    return path


def importance(names: list[str], values: np.ndarray, path: Path) -> Path:
    """Rise of the loss model's squared error when one input is shuffled; the largest fifteen."""
    top = np.argsort(values)[-15:]
    made, axes = figure("What the loss model looks at", "rise of squared error when shuffled", "")
    axes.barh([names[i] for i in top], values[top])
    made.savefig(path, dpi=110)
    return path


def decisions(requests: list[Request], choose: Choice, path: Path) -> Path:
    """The plan chosen most often, and its mean cost, by scenario and SLO."""
    scenarios = sorted({str(r.rows.scenario[0]) for r in requests})
    cost = np.zeros((len(scenarios), len(QUALITIES)))
    size = (3 + 1.7 * len(QUALITIES), 1.5 + 0.5 * len(scenarios))
    made, axes = figure("Decisions: most chosen plan", "quality SLO, nats per token", "", size)
    for i, scenario in enumerate(scenarios):
        for j, quality in enumerate(QUALITIES):
            chosen = [(r, choose(r, quality)) for r in requests if r.rows.scenario[0] == scenario]
            cost[i, j] = np.mean([r.cost[k] for r, k in chosen])
            plan, times = Counter(str(r.rows.plan[k]) for r, k in chosen).most_common(1)[0]
            axes.text(j, i, f"{plan}\n{times}/{len(chosen)}", ha="center", va="center", fontsize=7)
    shade = axes.imshow(cost, cmap="YlGn_r", vmin=0, vmax=1, aspect="auto", alpha=0.6)
    axes.set_xticks(range(len(QUALITIES)), [str(q) for q in QUALITIES])
    axes.set_yticks(range(len(scenarios)), scenarios)
    made.colorbar(shade, label="cost / full cache")
    made.savefig(path, dpi=110)
    return path


def certificate(
    grid: Sequence[float], bound: np.ndarray, charged: np.ndarray, alpha: float, margin: float, path: Path
) -> Path:
    """The violation bound of the worst SLO and the charged cost (of the full cache) against the margin, [L] each."""
    made, axes = figure("Certification", "margin, log10 of a broken SLO's weight", "violation rate, upper bound")
    axes.plot(grid, bound, marker=".", color="tab:red", label="bound")
    axes.axhline(alpha, color="0.6", linewidth=0.8, label=f"alpha {alpha:g}")
    axes.axvline(margin, color="0.6", linestyle="--", linewidth=0.8, label=f"certified {margin:g}")
    axes.set(ylim=(0, None), xlim=(max(grid) + 0.1, min(grid) - 0.1))
    right = axes.twinx()
    right.plot(grid, charged, color="tab:green", label="charged cost")
    right.set(ylabel="charged cost / full cache", ylim=(0, None))
    made.legend(loc="outside lower center", ncols=4, fontsize=8)
    made.savefig(path, dpi=110)
    return path


def ways(table: dict[str, dict[str, Any]], path: Path) -> Path:
    """Cost and violation rate by SLO, a line a way, without the dear ones; as they are above, certified below."""
    made = Figure(figsize=(11, 8), layout="constrained")
    panels = made.subplots(len(table), 2, squeeze=False)
    colours = {way: f"C{i}" for i, way in enumerate(next(iter(table.values())))}
    for row, (kind, found) in zip(panels, table.items(), strict=True):
        for axes, what in zip(row, ("cost", "violation"), strict=True):
            for way, got in found.items():
                if way in ("full", "random safe") or "slos" not in got:
                    continue
                y = [slo[what] for slo in got["slos"].values()]
                width = 2.5 if way == "selector" else 1.2
                axes.plot(QUALITIES, y, marker="o", linewidth=width, label=way, color=colours[way])
            label = "cost / full cache" if what == "cost" else "share of requests over their SLO"
            axes.set(title=f"{what}, {kind}", xlabel="quality SLO, nats per token", ylabel=label, xscale="log")
            axes.set(ylim=(0, None))
            axes.set_xticks(QUALITIES, [str(q) for q in QUALITIES])
            axes.minorticks_off()
        row[1].axhline(0.05, color="0.7", linewidth=0.8)
    panels[0, 0].legend(fontsize=7)
    made.savefig(path, dpi=110)
    return path


def scenarios(table: dict[str, dict[str, Any]], path: Path) -> Path:
    """Charged cost of some ways per scenario; marked where more than 5 % break an SLO."""
    shown = [w for w in ("selector", "table", "static", "oracle") if any(w in got for got in table.values())]
    made, axes = figure(
        "Charged cost per scenario; x: over 5 % of an SLO's requests", "", "charged / full cache", (11, 4.5)
    )
    for i, way in enumerate(shown):
        x = np.arange(len(table)) + (i - (len(shown) - 1) / 2) * 0.8 / len(shown)
        y = [got[way]["charged"] for got in table.values()]
        axes.bar(x, y, 0.8 / len(shown), label=way)
        for at, height, got in zip(x, y, table.values(), strict=True):
            if got[way]["violation"] > 0.05:
                axes.text(at, height, "x", ha="center", va="bottom")
    axes.set_xticks(range(len(table)), [f"{name}\n{got['requests']}" for name, got in table.items()])
    made.legend(loc="outside right upper")
    made.savefig(path, dpi=110)
    return path


def goodput(rows: list[dict[str, Any]], path: Path) -> Path:
    """Requests a minute served in time and quality against the load, a panel an arena."""
    arenas = sorted({row["arena"] for row in rows})
    made = Figure(figsize=(4 * len(arenas), 4), layout="constrained")
    for axes, arena in zip(made.subplots(1, len(arenas), squeeze=False)[0], arenas, strict=True):
        for way in dict.fromkeys(row["way"] for row in rows):
            points = [(row["load"], row["goodput"]) for row in rows if (row["way"], row["arena"]) == (way, arena)]
            axes.plot(*zip(*points, strict=True), marker="o", linewidth=2.5 if way == "selector" else 1.2, label=way)
        axes.set(
            title=f"arena {arena / 2**20:.0f} MiB",
            xlabel="load, of what full caches could use of the middle arena",
            ylim=(0, None),
        )
    made.axes[0].set_ylabel("requests a minute in time and quality (simulated)")
    made.axes[0].legend()
    made.savefig(path, dpi=110)
    return path
