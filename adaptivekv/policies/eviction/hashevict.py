"""HashEvict (arXiv 2412.16187): drop the tokens whose key hashes far from the query, before any attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from adaptivekv.memory.observed import slots
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import whole
from adaptivekv.policies.eviction.base import Eviction


@dataclass(frozen=True)
class HashEvict(Eviction):
    """A slot is worth -(Hamming distance of its key's code to a query's), averaged over the last `window` queries and
    the query heads of its KV head.

    A code is the signs of `bits` random projections, the same for keys and queries of a layer (SimHash): two codes
    differ in a share of their bits that is, on average, the angle between the vectors over pi. Few bits make few
    distances; of slots equally far the newer stays.

    Differs from the paper: it drops one token in every step, by that step's query alone. Queries are at hand only while
    a prompt is read, so the choice is made once, at its end, for all of them; codes are not stored beside the keys.
    """

    bits: int = 16
    seed: int = 0

    name: ClassVar[str] = "hashevict"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.16187"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "bits", whole("bits", self.bits, 1))
        object.__setattr__(self, "seed", whole("seed", self.seed))

    def codes(self, vectors: torch.Tensor, layer: int) -> torch.Tensor:
        """Float vectors [..., k_dim] of one layer as -1 and 1, [..., bits]."""
        draw = np.random.default_rng([self.seed, layer]).standard_normal((vectors.shape[-1], self.bits), np.float32)
        return (vectors @ torch.from_numpy(draw).to(vectors.device) >= 0).float() * 2 - 1

    def score(self, sequence: Sequence, layer: int) -> torch.Tensor:
        heads = len(sequence.ids[layer])
        queries = sequence.observed(layer)[:, -self.window :].float()
        queries = self.codes(queries.reshape(heads, -1, queries.shape[-1]), layer)  # [H, G * W, bits]
        out = []
        for h, total in enumerate(queries.sum(1)):
            agree = self.codes(sequence.keys(layer, h), layer) @ total / queries.shape[1]  # bits - 2 x distance
            out.append((agree - self.bits) / 2)
        return slots(out)
