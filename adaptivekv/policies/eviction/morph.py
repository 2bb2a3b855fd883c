"""MorphKV (arXiv 2503.00979): keep the old tokens that the recent ones, taken together, attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adaptivekv.memory.observed import attention, slots
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import choice
from adaptivekv.policies.eviction.base import Eviction


@dataclass(frozen=True)
class Morph(Eviction):
    """A slot is worth the attention of the last `window` queries, fused over them: their sum, or their maximum.

    The sum wants tokens that many recent ones use, the maximum those that any one of them uses.

    Differs from the paper: queries are at hand only while a prompt is read, so the choice is made once, at its end,
    where the paper makes it anew in every step to hold the cache at one size; the query heads of one KV head are
    averaged before they are fused; sinks are protected as well as the window.
    """

    fusion: str = "max"

    name: ClassVar[str] = "morph"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.00979"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("fusion", self.fusion, "sum", "max")

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        recent = [weights.mean(0) for weights in attention(sequence, layer, self.window)]  # [W, P * 64] a head
        return slots([w.sum(0) if self.fusion == "sum" else w.amax(0) for w in recent])
