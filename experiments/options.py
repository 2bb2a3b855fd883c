"""An option against the default: what plans lose and how many bytes they take with either, request by request.

    python -m experiments.options layers --seconds 1200 --out experiments/results/budgets.json
    python -m experiments.options guard --seconds 1200 --max-tokens 4096 --out experiments/results/guard.json

Requests of split train, one of each scenario in turn, are replayed as `collect` does, until the time is over.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from adaptivekv import model
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.plan import Plan
from adaptivekv.trainer import replay as replaying
from adaptivekv.trainer import workload
from experiments import output
from experiments.champion import SCENARIOS

OPTIONS: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "layers": (
        ("uniform", "adaptive"),
        tuple(
            plan.format(f"{keep}, layers={{}}")
            for plan in ("kvzip({}) | int4(window=0)", "kvzap({}) | int4(window=0)", "kvzap({}) | k4v2(window=0)")
            for keep in (0.5, 0.3, 0.2)
        ),
    ),
    "guard": (
        ("native", "int8"),
        (
            "int4(guard={})", "int4(window=0, guard={})", "k4v2(window=0, guard={})",
            "kvzap(0.75) | tuned(0.25, high=int8, low=int4, guard={})",
            "kvzap(0.4) | int4(window=0, guard={})", "kvzap(0.2) | k4v2(window=0, guard={})",
        ),
    ),
}  # fmt: skip
"""Two values, and plans that take either."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("option", choices=OPTIONS)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        output.check(args.out)
        ways, plans = OPTIONS[args.option]
        found = measure(ways, plans, args.seconds, args.max_tokens)
    except AdaptiveKVError as error:
        raise SystemExit(f"options: {error}") from None
    output.emit("options", summary(ways, found), args.out)


def measure(
    ways: tuple[str, str], texts: tuple[str, ...], seconds: float, max_tokens: int
) -> dict[str, list[dict[str, tuple[float, float]]]]:
    """By plan: of each request, nats and share of the full bytes, either way."""
    torch.set_num_threads(1)
    loaded, until = model.load(), time.monotonic() + seconds
    names = {way: [str(Plan.parse(text.format(way))) for text in texts] for way in ways}
    found: dict[str, list[dict[str, tuple[float, float]]]] = {}
    drawn = [workload.draw(workload.load(name), 40, 0, max_tokens, ("train",)) for name in SCENARIOS]
    for request in (request for group in zip(*drawn, strict=True) for request in group):
        if time.monotonic() > until:
            break
        prompt = workload.write(request, loaded.tokenizer)
        new = min(request.new, 64)
        reference = replaying.reference(loaded, prompt.ids, new, stop=True, plans=sum(map(tuple, names.values()), ()))
        for plans in zip(*names.values(), strict=True):
            pair = {}
            for way, plan in zip(ways, plans, strict=True):
                run = replaying.replay(reference, plan)
                pair[way] = run.kl_mean, run.device_bytes / run.full_bytes
            found.setdefault(plans[0], []).append(pair)
        reference.free()
        print(f"{request.id}: {len(prompt.ids)} tokens", flush=True)
    return found


def summary(ways: tuple[str, str], found: dict[str, list[dict[str, tuple[float, float]]]]) -> dict[str, Any]:
    """Means, and the geometric mean of the ratio of the losses, the other value over the default, with its interval."""
    rows = {}
    draws = np.random.default_rng(0)
    for plan, pairs in found.items():
        loss, size = np.moveaxis(np.array([[pair[way] for way in ways] for pair in pairs]), 2, 0)
        logs = np.diff(np.log(np.maximum(loss, 1e-4)), axis=1)[:, 0]
        means = logs[draws.integers(len(logs), size=(2000, len(logs)))].mean(1)
        low, high = np.exp(np.quantile(means, (0.025, 0.975)))
        rows[plan] = {
            "loss": dict(zip(ways, loss.mean(0).round(5).tolist(), strict=True)),
            "bytes": dict(zip(ways, size.mean(0).round(5).tolist(), strict=True)),
            "ratio": round(float(np.exp(logs.mean())), 4), "low": round(float(low), 4), "high": round(float(high), 4),
        }  # fmt: skip
    return {"requests": len(next(iter(found.values()), [])), "plans": rows}


if __name__ == "__main__":
    main()
