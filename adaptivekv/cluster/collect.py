"""Collect trajectories: requests of a scenario, each replayed through every plan, on Ray workers, into one MLflow run.

Finished requests are kept as whole Parquet parts in a working folder as they come, so that a collection that was
stopped or killed goes on where it was. The parts become artifacts of the run at the end.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptivekv.cluster.workers import actors, judged, replayed
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.trainer import dataset, scoring, tracking, trajectories, workload

ARTIFACTS = "trajectories"
BATCH, SECONDS = 8, 30.0  # a part is written after so many requests, or so long after its first
HOPELESS = 3  # failures at the start, with no success, that end a collection
STATE = "collect.json"
Progress = Callable[[int, int], None]


def collect(
    scenario: str | Path | workload.Scenario | None = None,
    requests: int = 40,
    plans: Sequence[str] | None = None,
    workers: int = 1,
    seed: int = 0,
    max_tokens: int = 2000,
    new_tokens: int = 256,
    model: str | None = None,
    out: str | Path | None = None,
    tracking_uri: str | None = None,
    experiment: str = tracking.EXPERIMENT,
    resume: bool = True,
    progress: Progress | None = None,
    splits: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Returns run_id, folder, requests, resumed, failed, rows, metrics and seconds.

    scenario: a name in experiments/scenarios (None: mixed) or a YAML file. plans: those to replay (default: the
    controller's candidates); `full` is always among them. max_tokens, new_tokens: most of a prompt, and of an
    answer.
    out: working folder, kept; by default one in the cache folder that is removed once MLflow has everything.
    splits: those to draw requests of (default: all that the scenario has).
    resume: go on with what the folder holds; otherwise start it anew. progress(done, total) after every request.
    A request that cannot be replayed is skipped and listed in `failed`. Ctrl-C is an AdaptiveKVError as well.
    """
    begun = time.monotonic()
    least = {"requests": 1, "workers": 1, "max_tokens": 64, "new_tokens": 2}
    for name, value in zip(least, (requests, workers, max_tokens, new_tokens), strict=True):
        if value < least[name]:
            raise AdaptiveKVError(f"collect: {name} is {value}; at least {least[name]}")
    model = str(Path(model).resolve()) if model and Path(model).is_dir() else model
    mix = scenario if isinstance(scenario, workload.Scenario) else workload.load(scenario or "mixed")
    names = judged(plans, "collect")
    drawn = workload.draw(mix, requests, seed, max_tokens, splits or None)
    settings = {
        "scenario": dataclasses.asdict(mix), "seed": seed, "plans": list(names), "max_tokens": max_tokens,
        "new_tokens": new_tokens, "model": model, "schema": schema.VERSION, "splits": list(splits or ()),
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))  # as it will be read back
    tell = progress or (lambda done, total: None)
    folder = Path(out) if out else default_folder(settings)
    with Store(folder, settings, resume) as store:
        resumed = store.done & {request.id for request in drawn}
        rest = [request for request in drawn if request.id not in resumed]
        failed: dict[str, str] = {}
        try:
            mlflow = tracking.client(tracking_uri)
            with tracking.run(mlflow, "collect", experiment, f"{mix.name}-{requests}") as run_id:
                store.begin(mlflow, run_id)
                tell(len(resumed), requests)
                if rest:
                    with actors(min(workers, len(rest)), model, names, new_tokens) as pool:
                        for done, (request, found) in enumerate(replayed(pool, rest), len(resumed) + 1):
                            if not isinstance(found, str):
                                store.add(found)
                            elif failed.setdefault(request.id, found) and len(failed) == done == HOPELESS:
                                break
                            tell(done, requests)
                store.flush()
                if not store.done:
                    raise AdaptiveKVError(
                        f"collect: no request could be replayed; the first: {next(iter(failed.values()))}"
                    )
                table = trajectories.read(folder)
                metrics = summary(table) | {"failed": float(len(failed)), "resumed": float(len(resumed))}
                metrics["seconds"] = time.monotonic() - begun
                params = {key: json.dumps(value)[:6000] for key, value in settings.items()}
                tracking.log(mlflow, run_id, params | {"requests": requests, "workers": workers}, metrics)
                for part in store.parts():
                    mlflow.log_artifact(run_id, str(part), ARTIFACTS)
                mlflow.log_artifact(run_id, str(draw(table, folder / "plans.png")), "plots")
        except KeyboardInterrupt:
            store.flush()
            kept = len(store.done & {request.id for request in drawn})
            raise AdaptiveKVError(
                f"collect: stopped with {kept} of {requests} requests done; the same command goes on from there"
            ) from None
        finally:
            store.flush()
        store.end(remove=out is None)
    return {
        "run_id": run_id,
        "folder": str(folder) if out else None,
        "requests": len(resumed) + len(rest) - len(failed),
        "resumed": len(resumed),
        "failed": failed,
        "rows": table.num_rows,
        "metrics": metrics,
        "seconds": round(time.monotonic() - begun, 2),
    }


def default_folder(settings: dict[str, Any]) -> Path:
    """One for each collection, so that the same command finds it again."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "adaptivekv" / "collect" / key


class Store:
    """The working folder: whole parts, the settings they were made with, and a lock against a second writer."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool):
        self.folder, self.settings, self.resume = folder, settings, resume
        self.buffer: list[dict[str, Any]] = []
        self.pending = 0  # requests in the buffer
        self.since = 0.0
        self.done: set[str] = set()

    def __enter__(self) -> Store:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "a")
        except OSError as error:
            raise AdaptiveKVError(f"collect: folder {self.folder}: {error.strerror or error}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise AdaptiveKVError(f"collect: folder {self.folder}: another collect is writing there") from None
        try:
            self._open()
        except BaseException:
            self.lock.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.lock.close()

    def _open(self) -> None:
        for stale in self.folder.glob(".*.tmp"):
            stale.unlink()
        self.state: dict[str, Any] = {"settings": self.settings, "run_id": None}
        if not self.resume:
            for file in [*self.parts(), self.folder / STATE]:
                file.unlink(missing_ok=True)
        file = self.folder / STATE
        if file.exists():
            try:
                self.state = json.loads(file.read_text())
                before = self.state["settings"]
            except (OSError, ValueError, KeyError, TypeError):
                raise AdaptiveKVError(f"collect: {file} is not readable; delete the folder or start it anew") from None
            for key, value in self.settings.items():
                if before.get(key) != value:
                    raise AdaptiveKVError(
                        f"collect: folder {self.folder} holds another collection ({key} differs); "
                        "name another folder or start it anew"
                    )
        elif self.parts():
            raise AdaptiveKVError(f"collect: folder {self.folder} holds parts of something else; name another folder")
        if self.parts():
            self.done = set(trajectories.read(self.folder)["request_id"].to_pylist())

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def begin(self, mlflow: Any, run_id: str) -> None:
        """Remembers the run, and closes the one that a killed collection left open."""
        from mlflow.exceptions import MlflowException

        if self.state["run_id"]:
            try:
                if mlflow.get_run(self.state["run_id"]).info.status == "RUNNING":
                    mlflow.set_terminated(self.state["run_id"], "FAILED")
            except MlflowException:
                pass  # of another tracking server
        self.state["run_id"] = run_id
        temporary = self.folder / f".{STATE}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(self.state, indent=1))
        os.replace(temporary, self.folder / STATE)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """The rows of one request, which stay together in one part."""
        self.since = self.since if self.buffer else time.monotonic()
        self.buffer += rows
        self.pending += 1
        if self.pending >= BATCH or time.monotonic() - self.since >= SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.buffer:
            number = max((int(part.stem.split("-")[1]) for part in self.parts()), default=-1) + 1
            trajectories.write(self.buffer, self.folder / f"part-{number:05d}.parquet")
            self.done |= {row["request_id"] for row in self.buffer}
            self.buffer, self.pending = [], 0

    def end(self, remove: bool) -> None:
        """Everything is in MLflow: remove the folder, or leave it with nothing to close."""
        if remove:
            for file in [*self.parts(), *(self.folder / name for name in (STATE, "plans.png", ".lock"))]:
                file.unlink(missing_ok=True)
            self.folder.rmdir()


# -- summary ---------------------------------------------------------------------------------------------------------


def summary(table: Any) -> dict[str, float]:
    """Per plan: mean loss, and bytes relative to the request's full cache; and the counts. Nats, shares, ms."""
    rows = dataset.rows(table)
    per: dict[str, list[tuple[float, ...]]] = {}
    for request in scoring.requests(rows):
        one, full = request.rows, request.rows.device_bytes[request.full]
        for i, plan in enumerate(one.plan):
            per.setdefault(str(plan), []).append(
                (one.loss[i], one.device_bytes[i] / full, one.host_bytes[i] / full, one.step_ms[i])
            )
    metrics = {"requests": float(len(set(rows.request))), "rows": float(len(rows))}
    for plan, found in per.items():
        name = re.sub(r"[^\w.]+", "_", plan).strip("_")
        means = np.mean(found, axis=0)
        metrics |= {
            f"{what}/{name}": float(x) for what, x in zip(("kl", "device", "host", "step_ms"), means, strict=True)
        }
    return metrics


def draw(table: Any, path: Path) -> Path:
    """Loss against bytes of every plan."""
    from adaptivekv.trainer import plots

    return plots.frontier(scoring.requests(dataset.rows(table)), path)
