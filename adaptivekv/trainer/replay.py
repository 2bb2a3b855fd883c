"""Quality labels by teacher-forced replay: what a plan does to the tokens that the full cache would have produced.

A prompt is read once, with the full cache. Every plan then starts from a copy of that cache in a pool of its own, so
that plans cannot disturb each other and bytes, peak and budget are those of a request that runs alone. The loss is the
KL divergence of the plan from the full cache (arXiv 2407.09141 on why, and why flips belong beside it), per generated
token. The first token's logits come from the prompt's own forward, before any plan can act: it counts, with no loss,
unless a question follows the compressed document. In a conversation every answer counts.

Tokens that are known are forced many at a time, up to the next page to be sealed: what a plan does to the cache happens
between pages. Only pages chosen anew for each token (`retrieve`), and a controller that may decide anew, need single
steps.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptivekv.cache import AdaptiveCache
from adaptivekv.controller import CANDIDATES, Controller
from adaptivekv.decisions import Decision
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features.request import text_features
from adaptivekv.kernels.codec import PAGE
from adaptivekv.layers import AdaptiveLayer
from adaptivekv.memory.formats import FORMATS
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, DISK, HOST
from adaptivekv.model import LoadedModel
from adaptivekv.plan import Plan
from adaptivekv.recall import recall

Budget = str | float | int | None
TIMED = 2  # decode steps that are timed after the last token


@dataclass
class Turn:
    """What the full cache answers. tokens [m] are greedy, m = `new` or, where generation stopped, fewer; logits [m, V]
    are float32 log-probabilities, row i over token i."""

    ids: list[int]  # said before it; nothing in the first turn, whose prompt is the reference's
    tokens: list[int]
    logits: Tensor


@dataclass
class Reference:
    """One prompt read with the full cache, and what it goes on with. `free()` gives the cache back.

    `cache` holds the document (all of the first prompt, unless there are `question_ids`).
    """

    loaded: LoadedModel
    cache: AdaptiveCache
    last: Tensor  # logits [V] after the document
    ids: list[int]
    question_ids: list[int]
    new: int  # tokens an answer may have
    turns: list[Turn]
    length: int  # of everything, with answers of `new` tokens
    seconds: float  # reading the document

    @property
    def prompt(self) -> int:
        return len(self.ids) + len(self.question_ids)

    @property
    def tokens(self) -> list[int]:
        return [token for turn in self.turns for token in turn.tokens]

    @property
    def logits(self) -> Tensor:
        return torch.cat([turn.logits for turn in self.turns])

    @property
    def text(self) -> str:
        return self.loaded.tokenizer.decode(self.tokens, skip_special_tokens=True)

    @property
    def full_bytes(self) -> int:
        """A 16-bit cache of everything said and generated."""
        tokens = self.prompt + sum(len(turn.ids) + len(turn.tokens) for turn in self.turns)
        return sum(s.slot_elements for s in self.cache.shapes) * 2 * tokens

    def free(self) -> None:
        self.cache.clear()


@dataclass
class Replay:
    """One plan against its reference. Losses in nats per generated token; bytes physical, after the last step."""

    plan: str  # in force at the end
    kl_mean: float
    kl_worst: float
    flip_rate: float  # share of the tokens whose most likely choice differs
    step_ms: float  # the quicker of two decode steps after the last token; processor time on one thread of a CPU
    apply_s: float  # deciding and applying at the end of the first prompt, likewise
    device_bytes: int
    host_bytes: int
    device_mean: float  # bytes, over the forced tokens: a plan may change on the way
    device_peak: int  # most held at once, the full cache before the plan was applied and staging included
    full_bytes: int  # a 16-bit cache of prompt and tokens
    budget: int | None
    decisions: list[Decision]
    kl: list[float] = field(default_factory=list)  # token by token
    text: str | None = None  # free-running greedy answer, where asked for
    seconds: float = 0.0


@torch.inference_mode()
def reference(
    loaded: LoadedModel,
    ids: list[int],
    new: int,
    kv_dtype: torch.dtype | None = None,
    question_ids: list[int] | None = None,
    stop: bool = False,
    plans: tuple[str, ...] = (),
    follow: Iterable[list[int]] = (),
) -> Reference:
    """Read `ids` with the full cache, watched as any plan would need it, and go on greedily for `new` tokens.

    kv_dtype: of native pages (None: 16 bits). question_ids: what follows the document; plans are then applied before
    it is read (question-agnostic), else to all of `ids`. stop: end with the model's own stop token, as an answer does.
    plans: those to be replayed, where they need more queries than the candidates do. follow: token ids of the turns
    after the first, each with an answer of its own.
    """
    question = question_ids or []
    if not ids or new < 1:
        raise AdaptiveKVError(f"new={new}: at least 1" if ids else "empty prompt: give some text")
    model = loaded.model
    dtype = kv_dtype or (torch.float16 if model.dtype == torch.float32 else model.dtype)
    watch = Controller(Plan(), candidates=tuple(dict.fromkeys(CANDIDATES + plans)), watch=True)
    follow = list(follow)
    total = len(ids) + len(question) + sum(map(len, follow)) + new * (1 + len(follow))
    cache = AdaptiveCache(model, kv_dtype=dtype, controller=watch, max_tokens=total, host=0)
    if cache.positions and total > cache.positions:
        raise AdaptiveKVError(f"{total} tokens, answer included: the model has {cache.positions} positions; shorten it")
    facts = text_features(loaded.tokenizer.decode(ids), ids)  # what is known when the plan is chosen
    cache.expect(len(ids) + len(question), new, facts)
    start = time.perf_counter()
    last = _feed(loaded, cache, ids, 0)
    if watch.recalls:
        recall(model, cache, torch.tensor([ids], device=loaded.device))
    made = Reference(loaded, cache, last, ids, question, new, [], total, time.perf_counter() - start)
    run = _Run(made, Controller(Plan()), None)
    stops = stop_tokens(loaded) if stop else set()
    for said in [[], *follow]:
        if said:
            run.hear(made.turns[-1], said)
        tokens, logits = run.generate(new, stops)
        made.turns.append(Turn(said, tokens, torch.stack(logits)))
    run.free()
    return made


def replay(
    reference: Reference,
    plan: str | Plan | Controller,
    budget: Budget = None,
    text: int = 0,
) -> Replay:
    """Force the reference's tokens through a plan (or whatever a fresh controller chooses).

    budget: as for AdaptiveCache; pages beyond it wait in host memory until the plan is applied, as while a prompt is
    read. text: also answer freely with up to this many tokens (`new` at most). The reference is left as it was.
    """
    controller = plan if isinstance(plan, Controller) else Controller(Plan.parse(plan))
    start, state = time.perf_counter(), controller.rng.bit_generator.state
    with torch.inference_mode():
        run = _Run(reference, controller, budget)
        try:
            out = run.forced()
        finally:
            run.free()
        if text:
            out.text = _answer(reference, controller, state, budget, min(text, reference.new), out.flip_rate)
    out.seconds = time.perf_counter() - start
    return out


@torch.inference_mode()
def answer(reference: Reference, plan: str | Plan) -> tuple[list[int], int]:
    """The plan's own greedy answer, up to `new` tokens, and the slots it held at its start, over all layers and heads.

    Only the answer: no losses, so half the steps of a `replay` with text.
    """
    run = _Run(reference, Controller(Plan.parse(plan)), None)
    try:
        sequence = run.request.sequence
        pages = sum(int(sequence.slots(layer)[0].sum()) for layer in range(len(sequence.ids)))
        held = pages + sequence.tail_len * sum(len(ids) for ids in sequence.ids)
        return run.generate(reference.new, stop_tokens(reference.loaded))[0], held
    finally:
        run.free()


def _answer(reference: Reference, controller: Controller, state: Any, budget: Budget, limit: int, flips: float) -> str:
    """The free-running answer: the reference's own as long as no choice differed, else generated anew."""
    stops, own = stop_tokens(reference.loaded), reference.tokens[:limit]
    whole = len(own) == limit or any(token in stops for token in own)
    if flips == 0 and whole:
        own = own[: next((i for i, token in enumerate(own) if token in stops), len(own))]
        return reference.loaded.tokenizer.decode(own, skip_special_tokens=True)
    controller.rng.bit_generator.state = state  # explores as it did
    run = _Run(reference, controller, budget)
    try:
        tokens, _ = run.generate(limit, stops)
    finally:
        run.free()
    return reference.loaded.tokenizer.decode(tokens, skip_special_tokens=True)


class _Run:
    """One request that goes on from a copy of the reference's cache under a controller of its own."""

    def __init__(self, reference: Reference, controller: Controller, budget: Budget):
        self.reference, self.loaded = reference, reference.loaded
        mine, (theirs,) = reference.cache, reference.cache.requests
        new = reference.new
        self.cache = cache = AdaptiveCache(
            self.loaded.model, budget, controller.quality, kv_dtype=mine.dtype, controller=controller,
            max_tokens=reference.length + TIMED,
        )  # fmt: skip
        cache.expect(reference.prompt, new, {k: v for k, v in theirs.facts.items() if not k.startswith("logit_")})
        cache.admit(1, [mine.seen])
        (self.request,) = cache.requests
        copy_sequence(theirs.sequence, self.request.sequence)
        self.request.facts = dict(theirs.facts)
        cache.seen = mine.seen
        cache.layers = [  # windows and recurrent states that transformers keeps: each run goes on from its own copy
            own if isinstance(own, AdaptiveLayer) else copy.deepcopy(theirs)
            for own, theirs in zip(cache.layers, mine.layers, strict=True)
        ]
        quiet = reference.loaded.device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.thread_time if quiet else time.perf_counter  # a busy machine's clock says nothing of a step
        self.stops = stop_tokens(reference.loaded)
        start = self.clock()
        cache.end_prefill()
        self.apply_s = self.clock() - start
        self.at, self.logits = len(reference.ids), reference.last
        if reference.question_ids:
            self.logits = _feed(self.loaded, cache, reference.question_ids, self.at)
            self.at += len(reference.question_ids)
            self.request.prefilling = False  # the question stays native: the plan was for the document

    def step(self, tokens: list[int]) -> Tensor:
        """One decode step of tokens that are known: logits [n, V] after each."""
        self.cache.reading = False
        rows = _forward(self.loaded, self.cache, tokens, self.at, keep=len(tokens))
        self.cache.reading, self.logits = None, rows[-1]
        self.at += len(tokens)
        return rows

    def hear(self, before: Turn, said: list[int]) -> None:
        """The next turn of the conversation; of the answer before, the last token was not fed yet."""
        last = [token for token in before.tokens[-1:] if token not in self.stops]  # `said` begins with the stop itself
        self.cache.reading = True
        self.logits = _feed(self.loaded, self.cache, last + said, self.at)
        self.cache.reading = None
        self.at += len(last) + len(said)

    def generate(self, new: int, stops: set[int]) -> tuple[list[int], list[Tensor]]:
        """Greedy tokens up to `new`, the stop token included, and the log-probabilities [V] each was chosen by."""
        tokens: list[int] = []
        rows: list[Tensor] = []
        while True:
            rows.append(self.logits.float().log_softmax(-1))
            tokens.append(int(rows[-1].argmax()))
            if len(tokens) == new or tokens[-1] in stops:
                return tokens, rows
            self.step(tokens[-1:])

    def forced(self) -> Replay:
        """The reference's tokens, whatever this run would have chosen."""
        losses: list[float] = []
        flips, held = 0, [(0, 0)]
        for i, turn in enumerate(self.reference.turns):
            if i:
                self.hear(self.reference.turns[i - 1], turn.ids)
            rows = [self.logits[None]]
            for logits in self._forced(turn.tokens[:-1]):
                rows.append(logits)
                held.append((len(logits), self.request.sequence.bytes(DEVICE)))
            ours, full = torch.cat(rows).float().log_softmax(-1), turn.logits
            losses += (full.exp() * (full - ours)).sum(-1).clamp_min(0.0).tolist()
            flips += int((ours.argmax(-1).cpu() != torch.tensor(turn.tokens)).sum())
        pool, sequence = self.cache.pool, self.request.sequence
        assert pool is not None
        made = Replay(
            plan=str(self.request.plan),
            kl_mean=float(np.mean(losses)),
            kl_worst=max(losses),
            flip_rate=flips / len(losses),
            step_ms=0.0,
            apply_s=self.apply_s,
            device_bytes=sequence.bytes(DEVICE),
            host_bytes=sequence.bytes(HOST),
            device_mean=sum(n * b for n, b in held) / max(1, sum(n for n, _ in held)),
            device_peak=pool.arena(DEVICE).peak + pool.staging_bytes,
            full_bytes=self.reference.full_bytes,
            budget=self.request.budget,
            decisions=list(self.request.decisions),
            kl=losses,
        )
        made.step_ms = 1e3 * min(self._timed(turn.tokens[-1]) for _ in range(TIMED))
        return made

    def _forced(self, tokens: list[int]) -> Iterator[Tensor]:
        """Logits [n, V] after each token, as many at a time as pages and plan allow."""
        controller, sequence = self.cache.controller, self.request.sequence
        single = controller.fixed is None or controller.fixed.stage("retrieve") is not None
        while tokens:
            n = 1 if single else PAGE - sequence.tail_len
            yield self.step(tokens[:n])
            tokens = tokens[n:]

    def _timed(self, token: int) -> float:
        start = self.clock()
        float(self.step([token])[0, 0])  # a read, so a GPU is waited for
        return self.clock() - start

    def free(self) -> None:
        self.cache.clear()


def copy_sequence(source: Sequence, target: Sequence) -> None:
    """Fill an empty sequence of another pool with a native one that lies on the device; `source` keeps everything.

    What the target's device has no room for goes to its host, or to its disk: the least worthy columns of each layer,
    as the controller spills them while a prompt is read.
    """
    native, pool = FORMATS["native"], target.pool
    if target.window > source.window:
        have, need = source.window, target.window
        raise AdaptiveKVError(
            f"window={need}: the reference kept {have} queries; name the plan in `plans` when making it"
        )
    columns = max(ids.shape[1] for ids in source.ids)
    keep = min(columns, pool.arena(DEVICE).free_bytes // pool.column_bytes(native))
    for layer, ids in enumerate(source.ids):
        assert (ids >= 0).all() and (source.pool.tier[ids] == DEVICE).all() and (source.pool.code[ids] == 0).all()
        target.ids[layer] = np.full_like(ids, -1)
        worth = np.nan_to_num(source.mass[layer], nan=0.0).max(0, initial=-1.0) + 1e-9 * np.arange(ids.shape[1])
        order = np.argsort(-worth, kind="stable")
        spilt = pool.column_bytes(native) // len(source.ids) * (columns - keep)
        away = HOST if spilt <= pool.away_free(HOST) else DISK
        for part, tier in ((np.sort(order[:keep]), DEVICE), (np.sort(order[keep:]), away)):
            if len(part):
                pages = ids[:, part].reshape(-1)
                raw = source.pool.raw(pages)
                made = pool.adopt(layer, raw, source.pool.count[pages], source.pool.pos[pages], native, tier)
                target.ids[layer][:, part] = made.reshape(len(ids), -1)
        target.mass[layer] = source.mass[layer].copy()
        target.tail_k[layer].copy_(source.tail_k[layer])
        target.tail_v[layer].copy_(source.tail_v[layer])
        if target.ring:
            target.ring[layer].copy_(source.ring[layer][:, source.window - target.window :])  # newest last
    target.length, target.tail_len, target.tail_pos = source.length, source.tail_len, source.tail_pos.copy()
    target.ring_fill = min(target.window, source.ring_fill)
    target.protected, target.scaling = list(source.protected), source.scaling
    target.recalled = source.recalled and [credit.copy() for credit in source.recalled]
    target.touch()


def stop_tokens(loaded: LoadedModel) -> set[int]:
    stop = loaded.model.generation_config.eos_token_id
    return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)


def _feed(loaded: LoadedModel, cache: AdaptiveCache, ids: list[int], at: int) -> Tensor:
    """Forward `ids`, which stand at position `at` and after, in chunks. Returns the last logits [V]."""
    step, out = cache.chunk, None
    for start in range(0, len(ids), step):
        out = _forward(loaded, cache, ids[start : start + step], at + start)
    assert out is not None
    return out[-1]


def _forward(loaded: LoadedModel, cache: AdaptiveCache, ids: list[int], at: int, keep: int = 1) -> Tensor:
    """Forward `ids` at position `at` and after. Returns the last `keep` rows of logits [keep, V]."""
    part = torch.tensor([ids], device=loaded.device)
    where = torch.arange(at, at + len(ids), device=loaded.device)[None]
    out = loaded.model(part, past_key_values=cache, position_ids=where, logits_to_keep=keep).logits[0]
    cache.observe_logits(out[-1:])
    return out
