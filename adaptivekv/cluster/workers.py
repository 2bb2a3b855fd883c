"""Ray workers of a collection: each loads the model once and replays whole requests through every plan."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from adaptivekv import model
from adaptivekv.candidates import CANDIDATES
from adaptivekv.controller import Controller
from adaptivekv.decisions import Request as CacheRequest
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.features.attention import prompt_features
from adaptivekv.features.request import text_features
from adaptivekv.layers import layer_shapes
from adaptivekv.memory.shapes import DEVICE
from adaptivekv.model import LoadedModel
from adaptivekv.plan import Plan
from adaptivekv.policies.eviction.surrogate import find
from adaptivekv.trainer import replay as replaying
from adaptivekv.trainer import tasks, workload
from adaptivekv.trainer.workload import Prompt, Request

QUIET = ("RAY_USAGE_STATS_ENABLED=0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0")
Job = TypeVar("Job")  # what a kind of worker replays
VERSION = "replay"  # of the policy that "chose": none did, every plan was run


def judged(plans: Sequence[str] | None, verb: str) -> tuple[str, ...]:
    """The plans to be labelled, `full` first; default: the controller's candidates.

    One that offloads to disk is refused: what it would cost is not known. No disk is drawn, and where the system keeps
    the file in memory a step does not wait for one.
    """
    parsed = [Plan.parse(plan) for plan in plans or CANDIDATES]
    for plan in parsed:
        if (offload := plan.stage("offload")) and offload.disk:
            raise AdaptiveKVError(f"{verb}: plan {plan} offloads to disk, whose time no label knows; leave it out")
    return tuple(dict.fromkeys(["full", *map(str, parsed)]))


class Worker:
    """One model, one torch thread. Each kind of it has a `replay`, which does one job at a time and may be repeated."""

    def __init__(self, model: str | None, plans: tuple[str, ...], new_tokens: int):
        torch.set_num_threads(1)
        self.name, self.plans, self.new_tokens = model, plans, new_tokens
        self.loaded: Any = None

    def load(self) -> str | None:
        """Loads the model; what is wrong with it, or None. Not in the constructor: Ray would bury the reason."""
        try:
            self.loaded = self.loaded or precise(self.name)
            if self.plans == judged(None, "") and not find(self.loaded.model, layer_shapes(self.loaded.model)):
                self.plans = tuple(plan for plan in self.plans if "surrogate" not in Plan.parse(plan).needs)
        except AdaptiveKVError as error:
            return str(error)
        return None


def precise(name: str | None) -> LoadedModel:
    """The model as labels want it: float32 on a CPU; float16 on a GPU, whose rounding loses 1e-5 nats where that of
    bfloat16 loses 1e-3, or bfloat16 if the model overflows float16."""
    if not torch.cuda.is_available():
        return model.load(name)
    loaded = model.load(name, dtype="float16")
    with torch.inference_mode():
        ids = loaded.tokenizer("One line of text.", return_tensors="pt").input_ids.to(loaded.device)
        whole = bool(loaded.model(ids).logits.isfinite().all())
    return loaded if whole else model.load(name, dtype="bfloat16")


class ReplayWorker(Worker):
    """Its jobs are drawn requests, which it writes."""

    def replay(self, request: Request) -> list[dict[str, Any]] | str:
        """A trajectory row per plan, or why there is none. The prompt is read once, with the full cache."""
        if fault := self.load():
            return fault
        try:
            prompt = workload.write(request, self.loaded.tokenizer)
            return self.labelled(request, prompt, drawn=self.loaded.device.type == "cpu")
        except AdaptiveKVError as error:
            return str(error)

    def labelled(
        self, request: Request, prompt: Prompt, drawn: bool, timed: int = replaying.TIMED
    ) -> list[dict[str, Any]]:
        """The rows of a request whose prompt is written. drawn: over the link it was drawn with, not a real one.
        timed: decode steps of each plan that are timed."""
        new = min(request.new, self.new_tokens)
        reference = replaying.reference(self.loaded, prompt.ids, new, stop=True, plans=self.plans, follow=prompt.follow)
        try:
            state = schema.row(features(request, prompt, reference, drawn)).tolist()
            link = request.link if drawn else None
            free = new if request.split == "test" and prompt.answers else 0  # an own answer doubles the work
            full = replaying.replay(reference, "full", text=free, timed=timed)
            limits = room(request, full.device_bytes)
            rest = [plan for plan in self.plans if plan != "full"]
            runs = {"full": full} | replaying.replays(reference, rest, free, int(limits["host_room"]), timed)
            tokens = len(reference.tokens)
            return [
                row(request, state, self.plans, plan, run, tokens, link) | limits
                | {"label_right": None if run.text is None else tasks.score(prompt.answers, run.text)}
                | {"model": reference.cache.mark}
                for plan, run in runs.items()
            ]  # fmt: skip
        finally:
            reference.free()


def features(request: Request, prompt: Prompt, reference: replaying.Reference, drawn: bool) -> dict[str, float]:
    """What a controller would see at the end of this prompt, under the budget and company the request was drawn with.

    The reference holds everything on the device, so the system features are computed: a controller's own bytes end at
    its budget, and what is above has been spilled to the host.
    """
    (watched,) = reference.cache.requests
    limited: CacheRequest = dataclasses.replace(
        watched,
        budget=int(request.budget * watched.full) if request.budget < 1 else None,
        facts=watched.facts | text_features(prompt.text, prompt.ids) | prompt_features(watched.sequence),
    )
    values = Controller(quality=request.quality).features(limited)
    values.pop("log2_question", None)  # where a question begins within one message is not known when serving
    values["session"] = float(request.turns > 1)
    if drawn:
        values["log10_link"] = math.log10(request.link)
    used = watched.sequence.bytes(DEVICE) + watched.sequence.pool.staging_bytes
    longest = max(reference.cache.positions, watched.prompt + watched.new)
    limit = limited.budget or watched.full * longest // (watched.prompt + watched.new)
    values["pressure"] = min(1.0, used / limit + request.pressure)
    values["host_room"] = request.host
    return values


def room(request: Request, full: int) -> dict[str, float]:
    """Bytes that the drawn budget, company and host leave for a request whose full cache takes `full`."""
    return {"device_room": request.budget * (1 - request.pressure) * full, "host_room": request.host * full}


def row(
    request: Request,
    state: list[float],
    plans: tuple[str, ...],
    plan: str,
    run: replaying.Replay,
    tokens: int,
    link: float | None = None,
) -> dict[str, Any]:
    """One row of trajectories.SCHEMA. Full information: every plan was run, so all are allowed, each with probability
    1 / n, and the label was taken for certain. Which ones the drawn limits would have allowed, `room` says.

    Byte-seconds are of the decode steps. link_bytes: what was moved out once, and read back a step by what is read.
    link: GB/s to the host, None: the steps went over a real one. A CPU has none, so reading over it is added to a step.
    """
    seen = Plan.parse(plan).features()
    step_ms = run.step_ms + (run.host_bytes * seen["read_share"] / link / 1e6 if link else 0.0)
    seconds = step_ms / 1e3 * tokens
    return {
        "request_id": request.id,
        "session_id": request.id,
        "step": 0,
        "moment": "prefill",
        "schema_version": schema.VERSION,
        "features": state,
        "plans": list(plans),
        "allowed": [True] * len(plans),
        "probs": [1 / len(plans)] * len(plans),
        "plan": plan,
        "plan_features": schema.row(seen, schema.PLAN_NAMES).tolist(),
        "pressure_override": False,
        "policy_version": VERSION,
        "seed": request.seed,
        "scenario": request.scenario,
        "kind": request.kind,
        "split": request.split,
        "document": request.document,
        "device_byte_s": run.device_bytes * seconds,
        "host_byte_s": run.host_bytes * seconds,
        "link_bytes": run.host_bytes * (1 + seen["read_share"] * tokens),
        "switch_ms": 1e3 * run.apply_s,
        "step_ms": step_ms,
        "device_bytes": run.device_bytes,
        "host_bytes": run.host_bytes,
        "tokens": tokens,
        "label_loss": run.kl_mean,
        "label_worst": run.kl_worst,
        "label_flip": run.flip_rate,
        "label_kl": run.kl,
        "label_kind": "replay",
        "label_prob": 1.0,
    }


# -- Ray -------------------------------------------------------------------------------------------------------------


@contextmanager
def actors(
    count: int,
    model: str | None,
    plans: tuple[str, ...],
    new_tokens: int,
    kind: type[Worker] = ReplayWorker,
    verb: str = "collect",
) -> Iterator[list[Any]]:
    """`count` workers that load their model, on the Ray of RAY_ADDRESS, of this process, or a local one."""
    try:
        import ray
    except ImportError:
        raise AdaptiveKVError("Ray is not installed; pip install 'adaptivekv[learn]'") from None

    started = not ray.is_initialized()
    if started:
        connect(ray, count)
    pool: list[Any] = []
    try:
        free = ray.available_resources()
        if free.get("CPU", 0) < count:
            have = int(ray.cluster_resources().get("CPU", 0))
            raise AdaptiveKVError(
                f"{verb}: workers is {count}, and Ray has {int(free.get('CPU', 0))} of {have} CPUs free"
            )
        gpus = min(1.0, int(100 * free.get("GPU", 0) / count) / 100)
        environment = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}}
        actor = ray.remote(kind).options(
            num_cpus=1, num_gpus=gpus, max_restarts=2, runtime_env=None if started else environment
        )
        pool = [actor.remote(model, plans, new_tokens) for _ in range(count)]
        for worker in pool:
            worker.load.remote()
        yield pool
    except ray.exceptions.RayError as error:
        line = str(error).strip().splitlines()[0]
        raise AdaptiveKVError(f"{verb}: Ray failed ({line}); run the same command again") from None
    finally:
        for worker in pool:
            ray.kill(worker)
        if started:
            ray.shutdown()


def connect(ray: Any, cpus: int) -> None:
    """Quiet, without dashboard or reports.

    Workers inherit the environment: threads that spin while they wait would stop each other, and Ray's niceness of 15
    would let anything else on a busy machine stop them all.
    """
    for name in ("OMP_WAIT_POLICY=PASSIVE", "RAY_worker_niceness=0", *QUIET):
        os.environ.setdefault(*name.split("="))
    address = os.environ.get("RAY_ADDRESS")
    local = {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False, "object_store_memory": 100 << 20}
    try:
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **({} if address else local)
        )
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AdaptiveKVError(f"collect: Ray at {address or 'this machine'} does not start ({reason})") from None


def replayed(pool: list[Any], requests: Sequence[Job]) -> Iterator[tuple[Job, list[dict[str, Any]] | str]]:
    """Every request with its rows, or with what went wrong, as they finish. A worker that stays dead is dropped."""
    import ray

    for fault in ray.get([worker.load.remote() for worker in pool]):
        if fault:
            raise AdaptiveKVError(fault)
    waiting, idle = list(requests), list(pool)
    running: dict[Any, tuple[Any, Job]] = {}
    while waiting or running:
        while waiting and idle:
            worker, request = idle.pop(), waiting.pop(0)
            running[worker.replay.remote(request)] = worker, request
        if not running:
            raise AdaptiveKVError("every Ray worker has died (out of memory?); use fewer workers")
        (ready,), _ = ray.wait(list(running), num_returns=1)
        worker, request = running.pop(ready)
        try:
            found = ray.get(ready)
            idle.append(worker)
        except ray.exceptions.RayActorError as error:
            if isinstance(error, ray.exceptions.ActorUnavailableError):  # it is being restarted
                idle.append(worker)
            waiting.append(request)
            continue
        except ray.exceptions.RayTaskError as error:
            found = f"{type(error.cause).__name__}: {error.cause}".splitlines()[0]
            idle.append(worker)
        yield request, found
