"""KVzip (arXiv 2505.23416): keep what the model needs to repeat its prompt, whatever will be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptivekv.memory.sealed import standing
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.eviction.base import Eviction


@dataclass(frozen=True)
class KVzip(Eviction):
    """A slot is worth the attention that all tokens pay it while the prompt is repeated (`adaptivekv.recall`), squared.

    All layers and heads share one budget by default, as in the paper. The only score here that costs a second reading
    of the prompt; like `kvzap`, it knows no question.

    Differs from the paper, which takes the largest attention of any token: the sum of squares is, to first order, the
    squared error of outputs without the slot, and loses 36 to 60 % less (docs/methods.md). A head's best fifth of its
    layer's share is safe (Ada-KV); attention is measured against the whole cache, not against the repeated chunk alone;
    the repetition is not asked for in words (asking changed nothing), so that a cache without a tokenizer can do it.
    """

    heads: str = "adaptive"
    layers: str = "adaptive"

    name: ClassVar[str] = "kvzip"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.23416"
    needs: ClassVar[frozenset[str]] = frozenset({"recall"})
    by_credit: ClassVar[str] = "recall"  # in `Sequence.credits`

    def apply(self, sequence: Sequence) -> None:
        if self.by_credit in sequence.credits:  # while a prompt is still being read nothing can be said
            super().apply(sequence)

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        _, pos = standing(sequence, layer)
        credit = torch.from_numpy(sequence.credits[self.by_credit][layer]).to(pos.device, non_blocking=True)
        known = credit.shape[1]
        found = credit.gather(1, pos.clamp(0, known - 1).flatten(1).long()).view(pos.shape)
        if known < sequence.length - sequence.tail_len:
            found.masked_fill_(pos >= known, torch.inf)  # what came later is kept
        return found
