"""Token eviction: score the sealed slots, keep the best, free the rest's pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.evict import evict_all
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import Stage, protected, share, whole


@dataclass(frozen=True)
class Eviction(Stage):
    """Keeps the share `keep` of the tokens in every layer and head, the first `sinks` always among them.

    A subclass gives `score`. With `growing`, the share holds for all tokens seen and is restored as the request
    grows; otherwise it applies to the prompt alone and everything generated is kept.
    """

    keep: float
    sinks: int = 4
    window: int = 32

    kind: ClassVar[str] = "evict"
    growing: ClassVar[bool] = False
    formula: ClassVar[str] = "keep x tokens x native"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", share("keep", self.keep))
        object.__setattr__(self, "sinks", whole("sinks", self.sinks))
        object.__setattr__(self, "window", whole("window", self.window, 1))

    def score(self, sequence: Sequence, layer: int) -> np.ndarray:
        """The worth of every sealed slot, [H, P, 64]; higher is kept."""
        raise TypeError(f"{type(self).__name__} does not score")

    def apply(self, sequence: Sequence) -> None:
        target = self.keep_slots(sequence)
        keep = [self._best(sequence, layer, target) for layer in range(len(sequence.ids))]
        if any(mask is not None for mask in keep):
            evict_all(sequence, keep)

    def _best(self, sequence: Sequence, layer: int, target: int) -> np.ndarray | None:
        """The `target` slots of each head that are worth most, bool [H, P, 64]; None: all."""
        used, pos = sequence.slots(layer)
        if used.sum(axis=(1, 2)).max(initial=0) <= target:
            return None
        score = np.where(protected(sequence, pos, self.sinks, self.window), np.inf, self.score(sequence, layer))
        if target == 0:
            return np.isposinf(score)
        # A float32 read as an integer, the negative ones turned round, sorts like itself; the position behind it
        # settles equal scores, the newer one stays: runs of one score must not break determinism.
        bits = (score.astype(np.float32) + np.float32(0)).view(np.int32)  # -0 becomes 0
        key = ((bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64) << 32) + pos
        key = np.where(used, key, np.iinfo(np.int64).min).reshape(len(used), -1)
        least = np.partition(key, key.shape[1] - target, axis=1)[:, -target]
        return (key >= least[:, None]).reshape(used.shape) | np.isposinf(score)

    def keep_slots(self, sequence: Sequence) -> int:
        """Sealed slots each head may keep; the tail counts as kept."""
        return max(0, round(self.keep * sequence.length) - sequence.tail_len)

    def features(self) -> dict[str, float]:
        return {"keep": self.keep, f"is_{self.name}": 1.0}


def page_scores(values: np.ndarray) -> np.ndarray:
    """Give every slot its page's value: [H, P] -> [H, P, 64]."""
    return np.broadcast_to(values[..., None], (*values.shape, PAGE))
