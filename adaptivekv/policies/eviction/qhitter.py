"""Q-Hitter (MLSys 2024): keep tokens that are attended to and that low bits do not hurt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.sealed import standing
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import share, worth
from adaptivekv.policies.eviction.base import Eviction, page_scores


@dataclass(frozen=True)
class QHitter(Eviction):
    """A slot is worth (1 - `friendly`) x its rank by page mass + `friendly` x its rank by quantization error.

    Ranks run from 0 to 1 within a head, the lowest error ranks highest. The error of a key or value with one scale a
    slot is its step against its length: (max - min) / ||x||, summed over both. Meant for `qhitter(0.5) | int4`.

    Differs from the paper: mass is known per page, as a moving average (see `h2o`); the error is told from the range of
    a slot. Pages store its distance from their mean instead, but that picks the tokens that are unlike the others, and
    evicting these costs more (docs/methods.md).
    """

    friendly: float = 0.5

    name: ClassVar[str] = "qhitter"
    paper: ClassVar[str] = "https://mlsys.org/virtual/2024/poster/2642"
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    growing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "friendly", share("friendly", self.friendly))

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        used, _ = standing(sequence, layer)
        mass, error = page_scores(worth(sequence, layer), sequence), _errors(sequence, layer)
        return (1 - self.friendly) * _ranks(mass, used) + self.friendly * _ranks(-error, used)


def _errors(sequence: Sequence, layer: int) -> Tensor:
    """Step against length of every slot's key and value, [H, P, 64]; unused slots hold anything."""
    ids, pool = sequence.ids[layer], sequence.pool
    out = torch.zeros(*ids.shape, PAGE, device=pool.device)
    for group in pool.groups(ids[ids >= 0]):
        at = np.flatnonzero(np.isin(ids, group))
        k, v = pool.read(ids.ravel()[at])
        out.view(-1, PAGE)[torch.from_numpy(at).to(out.device)] = _relative_range(k) + _relative_range(v)
    return out


def _relative_range(x: torch.Tensor) -> torch.Tensor:
    return (x.amax(-1) - x.amin(-1)) / x.norm(dim=-1).clamp(min=1e-6)


def _ranks(values: Tensor, used: Tensor) -> Tensor:
    """Ranks of each head's used slots, 0 to 1, equal values sharing the middle of theirs: [H, P, 64]."""
    flat = torch.where(used, values, torch.inf).flatten(1)
    order = flat.sort(1).values
    middle = (torch.searchsorted(order, flat) + torch.searchsorted(order, flat, right=True) - 1) / 2
    return (middle / (used.flatten(1).sum(1, keepdim=True) - 1).clamp(min=1)).view(values.shape)
