"""Features of where attention goes, from the page mass that the attention kernel leaves behind."""

from __future__ import annotations

import numpy as np

from adaptivekv.memory.sequence import Sequence

GROUPS = ("early", "mid", "late")


def attention_features(sequence: Sequence) -> dict[str, float]:
    """For the early, middle and late third of the layers, averaged over heads; empty until mass was measured.

    sink: share of the mass of all pages on the first page; recent: on the last two; entropy: of the distribution over
    pages, 1 = uniform; top: share held by the heaviest tenth of the pages.
    """
    layers = [m for m in sequence.mass if m.shape[1] > 2 and not np.isnan(m).all()]
    if not layers:
        return {}
    out: dict[str, float] = {}
    for name, part in zip(GROUPS, np.array_split(np.arange(len(layers)), 3), strict=True):
        rows = [_summary(layers[i]) for i in part]
        if rows:
            out |= {f"{key}_{name}": float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return out


def _summary(mass: np.ndarray) -> dict[str, float]:
    mass = np.nan_to_num(mass)
    p = mass / np.maximum(mass.sum(1, keepdims=True), 1e-12)  # [H, P]
    columns = p.shape[1]
    entropy = -(p * np.log(np.maximum(p, 1e-12))).sum(1) / np.log(columns)
    heavy = -np.sort(-p, axis=1)[:, : max(1, columns // 10)].sum(1)
    return {"sink": p[:, 0].mean(), "recent": p[:, -2:].sum(1).mean(), "entropy": entropy.mean(), "top": heavy.mean()}
