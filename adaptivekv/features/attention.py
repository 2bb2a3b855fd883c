"""Features of where attention goes, from the page mass that the attention kernel leaves behind."""

from __future__ import annotations

import numpy as np

from adaptivekv.features.schema import GROUPS
from adaptivekv.memory.sequence import Sequence


def attention_features(sequence: Sequence) -> dict[str, float]:
    """`summary` for the early, middle and late third of the layers, averaged; empty until mass was measured."""
    layers = [found for mass in sequence.mass if (found := summary(mass))]
    out: dict[str, float] = {}
    for group, part in zip(GROUPS, np.array_split(np.arange(len(layers)), len(GROUPS)), strict=True):
        if len(part):
            out |= {f"{key}_{group}": float(np.mean([layers[i][key] for i in part])) for key in layers[0]}
    return out


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
