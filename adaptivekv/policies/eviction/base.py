"""Token eviction: score the sealed slots, keep the best, free the rest's pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.evict import evict
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import Stage, choice, protected, share, whole
from adaptivekv.policies.eviction.budgets import across_heads, across_layers, dispersion, only, pyramid, top, weighted


@dataclass(frozen=True)
class Eviction(Stage):
    """Keeps the share `keep` of the tokens in every layer and head, the first `sinks` always among them.

    A subclass gives `score`. With `growing`, the share holds for all tokens seen and is restored as the request
    grows; otherwise it applies to the prompt alone and everything generated is kept.

    Two options change who keeps how much, not how much is kept, whatever the score: `heads=adaptive` (Ada-KV) lets
    the heads of a layer compete for their common budget; `layers=pyramid` (PyramidKV) gives early layers more,
    `layers=measured` (CAKE) those whose attention is spread out and shifts from query to query. That needs queries;
    once they are gone, layers that grow share as they do by then. `layers=adaptive` (KVzip) lets all layers compete.
    Heads of different lengths end in partly filled pages of their own, so up to one page a head comes on top.
    """

    keep: float
    sinks: int = 4
    window: int = 32
    heads: str = "uniform"
    layers: str = "uniform"

    kind: ClassVar[str] = "evict"
    growing: ClassVar[bool] = False
    by: ClassVar[str] = "keys"  # what else than its needs says how it chooses
    formula: ClassVar[str] = "keep x tokens x native"
    HEADS: ClassVar[tuple[str, ...]] = ("uniform", "adaptive")
    LAYERS: ClassVar[tuple[str, ...]] = ("uniform", "pyramid", "measured", "adaptive")

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", share("keep", self.keep))
        object.__setattr__(self, "sinks", whole("sinks", self.sinks))
        object.__setattr__(self, "window", whole("window", self.window, 1))
        choice("heads", self.heads, *self.HEADS)
        choice("layers", self.layers, *self.LAYERS)
        if self.layers == "measured":  # what this stage needs, beyond what its method does
            object.__setattr__(self, "needs", self.needs | {"queries"})

    def score(self, sequence: Sequence, layer: int) -> np.ndarray:
        """The worth of every sealed slot, [H, P, 64]; higher is kept."""
        raise TypeError(f"{type(self).__name__} does not score")

    def score_within(self, sequence: Sequence, layer: int, budget: int) -> np.ndarray:
        """`score` where `budget` slots of each head stay, on average: for methods that divide their budget."""
        return self.score(sequence, layer)

    def apply(self, sequence: Sequence) -> None:
        if "queries" in type(self).needs and sequence.ring and not sequence.ring_fill:
            return  # a new turn has opened the ring and brought no query yet: pressure must find room elsewhere
        keep = self.choose(sequence)
        if any(mask is not None for mask in keep):
            evict(sequence, keep)

    def choose(self, sequence: Sequence) -> list[np.ndarray | None]:
        """The slots that stay, layer by layer: bool [H, P, 64], None: all."""
        scores: dict[int, np.ndarray] = {}
        budgets = self.budgets(sequence, scores)
        return [self._best(sequence, layer, target, scores.get(layer)) for layer, target in enumerate(budgets)]

    def _best(self, sequence: Sequence, layer: int, target: int, score: np.ndarray | None = None) -> np.ndarray | None:
        """The slots that are worth most, `target` of each head or on average, bool [H, P, 64]; None: all."""
        used, pos = sequence.slots(layer)
        heads, held = len(used), used.sum(axis=(1, 2))
        if (held.mean() if self.heads == "adaptive" else held.max(initial=0)) <= target:
            return None
        forced = protected(sequence, pos, self.sinks, self.window)
        score = np.where(forced, np.inf, self.score_within(sequence, layer, target) if score is None else score)
        # A float32 read as an integer, the negative ones turned round, sorts like itself; position and head behind it
        # settle equal scores, the newer one stays: runs of one score must not break determinism.
        bits = (score.astype(np.float32) + np.float32(0)).view(np.int32)  # -0 becomes 0
        key = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64) << 32
        key += pos.astype(np.int64) * heads + np.arange(heads)[:, None, None]
        rank, live, sure = key.reshape(heads, -1), used.reshape(heads, -1), np.isposinf(score).reshape(heads, -1)
        if self.heads == "adaptive":
            best = across_heads(rank, live, sure, target)
        else:
            best = sure | top(only(rank, live), target)
        return best.reshape(used.shape)

    def keep_slots(self, sequence: Sequence) -> int:
        """Sealed slots each head may keep, on average over layers and heads; the tail counts as kept."""
        return max(0, round(self.keep * sequence.length) - sequence.tail_len)

    def budgets(self, sequence: Sequence, scores: dict[int, np.ndarray] | None = None) -> list[int]:
        """`keep_slots` of each layer. scores: gets those that were needed for it, unless a budget changes them."""
        mean, layers = self.keep_slots(sequence), range(len(sequence.ids))
        if self.layers in ("uniform", "own"):
            return [mean for _ in layers]
        sealed = np.arange(sequence.length - sequence.tail_len)
        # what no layer may lose is not shared out, as the paper's window is not
        fixed = min(mean, int(protected(sequence, sealed, self.sinks, self.window).sum()))
        if self.layers == "pyramid":
            shared = pyramid(mean - fixed, len(layers), len(sealed) - fixed)
            return [fixed + n for n in shared]
        held = [sequence.slots(layer)[0].sum((1, 2)) for layer in layers]
        most = [h.mean() if self.heads == "adaptive" else h.max(initial=0) for h in held]
        most = [max(0, math.ceil(n) - fixed) for n in most]
        heads = list(map(len, held))
        if sum(h.sum() for h in held) <= mean * sum(heads):  # all fits: nothing to weigh, nothing to score
            shared = most
        elif self.layers == "adaptive":
            found = {layer: self.score_within(sequence, layer, mean) for layer in layers}
            worth = [score[self._may_go(sequence, layer)] for layer, score in found.items()]
            shared = across_layers(worth, heads, most, mean - fixed)
            if scores is not None and type(self).score_within is Eviction.score_within:
                scores |= found
        else:
            wants = [dispersion(sequence, layer, self.window) for layer in layers] if sequence.ring_fill else most
            shared = weighted(mean - fixed, wants, most)
        return [fixed + n for n in shared]

    def _may_go(self, sequence: Sequence, layer: int) -> np.ndarray:
        used, pos = sequence.slots(layer)
        return used & ~protected(sequence, pos, self.sinks, self.window)

    def features(self) -> dict[str, float]:
        needs = type(self).needs
        how = {"by_recency": self.by == "recency", "by_window": "queries" in needs, "by_mass": "mass" in needs}
        how |= {"by_recall": bool({"recall", "surrogate"} & needs)}
        return {"keep": self.keep, "log2_pool": math.log2(getattr(self, "pool", 1))} | {
            k: float(v) for k, v in how.items()
        }


def page_scores(values: np.ndarray) -> np.ndarray:
    """Give every slot its page's value: [H, P] -> [H, P, 64]."""
    return np.broadcast_to(values[..., None], (*values.shape, PAGE))


def slot_scores(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Give every slot its head's value: [H] -> [H, P, 64]."""
    return np.broadcast_to(values[:, None, None], shape)
