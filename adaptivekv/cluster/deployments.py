"""The two Serve deployments: an Ingress that speaks OpenAI's HTTP, and the Worker that holds a model.

No postponed annotations here: Serve pickles the routes by value, without the globals that only annotations name.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from adaptivekv.cluster.api import Asked, ChatRequest, Fault, Job, Reload, TextRequest, invalid
from adaptivekv.cluster.metrics import CONTENT_TYPE, Metrics
from adaptivekv.cluster.replies import Event, Reply, model_card
from adaptivekv.errors import AdaptiveKVError

SESSION_HEADER = "x-session-id"
LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
log = logging.getLogger("adaptivekv")


@serve.deployment
class Worker:
    """One model in one process; one answer at a time. `threads`: of torch, on the CPU."""

    def __init__(
        self,
        model: str | None,
        device: str = "auto",
        dtype: str = "auto",
        threads: int = 1,
        sessions: int = 4,
        trajectories: str | None = None,
        sample: float = 0.0,
        plans: tuple[str, ...] | None = None,
        **options: Any,
    ):
        import torch

        from adaptivekv.cluster.conversations import make_engine
        from adaptivekv.engine.process import freeze
        from adaptivekv.engine.session import Options
        from adaptivekv.model import load

        torch.set_num_threads(threads)
        loaded = load(model, device, dtype)
        self.engine = make_engine(loaded, Options(**options), sessions, trajectories, sample, plans)
        self.turn, self.file = asyncio.Lock(), ""  # one reload at a time
        freeze()

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """`{"selector": "champion" | "rules" | path, "tracking_uri", "margin", "epsilon", "shadow"}`, as Engine takes
        them; other keys only make it look new. `reloaded`: a file of what `reload` gave this server since, which a
        replica that Serve restarts takes up too."""
        self.file = config.get("reloaded", "")
        reloaded = _read(self.file)
        try:
            await self._take(config | reloaded)
        except AdaptiveKVError as error:  # a selector that is gone, a margin below that of a newer champion
            if not reloaded:
                raise
            log.error(f"{error}; starting as the server did")
            await self._take(config)

    async def reload(self, config: dict[str, Any]) -> dict[str, Any]:
        """The same for a replica that runs: the selector and margin now in force, and why they are not those asked for,
        or None."""
        async with self.turn:
            fault = await self._take(config)
            if fault is None and self.file:
                now = self.engine.settings | {key: config[key] for key in ("margin",) if key in config}
                try:
                    _keep(self.file, now)
                except OSError as error:
                    log.error(f"reload: not kept for replicas that restart ({error})")
                    if _read(self.file) != now:  # better none than an older one
                        with contextlib.suppress(OSError):
                            os.unlink(self.file)
        return {"selector": self.engine.selector.name, "margin": self.engine.margin, "fault": fault}

    async def _take(self, config: dict[str, Any]) -> str | None:
        known = ("selector", "tracking_uri", "margin", "epsilon", "shadow")
        return await self.engine.reconfigure(**{key: config[key] for key in known if key in config})

    async def generate(self, job: Job) -> AsyncIterator[Event]:
        async with contextlib.aclosing(self.engine.generate(job)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    def check_health(self) -> None:
        self.engine.check()

    async def __del__(self) -> None:
        await asyncio.to_thread(self.engine.close)


def _keep(file: str, now: dict[str, Any]) -> None:
    """Write it whole, readable by us alone, under a name that nobody can have taken before."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f"{Path(file).name}.", dir=Path(file).parent)
    try:
        with os.fdopen(handle, "w") as out:
            json.dump(now, out)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(file: str) -> dict[str, Any]:
    try:
        return dict(json.loads(Path(file).read_text()))
    except (OSError, ValueError, TypeError):  # nothing was reloaded
        return {}


def allowed(request: Request) -> None:
    """401 unless the request carries the server's key, where it has one."""
    key = serve.get_replica_context().servable_object.api_key
    given = request.headers.get("authorization", "").encode()
    if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
        raise Fault(401, "wrong or missing API key: send Authorization: Bearer KEY", code="invalid_api_key")


app = FastAPI(title="adaptivekv", docs_url=None, redoc_url=None)
KEY = [Depends(allowed)]


def _error(fault: Fault) -> JSONResponse:
    return JSONResponse({"error": fault.error}, fault.status, fault.headers)


@app.exception_handler(Fault)
async def _on_fault(request: Request, fault: Fault) -> Response:
    return _error(fault)


@app.exception_handler(RequestValidationError)
async def _on_invalid(request: Request, error: RequestValidationError) -> Response:
    return _error(invalid(error.errors()))


@app.exception_handler(HTTPException)
async def _on_http(request: Request, error: HTTPException) -> Response:
    return _error(Fault(error.status_code, f"{request.method} {request.url.path}: {error.detail}".lower()))


@app.exception_handler(Exception)
async def _on_bug(request: Request, error: Exception) -> Response:
    return _error(Fault(500, "internal error; the server's log has it", code="internal_error"))


@serve.deployment
@serve.ingress(app)
class Ingress:
    """Checks requests, hands them to a worker, shapes what comes back."""

    def __init__(self, worker: DeploymentHandle, model: str, api_key: str | None = None):
        self.worker, self.everyone, self.model, self.api_key = worker.options(stream=True), worker, model, api_key
        self.card, self.metrics = model_card(model, int(time.time())), Metrics()

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok", "model": self.model}

    @app.get("/metrics")
    async def counts(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", dependencies=KEY)
    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.card]}

    @app.get("/v1/models/{name:path}", dependencies=KEY)
    async def one_model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self.card

    @app.post("/v1/chat/completions", dependencies=KEY)
    async def chat(self, body: ChatRequest, request: Request) -> Response:
        return await self._answer(body, request, "chatcmpl")

    @app.post("/v1/completions", dependencies=KEY)
    async def text(self, body: TextRequest, request: Request) -> Response:
        return await self._answer(body, request, "cmpl")

    @app.post("/reload", dependencies=KEY)
    async def reload(self, body: Reload) -> dict[str, Any]:
        """Through Serve's broadcast: `serve.run` would start all replicas anew."""
        config = body.model_dump(exclude_none=True)
        answers = await asyncio.to_thread(lambda: self.everyone.broadcast("reload", config).results(timeout_s=60))
        for answer in answers:
            if answer["fault"]:
                raise Fault(409, answer["fault"], "selector", "not_taken_up")
        return {"replicas": len(answers), "selector": answers[0]["selector"], "margin": answers[0]["margin"]}

    def _check_model(self, name: str) -> None:
        if name != self.model:
            message = f"model {name!r} does not exist; this server has {self.model!r}"
            raise Fault(404, message, "model", "model_not_found")

    async def _answer(self, body: Asked, request: Request, prefix: str) -> Response:
        self._check_model(body.model)
        assert isinstance(body, ChatRequest | TextRequest)
        job = body.to_job(f"{prefix}-{uuid.uuid4().hex}", request.headers.get(SESSION_HEADER) or None)
        reply = Reply(job.id, self.model, isinstance(body, ChatRequest), body.usage_wanted)
        events = self.metrics.watch(self._events(job))
        first = await anext(events)
        if body.stream and "error" not in first:
            stream = reply.stream(first, events)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        text, event = "", first
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            while "done" not in event:
                if "error" in event:
                    return JSONResponse({"error": event["error"]}, event["status"])
                text += event["text"]
                event = await anext(events)
        return JSONResponse(reply.whole(text, event["done"]))

    async def _events(self, job: Job) -> AsyncIterator[Event]:
        """A worker's events. A worker that dies before its first one is replaced once; later, an error ends them."""
        for last_try in (False, True):
            begun, answer = False, self.worker.options(session_id=job.session or job.id).generate.remote(job)
            try:
                async for event in answer:
                    begun = True
                    yield event
                return
            except BackPressureError:
                message = "all workers are busy and the queue is full; try again soon"
                raise Fault(429, message, None, "rate_limit_exceeded", "rate_limit_error") from None
            except LOST as error:
                log.error(f"request {job.id}: {type(error).__name__}")
                gone = Fault(503, "the worker died; send the request again", None, "worker_died")
                if begun or last_try:
                    yield {"error": gone.error, "status": gone.status}
                    return
            except (asyncio.CancelledError, GeneratorExit):  # the client has gone
                answer.cancel()
                raise


def model_id(model: str) -> str:
    """What clients call the model: its name, or the folder's without the path."""
    return Path(model).name if Path(model).is_dir() else model
