"""Decode steps of the embedded model on a CPU core, measured once and put into a study, whichever machine replayed it.

    python -m experiments.cputimes measure --out experiments/results/step-times-cpu.json
    python -m experiments.cputimes apply build/study experiments/results/step-times-cpu.json

A step that is timed beside a replay depends on the machine and on the load of its neighbours. Fitted is, to steps of
one idle core,

    base + bytes that are read x a rate of the plan

and reading host bytes over the drawn link is added, since a CPU has none (workers.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.progress import track

from adaptivekv.candidates import CANDIDATES
from adaptivekv.controller import Controller
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.huggingface import line
from adaptivekv.memory.shapes import DEVICE, HOST
from adaptivekv.model import load
from adaptivekv.plan import Plan
from adaptivekv.selector import LINK, READ_SHARE
from adaptivekv.trainer import tasks, trajectories
from adaptivekv.trainer.branch import Branch
from adaptivekv.trainer.replay import reference
from experiments import output
from experiments.selector import machine

LENGTHS = (256, 512, 1024, 2048, 4096)
STEPS = 24  # of each, after one that is not timed


@dataclasses.dataclass(frozen=True)
class Steps:
    base_ms: float
    per_mb: dict[str, float]  # ms for a million bytes read, by plan
    worst: float  # relative error of the fit, of the measured step that it misses most

    def of(self, plan: str, read: float) -> float:
        """Milliseconds of a step that reads so many bytes. AdaptiveKVError for a plan that was not measured."""
        if plan not in self.per_mb:
            raise AdaptiveKVError(
                f"plan {plan!r} has no step times; measure it: python -m experiments.cputimes measure"
            )
        return self.base_ms + read / 1e6 * self.per_mb[plan]


@torch.inference_mode()
def measure() -> list[dict[str, Any]]:
    """A row a length and candidate: processor time of the fastest step, one thread; bytes after it.

    All take their steps in turn: what slows a shared core for a while (by a third, for minutes) meets every one.
    """
    torch.set_num_threads(1)
    loaded, runs = load(device="cpu"), {}
    text = loaded.tokenizer.encode(tasks.haystack()[: 6 * LENGTHS[-1]])
    for tokens in LENGTHS:
        full = reference(loaded, text[:tokens], STEPS + 1)
        for plan in dict.fromkeys(["full", *(str(Plan.parse(p)) for p in CANDIDATES)]):
            runs[tokens, plan] = Branch(full, Controller(Plan.parse(plan)), None)
        full.free()
    rounds = [[run.timed(text[0]) for run in runs.values()] for _ in track(range(STEPS + 1), "steps")]
    rows = []
    for (tokens, plan), run, ms in zip(runs, runs.values(), 1e3 * np.min(rounds[1:], axis=0), strict=True):
        device, host = (run.request.sequence.bytes(tier) for tier in (DEVICE, HOST))
        rows.append({"tokens": tokens, "plan": plan, "ms": float(ms), "device_bytes": device, "host_bytes": host})
    return rows


def fit(path: Path) -> Steps:
    """Least squares of relative errors, one base for all plans. AdaptiveKVError: not a file that `measure` writes."""

    def share(plan: str) -> float:  # of the host bytes, what a step reads
        return float(Plan.parse(plan).features()["read_share"])

    try:
        rows = json.loads(path.read_text())["rows"]
        ms = np.array([float(row["ms"]) for row in rows])
        read = np.array([row["device_bytes"] + row["host_bytes"] * share(row["plan"]) for row in rows]) / 1e6
        plans = list(dict.fromkeys(row["plan"] for row in rows))
        parts = np.column_stack([np.ones(len(ms)), *(read * [row["plan"] == p for row in rows] for p in plans)])
    except (OSError, ValueError, KeyError, TypeError, AdaptiveKVError) as error:
        raise AdaptiveKVError(f"times {path}: not rows of `experiments.cputimes measure` ({line(error)})") from None
    if not len(ms) or not (np.isfinite(ms).all() and (ms > 0).all()):
        raise AdaptiveKVError(f"times {path}: every ms must be finite and above zero; measure again")
    found, _, rank, _ = np.linalg.lstsq(parts / ms[:, None], np.ones(len(ms)), rcond=None)
    if rank < parts.shape[1] or found.min() <= 0:
        raise AdaptiveKVError(f"times {path}: no time a byte can be told from these steps; measure again, idle")
    base, *rates = (float(x) for x in found)
    return Steps(base, dict(zip(plans, rates, strict=True)), float(np.abs(parts @ found / ms - 1).max()))


def retimed(table: pa.Table, steps: Steps) -> list[dict[str, Any]]:
    """Rows of trajectories.SCHEMA with these step times, and what follows from them."""
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        away = row["host_bytes"] * row["plan_features"][READ_SHARE]
        over = away / 10 ** row["features"][LINK] / 1e6
        seconds = (steps.of(row["plan"], row["device_bytes"] + away) + over) / 1e3 * row["tokens"]
        row["step_ms"] = 1e3 * seconds / row["tokens"]
        row["device_byte_s"], row["host_byte_s"] = row["device_bytes"] * seconds, row["host_bytes"] * seconds
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("measure")
    made.add_argument("--out", type=Path, required=True)
    used = verbs.add_parser("apply")
    used.add_argument("study", type=Path)
    used.add_argument("times", type=Path)
    args = parser.parse_args()
    if args.verb == "measure":
        output.check(args.out)
        output.emit("cputimes", {"machine": machine(), "torch": torch.__version__, "rows": measure()}, args.out)
        print(fit(args.out))
        return
    steps = fit(args.times)
    parts = sorted(args.study.glob("*/trajectories/*.parquet"))
    if not parts:
        raise AdaptiveKVError(f"study {args.study}: no <scenario>/trajectories/*.parquet there")
    for part in parts:
        trajectories.write(retimed(trajectories.read(part), steps), part)


if __name__ == "__main__":
    try:
        main()
    except AdaptiveKVError as error:
        sys.exit(f"cputimes: {error}")
