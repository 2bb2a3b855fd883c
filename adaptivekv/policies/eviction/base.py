"""Token eviction: score the sealed slots, keep the best, free the rest's pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.evict import evict
from adaptivekv.memory.sealed import Sealed, groups
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import Stage, choice, protected, share, whole
from adaptivekv.policies.eviction.budgets import across_layers, dispersion, of_heads, of_layers, pyramid, weighted


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

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        """The worth of every sealed slot, [H, P, 64] on the pool's device; higher is kept."""
        raise TypeError(f"{type(self).__name__} does not score")

    def score_within(self, sequence: Sequence, layer: int, budget: int) -> Tensor:
        """`score` where `budget` slots of each head stay, on average: for methods that divide their budget."""
        return self.score(sequence, layer)

    def apply(self, sequence: Sequence) -> None:
        if "queries" in type(self).needs and sequence.ring and not sequence.ring_fill:
            return  # a new turn has opened the ring and brought no query yet: pressure must find room elsewhere
        if (keep := self.choose(sequence)) is not None:
            evict(sequence, keep)

    def choose(self, sequence: Sequence) -> np.ndarray | None:
        """The slots that stay, as `evict` takes them; None: all."""
        budgets, scores = self._share_out(sequence)
        if all(held <= n for held, n in zip(self._held(sequence.counts()), budgets, strict=True)):
            return None
        out = []
        for sealed in groups(sequence):
            each = [scores[i] if scores else self.score_within(sequence, i, budgets[i]) for i in sealed.layers]
            score, keep = self._sure(sequence, sealed, joined(each)), np.array([budgets[i] for i in sealed.layers])
            if self.heads == "adaptive":
                out.append(of_layers(sealed, score, keep))
            else:
                out.append(of_heads(sealed, score, np.repeat(keep, [heads for heads, _ in sealed.shapes])))
        return np.concatenate(out)

    def _held(self, counts: list[np.ndarray]) -> list[float]:
        """Sealed slots of a head of each layer: what its budget is measured against."""
        return [n.mean() if self.heads == "adaptive" else n.max(initial=0) for n in counts]

    def _sure(self, sequence: Sequence, sealed: Sealed, score: Tensor) -> Tensor:
        """Scores of cells, [n, 64], with those of protected slots made inf in place."""
        return score.masked_fill_(protected(sequence, sealed.pos, self.sinks, self.window), torch.inf)

    def _rivals(self, sequence: Sequence, sealed: Sealed, score: Tensor) -> Tensor:
        """Scores of cells, [n, 64], with those of unused and protected slots made -inf in place."""
        free = sealed.used & ~protected(sequence, sealed.pos, self.sinks, self.window)
        return score.masked_fill_(~free, -torch.inf)

    def keep_slots(self, sequence: Sequence) -> int:
        """Sealed slots each head may keep, on average over layers and heads; the tail counts as kept."""
        return max(0, round(self.keep * sequence.length) - sequence.tail_len)

    def budgets(self, sequence: Sequence) -> list[int]:
        """`keep_slots` of each layer."""
        return self._share_out(sequence)[0]

    def _share_out(self, sequence: Sequence) -> tuple[list[int], list[Tensor] | None]:
        """Budgets, and the scores of each layer where it took these to find them and they stay what they are."""
        mean, layers = self.keep_slots(sequence), range(len(sequence.ids))
        if self.layers in ("uniform", "own"):
            return [mean for _ in layers], None
        sealed = np.arange(sequence.length - sequence.tail_len)
        # what no layer may lose is not shared out, as the paper's window is not
        fixed = min(mean, int(protected(sequence, sealed, self.sinks, self.window).sum()))
        if self.layers == "pyramid":
            shared = pyramid(mean - fixed, len(layers), len(sealed) - fixed)
            return [fixed + n for n in shared], None
        counts, scores = sequence.counts(), None
        most = [max(0, math.ceil(n) - fixed) for n in self._held(counts)]
        heads = list(map(len, counts))
        if sum(int(n.sum()) for n in counts) <= mean * sum(heads):  # all fits: nothing to weigh, nothing to score
            shared = most
        elif self.layers == "adaptive":
            scores = [self.score_within(sequence, layer, mean) for layer in layers]
            rivals = torch.cat(
                [self._rivals(sequence, x, joined([scores[i] for i in x.layers])) for x in groups(sequence)]
            )
            sizes = [score.numel() for score in scores]
            shared = across_layers(rivals.flatten(), sizes, heads, most, mean - fixed)
            if type(self).score_within is not Eviction.score_within:
                scores = None
        else:
            wants = [dispersion(sequence, layer, self.window) for layer in layers] if sequence.ring_fill else most
            shared = weighted(mean - fixed, wants, most)
        return [fixed + n for n in shared], scores

    def features(self) -> dict[str, float]:
        needs = type(self).needs
        how = {"by_recency": self.by == "recency", "by_window": "queries" in needs, "by_mass": "mass" in needs}
        how |= {"by_recall": bool({"recall", "surrogate"} & needs)}
        return {"keep": self.keep, "log2_pool": math.log2(getattr(self, "pool", 1))} | {
            k: float(v) for k, v in how.items()
        }


def joined(scores: list[Tensor]) -> Tensor:
    """Scores of layers, [H, P, 64] each, cell by cell: a copy, [n, 64]."""
    return torch.cat([score.flatten(0, 1) for score in scores])


def page_scores(values: np.ndarray, sequence: Sequence) -> Tensor:
    """Give every slot its page's value, float32: [H, P] -> [H, P, 64]."""
    there = torch.from_numpy(values.astype(np.float32)).to(sequence.pool.device)
    return there[..., None].expand(*values.shape, PAGE)
