"""Features of where attention goes: that of a prompt's last queries, on one layer of each third of the model."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from adaptivekv.features.schema import GROUPS
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.observed import attention
from adaptivekv.memory.sequence import Sequence

WINDOW = 32  # queries asked
POOL = 32  # neighbouring slots that are kept or lost together
SINKS, RECENT = 4, 64  # tokens no plan touches


def prompt_features(sequence: Sequence) -> dict[str, float]:
    """Once a prompt, when it has ended; empty without queries in the observation ring or sealed pages.

    sink, recent, entropy, top: of the page mass of these queries (`summary`). spread: standard deviation over heads of
    the attention, of 1, to the sealed slots outside the half that a head looks at most; norms: standard deviation of
    the key norms over their mean, mean over heads.
    """
    if not (sequence.ring and sequence.ring_fill and sequence.ids[0].size):
        return {}
    out: dict[str, float] = {}
    for group, part in zip(GROUPS, np.array_split(np.arange(len(sequence.ids)), len(GROUPS)), strict=True):
        if not len(part):
            continue
        layer = int(part[len(part) // 2])
        votes = torch.stack([weights.mean((0, 1)) for weights in attention(sequence, layer, WINDOW)])  # [H, P * 64]
        mass = votes.unflatten(1, (-1, PAGE)).sum(2).cpu().numpy()  # [H, P]
        out |= {f"{name}_{group}": x for name, x in summary(mass).items()}
        out[f"spread_{group}"] = float(_outside(sequence, layer, votes).std())
        out[f"norms_{group}"] = _norms(sequence, layer)
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


def _outside(sequence: Sequence, layer: int, votes: torch.Tensor) -> np.ndarray:
    """Of each head's votes [H, P * 64], those lost if it keeps half of its slots: the most voted for and the recent."""
    used, pos = (torch.from_numpy(x.reshape(len(votes), -1)).to(votes.device) for x in sequence.slots(layer))
    rank = functional.avg_pool1d(votes, POOL, 1, POOL // 2, count_include_pad=False)[:, : votes.shape[1]]
    rank = rank.masked_fill(used & ((pos < SINKS) | (pos >= sequence.length - RECENT)), torch.inf)
    order = rank.masked_fill(~used, -torch.inf).argsort(1, descending=True)
    kept = max(1, round(sequence.length / 2) - sequence.tail_len)
    return votes.gather(1, order)[:, kept:].sum(1).cpu().numpy()


def _norms(sequence: Sequence, layer: int) -> float:
    used, _ = sequence.slots(layer)
    found = []
    for head, here in enumerate(used):
        norms = sequence.keys(layer, head).norm(dim=-1)[torch.from_numpy(here.ravel()).to(sequence.pool.device)]
        found.append(norms.std(unbiased=False) / norms.mean().clamp_min(1e-9))
    return float(torch.stack(found).mean())
