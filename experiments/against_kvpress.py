"""Our eviction methods against kvpress's: same weights, prompts and kept slots, each prompt answered by both.

    python -m experiments.against_kvpress prompts WORK            # 200 needle prompts, as token ids
    kvp/bin/python experiments/kvpress_side.py WORK/prompts.json WORK/theirs.jsonl
    python -m experiments.against_kvpress ours WORK
    python -m experiments.against_kvpress table WORK --out experiments/results/kvpress.json

float32 on both sides. kvpress's presses have their own defaults; ours are told the same window where one is wanted.
Ours free the pages; its AdaKV masks and frees nothing. Intervals: bootstrap over prompts of the paired difference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from adaptivekv.console import bar
from adaptivekv.embedded import converted
from adaptivekv.model import load
from adaptivekv.trainer.replay import answer, reference, stop_tokens
from adaptivekv.trainer.tasks import Task, haystack, make

PLANS = {
    "full": "full",
    "snapkv": "snapkv({keep}, window=64)",
    "expected": "expected({keep}, window=64)",
    "streaming": "streaming({keep})",
    "knorm": "knorm({keep})",
    "tova": "tova({keep})",
    "keydiff": "keydiff({keep})",
    "pyramid": "snapkv({keep}, window=64, layers=pyramid)",
    "adasnap": "snapkv({keep}, window=64, heads=adaptive)",
}
FAMILIES = ("niah_single", "niah_multikey")
MARGIN = 0.05  # of accuracy: what "not below" allows the lower end of the interval


def prompts(work: Path, samples: int, tokens: int, keep: float) -> None:
    loaded = load()
    made = [_task(loaded.tokenizer, i, tokens) for i in range(samples)]
    job: dict[str, Any] = {"model": str(converted("smollm2")), "tokens": tokens, "keep": keep, "new": 24}
    job["stops"] = sorted(stop_tokens(loaded))
    job["ids"] = [document + question for document, question in (task.ids(loaded.tokenizer) for task in made)]
    work.mkdir(parents=True, exist_ok=True)
    (work / "prompts.json").write_text(json.dumps(job))


def _task(tokenizer: Any, number: int, tokens: int) -> Task:
    return make(FAMILIES[number % len(FAMILIES)], tokens, tokenizer, 40_000 + number, haystack())


def ours(work: Path) -> None:
    job, loaded = json.loads((work / "prompts.json").read_text()), load(dtype="float32")
    out = work / "ours.jsonl"
    plans = {name: plan.format(keep=job["keep"]) for name, plan in PLANS.items()}
    done = len(out.read_text().splitlines()) if out.exists() else 0
    with bar(False) as progress:
        task = progress.add_task("ours", total=len(job["ids"]), completed=done)
        for i, ids in enumerate(job["ids"][done:], done):
            full = reference(loaded, ids, job["new"], torch.float32, stop=True, plans=tuple(plans.values()))
            answers = {name: answer(full, plan) for name, plan in plans.items()}
            full.free()
            with out.open("a") as file:
                file.write(json.dumps({"prompt": i, "answers": answers}) + "\n")
            progress.update(task, completed=i + 1)


def table(work: Path, out: Path) -> None:
    job, tokenizer = json.loads((work / "prompts.json").read_text()), load().tokenizer
    sides = [[json.loads(line) for line in (work / f"{s}.jsonl").read_text().splitlines()] for s in ("ours", "theirs")]
    n = min(map(len, sides))
    tasks = [_task(tokenizer, i, job["tokens"]) for i in range(n)]
    rows, rng = [], np.random.default_rng(0)
    for name in PLANS:
        score, held = [], []
        for side in sides:
            found = [side[i]["answers"][name] for i in range(n)]
            texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in found]
            score.append(np.array([task.score(text) for task, text in zip(tasks, texts, strict=True)]))
            held.append(float(np.mean([slots for _, slots in found])))
        gap = score[0] - score[1]
        low, high = np.quantile(gap[rng.integers(n, size=(10_000, n))].mean(1), [0.025, 0.975])
        rows.append(
            {
                "method": name, "plan": PLANS[name].format(keep=job["keep"]), "n": n,
                "ours": float(score[0].mean()), "kvpress": float(score[1].mean()),
                "difference": float(gap.mean()), "low": float(low), "high": float(high),
                "not_below": bool(low >= -MARGIN), "slots_ours": held[0], "slots_kvpress": held[1],
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]))
    facts = {key: job[key] for key in ("tokens", "keep", "new")} | {"families": FAMILIES, "margin": MARGIN}
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__, "kvpress": "0.5.5"}
    facts["command"] = [line.strip() for line in (__doc__ or "").splitlines() if line.startswith("    ")]
    out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prompts", "ours", "table"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/kvpress.json"))
    given = parser.parse_args()
    if given.step == "prompts":
        prompts(given.work, given.samples, given.tokens, given.keep)
    elif given.step == "ours":
        ours(given.work)
    else:
        table(given.work, given.out)


if __name__ == "__main__":
    main()
