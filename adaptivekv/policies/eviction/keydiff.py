"""KeyDiff (arXiv 2504.15364): keep the keys least like the others; what resembles all is redundant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import cosine_similarity, normalize

from adaptivekv.memory.observed import slots
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.eviction.base import Eviction


@dataclass(frozen=True)
class KeyDiff(Eviction):
    """A slot is worth -cos(k, anchor), anchor = mean of k / ||k|| over the keys its head holds. Needs only keys.

    Differs from the paper: it runs when the prompt has ended and whenever pages are sealed, not after each block of
    the prompt; sinks and recent tokens are protected.
    """

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.15364"
    growing: ClassVar[bool] = True

    def score(self, sequence: Sequence, layer: int) -> torch.Tensor:
        return -slots(likeness(sequence, layer))


def likeness(sequence: Sequence, layer: int) -> list[torch.Tensor]:
    """cos(k, anchor) of the sealed slots in table order, [P * 64] a head; the open tail has its say in the anchor."""
    tail, out = sequence.tail(layer)[0].float(), []
    for h, held in enumerate(sequence.counts()[layer].tolist()):
        keys = sequence.keys(layer, h)  # unused slots are 0 and add nothing to the sum
        total = normalize(keys, dim=-1).sum(0) + normalize(tail[h], dim=-1).sum(0)
        anchor = total / max(1, held + sequence.tail_len)
        out.append(cosine_similarity(keys, anchor[None], dim=-1))
    return out
