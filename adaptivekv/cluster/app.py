"""Run the server: `build` for `serve run adaptivekv.cluster.app:build`, `serve` for `adaptivekv serve`."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import signal
import socket
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve as ray_serve
from ray.serve import Deployment

from adaptivekv.cluster import arguments
from adaptivekv.cluster.deployments import Ingress, Worker, model_id
from adaptivekv.cluster.workers import judged
from adaptivekv.controller import DEFAULT_QUALITY
from adaptivekv.embedded import DEFAULT, EMBEDDED, converted
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.formats import parse_bytes
from adaptivekv.paths import cache_root
from adaptivekv.plan import Plan
from adaptivekv.trainer.registry import ALIAS, find_champion

NAME = "adaptivekv"
WAITING = 4  # jobs a worker takes at a time: one runs, the others start without a gap
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
ARGS = (
    "model", "replicas", "budget", "quality", "selector", "tracking_uri", "api_key", "device", "dtype", "threads",
    "sessions", "queue", "trajectories", "epsilon", "sample", "shadow", "plans", "compile",
)  # fmt: skip


def build(args: dict[str, Any]) -> ray_serve.Application:
    """The application, from `key=value` words or a config file's `args`; all are optional.

    model, device, dtype: as adaptivekv.model.load. replicas: workers, a model each. budget, quality: of requests that
    name none. selector: champion, rules or a policy's path; tracking_uri: where the champion is looked for.
    api_key: what clients must send. threads: of torch a worker, on the CPU. sessions: conversations a worker keeps.
    queue: requests that may wait before others are refused with 429. trajectories: folder for decision logs.
    epsilon: chance that a decision explores. sample: chance that a request is kept, prompt and all, in
    trajectories/samples. shadow: a policy whose choices are logged and never obeyed. plans: those to choose
    among, a list or separated by ";". compile: decode steps through torch.compile first (GPU only; the first answer
    waits for it).

    Raises AdaptiveKVError for an unknown or impossible argument.
    """
    for key in args:
        if key not in ARGS:
            near = difflib.get_close_matches(key, ARGS, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ARGS)}"
            raise AdaptiveKVError(f"argument {key!r}: unknown; {hint}")
    given = {key: value for key, value in args.items() if value is not None}
    replicas, queue = arguments.number(given, "replicas", 1, 1), arguments.number(given, "queue", 32, 0)
    threads = arguments.number(given, "threads", max(1, (os.cpu_count() or 2) // 2 // replicas), 1)
    options: dict[str, Any] = {
        "quality": arguments.real(given, "quality", DEFAULT_QUALITY, sys.float_info.max, "nats per token, 0 or more")
    }
    for name in ("epsilon", "sample"):
        options[name] = arguments.real(given, name, 0.0, 1.0, "a chance between 0 and 1")
    if options["sample"] and "trajectories" not in given:
        raise AdaptiveKVError("sample: samples are kept beside the trajectories; name a folder with trajectories")
    if "plans" in given:
        names = given["plans"].split(";") if isinstance(given["plans"], str) else given["plans"]
        options["plans"] = tuple(str(Plan.parse(name)) for name in names)
        if options["sample"]:
            judged(options["plans"], "sample")  # what no label can judge would count as a broken promise
    if "budget" in given:
        options["budget"] = parse_bytes(given["budget"])
    device, dtype = str(given.get("device", "auto")), str(given.get("dtype", "auto"))
    gpus = arguments.gpus(device, dtype, replicas)
    options["compiled"] = arguments.yes(given, "compile")
    if options["compiled"] and not gpus:
        raise AdaptiveKVError("compile: decode steps are compiled on a GPU only; leave it out")
    model = arguments.absolute(str(given.get("model", DEFAULT)).strip())
    folder = arguments.absolute(str(given["trajectories"]), True) if "trajectories" in given else None
    worker = cast(Deployment, Worker).options(
        num_replicas=replicas,
        max_ongoing_requests=WAITING,
        max_queued_requests=queue,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=20,
        health_check_period_s=5,
        max_constructor_retry_count=1,
        user_config={
            "selector": arguments.absolute(str(given.get("selector", ALIAS))),
            "tracking_uri": arguments.tracking_of(given),
            "reloaded": str(Path(folder or cache_root()) / f".reload-{uuid.uuid4().hex}.json"),
        }
        | ({"shadow": arguments.absolute(str(given["shadow"]))} if "shadow" in given else {}),
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": gpus,
            # Idle OpenMP threads that spin would take the cores that other workers compute on.
            "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
        },
        **({"request_router_config": {"request_router_class": ROUTER}} if replicas > 1 else {}),
    ).bind(
        model, "cuda" if gpus else "cpu", dtype, threads, arguments.number(given, "sessions", 4, 0),
        folder, **options,
    )  # fmt: skip
    ingress = cast(Deployment, Ingress).options(
        max_ongoing_requests=1000, graceful_shutdown_wait_loop_s=0.2, ray_actor_options={"num_cpus": 0}
    )
    return ingress.bind(worker, model_id(model), str(given["api_key"]) if "api_key" in given else None)


def serve(
    host: str = "127.0.0.1",
    port: int = 8000,
    model: str | None = None,
    replicas: int = 1,
    budget: str | float | int | None = None,
    quality: float = DEFAULT_QUALITY,
    selector: str | None = None,
    api_key: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    **more: Any,
) -> int:
    """Serve until Ctrl-C or SIGTERM, then stop and return 0. `more`: further arguments of `build`.

    Starts a Ray of its own, or joins the one that RAY_ADDRESS names. Raises AdaptiveKVError, one line that names the
    fix, before anything is started where it can: port taken, model or selector not to be had, bad option.
    """
    args: dict[str, Any] = {
        "model": model,
        "replicas": replicas,
        "budget": budget,
        "quality": quality,
        "selector": selector,
    }
    args |= {"api_key": api_key, "device": device, "dtype": dtype} | more
    with contextlib.suppress(KeyboardInterrupt), running(args, host, port, replicas):
        print(f"serving {model_id(model or DEFAULT)} on http://{host}:{port}/v1", flush=True)
        while True:
            time.sleep(3600)
    return 0


@contextlib.contextmanager
def running(args: dict[str, Any], host: str, port: int, cpus: int) -> Iterator[str]:
    """The app of `build`'s arguments while the block runs, and its address. cpus: that a Ray of our own must have.

    SIGINT and SIGTERM are a KeyboardInterrupt meanwhile.
    """
    with _interruptible():
        try:
            check_port(host, port)
            check_model(args.get("model") or DEFAULT)
            app = build(args)
            find_champion(args.get("selector"), args.get("tracking_uri"))
            _start(app, host, port, cpus)
            yield f"http://{host}:{port}"
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C would leave half of it running
                signal.signal(number, signal.SIG_IGN)
            _stop()


def check_port(host: str, port: int) -> None:
    """AdaptiveKVError unless a server could listen there now."""
    if not 0 < port < 65536:
        raise AdaptiveKVError(f"port {port}: between 1 and 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise AdaptiveKVError(f"port {port} on {host}: {reason}; give another with --port or --host") from None


def check_model(model: str) -> None:
    """AdaptiveKVError where it is plain without loading anything that this model cannot be had."""
    if model in EMBEDDED:
        converted(model)
        return
    from transformers import AutoConfig

    from adaptivekv.huggingface import quiet
    from adaptivekv.model import _hint, _local_folder

    folder = _local_folder(model)
    with quiet():
        try:
            AutoConfig.from_pretrained(str(folder or model), local_files_only=bool(folder))
        except Exception as error:  # transformers raises almost anything here
            line = str(error).strip().splitlines()[0][:200]
            raise AdaptiveKVError(f"cannot load model {model!r}: {line}{'' if folder else _hint(model)}") from None


def _start(app: ray_serve.Application, host: str, port: int, cpus: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15, so that anything else on a busy machine would go first
    # A busy machine takes longer than Serve's 5 seconds to import the proxy, which is then killed.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    address = os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {
        "num_cpus": max(os.cpu_count() or 1, cpus), "include_dashboard": False, "object_store_memory": 128 << 20,
    }  # fmt: skip
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        ray.init(address or "local", namespace="serve", **quiet, **({} if address else own))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise AdaptiveKVError(f"cannot start Ray at {address or 'local'}: {last_line(error)}") from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    _take_signals()  # ray.init has put its own in
    try:
        ray_serve.start(http_options={"host": host, "port": port})
        ray_serve.run(app, name=NAME, logging_config={"enable_access_log": False, "log_level": "WARNING"})
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise AdaptiveKVError(_cause(error)) from None
    _check_answers(host, port)


def _stop() -> None:
    """Let the app's workers end what they are at; a Ray of our own ends with us, others' stays as it was."""
    if ray.is_initialized():
        with contextlib.suppress(Exception):
            ray_serve.delete(NAME)
        ray.shutdown()


def _check_answers(host: str, port: int) -> None:
    """A Serve that ran before keeps its own host and port; say so instead of naming ours."""
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(f"http://{here}:{port}/health", timeout=10).close()
    except OSError as error:
        raise AdaptiveKVError(
            f"port {port} on {host}: the app runs, but does not answer there ({last_line(error)}); a Serve that was "
            "already running on this cluster keeps its own address: stop it or give its port"
        ) from None


def _cause(error: Exception) -> str:
    """The worker's own words out of Serve's account of a failed deployment."""
    messages = [str(error)]
    with contextlib.suppress(Exception):
        deployed = ray_serve.status().applications[NAME]
        messages += [deployed.message, *(deployment.message for deployment in deployed.deployments.values())]
    ours = re.findall(r"(?:AdaptiveKVError|BudgetError): (.+)", "\n".join(messages))
    return ours[-1].strip() if ours else f"the app did not start: {last_line(error)}; Ray's logs are under /tmp/ray"


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:300] if lines else type(error).__name__


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _take_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _take_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
