"""SnapKV (arXiv 2404.14469): keep what the prompt's last queries look at, and its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from adaptivekv.memory.observed import attention, slots
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import choice, whole
from adaptivekv.policies.eviction.base import Eviction


@dataclass(frozen=True)
class SnapKV(Eviction):
    """A slot is worth the attention of the observation window's queries, pooled over `pool` neighbouring slots.

    A tokenizer that splits numbers into digits spreads one fact over many slots, and the question looks at the first
    of them: 5 slots lose the tail, 32 keep it. `pooling=max` gives a neighbourhood the worth of its best slot, so
    that one slot alone keeps all its neighbours; the mean wants a neighbourhood that is looked at as a whole.

    Differs from the paper: the query heads of one KV head vote together, so each KV head has one set of kept slots.
    """

    pool: int = 5
    pooling: str = "mean"

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pool", whole("pool", self.pool, 1))
        choice("pooling", self.pooling, "mean", "max")

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        out = []
        for weights in attention(sequence, layer, self.window):
            votes = weights.flatten(0, 1).mean(0)[None]  # [1, P * 64]
            if self.pooling == "max":
                pooled = functional.max_pool1d(votes, self.pool, 1, self.pool // 2)
            else:
                pooled = functional.avg_pool1d(votes, self.pool, 1, self.pool // 2, count_include_pad=False)
            out.append(pooled[0, : votes.shape[1]])  # an even pool gives one more
        return slots(out)
