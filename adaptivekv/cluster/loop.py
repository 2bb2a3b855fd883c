"""The closed loop on a small scale, with nothing left out: serve, log, label, train, evaluate, gate, promote, swap.

Every stage is the verb of the same name, run on a server that keeps answering. A candidate that is not better ends the
loop with the old champion in place, which is what it is for.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from adaptivekv.cluster import samples as sampling
from adaptivekv.cluster import traffic
from adaptivekv.cluster.app import running
from adaptivekv.cluster.arguments import absolute
from adaptivekv.cluster.deployments import model_id
from adaptivekv.cluster.labels import label, labellers
from adaptivekv.cluster.monitor import Monitor
from adaptivekv.cluster.reload import reload
from adaptivekv.cluster.traffic import Load, Question, Reply
from adaptivekv.embedded import DEFAULT, EMBEDDED, converted
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import tracking, trajectories, workload
from adaptivekv.trainer.gate import DOCUMENTS
from adaptivekv.trainer.ope import ope
from adaptivekv.trainer.registry import promote
from adaptivekv.trainer.train import train

Say = Callable[[str], None]


def loop(
    scenario: str | Path | workload.Scenario = "serving",
    requests: int = 30,
    held_out: int = 10,
    plans: Sequence[str] | None = None,
    epsilon: float = 0.2,
    seed: int = 0,
    max_tokens: int = 600,
    new_tokens: int = 16,
    workers: int = 1,
    sources: Sequence[str | Path] = (),
    out: str | Path | None = None,
    model: str | None = None,
    tracking_uri: str | None = None,
    experiment: str = tracking.EXPERIMENT,
    say: Say | None = None,
) -> dict[str, Any]:
    """Runs the whole circle once on a server of its own and returns what each stage found.

    requests: served with exploration and labelled, to train on (a fifth of them to select). held_out: requests to gate
    on, and as many that are asked before and after. plans: to choose among and to label (default: the controller's).
    sources: further labelled trajectories for training. out: folder for everything, else a temporary one.

    Keys: champion (at the start), before and after (the same questions at the same SLOs: what they cost as served, and
    in one replay, each under the plan it got then), serve, label, train, ope, promote, swap, monitor; `saved` (shares
    of the replayed bytes, time and cost, each with its 95 % interval), `improved` (cost, for certain or not) and `why`.
    A stage that refuses says so under `refused`. AdaptiveKVError: the loop could not be run.
    """
    for name, value, least in (("requests", requests, 10), ("held_out", held_out, DOCUMENTS), ("workers", workers, 1)):
        if value < least:
            raise AdaptiveKVError(f"loop: {name} is {value}; at least {least}")
    begun, tell = time.monotonic(), say or (lambda line: None)
    if out is None:
        with tempfile.TemporaryDirectory(prefix="adaptivekv-loop-") as made:
            given = (scenario, requests, held_out, plans, epsilon, seed, max_tokens, new_tokens, workers, sources)
            return loop(*given, made, model, tracking_uri, experiment, say) | {"folder": None}
    mix = scenario if isinstance(scenario, workload.Scenario) else workload.load(scenario)
    counts = {"train": requests - requests // 5, "select": requests // 5, "gate": held_out, "test": held_out}
    asked = traffic.questions(mix, counts, _tokenizer(model), seed, max_tokens, new_tokens)
    folder = Path(out).resolve()
    args = {
        "model": model, "tracking_uri": tracking_uri, "trajectories": str(folder / "trajectories"), "sample": 1.0,
        "plans": list(plans) if plans else None, "sessions": 0, "threads": 1,
    }  # fmt: skip
    tell("starting the server")
    with (
        running(args, "127.0.0.1", _free_port(), 1 + workers) as url,
        labellers(workers, model and absolute(model), plans, new_tokens) as pool,
    ):
        circle = _Circle(url, model_id(model or DEFAULT), folder, pool, tracking_uri, tell)
        result = circle.run(asked, epsilon, seed, sources, experiment)
    return result | {"folder": str(folder), "seconds": round(time.monotonic() - begun, 1)}


class _Circle:
    """The stages, against a server at `url` whose trajectories lie in `folder`."""

    def __init__(
        self,
        url: str,
        model: str,
        folder: Path,
        pool: list[Any],
        tracking_uri: str | None,
        tell: Say,
    ):
        self.url, self.model, self.folder, self.pool = url, model, folder, pool
        self.tracking_uri, self.tell = tracking_uri, tell

    def run(
        self,
        asked: dict[str, list[Question]],
        epsilon: float,
        seed: int,
        sources: Sequence[str | Path],
        experiment: str,
    ) -> dict[str, Any]:
        result: dict[str, Any] = {
            "champion": reload(self.url, epsilon=0.0)["selector"],
            "improved": False,
            "saved": None,
        }
        self.tell("measuring the champion")
        before = self.served(asked["test"])
        result["before"] = self.cost(before)

        self.tell("serving with exploration")
        reload(self.url, epsilon=epsilon)
        replies = self.served([*asked["train"], *asked["select"], *asked["gate"]])
        reload(self.url, epsilon=0.0)
        rows = traffic.logged(self.folder / "trajectories", [str(r.id) for r in replies])
        mlflow = tracking.client(self.tracking_uri)
        with tracking.run(mlflow, "serve", experiment, f"serve-{len(replies)}") as run_id:
            part = trajectories.write(rows, self.folder / "logged" / "part-00000.parquet")
            mlflow.log_artifact(run_id, str(part), "trajectories")
            tracking.log(mlflow, run_id, {"epsilon": epsilon, "policy": result["champion"]}, traffic.cost(rows))
        result["serve"] = {"run_id": run_id, "requests": len(replies), "rows": len(rows)}

        self.tell("labelling what was served")
        result["label"] = self.labelled(replies, "labels")
        self.tell("training on Ray")
        labels = self.folder / "labels"
        made = self.trained([str(labels), *map(str, sources)], seed, experiment)
        result["train"] = {
            "run_id": made["run_id"],
            "rows": made["rows"],
            "select_cost": made["metrics"]["select_cost"],
        }
        self.tell("evaluating the candidate on the log")
        try:
            result["ope"] = ope([run_id], made["run_id"], tracking_uri=self.tracking_uri, seed=seed)
        except AdaptiveKVError as error:  # few requests say little; the gate decides
            result["ope"] = {"refused": str(error)}
        self.tell("gate and promotion")
        try:
            result["promote"] = promote(made["run_id"], tracking_uri=self.tracking_uri, gate=[labels])
        except AdaptiveKVError as error:
            return result | {"promote": {"refused": str(error)}, "why": f"kept {result['champion']}: {error}"}

        self.tell("swapping under load and measuring the new champion")
        result["swap"], after = self.swapped(asked["test"])
        self.labelled(after, "after")
        old, new = traffic.judged(self.samples(before), self.samples(after), self.folder / "after")
        result["before"] |= old.means()
        result["after"] = self.cost(after) | new.means()
        result["monitor"] = self.watched(after, result["swap"]["margin"])
        saved = traffic.saved(old, new)
        broken = f"{result['before']['violations']:.3f} to {result['after']['violations']:.3f}"
        shares = ", ".join(f"{name} {-share['saved']:+.1%}" for name, share in saved.items())
        why = f"{result['champion']} to {result['swap']['selector']}: {shares}, violations {broken}"
        return result | {"improved": saved["cost"]["saved"] > 0, "saved": saved, "why": why}

    # -- stages --------------------------------------------------------------------------------------------------------

    def served(self, asked: Sequence[Question]) -> list[Reply]:
        replies = traffic.ask_all(self.url, self.model, asked)
        if lost := [reply for reply in replies if reply.id is None]:
            raise AdaptiveKVError(f"loop: {len(lost)} of {len(replies)} requests failed; the first: {lost[0].fault}")
        return replies

    def samples(self, replies: Sequence[Reply]) -> list[sampling.Sample]:
        """Those of these requests, once they are all written; an answer is sent a moment before."""
        ids, end = {reply.id for reply in replies}, time.monotonic() + 30
        while True:
            found = [s for s in sampling.read(self.folder / "trajectories" / "samples") if s.id in ids]
            if (len(found) == len(ids) and all(s.state == "done" for s in found)) or time.monotonic() > end:
                return found
            time.sleep(0.1)

    def labelled(self, replies: Sequence[Reply], name: str) -> dict[str, Any]:
        """Every one of them: what cannot be judged cannot be compared."""

        def progress(done: int, total: int) -> None:
            if done == total or done % 10 == 0:
                self.tell(f"labelled {done} of {total}")

        only = {s.id for s in self.samples(replies)}
        samples = self.folder / "trajectories" / "samples"
        found = label(samples, self.folder / name, progress=progress, only=only, pool=self.pool)
        if found["failed"]:
            raise AdaptiveKVError(f"loop: a request cannot be replayed: {next(iter(found['failed'].values()))}")
        return found

    def cost(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """What these requests cost as they were served."""
        return traffic.cost(traffic.logged(self.folder / "trajectories", [str(reply.id) for reply in replies]))

    def trained(self, sources: list[str], seed: int, experiment: str) -> dict[str, Any]:
        where = tracking.uri(self.tracking_uri)
        job = ray.remote(train).options(num_cpus=0)  # the labellers have nothing to do meanwhile
        try:
            made: dict[str, Any] = ray.get(job.remote(sources, seed, str(self.folder / "policy"), where, experiment))
        except ray.exceptions.RayTaskError as error:
            raise AdaptiveKVError(f"loop: {error.cause}") from None
        except ray.exceptions.RayError as error:
            raise AdaptiveKVError(f"loop: Ray failed ({str(error).strip().splitlines()[0]})") from None
        return made

    def swapped(self, asked: Sequence[Question]) -> tuple[dict[str, Any], list[Reply]]:
        """Swap while clients ask, and the new policy's answers to all the questions. None may fail."""
        with Load(self.url, self.model, asked) as load:
            load.wait(traffic.CLIENTS)
            begun = time.monotonic()
            new = reload(self.url, selector="champion", tracking_uri=self.tracking_uri)
            seconds = time.monotonic() - begun
            after = load.wait(len(asked), new["selector"])
        replies = load.replies
        if len(after) < len(asked):
            faults = [reply.fault for reply in replies if reply.fault] or ["the server is too slow"]
            raise AdaptiveKVError(f"loop: {new['selector']} answered {len(after)} of {len(asked)}: {faults[0]}")
        return {
            "selector": new["selector"],
            "margin": new["margin"],
            "seconds": round(seconds, 3),
            "requests": len(replies),
            "dropped": sum(reply.id is None for reply in replies),
            "by_new": sum(reply.selector == new["selector"] for reply in replies),
        }, after

    def watched(self, replies: Sequence[Reply], margin: float) -> dict[str, Any]:
        """The monitor on the new champion's first labels; what it advises is applied."""
        monitor, advice = Monitor(margin), None
        for _, promised, violated in sampling.outcomes(self.samples(replies), self.folder / "after"):
            advice = monitor.feed(violated, promised) or advice
        if advice:
            reload(self.url, **advice)
        return monitor.state() | {"advice": advice}


def _tokenizer(model: str | None) -> Any:
    """Of a model that need not be loaded here."""
    from transformers import AutoTokenizer

    from adaptivekv.huggingface import quiet

    name = model or DEFAULT
    with quiet():
        return AutoTokenizer.from_pretrained(str(converted(name) if name in EMBEDDED else name))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
