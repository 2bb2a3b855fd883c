"""The study's labels from a GPU host that has neither documents nor Ray: many processes a GPU, prompts written here.

    python -m experiments.away jobs experiments/data/study jobs.jsonl.xz --per 300     # requests it lacks, or --again
    python -m experiments.away run jobs.jsonl.xz lines --seconds 1500 --processes 15   # there
    python -m experiments.away merge experiments/data/study lines                      # here

15 processes share an H100 best under NVIDIA's multi-process service. `run` adds lines to a folder, a file a process; it
may be stopped at any time, and goes on where it was. With `--plan` it replays only some of the candidates, and all of
them where the model gave another answer than the study has (one in 14, on another kind of machine): losses of different
answers do not compare. `merge` gives rows the step times of one idle core; of requests that the study has, rows of the
same plans are replaced, and rows of plans that nobody is asked about any more go.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import lzma
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import multiprocessing

from adaptivekv import model
from adaptivekv.cluster.workers import ReplayWorker, judged
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import trajectories, workload
from adaptivekv.trainer.writing import Prompt
from experiments import cputimes
from experiments.champion import SCENARIOS

MAX_TOKENS, NEW_TOKENS = 4096, 256
TIMES = Path("experiments/results/step-times-cpu.json")
WITNESS = "int4(guard=int8)"  # its losses, token by token, tell one answer from another


def jobs(study: Path, out: Path, per: int, again: bool) -> None:
    """Requests with their prompts, scenario after scenario in turn, so that a run cut short has as many of each."""
    tokenizer = model.load(device="cpu").tokenizer
    queues = [again_of(study, name) if again else lacking(study, name, per) for name in SCENARIOS]
    order = in_turn(queues)
    had = {row["request_id"]: row["label_kl"] for name in SCENARIOS for row in witnesses(study, name) if again}
    with lzma.open(out, "wt") as file:
        for request in order:
            prompt = dataclasses.asdict(workload.write(request, tokenizer))
            line = {"request": dataclasses.asdict(request), "prompt": prompt, "witness": had.get(request.id)}
            file.write(json.dumps(line) + "\n")
    print(f"{len(order)} requests")


def witnesses(study: Path, scenario: str) -> list[dict[str, Any]]:
    table = trajectories.read(study / scenario / "trajectories").select(["request_id", "plan", "label_kl"])
    return [row for row in table.to_pylist() if row["plan"] == WITNESS]


def same(rows: list[dict[str, Any]], had: list[float]) -> bool:
    """Whether the answer of these rows is the one whose losses under WITNESS were `had`.

    Of 28 requests answered on a CPU and on a GPU (experiments/data/again, `int4`) 26 differed by 0.04 to 0.16 in mean
    log10 loss, one by 0.36, and one in length.
    """
    (now,) = (row["label_kl"] for row in rows if row["plan"] == WITNESS)
    return len(now) == len(had) and float(np.abs(np.subtract(*map(logs, (now, had)))).mean()) < 0.2


def logs(losses: list[float]) -> np.ndarray:
    return np.log10(np.array(losses) + 1e-4)


def numbers(study: Path, scenario: str) -> dict[str, set[int]]:
    """By split, which of the requests that a scenario draws the study has."""
    have: dict[str, set[int]] = defaultdict(set)
    for name in set(trajectories.read(study / scenario / "trajectories")["request_id"].to_pylist()):
        _, _, split, number = name.rsplit("-", 3)
        have[split].add(int(number))
    return have


def drawn(scenario: str, split: str, count: int) -> list[workload.Request]:
    return workload.draw(workload.load(scenario), count, 0, MAX_TOKENS, (split,))


def again_of(study: Path, scenario: str) -> list[workload.Request]:
    """What is trained on first; of a run that is cut short, the rest is as much of split certify as of test."""
    have = numbers(study, scenario)
    found = {
        split: [request for i, request in enumerate(drawn(scenario, split, max(have[split]) + 1)) if i in have[split]]
        for split in trajectories.SPLITS if split in have
    }  # fmt: skip
    late = in_turn([found.pop("certify", []), found.pop("test", [])])
    return [request for early in found.values() for request in early] + late


def lacking(study: Path, scenario: str, per: int) -> list[workload.Request]:
    """Of split certify and test in turn, from the study's first on, until it has `per` of each."""
    queues = []
    for split in ("certify", "test"):
        have = numbers(study, scenario)[split]
        every = drawn(scenario, split, min(have) + per + len(have))
        fresh = [request for i, request in enumerate(every) if i > min(have) and i not in have]
        queues.append(fresh[: max(0, per - len(have))])
    return in_turn(queues)


def in_turn(queues: list[list[workload.Request]]) -> list[workload.Request]:
    """One of each, as long as it has any."""
    return [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]


def work(file: Path, device: str, out: Path, some: list[str] | None, had: set[str], at: Any, until: float) -> None:
    torch.set_num_threads(1)
    with lzma.open(file, "rt") as lines:
        queue = [line for line in lines if json.loads(line)["request"]["id"] not in had]
    every = judged(None, "collect")
    few = judged([WITNESS, *some], "run") if some else every
    worker = ReplayWorker(None, every, NEW_TOKENS)
    worker.loaded = model.load(None, device, "float32" if device == "cpu" else "float16")
    with (out / f"{os.getpid()}-{time.time_ns()}.jsonl").open("x") as done:  # never behind a line that was cut
        while time.time() < until:
            with at.get_lock():
                i, at.value = at.value, at.value + 1
            if i >= len(queue):
                return
            job = json.loads(queue[i])
            request, prompt = workload.Request(**job["request"]), Prompt(**job["prompt"])
            worker.plans = few if job["witness"] else every
            try:
                rows = worker.labelled(request, prompt, drawn=True, timed=1)  # link and times are not its own
                if worker.plans != every and not same(rows, job["witness"]):
                    worker.plans = every
                    rows = worker.labelled(request, prompt, drawn=True, timed=1)
            except AdaptiveKVError as error:
                print(f"{request.id}: {error}", flush=True)
                continue
            for row in rows:
                row["label_kl"] = [float(f"{loss:.4g}") for loss in row["label_kl"]]
            done.write(json.dumps({"id": request.id, "rows": rows}) + "\n")
            done.flush()


def run(file: Path, out: Path, some: list[str] | None, seconds: float, processes: int) -> None:
    """some: plans to be replayed. processes: of each GPU, or in all. One that fails says why; the others go on, and in
    the end that is an AdaptiveKVError."""
    judged(some, "away")
    try:
        with lzma.open(file, "rt") as queue:  # all of it, or a file that was cut is found by every process
            known = {"request" in json.loads(line) for line in queue} == {True}
    except (OSError, ValueError, TypeError, EOFError, lzma.LZMAError) as error:
        raise AdaptiveKVError(f"{file} cannot be read ({error}); `jobs` writes it") from None
    if not known:
        raise AdaptiveKVError(f"{file} holds no requests; `jobs` writes them")
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    context, until = multiprocessing.get_context("spawn"), time.time() + seconds
    at, had = context.Value("i", 0), {line["id"] for line in lines(out)}
    failed: list[Any] = []
    workers = [
        context.Process(target=work, args=(file, devices[i % len(devices)], out, some, had, at, until))
        for i in range(processes * len(devices))
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers) and time.time() < until:
        time.sleep(min(10.0, max(0.1, until - time.time())))
        failed = [worker for worker in workers if worker.exitcode]
        print(f"{sum(1 for _ in lines(out))} done" + f", {len(failed)} processes failed" * bool(failed), flush=True)
    for worker in workers:
        worker.kill()  # what it has written stays
    if failed:
        raise AdaptiveKVError(f"{len(failed)} of {len(workers)} processes failed and said why; run it again")


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                print(f"{file.name}: a line was cut and is left out")


def merge(study: Path, out: Path, drop: bool = False) -> None:
    """Parts of the study stay, with new rows in place of old ones; new requests are a part of their own.

    drop: leave out requests that lack a plan; without it they are an AdaptiveKVError, and nothing is written.
    """
    steps, plans = cputimes.fit(TIMES), judged(None, "collect")
    new: dict[str, dict[str, dict[str, Any]]] = {x["id"]: {row["plan"]: row for row in x["rows"]} for x in lines(out)}
    if not new:
        raise AdaptiveKVError(f"{out} has no lines; `run` writes them")
    made: dict[Path, list[list[dict[str, Any]]]] = {}
    lacking = 0
    for scenario in SCENARIOS:
        folder = study / scenario / "trajectories"
        parts = {file: by_request(trajectories.read(file).to_pylist()) for file in sorted(folder.glob("*.parquet"))}
        had = {name for requests in parts.values() for name in requests}
        fresh = {name: rows for name, rows in new.items() if name not in had and named(rows) == scenario}
        if fresh:
            parts[folder / f"part-{len(parts):05d}.parquet"] = fresh
        for file, requests in parts.items():
            whole = [rows | new.get(name, {}) for name, rows in requests.items()]
            made[file] = [[rows[plan] for plan in plans] for rows in whole if rows.keys() >= set(plans)]
            lacking += len(whole) - len(made[file])
    if lacking and not drop:
        raise AdaptiveKVError(f"{lacking} requests lack a plan; collect them, or leave them out with --drop")
    chances = {"plans": list(plans), "allowed": [True] * len(plans), "probs": [1 / len(plans)] * len(plans)}
    for file, requests in made.items():
        if not requests:
            file.unlink(missing_ok=True)
            continue
        rows = [row | chances for request in requests for row in request]
        table = pa.Table.from_pylist(rows, schema=trajectories.SCHEMA)
        trajectories.write(cputimes.retimed(table, steps), file)
        print(f"{file.relative_to(study)}: {len(requests)} requests")


def by_request(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row["request_id"]][row["plan"]] = row
    return found


def named(rows: dict[str, dict[str, Any]]) -> str:
    return str(next(iter(rows.values()))["scenario"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("jobs")
    one.add_argument("study", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--per", type=int, default=300, help="certify and test requests a scenario")
    one.add_argument("--again", action="store_true", help="those that the study has instead, for other plans")
    two = verbs.add_parser("run")
    two.add_argument("jobs", type=Path)
    two.add_argument("out", type=Path)
    two.add_argument("--seconds", type=float, required=True)
    two.add_argument("--plan", action="append", help="replay these only, where the answer is the study's; repeat it")
    two.add_argument("--processes", type=int, default=1, help="of each GPU, or in all")
    three = verbs.add_parser("merge")
    three.add_argument("study", type=Path)
    three.add_argument("out", type=Path)
    three.add_argument("--drop", action="store_true", help="leave out requests that lack a plan")
    args = parser.parse_args()
    try:
        if args.verb == "jobs":
            jobs(args.study, args.out, args.per, args.again)
        elif args.verb == "run":
            run(args.jobs, args.out, args.plan, args.seconds, args.processes)
        else:
            merge(args.study, args.out, args.drop)
    except (AdaptiveKVError, OSError) as error:
        raise SystemExit(f"away: {error}") from None


if __name__ == "__main__":
    main()
