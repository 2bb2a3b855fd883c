"""What deciding costs beside a decode step: features, prediction and choice, on this machine.

    python -m experiments.decision --tokens 2000 --out experiments/results/selector-cost.json

A prompt of the book is answered under the champion. *Attention* is the features that are taken once, at the end of
the prompt, against reading it, the quickest of three; *deciding* is all else the controller does, divided over the
steps; *prediction* is the selector alone, for 32 plans, quickest and median of 2,000.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from adaptivekv import model
from adaptivekv.controller import Controller
from adaptivekv.features import schema
from adaptivekv.features.attention import prompt_features
from adaptivekv.memory.sequence import Sequence
from adaptivekv.selector import Selector
from adaptivekv.trainer import registry, tasks
from adaptivekv.trainer import replay as replaying
from experiments.selector import machine, rounded

NEW = 65  # tokens: two epochs, and the token that the prompt's own forward gives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/selector-cost.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = model.load()
    selector = registry.find_champion(None, "sqlite:///none.db")
    made = {"command": "python -m experiments.decision " + " ".join(sys.argv[1:]), "machine": machine()}
    made |= {"selector": selector.name, "prediction": predicted(selector)} | answered(loaded, selector, args.tokens)
    args.out.write_text(json.dumps(rounded(made), indent=1) + "\n")
    print(json.dumps(rounded(made), indent=1))


def predicted(selector: Selector, count: int = 32) -> dict[str, float]:
    """Microseconds of one prediction."""
    state, plans = np.ones(len(schema.NAMES)), np.resize(Controller().rows, (count, len(schema.PLAN_NAMES)))
    took = []
    for _ in range(2000):
        begun = time.perf_counter()
        selector.predict(state, plans)
        took.append(1e6 * (time.perf_counter() - begun))
    return {"plans": count, "least_us": min(took), "median_us": float(np.median(took))}


def answered(loaded: Any, selector: Selector, tokens: int) -> dict[str, Any]:
    """Times of one request, and the shares that deciding and the features of attention take."""
    ids = loaded.tokenizer(tasks.haystack()[: 8 * tokens], verbose=False).input_ids[:tokens]
    reference = replaying.reference(loaded, ids, NEW)
    (watched,) = reference.cache.requests
    took: list[float] = []

    def timed(sequence: Sequence) -> dict[str, float]:
        begun = time.perf_counter()
        found = prompt_features(sequence)
        took.append(time.perf_counter() - begun)
        return found

    for _ in range(2):
        timed(watched.sequence)
    controller = Controller(selector=selector, quality=0.03)
    with mock.patch("adaptivekv.controller.prompt_features", timed):
        run = replaying.replay(reference, controller)
    reference.free()
    per_step = (controller.seconds - took[-1]) / (NEW - 1)
    return {
        "tokens": len(ids), "steps": NEW - 1, "decisions": len(run.decisions), "step_ms": run.step_ms,
        "deciding_us_per_step": 1e6 * per_step, "deciding_share_of_a_step": 1e3 * per_step / run.step_ms,
        "prefill_s": reference.seconds, "attention_ms": 1e3 * min(took),
        "attention_share_of_prefill": min(took) / reference.seconds,
    }  # fmt: skip


if __name__ == "__main__":
    main()
