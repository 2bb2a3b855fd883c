"""A prompt that was read once with the full cache, and requests that go on from copies of it.

Every one of them has a pool of its own, so that plans cannot disturb each other and bytes, peak and budget are those of
a request that runs alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptivekv.cache import AdaptiveCache
from adaptivekv.controller import Controller
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels.codec import PAGE
from adaptivekv.layers import AdaptiveLayer
from adaptivekv.memory.formats import FORMATS
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, DISK, HOST
from adaptivekv.model import LoadedModel

Budget = str | float | int | None
TIMED = 4  # decode steps that are timed after the last token


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


class Branch:
    """One request that goes on from a copy of the reference's cache under a controller of its own."""

    def __init__(
        self,
        reference: Reference,
        controller: Controller,
        budget: Budget,
        host: int | None = None,
        more: int = TIMED,
    ):
        """more: decode steps that will come after the last token."""
        self.reference, self.loaded = reference, reference.loaded
        mine, (theirs,) = reference.cache, reference.cache.requests
        new = reference.new
        self.cache = cache = AdaptiveCache(
            self.loaded.model, budget, controller.quality, kv_dtype=mine.dtype, host=host, controller=controller,
            max_tokens=reference.length + more,
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
            self.logits = feed(self.loaded, cache, reference.question_ids, self.at)
            self.at += len(reference.question_ids)
            self.request.prefilling = False  # the question stays native: the plan was for the document

    def step(self, tokens: list[int]) -> Tensor:
        """One decode step of tokens that are known: logits [n, V] after each."""
        self.cache.reading = False
        rows = forward(self.loaded, self.cache, tokens, self.at, keep=len(tokens))
        self.cache.reading, self.logits = None, rows[-1]
        self.at += len(tokens)
        return rows

    def hear(self, before: Turn, said: list[int]) -> None:
        """The next turn of the conversation; of the answer before, the last token was not fed yet."""
        last = [token for token in before.tokens[-1:] if token not in self.stops]  # `said` begins with the stop itself
        self.cache.reading = True
        self.logits = feed(self.loaded, self.cache, last + said, self.at)
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

    def force(self, tokens: list[int]) -> Iterator[Tensor]:
        """Logits [n, V] after each of tokens that are known, as many at a time as pages and plan allow."""
        controller, sequence = self.cache.controller, self.request.sequence
        single = controller.fixed is None or controller.fixed.stage("retrieve") is not None
        while tokens:
            n = 1 if single else PAGE - sequence.tail_len
            yield self.step(tokens[:n])
            tokens = tokens[n:]

    def timed(self, token: int) -> float:
        start = self.clock()
        float(self.step([token])[0, 0])  # a read, so a GPU is waited for
        return self.clock() - start

    def quickest(self, steps: int) -> float:
        """Milliseconds of the quickest of so many decode steps of the answer's last token."""
        token = self.reference.turns[-1].tokens[-1]
        return 1e3 * min(self.timed(token) for _ in range(steps))

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
    target.credits = source.copied_credits()
    target.touch()


def stop_tokens(loaded: LoadedModel) -> set[int]:
    stop = loaded.model.generation_config.eos_token_id
    return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)


def feed(loaded: LoadedModel, cache: AdaptiveCache, ids: list[int], at: int) -> Tensor:
    """Forward `ids`, which stand at position `at` and after, in chunks. Returns the last logits [V]."""
    step, out = cache.chunk, None
    for start in range(0, len(ids), step):
        out = forward(loaded, cache, ids[start : start + step], at + start)
    assert out is not None
    return out[-1]


def forward(loaded: LoadedModel, cache: AdaptiveCache, ids: list[int], at: int, keep: int = 1) -> Tensor:
    """Forward `ids` at position `at` and after. Returns the last `keep` rows of logits [keep, V]."""
    part = torch.tensor([ids], device=loaded.device)
    where = torch.arange(at, at + len(ids), device=loaded.device)[None]
    out = loaded.model(part, past_key_values=cache, position_ids=where, logits_to_keep=keep).logits[0]
    cache.observe_logits(out[-1:])
    return out
