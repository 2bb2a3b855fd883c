"""Our eviction methods against kvpress's: same weights, prompts and kept slots, each prompt answered by both.

    python -m experiments.against_kvpress prompts WORK --keep 0.5           # 240 needle prompts, as token ids
    kvp/bin/python experiments/kvpress_side.py WORK/prompts.json WORK/theirs.jsonl cuda 6
    python -m experiments.against_kvpress ours WORK --device cuda --jobs 10
    python -m experiments.against_kvpress table WORK [WORK2 ...] --out experiments/results/kvpress.json

float32 on both sides. kvpress's presses have their own defaults; ours are told the same window where one is wanted, and
to keep as many slots (it cuts a share of the tokens to a whole number). Ours free the pages; its AdaKV masks and frees
nothing. Intervals: bootstrap over prompts of the paired difference. Both sides go on where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import multiprocessing

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
SIDES = ("ours", "theirs")
MARGIN = 0.05  # of accuracy: what "not below" allows the lower end of the interval


def prompts(work: Path, samples: int, tokens: int, keep: float) -> None:
    loaded = load(device="cpu")
    made = [_task(loaded.tokenizer, i, tokens) for i in range(samples)]
    job: dict[str, Any] = {"model": str(converted("smollm2")), "tokens": tokens, "keep": keep, "new": 24}
    job["stops"] = sorted(stop_tokens(loaded))
    job["ids"] = [document + question for document, question in (task.ids(loaded.tokenizer) for task in made)]
    work.mkdir(parents=True, exist_ok=True)
    (work / "prompts.json").write_text(json.dumps(job))


def _task(tokenizer: Any, number: int, tokens: int) -> Task:
    return make(FAMILIES[number % len(FAMILIES)], tokens, tokenizer, 40_000 + number, haystack())


def ours(work: Path, device: str, jobs: int) -> None:
    count = len(json.loads((work / "prompts.json").read_text())["ids"])
    done = _read(work / "ours.jsonl")
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // jobs))
    context = multiprocessing.get_context("spawn")
    todo, at = [i for i in range(count) if i not in done], context.Value("i", 0)
    workers = [context.Process(target=_answer, args=(work, device, todo, at)) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _answer(work: Path, device: str, todo: list[int], at: Any) -> None:
    job, loaded = json.loads((work / "prompts.json").read_text()), load(device=device, dtype="float32")
    facts = {"device": torch.cuda.get_device_name() if loaded.device.type == "cuda" else "CPU"}
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
    while True:
        with at.get_lock():
            number, at.value = at.value, at.value + 1
        if number >= len(todo):
            return
        ids = job["ids"][todo[number]]
        keep = int(len(ids) * job["keep"]) / len(ids)
        plans = {name: plan.format(keep=keep) for name, plan in PLANS.items()}
        full = reference(loaded, ids, job["new"], torch.float32, stop=True, plans=tuple(plans.values()))
        answers = {name: answer(full, plan) for name, plan in plans.items()}
        full.free()
        with (work / "ours.jsonl").open("a") as file:
            file.write(json.dumps({"prompt": todo[number], "answers": answers} | facts) + "\n")


def _read(path: Path) -> dict[int, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["prompt"]: row for row in map(json.loads, lines)}


def table(works: list[Path], out: Path) -> None:
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"families": FAMILIES, "margin": MARGIN, "kvpress": "0.5.5"}
    for work in works:
        job, sides = json.loads((work / "prompts.json").read_text()), [_read(work / f"{s}.jsonl") for s in SIDES]
        facts |= {key: job[key] for key in ("tokens", "new")}
        for side, lines in zip(SIDES, sides, strict=True):
            facts[side] = {k: sorted({line[k] for line in lines.values()}) for k in ("device", "torch", "transformers")}
        rows += compare(job, *sides)
    facts["command"] = [line.strip() for line in (__doc__ or "").splitlines() if line.startswith("    ")]
    out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    print("| plan | prompts | ours | kvpress | difference (95 %) | slots ours / kvpress |\n" + "| --- " * 6 + "|")
    for row in rows:
        print(
            f"| `{row['plan']}` | {row['n']} | {row['ours']:.3f} | {row['kvpress']:.3f} | {row['difference']:+.3f} "
            f"({row['low']:+.3f} to {row['high']:+.3f}) | {row['slots_ours'] / row['slots_kvpress']:.5f} |"
        )


def compare(job: dict[str, Any], mine: dict[int, Any], theirs: dict[int, Any]) -> list[dict[str, Any]]:
    tokenizer = load(device="cpu").tokenizer
    both = sorted(mine.keys() & theirs.keys())
    tasks = {i: _task(tokenizer, i, job["tokens"]) for i in both}
    rows, rng = [], np.random.default_rng(0)
    for name, plan in PLANS.items():
        score, held = [], []
        for side in (mine, theirs):
            found = [side[i]["answers"][name] for i in both]
            texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in found]
            score.append(np.array([tasks[i].score(text) for i, text in zip(both, texts, strict=True)]))
            held.append(float(np.mean([slots for _, slots in found])))
        gap = score[0] - score[1]
        low, high = np.quantile(gap[rng.integers(len(gap), size=(10_000, len(gap)))].mean(1), [0.025, 0.975])
        rows.append(
            {
                "method": name, "plan": plan.format(keep=job["keep"]), "keep": job["keep"], "n": len(both),
                "ours": float(score[0].mean()), "kvpress": float(score[1].mean()),
                "difference": float(gap.mean()), "low": float(low), "high": float(high),
                "not_below": bool(low >= -MARGIN), "slots_ours": held[0], "slots_kvpress": held[1],
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prompts", "ours", "table"))
    parser.add_argument("work", type=Path, nargs="+")
    parser.add_argument("--samples", type=int, default=240)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/kvpress.json"))
    given = parser.parse_args()
    if given.step == "table":
        table(given.work, given.out)
        return
    for work in given.work:
        if given.step == "prompts":
            prompts(work, given.samples, given.tokens, given.keep)
        else:
            ours(work, given.device, given.jobs)


if __name__ == "__main__":
    main()
