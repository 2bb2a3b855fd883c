"""Quality against physical bytes: plans over the task families, and the front they form.

    python -m experiments.pareto --lengths 4096 --samples 2 --out experiments/results/pareto-aware.json
    python -m experiments.pareto --lengths 4096 --samples 2 --agnostic --out experiments/results/pareto-agnostic.json

A cell (task, length) at a time, each written as soon as it is done: a run that was stopped goes on where it was, and
more plans, lengths or samples are other files. Accuracy is the mean over the families, relative to the full cache's on
the same prompts; bytes are those the cache holds at the end, scales, native windows and the open tail included.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from adaptivekv.console import bar
from adaptivekv.model import load
from adaptivekv.trainer.evaluate import evaluate
from adaptivekv.trainer.tasks import TASKS

AWARE = (
    "full", "k4v2", "snapkv(0.5, pool=32) | k4v2", "snapkv(0.35, pool=32) | k4v2", "snapkv(0.25, pool=32) | k4v2",
    "tova(0.5) | k4v2", "snapkv(0.5) | k4v2",
)  # fmt: skip
AGNOSTIC = (
    "full", "k4v2", "kvzip(0.6) | k4v2", "kvzip(0.5) | k4v2", "kvzip(0.4) | k4v2", "keydiff(0.6) | k4v2",
    "snapkv(0.6, pool=32) | k4v2",
)  # fmt: skip


def measure(args: argparse.Namespace, plans: tuple[str, ...]) -> dict[str, Any]:
    """Cells not yet in the file are evaluated and added to it."""
    loaded = load(args.model, args.device)
    facts = {"model": loaded.name, "samples": args.samples, "seed": args.seed, "plans": list(plans)}
    facts |= {"question_aware": not args.agnostic}
    where = torch.cuda.get_device_name() if loaded.device.type == "cuda" else f"{platform.machine()} CPU"
    result = facts | {"device": where, "torch": torch.__version__, "command": args.command, "rows": []}
    if args.out.exists():
        old = json.loads(args.out.read_text())
        if any(old[key] != value for key, value in facts.items()):
            raise SystemExit(f"{args.out}: made with other settings; give another --out")
        result["rows"] = old["rows"]
    done = {(row["task"], row["length"]) for row in result["rows"]}
    cells = [(task, length) for length in args.lengths for task in args.tasks if (task, length) not in done]
    with bar(False) as progress:
        job = progress.add_task("pareto", total=len(cells) * len(plans) * args.samples)
        for task, length in cells:
            result["rows"] += evaluate(
                loaded, plans, [task], [length], args.samples, args.seed, question_aware=not args.agnostic,
                progress=lambda *_: progress.advance(job),
            )  # fmt: skip
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a length and plan: mean over the tasks, relative to `full`."""
    out = []
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["length"], row["plan"]), []).append(row)
    for (length, plan), cell in sorted(groups.items()):
        full = np.mean([row["score"] for row in groups[length, "full"]])
        mean = {key: float(np.mean([row[key] for row in cell])) for key in ("score", "kl", "flip_rate", "kv_ratio")}
        megabytes = float(np.mean([row["kv_bytes_end"] for row in cell])) / 1e6
        out.append({"length": length, "plan": plan, "relative": mean["score"] / full, "mb": megabytes} | mean)
    return out


def plot(table: list[dict[str, Any]], path: Path) -> None:
    lengths = sorted({row["length"] for row in table})
    figure = Figure(figsize=(5.5 * len(lengths), 4.5), layout="constrained")
    for i, length in enumerate(lengths):
        axes = figure.add_subplot(1, len(lengths), i + 1)
        rows = sorted((row for row in table if row["length"] == length), key=lambda row: row["kv_ratio"])
        best, front = -1.0, []
        for row in rows:
            axes.plot(row["kv_ratio"], row["relative"], "o", label=row["plan"])
            if row["relative"] > best:
                best = row["relative"]
                front.append(row)
        axes.plot([r["kv_ratio"] for r in front], [r["relative"] for r in front], "0.6", zorder=0)
        axes.set(xscale="log", xlabel="bytes held / 16-bit cache", ylabel="accuracy / full cache's")
        axes.set_title(f"{length} tokens")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--agnostic", action="store_true", help="compress the document before the question is known")
    parser.add_argument("--plans", nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    given = [f"--lengths {' '.join(map(str, args.lengths))}", f"--samples {args.samples}", f"--seed {args.seed}"]
    args.command = " ".join(["python -m experiments.pareto", *given, "--agnostic" * args.agnostic, f"--out {args.out}"])
    plans = tuple(args.plans or (AGNOSTIC if args.agnostic else AWARE))
    table = summary(measure(args, plans)["rows"])
    plot(table, args.out.with_suffix(".png"))
    for row in table:
        print(
            f"{row['length']:>6} {row['plan']:<34} {row['score']:.3f} ({row['relative']:.0%} of full) "
            f"KL {row['kl']:.4f} flips {row['flip_rate']:.1%} {row['kv_ratio']:.1%} {row['mb']:.1f} MB"
        )


if __name__ == "__main__":
    main()
