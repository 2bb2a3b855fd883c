"""NACL (arXiv 2408.03675): most of the budget by the attention of proxy tokens, the rest drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptivekv.memory.observed import attention, slots
from adaptivekv.memory.sealed import standing
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import protected, share, whole
from adaptivekv.policies.eviction.base import Eviction
from adaptivekv.policies.eviction.budgets import elect


@dataclass(frozen=True)
class NACL(Eviction):
    """A slot is worth the summed attention of the proxy queries; the share `random` of the budget is drawn instead.

    The draw is without replacement, with probability softmax(worth) over the slots that the proxies left, head by
    head: the best of worth + Gumbel noise are just that. One `seed` gives one draw.

    Differs from the paper: the proxies are the last `window` queries of the prompt (the paper takes a share of it),
    they look causally, and the query heads of one KV head vote together.
    """

    random: float = 0.3
    seed: int = 0

    name: ClassVar[str] = "nacl"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.03675"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "random", share("random", self.random))
        object.__setattr__(self, "seed", whole("seed", self.seed))

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        return self.score_within(sequence, layer, self.budgets(sequence)[layer])

    def score_within(self, sequence: Sequence, layer: int, budget: int) -> Tensor:
        used, pos = standing(sequence, layer)
        votes = slots([w.sum((0, 1)) for w in attention(sequence, layer, self.window)])
        noise = np.random.default_rng([self.seed, layer]).gumbel(size=votes.shape).astype(np.float32)
        drawn = votes + torch.from_numpy(noise).to(votes.device)
        sure = used & protected(sequence, pos, self.sinks, self.window)
        budget -= int(sure.sum((1, 2)).max())
        elected = elect(torch.where(used & ~sure, votes, -1), round((1 - self.random) * budget))
        return torch.where(elected, votes, drawn - drawn.max() - 1)  # any that was drawn comes after all elected
