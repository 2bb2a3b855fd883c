"""What the host does between decode steps, without the kernels: milliseconds for the page tables of an 8B model.

    python -m experiments.bookkeeping --out experiments/results/bookkeeping.json

32 layers of 8 KV heads, with heads of 8 elements so that the data is next to nothing. `seal`: a
full tail; `keep`: the plan's upkeep after it; `update`: the tables that captured steps read
(the sorting in it runs on the device, here the processor). `collection`: one full garbage collection of a process with
torch, transformers and Triton, and one after `gc.freeze`.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers.models.llama  # noqa: F401 - what a serving process holds

from adaptivekv.engine.process import freeze
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels.table import Launch
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.memory.tables import StepTables, columns_for
from adaptivekv.plan import Plan
from experiments import output

LAYERS, HEADS, DIM, STEP = 32, 8, 8, 8192


def ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def filled(tokens: int) -> Sequence:
    """A sequence of native pages."""
    shape = LayerShape(HEADS, 4 * HEADS, DIM, DIM)
    pool = PagePool([shape] * LAYERS, torch.float16, "cpu", 2 * LAYERS * HEADS * tokens * DIM * 4 + (64 << 20))
    sequence = Sequence(pool)
    for start in range(0, tokens, STEP):
        n = min(STEP, tokens - start)
        x, pos = torch.zeros(HEADS, n, DIM, dtype=torch.float16), start + np.arange(n)
        for layer in range(LAYERS):
            sequence.append(layer, x, x, pos)
        sequence.commit(pos)
    return sequence


def measure(tokens: int, text: str, repeat: int = 5) -> dict[str, float]:
    """Medians of `repeat` seals, upkeeps and table updates under a plan."""
    sequence, plan = filled(tokens), Plan.parse(text)
    with patch("adaptivekv.kernels.pageops.recode"), patch("adaptivekv.kernels.pageops.copy_parts"):
        return _measure(sequence, plan, tokens, repeat)


def _measure(sequence: Sequence, plan: Plan, tokens: int, repeat: int) -> dict[str, float]:
    out: dict[str, list[float]] = {"seal": [], "keep": [], "update": []}
    plan.apply(sequence)
    tables = StepTables([sequence], columns_for(tokens + 64 * (repeat + 1)), 132, Launch())
    tables.update()
    for _ in range(repeat):
        for _ in range(64 - sequence.tail_len):
            sequence.extend()
        out["seal"].append(ms(sequence.seal))
        out["keep"].append(ms(lambda: plan.maintain(sequence)))
        out["update"].append(ms(tables.update))
    return {key: round(statistics.median(values), 2) for key, values in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    output.check(args.out)
    torch.set_num_threads(1)
    machine = f"{platform.processor() or platform.machine()}, one thread"
    gc.collect()
    collection = ms(gc.collect)
    rows = [{"tokens": n, "plan": p} | measure(n, p) for n, p in ((1024, "full"), (32768, "full"), (32768, "int4"))]
    freeze()
    frozen = round(ms(gc.collect), 3)
    found = {"machine": machine, "rows": rows, "collection_ms": round(collection, 1), "collection_frozen_ms": frozen}
    output.emit("bookkeeping", found, args.out)


if __name__ == "__main__":
    try:
        main()
    except AdaptiveKVError as error:
        sys.exit(f"bookkeeping: {error}")
