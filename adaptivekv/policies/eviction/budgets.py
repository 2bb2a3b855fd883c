"""Who keeps how much: a budget shared among layers (PyramidKV, CAKE, KVzip) or the heads of a layer (Ada-KV)."""

from __future__ import annotations

from collections.abc import Sequence as Row

import numpy as np
import torch
from torch import Tensor

from adaptivekv.kernels.topslots import nth, top_slots
from adaptivekv.memory.observed import attention
from adaptivekv.memory.sealed import Sealed
from adaptivekv.memory.sequence import Sequence

BETA = 20  # PyramidKV: the last layer gets a 20th of the mean, where the first has room for the rest
FLOOR = 0.2  # Ada-KV: the share of an even budget that no head falls below


def pyramid(mean: int, layers: int, most: int) -> list[int]:
    """Budgets that fall linearly from the first layer to the last, `mean` on average and none above `most`.

    PyramidKV, https://arxiv.org/abs/2406.02069: first = 2 mean - last, last = mean / BETA.
    """
    rise = min(mean - mean / BETA, most - mean)  # of the first layer above the mean
    slope = np.linspace(1, -1, layers)
    budgets = mean + rise * (slope - slope.mean())  # one layer alone has slope 0
    return np.diff(np.cumsum(budgets).round().astype(int), prepend=0).tolist()  # rounding never changes the total


def dispersion(sequence: Sequence, layer: int, window: int) -> float:
    """How much of a common budget a layer should have by the attention of the last `window` queries.

    CAKE, https://arxiv.org/abs/2503.12491, with both its exponents 1: (entropy of a query's attention) x (variance of
    the attention to a slot over the queries, summed over slots). Each is averaged over the query heads; the window
    itself is left out, and so is the open tail, which nothing can evict.
    """
    pos, out = sequence.slots(layer)[1], []
    for h, weights in enumerate(attention(sequence, layer, window)):
        old = torch.from_numpy(pos[h].ravel() < sequence.length - window).to(weights.device)
        weights = weights * old
        entropy = torch.special.entr(weights).sum(-1).mean()
        out.append(torch.stack([entropy, weights.var(1, correction=0).sum(-1).mean()]))
    return float(torch.stack(out).mean(0).prod())


def weighted(mean: int, weights: Row[float], most: Row[int]) -> list[int]:
    """Budgets in proportion to `weights`, `mean` on average and none above its `most`: others get what one cannot hold.

    Where all together cannot hold that much, each gets its most.
    """
    weight, limit, total = np.array(weights, float), np.array(most, float), mean * len(most)
    if limit.sum() <= total:
        return limit.astype(int).tolist()
    full = np.zeros(len(limit), bool)
    while True:
        wants = np.where(full, 0, weight) if weight[~full].any() else ~full  # nothing to tell them apart: even shares
        budgets = np.where(full, limit, (total - limit[full].sum()) * wants / wants.sum())
        if not (budgets > limit).any():
            break
        full |= budgets > limit
    down = np.floor(budgets)
    first = np.argsort(down - budgets, kind="stable")  # what rounding down leaves goes to those that lost most by it
    down[first[: round(total - down.sum())]] += 1
    return down.astype(int).tolist()


def across_layers(score: Tensor, sizes: list[int], heads: Row[int], most: Row[int], mean: int) -> list[int]:
    """Budgets of a head in each layer where all slots compete for room for `mean` a head: the best are counted.

    KVzip, https://arxiv.org/abs/2505.23416. score: of all layers, `sizes` elements of each; -inf does not compete.
    Where all fits, each gets its `most`; else a layer's count is rounded down to a whole number a head.
    """
    rivals, total = int(torch.count_nonzero(score > -torch.inf)), mean * sum(heads)
    if not total or not rivals:
        return [0] * len(sizes)
    if rivals <= total:
        return list(most)
    least = nth(score, total)
    both = ([torch.count_nonzero(part) for part in test(score, least).split(sizes)] for test in (torch.gt, torch.eq))
    counts, ties = (torch.stack(parts).cpu().numpy() for parts in both)
    counts += np.diff(np.minimum(np.cumsum(ties), total - counts.sum()), prepend=0)  # in the order of layers
    return (counts // heads).tolist()


def elect(values: Tensor, n: int) -> Tensor:
    """The `n` largest of each head, all if it has fewer, and what equals the last of them: bool [H, P, 64]."""
    flat = values.flatten(1)
    if (n := min(n, flat.shape[1])) <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    return values >= flat.topk(n, 1, sorted=False).values.amin(1)[:, None, None]


def of_heads(sealed: Sealed, score: Tensor, keep: np.ndarray) -> np.ndarray:
    """The best of each head, `keep` of it: uint64, a bit a slot, for every cell.

    score: of all cells, [n, 64]; inf: it stays. keep: of the heads of all layers. Of equal scores the newer stays.
    """
    return _top(sealed, score, sealed.head_edges, keep).cpu().numpy().view(np.uint64)


def of_layers(sealed: Sealed, score: Tensor, keep: np.ndarray) -> np.ndarray:
    """`of_heads` where the heads of a layer compete. keep: of each layer, a head on average.

    Ada-KV, https://arxiv.org/abs/2407.11550, with its safeguard: a head's own best FLOOR x mean are never given away.
    """
    heads, _ = np.array(sealed.shapes).T
    floor = np.repeat((FLOOR * keep).astype(int), heads)
    safe = _top(sealed, score, sealed.head_edges, floor)
    return _top(sealed, score, sealed.edges, heads * keep, safe).cpu().numpy().view(np.uint64)


def _top(sealed: Sealed, score: Tensor, edges: list[int], keep: np.ndarray, sure: Tensor | None = None) -> Tensor:
    edge, many = (torch.from_numpy(np.array(x, np.int64)).to(score.device) for x in (edges, keep))
    out = torch.empty(len(score), dtype=torch.int64, device=score.device)
    sure = torch.zeros_like(out) if sure is None else sure
    heads = max(heads for heads, _ in sealed.shapes)
    top_slots(score.float(), sealed.pos, sealed.count, sealed.head, heads, edge, many, sure, out)
    return out
