"""TOVA (arXiv 2401.06104): drop the token that the last query attends to least, the same one in all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptivekv.memory.observed import attention
from adaptivekv.memory.sealed import standing
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.eviction.base import Eviction


@dataclass(frozen=True)
class TOVA(Eviction):
    """A token is worth the last query's attention to it, averaged over all query heads of the layer.

    Needs the last query, which exists only while a prompt is read.

    Differs from the paper: one choice at the end of the prompt instead of one token in every step, and sinks and
    recent tokens are protected.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.06104"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        used, pos = standing(sequence, layer)
        weights = torch.stack([w[:, 0].mean(0) for w in attention(sequence, layer, 1)])  # [H, P * 64]
        # heads may hold a token in different slots, or not at all: they meet at its position, unused slots behind all
        at = torch.where(used, pos, sequence.length).flatten(1).long()
        votes = weights.new_zeros(len(at), sequence.length + 1).scatter_(1, at, weights).mean(0)
        return votes[at].view(pos.shape)
