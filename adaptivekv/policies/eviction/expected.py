"""Expected Attention (arXiv 2510.00636): keep what future queries, taken as Gaussian, will attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.observed import logits, slots
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.eviction.base import Eviction


@dataclass(frozen=True)
class Expected(Eviction):
    """A slot is worth (softmax over keys of log E[exp(q k s)]) ||v||, averaged over the query heads of its KV head.

    For q ~ N(μ, Σ): log E[exp(q k s)] = s μk + s² kΣk / 2. Both terms are the mean and half the variance of the
    observed queries' own scores, so Σ is never built. Sinks stay out of the softmax, as in NVIDIA's kvpress.

    Differs from the paper: it takes μ and Σ from the hidden states of the whole prompt, before the rotary embedding,
    and turns them to the mean of the next 512 positions. A cache sees queries after the rotary embedding, and the
    ring holds the last `window`: μ and Σ are theirs, at their own positions.
    """

    name: ClassVar[str] = "expected"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.00636"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def score(self, sequence: Sequence, layer: int) -> torch.Tensor:
        _, pos = sequence.slots(layer)
        out = []
        for h, scores in enumerate(logits(sequence, layer, self.window, causal=False)):  # the future sees all keys
            sealed = torch.from_numpy(pos[h].ravel()).to(scores.device)
            expected = scores.mean(1) + scores.var(1, correction=0).nan_to_num() / 2  # [G, P * 64 + T]
            expected[:, : len(sealed)].masked_fill_(sealed < self.sinks, -torch.inf)
            weight = expected.softmax(-1).mean(0)[: len(sealed)]
            out.append(weight * _value_norms(sequence, layer, h))
        return slots(out)


def _value_norms(sequence: Sequence, layer: int, head: int) -> torch.Tensor:
    """||v|| of a head's sealed slots in table order, [P * 64]."""
    ids, pool = sequence.ids[layer][head], sequence.pool
    out = torch.zeros(len(ids), PAGE, device=pool.device)
    for group in pool.groups(ids[ids >= 0]):
        at = np.flatnonzero(np.isin(ids, group))
        out[torch.from_numpy(at).to(out.device)] = pool.read(ids[at])[1].norm(dim=-1)
    return out.view(-1)
