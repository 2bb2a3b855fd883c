"""What the probe at the end of a prompt costs, and what it is worth to the selector.

    python -m experiments.probe --trajectories build/champion/trajectories --out experiments/results/probe.json

Cost: processor time of the probe beside that of reading the prompt, one thread, part of the book. Worth: selectors are
trained on the collection of `experiments/champion.py` with and without the probe's columns, a seed each, and scored on
its select split as `train` does: charged cost (of the full cache) and violations, means over the SLOs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptivekv import AdaptiveCache
from adaptivekv.features import schema
from adaptivekv.features.probe import probe_features
from adaptivekv.model import load
from adaptivekv.selector import TreeSelector
from adaptivekv.trainer import dataset, export, scoring
from adaptivekv.trainer.tasks import haystack
from adaptivekv.trainer.train import learned

WITHOUT = {"everything": (), "no probe": schema.PROBE, "no text": schema.REQUEST[7:11]}


@torch.inference_mode()
def cost(tokens: int) -> dict[str, float]:
    loaded = load(None, "cpu", "float32")
    ids = torch.tensor([loaded.tokenizer(haystack()[50_000 : 50_000 + 6 * tokens], verbose=False).input_ids[:tokens]])
    cache = AdaptiveCache(loaded.model, kv_dtype=torch.float16)
    start = time.thread_time()
    for piece, at in zip(ids.split(256, 1), range(0, tokens, 256), strict=True):
        where = torch.arange(at, at + piece.shape[1])[None]
        loaded.model(piece, position_ids=where, past_key_values=cache, logits_to_keep=1)
    read = time.thread_time() - start
    start = time.thread_time()
    probe_features(cache.sequences[0])
    return {"tokens": tokens, "read_s": read, "probe_s": time.thread_time() - start}


def worth(folder: Path, seeds: int) -> list[dict[str, Any]]:
    rows, out = dataset.rows(dataset.load([folder])), []
    for name, columns in WITHOUT.items():
        state = rows.state.copy()
        state[:, [schema.NAMES.index(column) for column in columns]] = np.nan
        seen = dataclasses.replace(rows, state=state)
        train, select = (scoring.requests(seen.of(split)) for split in ("train", "select"))
        static, found = scoring.best_static(train), []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as at:
                policy = TreeSelector.load(export.save(at, learned(seen.of("train"), seed), name))
            found.append(scoring.compare(policy, static, select))
        keys = ("charged/selector", "violation/selector", "charged/static", "charged/oracle")
        mean = {key: float(np.mean([metrics[key] for metrics in found])) for key in keys}
        out.append({"columns": name, "seeds": seeds, "train": len(train), "select": len(select)} | mean)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=Path, default=Path("build/champion/trajectories"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python -m experiments.probe --trajectories {args.trajectories} --seeds {args.seeds} --out {args.out}"
    result = {
        "command": command,
        "cost": [cost(n) for n in (1200, 4000)],
        "worth": worth(args.trajectories, args.seeds),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
