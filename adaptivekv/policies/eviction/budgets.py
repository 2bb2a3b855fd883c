"""Who keeps how much: a budget shared among layers (PyramidKV) or among the heads of a layer (Ada-KV)."""

from __future__ import annotations

import numpy as np

BETA = 20  # PyramidKV: the last layer gets a 20th of the mean, where the first has room for the rest
FLOOR = 0.2  # Ada-KV: the share of an even budget that no head falls below
_NEVER = np.iinfo(np.int64).min


def pyramid(mean: int, layers: int, most: int) -> list[int]:
    """Budgets that fall linearly from the first layer to the last, `mean` on average and none above `most`.

    PyramidKV, https://arxiv.org/abs/2406.02069: first = 2 mean - last, last = mean / BETA.
    """
    rise = min(mean - mean / BETA, most - mean)  # of the first layer above the mean
    slope = np.linspace(1, -1, layers)
    budgets = mean + rise * (slope - slope.mean())  # one layer alone has slope 0
    return np.diff(np.cumsum(budgets).round().astype(int), prepend=0).tolist()  # rounding never changes the total


def top(key: np.ndarray, n: int) -> np.ndarray:
    """The `n` largest of each row, bool [R, N]."""
    if n <= 0:
        return np.zeros(key.shape, bool)
    return key >= np.partition(key, -n, axis=1)[:, -n, None]


def across_heads(key: np.ndarray, used: np.ndarray, forced: np.ndarray, mean: int) -> np.ndarray:
    """`mean` slots a head on average, the best of all heads together; each [H, N].

    Ada-KV, https://arxiv.org/abs/2407.11550, with its safeguard: a head's own best FLOOR x mean are never given away.
    """
    safe = used & (forced | top(np.where(used, key, _NEVER), int(FLOOR * mean)))
    others = np.where(used & ~safe, key, _NEVER)
    best = top(others.reshape(1, -1), mean * len(key) - int(safe.sum())).reshape(key.shape)
    return safe | (used & best)
