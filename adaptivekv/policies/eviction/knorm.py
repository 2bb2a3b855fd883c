"""L2 norm of keys (arXiv 2406.11430): keep the keys of smallest norm, which attention likes best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adaptivekv.memory.observed import slots
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.eviction.base import Eviction


@dataclass(frozen=True)
class KNorm(Eviction):
    """A slot is worth -||k||. Needs nothing but the keys: no query, no attention.

    Differs from the paper: no layer is exempt (the paper leaves out the first two, where norm and attention do not
    go together), and sinks and recent tokens are protected.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11430"
    growing: ClassVar[bool] = True

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        heads = range(len(sequence.ids[layer]))
        return -slots([sequence.keys(layer, h).norm(dim=-1) for h in heads])
