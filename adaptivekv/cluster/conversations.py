"""One model answering jobs one at a time, on a thread of its own, with a few conversations kept warm. Knows no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
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
from adaptivekv.cluster.monitor import Widened
from adaptivekv.cluster.record import Meter, Recorder
from adaptivekv.cluster.replies import Event, usage
from adaptivekv.cluster.samples import Sample, Samples
from adaptivekv.controller import Controller
from adaptivekv.engine.sampling import Sampler
from adaptivekv.engine.session import Answer, Options, Session
from adaptivekv.errors import AdaptiveKVError, BudgetError, CacheFileError
from adaptivekv.layers import model_mark
from adaptivekv.model import LoadedModel
from adaptivekv.selector import RuleTable, Selector, foreign
from adaptivekv.trainer.registry import ALIAS, find_champion

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
    not used for longest goes first). record: takes trajectory rows, None for none. samples: keeps some requests for
    labelling. plans: those that the controller chooses among, None for its own.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        defaults: Options,
        keep: int = 4,
        record: Recorder | None = None,
        samples: Samples | None = None,
        plans: tuple[str, ...] | None = None,
    ):
        self.loaded, self.defaults, self.keep, self.record = loaded, defaults, keep, record
        self.samples, self.plans, self.mark = samples, plans, model_mark(loaded.model)
        self.shadow: Selector | None = None  # a challenger whose choices are logged
        self.settings: dict[str, Any] = {}  # of reconfigure, those that stay until they are given again
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

    async def reconfigure(
        self, selector: str | None = None, tracking_uri: str | None = None, margin: float | None = None, **more: Any
    ) -> str | None:
        """Put another selector in, for answers that start from now on; what is under way ends as it began.

        selector, tracking_uri, and of `more` epsilon and shadow: stay as they were where None. margin: as a policy's,
        above the selector's own (None: its own). A selector that does not load leaves the old one and is said in a
        line, which is returned; a shadow that does not load is no shadow and one warning.
        """
        given = {"selector": selector, "tracking_uri": tracking_uri} | more
        settings = self.settings | {key: value for key, value in given.items() if value is not None}
        name, where = settings.get("selector"), settings.get("tracking_uri")
        old = self.defaults.selector
        try:
            new: Selector = await asyncio.to_thread(find_champion, name, where)
            if fault := foreign(new, self.mark):
                if old is not None or name not in (None, ALIAS):
                    raise AdaptiveKVError(fault)
                log.warning(f"{fault}; using the rule table instead")
                new = RuleTable()
            if isinstance(new, RuleTable) and name != "rules" and old is not None:
                raise AdaptiveKVError(f"selector {name or 'champion'}: none found that loads")
            if margin is not None and margin < new.margin:
                raise AdaptiveKVError(f"margin {margin:g}: below the {new.margin:g} of {new.name}; give more")
            if margin is not None and margin > 10:
                raise AdaptiveKVError(f"margin {margin:g}: above 10; give less")
        except AdaptiveKVError as error:
            if old is None:
                raise
            log.error(why := f"{error}; keeping selector {old.name}")
            return why
        if margin is not None and margin > new.margin:
            new = Widened(new, margin)
        self.settings = settings
        epsilon = float(settings.get("epsilon", self.defaults.epsilon))
        self.defaults = dataclasses.replace(self.defaults, selector=new, epsilon=epsilon)
        self.shadow = await asyncio.to_thread(_challenger, settings.get("shadow"), where, self.mark)
        return None

    @property
    def selector(self) -> Selector:
        return self.defaults.selector or RuleTable()

    @property
    def margin(self) -> float:
        """In force."""
        return self.selector.margin + getattr(self.selector, "by", 0.0)

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
        except (BudgetError, CacheFileError):  # a grown cache lacks room, or its disk pages are damaged: start anew
            if sent or not known:
                raise
            yield from self._turn(self._begin(job), job, stop)

    def _begin(self, job: Job) -> Conversation:
        asked = {name: getattr(job, name) for name in ("budget", "quality", "plan") if getattr(job, name) is not None}
        # Explores by a seed of its own: a client that always sends the same one would always get the same draw.
        seed = int(hashlib.sha256(f"explore {job.id}".encode()).hexdigest()[:8], 16)
        options = dataclasses.replace(self.defaults, **asked, seed=seed, goes_on=job.session is not None)
        talk = Conversation(self.loaded, options)
        if self.plans and options.plan is None:
            own = talk.cache.controller
            talk.cache.controller = Controller(None, own.selector, own.quality, self.plans, own.epoch, seed=seed)
        return talk

    def _turn(self, talk: Conversation, job: Job, stop: threading.Event) -> Iterator[Event]:
        """One answer. Afterwards the conversation is kept, or freed: nobody named it, or a forward broke off in it."""
        whole = False
        controller, shadow = talk.cache.controller, self.shadow
        sample: Sample | None = None
        shown: list[str] = []
        try:
            talk.stop, talk.meter = stop, Meter(talk.cache) if self.record else None
            controller.selector, controller.shadow = self.selector, shadow
            controller.meet(self.mark)
            controller.epsilon = self.defaults.epsilon
            ids, positions = talk.encode(job.messages, job.raw), talk.cache.positions
            if positions and len(ids) >= positions:
                room = f"prompt of {len(ids)} tokens: the model has {positions} positions; shorten it"
                raise Fault(400, room, "prompt" if job.raw else "messages", "context_length_exceeded")
            held, cut = talk.held(ids), Cut(job.stop)
            sample = self.samples.begin(job, talk, ids) if self.samples else None
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
            if self.samples and sample:
                self.samples.done(sample, talk)
        except (Stopped, Fault):
            whole = True
            if self.samples and sample:
                self.samples.gone(sample)
            raise
        except AdaptiveKVError:
            if self.samples and sample and not shown:
                self.samples.refused(sample)
            raise
        finally:
            if controller.shadow is None and self.shadow is shadow:
                self.shadow = None  # it failed, and that has been said
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


def _challenger(name: str | None, tracking_uri: str | None, mark: str) -> Selector | None:
    try:
        found = find_champion(name, tracking_uri) if name else None
        if found and (fault := foreign(found, mark)):
            raise AdaptiveKVError(fault)
        return found
    except AdaptiveKVError as error:
        log.warning(f"shadow: {error}; nothing is logged of it")
        return None


def make_engine(
    loaded: LoadedModel,
    defaults: Options,
    keep: int = 4,
    trajectories: str | None = None,
    sample: float = 0.0,
    plans: tuple[str, ...] | None = None,
) -> Engine:
    """An engine that records into the folder `trajectories`, where one is given, and samples beside it."""
    record = Recorder(Path(trajectories)) if trajectories else None
    samples = Samples(Path(trajectories) / "samples", sample, loaded.name) if trajectories and sample else None
    return Engine(loaded, defaults, keep, record, samples, plans)
