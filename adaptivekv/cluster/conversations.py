"""One model answering jobs one at a time, on a thread of its own, with a few conversations kept warm. Knows no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from adaptivekv.cluster.api import Fault, Job
from adaptivekv.cluster.record import Meter, Recorder
from adaptivekv.cluster.replies import Event, usage
from adaptivekv.engine.sampling import Sampler
from adaptivekv.engine.session import Answer, Options, Session
from adaptivekv.errors import AdaptiveKVError, BudgetError
from adaptivekv.model import LoadedModel
from adaptivekv.selector import RuleTable, Selector
from adaptivekv.trainer.registry import find_champion

log = logging.getLogger("adaptivekv")


class Stopped(Exception):
    """The client has gone; raised between two forwards, so that the cache stays whole."""


class Conversation(Session):
    """A Session that can be stopped between forwards and tells a meter what each of them took."""

    stop: threading.Event | None = None
    meter: Meter | None = None

    def _forward(self, ids: list[int]) -> torch.Tensor:
        if self.stop is not None and self.stop.is_set():
            raise Stopped
        if self.meter is None:
            return super()._forward(ids)
        with self.meter.step(self.cache, len(ids)):
            return super()._forward(ids)

    def held(self, ids: list[int]) -> int:
        """How many of a prompt's first tokens the cache already holds; the last one is always computed."""
        same = next((i for i, (a, b) in enumerate(zip(ids, self.tokens, strict=False)) if a != b), None)
        return min(len(ids) - 1, len(self.tokens) if same is None else same)

    def suits(self, job: Job) -> bool:
        """Whether the job asks for nothing that this conversation's cache was not made with."""
        o = self.options
        return all(
            asked is None or asked == own
            for asked, own in ((job.plan, o.plan), (job.budget, o.budget), (job.quality, o.quality))
        )


class Cut:
    """Text up to the first stop string; what could be the beginning of one is held back."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.waiting, self.hit = stops, "", False

    def push(self, piece: str) -> str:
        """What may be shown now."""
        text = self.waiting + piece
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self.waiting = True, ""
            return text[: min(found)]
        hold = max((n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.waiting = text[len(text) - hold :]
        return text[: len(text) - hold]


class Engine:
    """Runs jobs in the order they came. Everything that touches the model happens on its one thread.

    defaults: budget, quality and the rest where a job names none. keep: how many conversations stay warm (the one
    not used for longest goes first). record: takes trajectory rows, None for none.
    """

    def __init__(self, loaded: LoadedModel, defaults: Options, keep: int = 4, record: Recorder | None = None):
        self.loaded, self.defaults, self.keep, self.record = loaded, defaults, keep, record
        self.warm: OrderedDict[str, Conversation] = OrderedDict()
        self.dead: str | None = None  # why no further job can succeed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")

    # -- from the event loop -----------------------------------------------------------------------------------------

    async def generate(self, job: Job) -> AsyncIterator[Event]:
        """Events as replies.Event describes them. Closing or cancelling this stops the job at its next forward."""
        loop, events, stop = asyncio.get_running_loop(), asyncio.Queue[Event | None](), threading.Event()

        def emit(event: Event | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
                loop.call_soon_threadsafe(events.put_nowait, event)

        waiting = self._thread.submit(self._run, job, emit, stop)
        try:
            while (event := await events.get()) is not None:
                yield event
        finally:
            stop.set()
            waiting.cancel()

    async def reconfigure(self, selector: str | None = None, tracking_uri: str | None = None) -> None:
        """Put another selector in, for jobs that start from now on. One that does not load leaves the old one."""
        old = self.defaults.selector
        try:
            new = await asyncio.to_thread(find_champion, selector, tracking_uri)
        except AdaptiveKVError as error:
            if old is None:
                raise
            log.error(f"{error}; keeping selector {old.name}")
            return
        if isinstance(new, RuleTable) and selector != "rules" and old is not None:
            log.error(f"selector {selector or 'champion'}: none found that loads; keeping selector {old.name}")
            return
        self.defaults = dataclasses.replace(self.defaults, selector=new)

    @property
    def selector(self) -> Selector | None:
        return self.defaults.selector

    def check(self) -> None:
        """Raises RuntimeError when the engine can no longer answer."""
        if self.dead:
            raise RuntimeError(self.dead)

    def close(self) -> None:
        """Let the job under way end, drop the others, write what was recorded."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._forget()
        if self.record:
            self.record.close()

    # -- on the thread -----------------------------------------------------------------------------------------------

    def _run(self, job: Job, emit: Callable[[Event | None], None], stop: threading.Event) -> None:
        try:
            for event in self._events(job, stop):
                emit(event)
        except Stopped:
            pass
        except Exception as error:
            fault = self._fault(error)
            emit({"error": fault.error, "status": fault.status})
        finally:
            emit(None)

    def _fault(self, error: Exception) -> Fault:
        if isinstance(error, Fault):
            return error
        if isinstance(error, BudgetError):
            return Fault(400, str(error), "budget", "budget_too_small")
        if isinstance(error, AdaptiveKVError):
            return Fault(400, str(error))
        if isinstance(error, TemplateError):
            return Fault(400, f"messages: the model's chat template refuses them ({error})", "messages")
        if isinstance(error, torch.OutOfMemoryError):
            self._forget()
            return Fault(503, "the worker ran out of device memory; ask for a smaller budget", code="out_of_memory")
        if isinstance(error, torch.AcceleratorError):
            self.dead = f"the accelerator failed: {str(error).splitlines()[0]}"
        log.exception("a request failed")
        return Fault(500, "internal error; the server's log has it", code="internal_error")

    def _events(self, job: Job, stop: threading.Event) -> Iterator[Event]:
        talk = self.warm.pop(job.session or "", None)
        if talk is not None and not talk.suits(job):
            talk.close()
            talk = None
        known, sent = talk is not None, False
        try:
            for event in self._turn(talk or self._begin(job), job, stop):
                sent = True
                yield event
        except BudgetError:  # what a new cache could hold, a grown one sometimes cannot
            if sent or not known:
                raise
            yield from self._turn(self._begin(job), job, stop)

    def _begin(self, job: Job) -> Conversation:
        asked = {name: getattr(job, name) for name in ("budget", "quality", "plan") if getattr(job, name) is not None}
        return Conversation(self.loaded, dataclasses.replace(self.defaults, **asked, seed=job.seed % 2**32))

    def _turn(self, talk: Conversation, job: Job, stop: threading.Event) -> Iterator[Event]:
        """One answer. Afterwards the conversation is kept, or freed: nobody named it, or a forward broke off in it."""
        whole = False
        try:
            talk.stop, talk.meter = stop, Meter(talk.cache) if self.record else None
            talk.cache.controller.selector = self.selector or RuleTable()
            ids, positions = talk.encode(job.messages, job.raw), talk.cache.positions
            if positions and len(ids) >= positions:
                room = f"prompt of {len(ids)} tokens: the model has {positions} positions; shorten it"
                raise Fault(400, room, "prompt" if job.raw else "messages", "context_length_exceeded")
            held, cut = talk.held(ids), Cut(job.stop)
            shown = []
            sampler = Sampler(job.temperature, job.top_p, job.seed)
            for piece in talk.answer(job.messages, job.max_tokens, sampler, job.raw):
                shown.append(cut.push(piece))
                if shown[-1]:
                    yield {"text": shown[-1]}
                if cut.hit:
                    new = len(talk.tokens) - len(ids) + 1  # the last one was chosen but not forwarded
                    talk.last = Answer("".join(shown), len(ids), new, "stop", report=talk.cache.report())
                    break
            if cut.waiting:
                yield {"text": cut.waiting}
            yield {"done": self._done(talk, held)}
            whole = True
            if self.record and talk.meter:
                self.record.add(job, talk, talk.meter)
        except (Stopped, Fault):
            whole = True
            raise
        finally:
            if whole and job.session:
                self.warm[job.session] = talk
                while len(self.warm) > self.keep:
                    self.warm.popitem(last=False)[1].close()
            else:
                talk.close()

    def _done(self, talk: Conversation, held: int) -> dict[str, Any]:
        kv = {key: value for key, value in talk.result().items() if key != "text"}
        counts = usage(kv["prompt_tokens"], kv["new_tokens"], held)
        return {"finish_reason": kv["finish_reason"], "usage": counts, "kv": kv}

    def _forget(self) -> None:
        while self.warm:
            self.warm.popitem()[1].close()


def make_engine(loaded: LoadedModel, defaults: Options, keep: int = 4, trajectories: str | None = None) -> Engine:
    """An engine that records into the folder `trajectories`, where one is given."""
    return Engine(loaded, defaults, keep, Recorder(Path(trajectories)) if trajectories else None)
