"""Made-up traffic for a running server: prompts of a scenario, clients that ask, and what the answers had cost."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptivekv.cluster.record import document_of, split_of
from adaptivekv.cluster.samples import Sample, labels_of
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import scoring, trajectories, workload
from adaptivekv.trainer.workload import Scenario

CLIENTS = 2
TRIES = 40  # prompts written for each that falls to its split
Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    text: str
    new: int  # most tokens of the answer
    quality: float  # SLO, nats per token


@dataclass(frozen=True)
class Reply:
    question: Question
    id: str | None  # None: not answered
    selector: str  # that decided when the prompt had ended
    fault: str = ""


def questions(
    scenario: Scenario, counts: dict[str, int], tokenizer: Any, seed: int, max_tokens: int, new_tokens: int
) -> dict[str, list[Question]]:
    """So many for each split, which the hash of a text decides when it is served; a server would wait for as many.

    Their documents are of the same split as well.
    """
    found: dict[str, list[Question]] = {}
    for split, count in counts.items():
        texts: dict[str, Question] = {}
        for drawn in workload.draw(scenario, TRIES * count, seed, max_tokens, {split}):
            if len(texts) == count:
                break
            text = workload.write(drawn, tokenizer).text
            if split_of(document_of(text)) == split:
                texts[text] = Question(text, min(drawn.new, new_tokens), drawn.quality)
        if len(texts) < count:
            raise AdaptiveKVError(f"loop: scenario {scenario.name} has {len(texts)} texts for split {split!r}")
        found[split] = list(texts.values())
    return found


def ask(url: str, model: str, question: Question) -> Reply:
    """One answer, as any client of the OpenAI API would get it."""
    body = {
        "model": model, "messages": [{"role": "user", "content": question.text}], "max_tokens": question.new,
        "temperature": 0, "quality": question.quality,
    }  # fmt: skip
    asked = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=300) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        return Reply(question, None, "", f"{error.code}: {error.read(300).decode(errors='replace')}")
    except (OSError, ValueError) as error:
        return Reply(question, None, "", str(error))
    decided = [d["selector"] for d in found["kv"]["decisions"] if d["moment"] == "prefill"]
    return Reply(question, found["id"], decided[-1] if decided else "")


def ask_all(url: str, model: str, asked: Sequence[Question]) -> list[Reply]:
    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(lambda question: ask(url, model, question), asked))


class Load:
    """Clients that keep asking while the block runs, and for as long after it as their last answers take."""

    def __init__(self, url: str, model: str, asked: Sequence[Question]):
        self.url, self.model, self.asked = url, model, asked
        self.replies: list[Reply] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(CLIENTS)]

    def _run(self, at: int) -> None:
        while not self._stop.is_set():
            self.replies.append(ask(self.url, self.model, self.asked[at % len(self.asked)]))
            at += CLIENTS

    def wait(self, questions: int, selector: str | None = None, seconds: float = 300) -> list[Reply]:
        """Until so many of the questions have been answered, by this selector if one is named, or `seconds` passed.
        Returns the first answer to each."""
        end = time.monotonic() + seconds
        while True:
            found: dict[Question, Reply] = {}
            for reply in list(self.replies):
                if reply.id and selector in (None, reply.selector):
                    found.setdefault(reply.question, reply)
            if len(found) >= questions or time.monotonic() > end:
                return list(found.values())
            time.sleep(0.05)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


# -- what it cost ----------------------------------------------------------------------------------------------------


def logged(folder: Path, ids: Sequence[str], seconds: float = 60) -> list[Row]:
    """The rows of these requests, once the server has written them all."""
    wanted, end = set(ids), time.monotonic() + seconds
    while True:
        table = trajectories.read(folder) if any(folder.glob("*.parquet")) else None
        rows = [row for row in table.to_pylist() if row["request_id"] in wanted] if table else []
        if {row["request_id"] for row in rows} == wanted:
            return rows
        if time.monotonic() > end:
            raise AdaptiveKVError(f"loop: {folder} lacks rows of {len(wanted)} requests after {seconds:g} s")
        time.sleep(0.2)


def cost(rows: Sequence[Row]) -> dict[str, Any]:
    """Means of served requests: device MiB, ms of a decode step, (device + 0.1 host) MiB x ms as `ope` counts it."""
    mib, took, price = [], [], []
    for one in _by_request(rows):
        tokens = np.array([row["tokens"] for row in one], np.float64)
        device, host, ms = (np.array([row[n] for row in one]) for n in ("device_bytes", "host_bytes", "step_ms"))
        if tokens.sum():
            mib.append(np.average(device / 2**20, weights=tokens))
            took.append(np.average(ms, weights=tokens))
            price.append(np.average((device + scoring.KAPPA * host) / 2**20 * ms, weights=tokens))
    means = {"served_mib": mib, "served_step_ms": took, "served_mib_ms": price}
    return {"requests": len(mib)} | {name: float(np.mean(values)) for name, values in means.items()}


@dataclass(frozen=True)
class Judged:
    """n requests by replay, each under the plan that a policy gave it."""

    documents: np.ndarray  # [n] names
    plans: list[str]
    mib: np.ndarray  # [n] device + 0.1 host
    ms: np.ndarray  # [n] a decode step, on processor time where there is no GPU
    loss: np.ndarray  # [n] nats per token
    broken: np.ndarray  # [n] whether it broke its SLO

    def means(self) -> dict[str, Any]:
        named = {"mib": self.mib, "step_ms": self.ms, "mib_ms": self.mib * self.ms, "loss": self.loss}
        found = {name: float(values.mean()) for name, values in (named | {"violations": self.broken}).items()}
        return found | {"plans": dict(Counter(self.plans))}


def judged(before: Sequence[Sample], after: Sequence[Sample], labels: Path) -> tuple[Judged, Judged]:
    """The later requests under the plans that their documents got before and that they got, out of the same labels:
    nothing but the plan differs."""
    then = {sample.document: sample.plan for sample in before}
    rows = [{r["plan"]: r for r in trajectories.read(labels_of(labels, sample)).to_pylist()} for sample in after]

    def under(plans: list[str]) -> Judged:
        got = [replayed[plan] for replayed, plan in zip(rows, plans, strict=True)]
        device, host, ms, loss = (
            np.array([row[name] for row in got], np.float64)
            for name in ("device_bytes", "host_bytes", "step_ms", "label_loss")
        )
        documents, mib = np.array([row["document"] for row in got]), (device + scoring.KAPPA * host) / 2**20
        return Judged(documents, plans, mib, ms, loss, loss > np.array([sample.quality for sample in after]))

    return under([then[sample.document] for sample in after]), under([sample.plan for sample in after])


def saved(old: Judged, new: Judged) -> dict[str, dict[str, float]]:
    """Shares of bytes, of the time of a step and of the cost (bytes x time), paired by request, with 95 % intervals."""
    pairs = {"bytes": (new.mib, old.mib), "time": (new.ms, old.ms), "cost": (new.mib * new.ms, old.mib * old.ms)}
    found = {n: scoring.paired(a[:, None], b[:, None], old.documents) for n, (a, b) in pairs.items()}
    return {name: {key: each[key] for key in ("saved", "saved_low", "saved_high")} for name, each in found.items()}


def _by_request(rows: Sequence[Row]) -> Iterator[list[Row]]:
    for id in dict.fromkeys(row["request_id"] for row in rows):
        yield [row for row in rows if row["request_id"] == id]
