"""What the last queries of a prompt look at: what every method that needs `queries` is made from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.sequence import Sequence


def logits(sequence: Sequence, layer: int, window: int, causal: bool = True) -> Iterator[torch.Tensor]:
    """Scores of the last `window` queries, KV head by KV head, -inf where there is nothing to see.

    Each is [G, W, P * 64 + T]: the G query heads of one KV head, its sealed slots in table order, then the open tail.
    One head at a time bounds the decoded copy. causal: a query does not see later positions.
    """
    used, pos = sequence.slots(layer)
    queries = sequence.observed(layer)[:, -window:].float()  # [Hq, W, d]
    window = queries.shape[1]
    queries = queries.view(len(used), -1, *queries.shape[1:])  # [H, G, W, d]
    at = torch.arange(sequence.length - window, sequence.length, device=queries.device)[:, None]
    tail, tail_pos = sequence.tail(layer)[0].float(), sequence.tail_pos[: sequence.tail_len]
    for h, query in enumerate(queries):
        keys = torch.cat([sequence.keys(layer, h), tail[h]])
        where = torch.from_numpy(np.append(pos[h].ravel(), tail_pos)).to(at.device)
        hidden = torch.from_numpy(np.append(~used[h].ravel(), np.zeros(len(tail_pos), bool))).to(at.device)
        scores = query @ keys.T * sequence.scaling
        yield scores.masked_fill(hidden | (where > at) if causal else hidden, -torch.inf)


def attention(sequence: Sequence, layer: int, window: int) -> Iterator[torch.Tensor]:
    """Attention weights of the last `window` queries to the sealed slots, [G, W, P * 64] for each KV head.

    The open tail takes its share: a row sums to 1 less what went there.
    """
    sealed = sequence.ids[layer].shape[1] * PAGE
    for scores in logits(sequence, layer, window):
        yield scores.softmax(-1)[..., :sealed]


def slots(values: list[torch.Tensor]) -> torch.Tensor:
    """One value a sealed slot and head, [P * 64] each, as `Eviction.score` gives them: float32 [H, P, 64]."""
    return torch.stack(values).float().unflatten(1, (-1, PAGE))
