"""Query-aware retrieval of pages (Quest, arXiv 2406.10774): read only the pages that could matter to this query."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.bounds import bounds
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import Stage, choice, page_span, share


@dataclass(frozen=True)
class Retrieve(Stage):
    """Each step reads the share `read` of the pages, those whose keys could score highest against the query.

    by=bounds: the bound is Quest's, sum over channels of max(q * smallest key, q * largest key), the largest over the
    query heads of a KV head. Differs from the paper: the first layers are not exempt, and a step of several tokens (a
    prompt) reads every page.
    by=keys: the attention that pages would get is worked out from all their keys, the mean over the query heads, and
    only the values are a choice. That is exact and reads half of the cache: for `offload(by=values)`, where keys are
    at hand and values are not. (ShadowKV, arXiv 2410.21465, ranks by the means of small chunks of keys instead.)
    Caps on scores are left out; no kernel.
    The first page and the last are always read.
    """

    read: float
    by: str = "bounds"

    name: ClassVar[str] = "retrieve"
    kind: ClassVar[str] = "retrieve"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.10774"
    undoable: ClassVar[bool] = True
    formula: ClassVar[str] = "+ 2 native keys a page on the device (by=keys: nothing)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "read", share("read", self.read))
        choice("by", self.by, "bounds", "keys")

    def apply(self, sequence: Sequence) -> None:
        for ids in sequence.pages():
            if len(ids) and self.by == "bounds":
                bounds(sequence.pool, ids)
        sequence.retrieve = self

    def pick(self, sequence: Sequence, layer: int, q: torch.Tensor) -> np.ndarray:
        """Which pages this step reads: q [H, G, k_dim] -> bool [H, P]."""
        ids = sequence.ids[layer]
        live = ids >= 0
        score = np.full(ids.shape, -np.inf)
        score[live] = (self._bounds if self.by == "bounds" else self._attention)(sequence, layer, q).cpu().numpy()
        first, last = page_span(sequence, layer)
        score[live & ((first == 0) | (last >= sequence.length - sequence.tail_len - 1))] = np.inf
        keep = np.zeros(ids.shape, bool)
        n = max(2, math.ceil(self.read * ids.shape[1]))
        np.put_along_axis(keep, np.argsort(-score, axis=1, kind="stable")[:, :n], True, 1)
        return keep & live

    def _bounds(self, sequence: Sequence, layer: int, q: torch.Tensor) -> torch.Tensor:
        """The most that a slot of each page can score: [n], head by head."""
        live = sequence.ids[layer] >= 0
        low, high = bounds(sequence.pool, sequence.ids[layer][live]).float().unbind(1)  # [n, k_dim] each
        query = q.float()[torch.from_numpy(np.nonzero(live)[0]).to(q.device)]  # [n, G, k_dim]
        return torch.maximum(query * low[:, None], query * high[:, None]).sum(-1).amax(-1)

    def _attention(self, sequence: Sequence, layer: int, q: torch.Tensor) -> torch.Tensor:
        """The share of each page in the attention that goes to pages, mean over the query heads: [n], head by head."""
        ids, pool = sequence.ids[layer], sequence.pool
        head, column = (torch.from_numpy(x).to(q.device) for x in np.nonzero(ids >= 0))
        pages = ids[ids >= 0]
        order = np.argsort(pages)
        sums = q.new_full((*ids.shape, q.shape[1]), -torch.inf, dtype=torch.float32)  # [H, P, G]
        for group in pool.groups(pages):
            at = torch.from_numpy(order[np.searchsorted(pages, group, sorter=order)]).to(q.device)
            scores = q.float()[head[at]] @ pool.keys(group).transpose(1, 2) * sequence.scaling  # [n, G, 64]
            used = torch.arange(PAGE) < torch.from_numpy(pool.count[group])[:, None]
            scores = scores.masked_fill(~used[:, None].to(q.device), -torch.inf)
            sums[head[at], column[at]] = scores.logsumexp(-1)
        return sums.softmax(1).mean(-1)[head, column]

    def features(self) -> dict[str, float]:
        return {"read_share": self.read}
