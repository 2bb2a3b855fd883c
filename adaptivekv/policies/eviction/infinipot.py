"""InfiniPot (arXiv 2410.01518): a pot that is distilled whenever it is full, by what is new and what is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptivekv.memory.observed import attention, slots
from adaptivekv.memory.sealed import standing
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import protected, share
from adaptivekv.policies.eviction.base import Eviction
from adaptivekv.policies.eviction.budgets import elect
from adaptivekv.policies.eviction.keydiff import likeness


@dataclass(frozen=True)
class InfiniPot(Eviction):
    """The share `novelty` of the budget goes to the slots whose keys are most unlike the others (1 - their cosine to
    the mean key direction, as in KeyDiff); the rest to those that the last `window` queries attend to most.

    The pot is the byte budget: without host room the plan is applied each time a prompt has filled it, to what is left
    and what came since, with the queries seen so far (`adaptivekv/pressure.py`). What is left then grows with the
    prompt, as `keep` is a share of the tokens seen; at the end of the prompt it is applied once more.

    Differs from the paper: novelty there is how badly the model predicted the token, and attention that of a catalyst
    prompt appended to the pot. A cache sees no logits of a prompt and appends nothing: keys and the prompt's own
    queries stand in, so novelty differs from head to head. Keys keep their original rotary position.
    """

    novelty: float = 0.5

    name: ClassVar[str] = "infinipot"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.01518"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "novelty", share("novelty", self.novelty))

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        return self.score_within(sequence, layer, self.budgets(sequence)[layer])

    def score_within(self, sequence: Sequence, layer: int, budget: int) -> Tensor:
        used, pos = standing(sequence, layer)
        looked_at = slots([w.mean((0, 1)) for w in attention(sequence, layer, self.window)])
        new = 1 - slots(likeness(sequence, layer))
        sure = used & protected(sequence, pos, self.sinks, self.window)
        budget -= int(sure.sum((1, 2)).max())
        elected = elect(torch.where(used & ~sure, new, -1), round(self.novelty * budget))
        return torch.where(elected, 2 + new, looked_at)  # attention is at most 1: it fills what novelty leaves
