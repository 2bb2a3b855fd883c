"""Query-aware retrieval of pages (Quest, arXiv 2406.10774): read only the pages that could matter to this query."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from adaptivekv.memory.bounds import bounds
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import Stage, page_span, share


@dataclass(frozen=True)
class Retrieve(Stage):
    """Each step reads the share `read` of the pages, those whose keys could score highest against the query.

    The bound is Quest's: sum over channels of max(q * smallest key, q * largest key), the largest over the query
    heads of a KV head. The first page and the last are always read. Differs from the paper: the first layers are not
    exempt, and a step of several tokens (a prompt) reads every page.
    """

    read: float

    name: ClassVar[str] = "retrieve"
    kind: ClassVar[str] = "retrieve"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.10774"
    undoable: ClassVar[bool] = True
    formula: ClassVar[str] = "+ 2 native keys a page on the device"

    def __post_init__(self) -> None:
        object.__setattr__(self, "read", share("read", self.read))

    def apply(self, sequence: Sequence) -> None:
        for ids in sequence.pages():
            if len(ids):
                bounds(sequence.pool, ids)
        sequence.retrieve = self

    def pick(self, sequence: Sequence, layer: int, q: torch.Tensor) -> np.ndarray:
        """Which pages this step reads: q [H, G, k_dim] -> bool [H, P]."""
        ids = sequence.ids[layer]
        live = ids >= 0
        low, high = bounds(sequence.pool, ids[live]).float().unbind(1)  # [n, k_dim] each
        query = q.float()[torch.from_numpy(np.nonzero(live)[0]).to(q.device)]  # [n, G, k_dim]
        bound = torch.maximum(query * low[:, None], query * high[:, None]).sum(-1).amax(-1)
        score = np.full(ids.shape, -np.inf)
        score[live] = bound.cpu().numpy()
        first, last = page_span(sequence, layer)
        score[live & ((first == 0) | (last >= sequence.length - sequence.tail_len - 1))] = np.inf
        keep = np.zeros(ids.shape, bool)
        n = max(2, math.ceil(self.read * ids.shape[1]))
        np.put_along_axis(keep, np.argsort(-score, axis=1, kind="stable")[:, :n], True, 1)
        return keep & live

    def features(self) -> dict[str, float]:
        return {"read_share": self.read}
