"""How well page mass measured in one step of 32 ranks pages as the attention of every step does.

    python -m experiments.mass --out experiments/results/mass.json

The embedded model reads part of the book and goes on writing. Every step's page mass is taken; `true` is its sum over
all steps, `sampled` the running average over one step an epoch, as a decode loop keeps it. Spearman's rank correlation
over the pages of each layer and KV head, and how much of the attention of all steps lies on the half of the pages that
each ranks highest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from adaptivekv.cache import AdaptiveCache
from adaptivekv.model import load

EPOCH = 32


def masses(tokens: int, steps: int) -> np.ndarray:
    """Mass of each page in each step: [steps, layers, heads, pages]."""
    loaded = load(None, "cpu", "float32")
    text = (Path(__file__).parent / "data" / "moby_dick.txt").read_text(encoding="utf-8")
    ids = loaded.tokenizer(text[20_000 : 20_000 + 8 * tokens]).input_ids[:tokens]
    cache = AdaptiveCache(loaded.model, plan="full", max_tokens=tokens + steps)
    cache.controller.epoch = 1  # every step measures; the running average is taken apart again below
    out, before = [], None
    with torch.inference_mode():
        for start in range(0, tokens, 256):
            chunk = torch.tensor([ids[start : start + 256]])
            logits = loaded.model(chunk, past_key_values=cache, logits_to_keep=1).logits
        cache.end_prefill()
        (sequence,) = cache.sequences
        for _ in range(steps):
            logits = loaded.model(logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache).logits
            pages = tokens // 64  # those of the prompt, held from the first step on
            now = np.stack([mass[:, :pages] for mass in sequence.mass])
            out.append(now if before is None else 2 * now - before)
            before = now
    return np.stack(out)


def ranks(x: np.ndarray) -> np.ndarray:
    return x.argsort(-1).argsort(-1).astype(float)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation over the last dimension."""
    a, b = (r - r.mean(-1, keepdims=True) for r in (ranks(a), ranks(b)))
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.steps < EPOCH or args.tokens < 128:
        parser.error(f"--steps must be at least {EPOCH} and --tokens at least 128")
    step = masses(args.tokens, args.steps)
    true, sampled = step.sum(0), step[EPOCH - 1]
    for mass in step[2 * EPOCH - 1 :: EPOCH]:
        sampled = (sampled + mass) / 2
    correlation = spearman(true, sampled)  # [layers, heads]
    half = true.shape[-1] // 2
    chosen = [np.take_along_axis(true, np.argsort(-x, -1)[..., :half], -1) for x in (true, sampled)]
    best = [x.sum(-1) / true.sum(-1) for x in chosen]
    result = {
        "tokens": args.tokens, "steps": args.steps, "epoch": EPOCH, "pages": true.shape[-1],
        "spearman": {
            "mean": float(correlation.mean()), "p10": float(np.quantile(correlation, 0.1)),
            "by_layer": correlation.mean(1).round(3).tolist(),
        },
        "attention_on_best_half": {"true": float(best[0].mean()), "sampled": float(best[1].mean())},
    }  # fmt: skip
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
