"""What fewer bits would do to attention, judged by the last queries of a prompt, without changing a page."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from adaptivekv.kernels import hadamard
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.formats import Format
from adaptivekv.memory.observed import logits
from adaptivekv.memory.sequence import Sequence


def distortion(sequence: Sequence, layer: int, select: np.ndarray, fmt: Format, window: int) -> float:
    """How much the selected pages (bool [H, P]) would change a layer's attention if they were in `fmt`.

    Squared error / squared output for the last `window` queries of the observation ring; without queries, of the keys
    and values themselves.
    """
    queries = None
    if sequence.ring and sequence.ring_fill:
        heads = len(sequence.ids[layer])
        queries = sequence.observed(layer)[:, -window:].float().unflatten(0, (heads, -1))  # [H, G, W, d]
    scores: Iterator[Tensor] = logits(sequence, layer, window) if queries is not None else iter(())
    tail = sequence.tail(layer)[1].float()
    wrong, total = 0.0, 1e-30
    for head, chosen in enumerate(select):
        k, v = _head(sequence, layer, head)
        if queries is not None:
            seen = next(scores)  # [G, W, P * 64 + T]
            out = seen.softmax(-1) @ torch.cat([v, tail[head]])
            total += float(out.square().sum())
        else:
            total += float(k.square().sum() + v.square().sum())
        if not chosen.any():
            continue
        k_low, v_low = _narrowed(sequence, layer, head, chosen, fmt, k, v)
        if queries is not None:
            seen[..., : len(k)] += queries[head] @ (k_low - k).T * sequence.scaling
            other = seen.softmax(-1) @ torch.cat([v_low, tail[head]])
            wrong += float((other - out).square().sum())
        else:
            wrong += float((k_low - k).square().sum() + (v_low - v).square().sum())
    return wrong / total


def _head(sequence: Sequence, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a head's sealed slots in table order, float32 [P * 64, d] each; unused slots are 0."""
    ids, pool, shape = sequence.ids[layer][head], sequence.pool, sequence.pool.layers[layer]
    k, v = (torch.zeros(len(ids), PAGE, dim, device=pool.device) for dim in (shape.k_dim, shape.v_dim))
    for group in pool.groups(ids[ids >= 0]):
        at = np.flatnonzero(np.isin(ids, group))
        where = torch.from_numpy(at).to(k.device)
        k[where], v[where] = pool.read(ids[at])
    used = _used(sequence, ids).to(k.device)
    return tuple(x.masked_fill_(~used, 0.0).flatten(0, 1) for x in (k, v))  # type: ignore[return-value]


def _used(sequence: Sequence, ids: np.ndarray) -> Tensor:
    """bool [P, 64, 1]: which slots of a head's pages hold a token."""
    count = np.where(ids >= 0, sequence.pool.count[ids], 0)
    return torch.from_numpy(np.arange(PAGE) < count[:, None])[..., None]


def _narrowed(
    sequence: Sequence, layer: int, head: int, chosen: np.ndarray, fmt: Format, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """A head's keys and values as they would be with the chosen pages in another format."""
    ids = sequence.ids[layer][head]
    at = torch.from_numpy(np.flatnonzero(chosen)).to(k.device)
    used = _used(sequence, ids[chosen]).to(k.device)
    out = []
    for x, codec in ((k, fmt.k), (v, fmt.v)):
        pages, dim = x.view(len(ids), PAGE, -1).clone(), x.shape[1]
        part = hadamard(pages[at]) if fmt.rotate else pages[at]
        raw = codec.encode(part, sequence.pool.dtype, used.flatten(1).sum(1))
        part = codec.decode(raw, dim, sequence.pool.dtype)
        pages[at] = (hadamard(part) if fmt.rotate else part).masked_fill_(~used, 0.0)
        out.append(pages.flatten(0, 1))
    return out[0], out[1]
