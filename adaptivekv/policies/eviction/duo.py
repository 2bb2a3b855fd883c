"""DuoAttention (arXiv 2410.10819): retrieval heads keep all, streaming heads the sinks and the recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.observed import attention
from adaptivekv.memory.sealed import groups, standing
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import protected
from adaptivekv.policies.eviction.base import Eviction
from adaptivekv.policies.eviction.budgets import of_heads


@dataclass(frozen=True)
class Duo(Eviction):
    """A head is worth the share of the last `window` queries' attention that streaming would lose: what goes beyond
    sinks, the recent window and protected spans, averaged over its query heads.

    The heads of all layers are worth comparing, as each share is of 1. The best keep all they hold, as many as
    `keep` x heads x tokens pays for; the last of them keeps its newest tokens, whatever is left of the budget; the
    others only what is protected. Who keeps how much is decided by that, so there is no option to choose.

    Differs from the paper: it finds retrieval heads once for a model, by training a gate a head on passkeys; here they
    are measured on each prompt's last queries. All heads keep what is generated, streaming heads too.
    """

    heads: str = "own"
    layers: str = "own"

    name: ClassVar[str] = "duo"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10819"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    HEADS: ClassVar[tuple[str, ...]] = ("own",)
    LAYERS: ClassVar[tuple[str, ...]] = ("own",)

    def __post_init__(self) -> None:
        for name in ("heads", "layers"):
            if getattr(self, name) != "own":
                raise AdaptiveKVError(
                    f"{name}={getattr(self, name)!r}: which head keeps how much is what duo decides; leave {name} out"
                )
        super().__post_init__()

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        worth, (used, _) = self._worth(sequence, layer), standing(sequence, layer)
        return worth[:, None, None].expand(used.shape)

    def choose(self, sequence: Sequence) -> np.ndarray | None:
        layers, held = range(len(sequence.ids)), np.concatenate(sequence.counts())  # of each head of all layers
        budget = self.keep_slots(sequence) * len(held)
        if held.sum() <= budget:
            return None
        wants = torch.cat([self._free(sequence, layer).sum((1, 2)) for layer in layers]).cpu().numpy()
        worth = torch.cat([self._worth(sequence, layer) for layer in layers]).cpu().numpy()
        order = np.argsort(-worth, kind="stable")
        before = np.cumsum(wants[order]) - wants[order]
        gets = np.zeros_like(wants)
        gets[order] = np.clip(budget - (held - wants).sum() - before, 0, wants[order])
        keep, out = np.split(held - wants + gets, np.cumsum([len(ids) for ids in sequence.ids])[:-1]), []
        for sealed in groups(sequence):
            newest = self._sure(sequence, sealed, sealed.pos.float())
            out.append(of_heads(sealed, newest, np.concatenate([keep[i] for i in sealed.layers])))
        return np.concatenate(out)

    def _free(self, sequence: Sequence, layer: int) -> Tensor:
        """The slots that a streaming head gives up, bool [H, P, 64]."""
        used, pos = standing(sequence, layer)
        return used & ~protected(sequence, pos, self.sinks, self.window)

    def _worth(self, sequence: Sequence, layer: int) -> Tensor:
        """Attention to the slots that a streaming head gives up, of 1, head by head: [H]."""
        mean = [w.mean((0, 1)) for w in attention(sequence, layer, self.window)]
        free = self._free(sequence, layer).flatten(1)
        return torch.stack([w.masked_fill(~f, 0).sum() for w, f in zip(mean, free, strict=True)])
