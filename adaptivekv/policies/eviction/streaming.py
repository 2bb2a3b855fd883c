"""StreamingLLM (arXiv 2309.17453): the first tokens and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adaptivekv.memory.sealed import standing
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.eviction.base import Eviction


@dataclass(frozen=True)
class Streaming(Eviction):
    """A slot is worth its position.

    Differs from the paper: the window is a share of the tokens seen, so it grows with the request, and keys keep
    their original rotary positions.
    """

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"
    growing: ClassVar[bool] = True
    by: ClassVar[str] = "recency"

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        _, pos = standing(sequence, layer)
        return pos.float()
