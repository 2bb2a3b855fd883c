"""DuoAttention (arXiv 2410.10819): retrieval heads keep all, streaming heads the sinks and the recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.observed import attention
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import protected
from adaptivekv.policies.eviction.base import Eviction, slot_scores


@dataclass(frozen=True)
class Duo(Eviction):
    """A head is worth the share of the last `window` queries' attention that streaming would lose: what goes beyond
    sinks, the recent window and protected spans, averaged over its query heads.

    The heads of all layers are worth comparing, as each share is of 1. The best keep all they hold, as many as
    `keep` x heads x tokens pays for; the last of them keeps its newest tokens, whatever is left of the budget; the
    others only what is protected. Who keeps how much is decided by that, so there is no option to choose.

    Differs from the paper: it finds retrieval heads once for a model, by training a gate a head on passkeys; here they
    are measured on each prompt's last queries. All heads keep what is generated, streaming heads too.
    """

    heads: str = "own"
    layers: str = "own"

    name: ClassVar[str] = "duo"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10819"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    HEADS: ClassVar[tuple[str, ...]] = ("own",)
    LAYERS: ClassVar[tuple[str, ...]] = ("own",)

    def __post_init__(self) -> None:
        for name in ("heads", "layers"):
            if getattr(self, name) != "own":
                raise AdaptiveKVError(
                    f"{name}={getattr(self, name)!r}: which head keeps how much is what duo decides; leave {name} out"
                )
        super().__post_init__()

    def score(self, sequence: Sequence, layer: int) -> np.ndarray:
        used, pos = sequence.slots(layer)
        return slot_scores(self._worth(sequence, layer, self._free(sequence, used, pos)), used.shape)

    def choose(self, sequence: Sequence) -> list[np.ndarray | None]:
        both = [sequence.slots(layer) for layer in range(len(sequence.ids))]
        held = sum(int(used.sum()) for used, _ in both)
        budget = self.keep_slots(sequence) * sum(len(used) for used, _ in both)
        if held <= budget:
            return [None for _ in both]
        free = [self._free(sequence, used, pos) for used, pos in both]
        wants = np.concatenate([f.sum((1, 2)) for f in free])  # of each head, numbered through all layers
        worth = np.concatenate([self._worth(sequence, layer, f) for layer, f in enumerate(free)])
        order = np.argsort(-worth, kind="stable")
        before = np.cumsum(wants[order]) - wants[order]
        gets = np.zeros_like(wants)
        gets[order] = np.clip(budget - (held - wants.sum()) - before, 0, wants[order])
        ends = np.cumsum([len(f) for f in free])[:-1]
        keep: list[np.ndarray | None] = []
        for (used, pos), f, n in zip(both, free, np.split(gets, ends), strict=True):
            age = np.where(f, -pos, 1).reshape(len(f), -1).argsort(1).argsort(1).reshape(f.shape)  # 0: the newest
            keep.append(used & ~f | f & (age < n[:, None, None]))
        return keep

    def _free(self, sequence: Sequence, used: np.ndarray, pos: np.ndarray) -> np.ndarray:
        """The slots that a streaming head gives up, bool [H, P, 64]."""
        return used & ~protected(sequence, pos, self.sinks, self.window)

    def _worth(self, sequence: Sequence, layer: int, free: np.ndarray) -> np.ndarray:
        """Attention to `free` slots, of 1, head by head: float32 [H]."""
        mean = [w.mean((0, 1)).cpu().numpy() for w in attention(sequence, layer, self.window)]
        return np.array([w[f.ravel()].sum() for w, f in zip(mean, free, strict=True)], np.float32)
