"""Who keeps how much: a budget shared among layers (PyramidKV, CAKE, KVzip) or the heads of a layer (Ada-KV)."""

from __future__ import annotations

from collections.abc import Sequence as Row

import numpy as np
import torch

from adaptivekv.memory.observed import attention
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


def across_layers(scores: Row[np.ndarray], heads: Row[int], most: Row[int], mean: int) -> list[int]:
    """Budgets of a head in each layer where all slots compete for room for `mean` a head: the best are counted.

    KVzip, https://arxiv.org/abs/2505.23416. scores: of what may go in each layer, [n]. Where all fits, each gets its
    `most`; else a layer's count is rounded down to a whole number a head.
    """
    worth, total = np.concatenate(scores), mean * sum(heads)
    if not total or not len(worth):
        return [0] * len(scores)
    if len(worth) <= total:
        return list(most)
    least = np.partition(worth, -total)[-total]  # a prompt has millions: no sorting
    counts, ties = (np.array([test(score, least).sum() for score in scores]) for test in (np.greater, np.equal))
    counts += np.diff(np.minimum(np.cumsum(ties), total - counts.sum()), prepend=0)  # in the order of layers
    return (counts // heads).tolist()


def only(key: np.ndarray, these: np.ndarray) -> np.ndarray:
    """`key` of these, elsewhere less than any; all differ, for among equals `np.partition` takes 70 times as long."""
    return np.where(these, key, np.iinfo(np.int64).min + np.arange(key.size).reshape(key.shape))


def top(key: np.ndarray, n: int) -> np.ndarray:
    """The `n` largest of each row, bool [R, N]."""
    if n <= 0:
        return np.zeros(key.shape, bool)
    return key >= np.partition(key, -n, axis=1)[:, -n, None]


def across_heads(key: np.ndarray, used: np.ndarray, forced: np.ndarray, mean: int) -> np.ndarray:
    """`mean` slots a head on average, the best of all heads together; each [H, N].

    Ada-KV, https://arxiv.org/abs/2407.11550, with its safeguard: a head's own best FLOOR x mean are never given away.
    """
    safe = used & (forced | top(only(key, used), int(FLOOR * mean)))
    others = only(key, used & ~safe)
    best = top(others.reshape(1, -1), mean * len(key) - int(safe.sum())).reshape(key.shape)
    return safe | (used & best)
