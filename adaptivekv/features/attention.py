"""Features of where attention goes, from page mass: the attention that each page of 64 slots receives."""

from __future__ import annotations

import numpy as np


def summary(mass: np.ndarray) -> dict[str, float]:
    """Of one layer's page mass [H, P], means over heads; empty for fewer than three pages or where all is NaN.

    sink: share of the mass of all pages on the first page; recent: on the last two; entropy: of the distribution over
    pages, 1 = uniform; top: share held by the heaviest tenth of the pages.
    """
    columns = mass.shape[1]
    if columns < 3 or np.isnan(mass).all():
        return {}
    mass = np.nan_to_num(mass)
    p = mass / np.maximum(mass.sum(1, keepdims=True), 1e-12)  # [H, P]
    entropy = -(p * np.log(np.maximum(p, 1e-12))).sum(1) / np.log(columns)
    heavy = -np.sort(-p, axis=1)[:, : max(1, columns // 10)].sum(1)
    parts = {"sink": p[:, 0], "recent": p[:, -2:].sum(1), "entropy": entropy, "top": heavy}
    return {name: float(part.mean()) for name, part in parts.items()}
