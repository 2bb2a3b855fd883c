"""One budget for all layers against a budget a layer: what plans that evict lose with either, at equal bytes.

    python -m experiments.budgets --seconds 900 --out experiments/results/budgets.json

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
from adaptivekv.trainer import replay as replaying
from adaptivekv.trainer import workload
from experiments import output
from experiments.champion import SCENARIOS

PLANS = (
    "kvzip({}) | int4(window=0)", "kvzap({}) | int4(window=0)", "kvzap({}) | k4v2(window=0)",
)  # fmt: skip
KEEPS = (0.5, 0.3, 0.2)
WAYS = ("uniform", "adaptive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        output.check(args.out)
        found = measure(args.seconds, args.max_tokens)
    except AdaptiveKVError as error:
        raise SystemExit(f"budgets: {error}") from None
    output.emit("budgets", summary(found), args.out)


def measure(seconds: float, max_tokens: int) -> dict[str, list[dict[str, tuple[float, float]]]]:
    """By plan: of each request, nats and share of the full bytes, with a budget a layer and with one for all."""
    torch.set_num_threads(1)
    loaded, until = model.load(), time.monotonic() + seconds
    names = {way: [plan.format(f"{keep}, layers={way}") for plan in PLANS for keep in KEEPS] for way in WAYS}
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
            for way, plan in zip(WAYS, plans, strict=True):
                run = replaying.replay(reference, plan)
                pair[way] = run.kl_mean, run.device_bytes / run.full_bytes
            found.setdefault(plans[0].replace(", layers=uniform", ""), []).append(pair)
        reference.free()
        print(f"{request.id}: {len(prompt.ids)} tokens", flush=True)
    return found


def summary(found: dict[str, list[dict[str, tuple[float, float]]]]) -> dict[str, Any]:
    """Means, and the geometric mean of the loss with one budget over that with a budget a layer, with its interval."""
    rows = {}
    draws = np.random.default_rng(0)
    for plan, pairs in found.items():
        loss, size = np.moveaxis(np.array([[pair[way] for way in WAYS] for pair in pairs]), 2, 0)
        logs = np.diff(np.log(np.maximum(loss, 1e-4)), axis=1)[:, 0]
        means = logs[draws.integers(len(logs), size=(2000, len(logs)))].mean(1)
        low, high = np.exp(np.quantile(means, (0.025, 0.975)))
        rows[plan] = {
            "loss": dict(zip(WAYS, loss.mean(0).round(5).tolist(), strict=True)),
            "bytes": dict(zip(WAYS, size.mean(0).round(5).tolist(), strict=True)),
            "ratio": round(float(np.exp(logs.mean())), 4), "low": round(float(low), 4), "high": round(float(high), 4),
        }  # fmt: skip
    return {"requests": len(next(iter(found.values()), [])), "plans": rows}


if __name__ == "__main__":
    main()
