"""SnapKV (arXiv 2404.14469): keep what the prompt's last queries look at, and its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import whole
from adaptivekv.policies.eviction.base import Eviction


@dataclass(frozen=True)
class SnapKV(Eviction):
    """A slot is worth the attention of the observation window's queries, pooled over `pool` neighbouring slots.

    Differs from the paper: the query heads of one KV head vote together, so each KV head has one set of kept slots.
    """

    pool: int = 5

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pool", whole("pool", self.pool, 1))

    def score(self, sequence: Sequence, layer: int) -> np.ndarray:
        used, pos = sequence.slots(layer)
        heads, columns, _ = used.shape
        queries = sequence.observed(layer)[:, -self.window :].float()  # [Hq, W, d]
        q_heads, window, dim = queries.shape
        queries = queries.view(heads, q_heads // heads * window, dim)
        at = torch.arange(sequence.length - window, sequence.length, device=queries.device).repeat(q_heads // heads)
        tail = sequence.tail(layer)[0].float()
        tail_pos = torch.from_numpy(sequence.tail_pos[: sequence.tail_len])
        out = np.zeros(used.shape, np.float32)
        for h in range(heads):  # one head at a time bounds the decoded copy
            keys = torch.cat([sequence.keys(layer, h), tail[h]])  # [P * 64 + T, d]
            where = torch.cat([torch.from_numpy(pos[h].reshape(-1)), tail_pos]).to(at.device)
            live = torch.from_numpy(np.append(used[h].reshape(-1), np.ones(sequence.tail_len, bool))).to(at.device)
            scores = queries[h] @ keys.T * sequence.scaling  # [G * W, P * 64 + T]
            scores = scores.masked_fill(~live | (where > at[:, None]), -torch.inf)
            votes = scores.softmax(-1).mean(0)[: columns * used.shape[2]]
            pooled = torch.nn.functional.avg_pool1d(votes[None], self.pool, 1, self.pool // 2, count_include_pad=False)
            out[h] = pooled[0, : len(votes)].view(columns, -1).cpu().numpy()
        return out
