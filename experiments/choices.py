"""What a change to an eviction takes, beside two decode steps of the same model shape: milliseconds.

    python -m experiments.choices --out experiments/results/choices.json
    python -m experiments.choices --out experiments/results/choices-cpu.json

A prompt of an 8B model, its slots scored already. `choose`: which slots stay; `evict`: they are packed and the others'
pages freed; medians. `two_steps`: two steps of the unchanged cache (`adaptivekv bench decode`), captured and not
compiled. Without a GPU `choose` alone is measured, in one thread, on heads of 8 elements, so that the data is next to
nothing.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptivekv.bench.decode import fill, run
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.evict import evict
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.plan import Plan
from adaptivekv.policies.eviction.base import Eviction
from experiments import output

LAYERS, HEADS, TOKENS, REPEAT = 32, 8, (4096, 32768), 7
PLANS = ("streaming(0.5)", "h2o(0.5)", "kvzip(0.5, layers=uniform)", "kvzip(0.5)")


def prompt(pool: PagePool, tokens: int) -> Sequence:
    """A prompt as it was read, random credits and masses given."""
    sequence, draws = Sequence(pool), np.random.default_rng(0)
    fill(sequence, tokens)
    for credit in sequence.credit("recall", tokens):
        draws.random(out=credit, dtype=np.float32)
    for mass in sequence.mass:
        draws.random(out=mass, dtype=np.float32)
    return sequence


def measure(pool: PagePool, tokens: int, text: str, gpu: bool) -> dict[str, Any]:
    stage, taken = Plan.parse(text).stage("evict"), []
    assert isinstance(stage, Eviction)
    for _ in range(REPEAT):
        sequence, clock = prompt(pool, tokens), [now(gpu)]
        keep = stage.choose(sequence)
        clock.append(now(gpu))
        if gpu and keep is not None:
            evict(sequence, keep)
            clock.append(now(gpu))
        sequence.free()
        taken.append(np.diff(clock))
    medians = [round(1e3 * float(np.median(times)), 2) for times in zip(*taken[1:], strict=True)]
    return dict(zip(("choose", "evict"), medians, strict=False))


def now(gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def two_steps() -> dict[int, float]:
    """Of the unchanged cache, by its tokens."""
    return {row["tokens"]: round(2 * row["ms"], 2) for row in run([("8b", 1, n, "full") for n in TOKENS], peers=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    output.check(args.out)
    gpu = torch.cuda.is_available()
    steps = {}
    if gpu:
        steps = two_steps()  # the host is warm afterwards
        torch.cuda.empty_cache()
    else:
        torch.set_num_threads(1)
    dim, dtype = (128, torch.bfloat16) if gpu else (8, torch.float16)
    rows = []
    for tokens in TOKENS:
        size = int(3.2 * LAYERS * HEADS * tokens * dim * 2 * dtype.itemsize) + (64 << 20)
        pool = PagePool([LayerShape(HEADS, 4 * HEADS, dim, dim)] * LAYERS, dtype, "cuda" if gpu else "cpu", size)
        for text in PLANS:
            row: dict[str, Any] = {"tokens": tokens, "plan": text} | measure(pool, tokens, text, gpu)
            rows.append(row | ({"two_steps": steps[tokens]} if gpu else {}))
            print(rows[-1], file=sys.stderr, flush=True)
        del pool
    machine = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()}, one thread"
    output.emit("choices", {"machine": machine, "rows": rows}, args.out)


if __name__ == "__main__":
    try:
        main()
    except AdaptiveKVError as error:
        sys.exit(f"choices: {error}")
