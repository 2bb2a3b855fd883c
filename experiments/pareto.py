"""Quality against physical bytes: every plan over the task families of RULER, and the front they form.

    python -m experiments.pareto run ruler.jsonl --jobs 14
    python -m experiments.pareto table ruler.jsonl [more.jsonl.xz] --out experiments/results

`run` works through a queue of prompts, those that matter most first, and appends a line a plan: a run that was stopped
goes on where it was, on any machine; lines of several files add up. `--lengths`, `--models`, `--samples` or `--plans`
replace the queue. Prompts, seeds and scores are those of `adaptivekv evaluate --seed 0`. `table`: see `front.py`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import multiprocessing

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.model import LoadedModel, load, resolve_device
from adaptivekv.plan import Plan
from adaptivekv.trainer.evaluate import NEW
from adaptivekv.trainer.replay import reference, replay
from adaptivekv.trainer.tasks import TASKS, haystack, make
from experiments import front

LOW = "k4v2(window=0)"
FRONT = {
    True: (
        "int4", LOW, *(f"snapkv({keep}, pool=32) | {LOW}" for keep in (0.7, 0.55)),
        *(f"kvzip({keep}) | {LOW}" for keep in (0.7, 0.55)), "int2(window=0)", "offload(0.05)", f"{LOW} | offload(0.3)",
    ),
    False: (
        "int4", LOW, *(f"kvzip({keep}) | {LOW}" for keep in (0.8, 0.7, 0.55)), f"keydiff(0.8) | {LOW}",
        "int2(window=0)", "offload(0.05)", f"{LOW} | offload(0.3)",
    ),
}  # fmt: skip
"""What may reach the targets, with the question known (True) and not."""
EVICTIONS = (
    "streaming", "snapkv", "h2o", "knorm", "keydiff", "tova", "expected", "morph", "nacl", "hashevict", "infinipot",
    "duo", "kvzip", "kvzap", "qhitter",
)  # fmt: skip
METHODS = (
    *(f"{name}(0.5)" for name in EVICTIONS), "snapkv(0.5, heads=adaptive)", "snapkv(0.5, layers=pyramid)",
    "snapkv(0.5, layers=measured)", "snapkv(0.5, pool=32)", "int8", "fp8", "int4", "kivi4", "kvquant", "k4v2", "kivi42",
    "int2", "kivi2", "palu(0.5)", "hotcold(0.25)", "tuned(0.5)",
    "tuned(0.12, high=int8, low=int4)", "tuned(0.5, high=k4v2, low=int2, window=0, sinks=0)",
    "offload(0.05)", "offload(0.1, by=layers)", "retrieve(0.1)", "flexgen", "qhitter_int4",
    "rocketkv", "infinigen", "shadowkv", "tailorkv",
)  # fmt: skip
"""Every method of the table once."""
SMALL, BASE, LONG, BOTH = "smollm2", "gemma3-270m", (4096, 7168), (True, False)


class Part(NamedTuple):
    """A part of the queue: every length, kind of question and task, sample by sample."""

    model: str
    lengths: tuple[int, ...]
    samples: range
    plans: tuple[str, ...] = ()  # () stands for `FRONT`, by what is known
    aware: tuple[bool, ...] = BOTH


QUEUE: tuple[Part, ...] = (
    Part(SMALL, LONG, range(0, 2)),
    Part(SMALL, LONG[:1], range(0, 1), METHODS),
    Part(SMALL, LONG, range(2, 4)),
    Part(BASE, LONG, range(0, 2)),
    Part(SMALL, LONG[1:], range(0, 1), METHODS),
    Part(BASE, LONG[:1], range(0, 1), METHODS),
    Part(SMALL, (2048,), range(0, 2)),
    Part(SMALL, LONG, range(4, 8)),
    Part(SMALL, (2048,), range(0, 1), METHODS),
    Part(BASE, LONG[1:], range(0, 1), METHODS),
    Part(BASE, (2048,), range(0, 2)),
    Part(BASE, (2048,), range(0, 1), METHODS),
    Part(SMALL, LONG, range(8, 16)),
    Part(SMALL, (*LONG, 2048), range(1, 4), METHODS),
    Part(BASE, LONG, range(2, 8)),
)


class Cell(NamedTuple):
    """A prompt and the plans it is answered under."""

    model: str
    aware: bool
    length: int
    task: str
    sample: int
    plans: tuple[str, ...]

    def key(self, plan: str) -> str:
        return json.dumps([*self[:5], plan])


def cells(parts: tuple[Part, ...]) -> Iterator[Cell]:
    for part in parts:
        for sample in part.samples:
            for length in part.lengths:
                for task in TASKS:
                    for aware in part.aware:
                        plans = ("full", *(part.plans or FRONT[aware]))
                        yield Cell(part.model, aware, length, task, sample, plans)


def work(queue: list[Cell], device: str, out: Path, at: Any, until: float) -> None:
    """Take cells until none or no time is left."""
    torch.set_num_threads(1)
    models: dict[str, LoadedModel] = {}
    while time.time() < until:
        with at.get_lock():
            number, at.value = at.value, at.value + 1
        if number >= len(queue):
            return
        cell = queue[number]
        if cell.model not in models:
            models[cell.model] = load(cell.model, device)
        try:
            measure(cell, models[cell.model], out, until)
        except Exception as error:
            _append(out, dict(zip(Cell._fields[:5], cell[:5], strict=True)) | _failed(error))
            if models[cell.model].device.type == "cuda":
                torch.cuda.synchronize()  # a context that is lost raises here, and another process takes over


def measure(cell: Cell, loaded: LoadedModel, out: Path, until: float) -> None:
    task = make(cell.task, cell.length, loaded.tokenizer, cell.sample, haystack())
    document, question = task.ids(loaded.tokenizer)
    if cell.aware:
        document, question = document + question, []
    full = reference(loaded, document, NEW, None, question, stop=True, plans=cell.plans)
    where = torch.cuda.get_device_name() if loaded.device.type == "cuda" else f"{platform.machine()} CPU"
    facts = {"device": where, "torch": torch.__version__, "transformers": transformers.__version__}
    for plan in cell.plans:
        if time.time() > until:
            break
        row = dict(zip(Cell._fields[:5], cell[:5], strict=True)) | {"plan": plan}
        try:
            run = replay(full, plan, text=NEW)
        except Exception as error:
            _append(out, row | _failed(error))
            if loaded.device.type == "cuda":
                torch.cuda.synchronize()
            continue
        row |= {"score": task.score(run.text or ""), "answer": run.text}
        row |= {"kl": run.kl_mean, "kl_worst": run.kl_worst, "flip_rate": run.flip_rate, "tokens": len(run.kl)}
        row |= {"device_bytes": run.device_bytes, "host_bytes": run.host_bytes, "full_bytes": run.full_bytes}
        _append(out, row | {"seconds": round(run.seconds, 2), "step_ms": round(run.step_ms, 2)} | facts)
    full.free()


def _failed(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {error}"[:300]}


def read(path: Path) -> list[dict[str, Any]]:
    try:
        text = lzma.decompress(path.read_bytes()).decode() if path.suffix == ".xz" else path.read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            measured = () if "error" in row else ("plan", "kl", "score", "device_bytes", "host_bytes", "full_bytes")
            lacking = [name for name in (*Cell._fields[:5], *measured) if name not in row]
            if lacking:
                raise ValueError(f"line {number} lacks {', '.join(lacking)}")
        return rows
    except (OSError, ValueError, lzma.LZMAError) as error:
        raise SystemExit(f"pareto: {path} is not a file of rows as `run` writes it ({error})") from None


def earlier(path: Path) -> dict[str, Any]:
    """A ruler.json that `table` wrote."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if all(row.keys() >= {"model", "aware", "length", "plan", "prompts", "relative"} for row in content["rows"]):
            return content
        reason = "a row lacks a field"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise SystemExit(f"pareto: {path} is not a ruler.json that `table` wrote ({reason})")


def _append(out: Path, row: dict[str, Any]) -> None:
    with out.open("a") as file:  # one write of one short line: whole, whoever else appends
        file.write(json.dumps(row) + "\n")


def run(args: argparse.Namespace) -> None:
    resolve_device(args.device)  # one that is not there fails here, not in every process
    parts, until = QUEUE, time.time() + args.seconds
    if args.lengths or args.models or args.samples or args.plans:
        lengths, samples = tuple(args.lengths or LONG), range(args.samples or 1)
        plans = (*FRONT[True], *FRONT[False], *METHODS) if args.plans == ["all"] else tuple(args.plans or ())
        parts = tuple(Part(model, lengths, samples, plans) for model in args.models or [SMALL])
    for plan in {plan for cell in cells(parts) for plan in cell.plans}:
        Plan.parse(plan)  # what is misspelt fails here
    done = set()
    if args.out.exists():
        for row in read(args.out):
            done.add(json.dumps([*(row[key] for key in Cell._fields[:5]), row.get("plan")]))
    queue = []
    for cell in cells(parts):
        left = tuple(plan for plan in cell.plans if cell.key(plan) not in done)
        if left:
            queue.append(cell._replace(plans=left))
            done |= {cell.key(plan) for plan in left}
    print(f"{sum(len(cell.plans) for cell in queue)} runs in {len(queue)} prompts", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    at = context.Value("i", 0)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if args.device in ("auto", "cuda") else []
    slots: list[Any] = [None] * args.jobs * max(1, len(gpus))
    while time.time() < until:
        left = at.value < len(queue)
        for n, worker in enumerate(slots):
            if left and not (worker and worker.is_alive()):  # also in place of one that failed
                device = gpus[n % len(gpus)] if gpus else args.device
                slots[n] = context.Process(target=work, args=(queue, device, args.out, at, until))
                slots[n].start()
        if not left and not any(worker and worker.is_alive() for worker in slots):
            return
        time.sleep(1)
    for worker in filter(None, slots):
        worker.join(max(0.0, until + args.grace - time.time()))
        worker.kill()  # what it has written stays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    made = steps.add_parser("run")
    made.add_argument("out", type=Path)
    made.add_argument("--models", nargs="+")
    made.add_argument("--lengths", type=int, nargs="+")
    made.add_argument("--samples", type=int)
    made.add_argument("--plans", nargs="+", help="`all`: every plan of the queue")
    made.add_argument("--device", default="auto")
    made.add_argument("--jobs", type=int, default=1, help="processes of each GPU, or in all")
    made.add_argument("--seconds", type=float, default=1e9, help="start nothing after so long")
    made.add_argument("--grace", type=float, default=8, help="seconds after that in which what was begun may end")
    shown = steps.add_parser("table")
    shown.add_argument("rows", type=Path, nargs="+")
    shown.add_argument("--out", type=Path, required=True)
    shown.add_argument("--keep", type=Path, help="an earlier ruler.json: its rows stay where these have fewer prompts")
    args = parser.parse_args()
    if args.step == "run":
        run(args)
    else:
        front.table([row for path in args.rows for row in read(path)], args.out, args.keep and earlier(args.keep))


if __name__ == "__main__":
    try:
        main()
    except AdaptiveKVError as error:
        raise SystemExit(f"pareto: {error}") from None
