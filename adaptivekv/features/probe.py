"""Features that ask: what would evicting, or fewer bits, do to the attention of the prompt's last queries?

Once a prompt, on one layer of each third of the model. The most telling features there are: they are the loss of plans,
measured where it is cheap, and need neither the tokens that will come nor a second pass.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from adaptivekv.features.attention import summary
from adaptivekv.features.schema import GROUPS, KEPT, NARROWED
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.distortion import distortion
from adaptivekv.memory.formats import FORMATS
from adaptivekv.memory.observed import attention
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.eviction.surrogate import NAME, foretell

WINDOW = 32  # queries asked
POOL = 32  # neighbouring slots that are kept or lost together
SINKS, RECENT = 4, 64  # tokens no plan touches


def probe_features(sequence: Sequence) -> dict[str, float]:
    """Empty without queries in the observation ring or pages to change.

    lost_K: attention to the sealed slots outside the K percent that it looks at most, of 1, mean over heads; spread:
    standard deviation over heads of the same at 50 percent. foretold_K: the same outside the K percent that `kvzap`
    keeps, about, where the model has a surrogate. norms: standard deviation of the key norms over their mean.
    error_F: squared error of the layer's attention output with its pages in format F, over the squared output.
    sink, recent, entropy, top: of the page mass of these queries (attention.py).
    """
    if not (sequence.ring and sequence.ring_fill and sequence.ids[0].size):
        return {}
    out: dict[str, float] = {}
    surrogate = sequence.pool.surrogate
    if surrogate:
        foretell(sequence, surrogate)
    for group, part in zip(GROUPS, np.array_split(np.arange(len(sequence.ids)), len(GROUPS)), strict=True):
        if not len(part):
            continue
        layer = int(part[len(part) // 2])
        votes = [weights.mean((0, 1)) for weights in attention(sequence, layer, WINDOW)]  # of a head, [P * 64]
        mass = torch.stack(votes).unflatten(1, (-1, PAGE)).sum(2).cpu().numpy()  # [H, P]
        out |= {f"{name}_{group}": x for name, x in summary(mass).items()}
        lost = _lost(sequence, layer, votes)  # [KEPT, H]
        out |= {f"lost_{100 * share:.0f}_{group}": float(x) for share, x in zip(KEPT, lost.mean(1), strict=True)}
        out[f"spread_{group}"] = float(lost[KEPT.index(0.5)].std())
        if surrogate:
            for share, x in zip(KEPT, _foretold(sequence, layer, votes), strict=True):
                out[f"foretold_{100 * share:.0f}_{group}"] = float(x)
        out[f"norms_{group}"] = _norms(sequence, layer)
        ids, pool = sequence.ids[layer], sequence.pool
        settled = (ids >= 0) & (pool.first[ids] >= SINKS) & (pool.last[ids] < sequence.length - RECENT)
        errors = distortion(sequence, layer, settled, tuple(FORMATS[name + "r"] for name in NARROWED), WINDOW)
        out |= {f"error_{name}_{group}": float(x) for name, x in zip(NARROWED, errors, strict=True)}
    return out


def _lost(sequence: Sequence, layer: int, votes: list[torch.Tensor]) -> np.ndarray:
    """Attention lost if a head keeps the shares KEPT of its slots, the most looked at and the recent: [KEPT, H]."""
    lost = []
    for head, vote in enumerate(votes):
        pooled = functional.avg_pool1d(vote[None], POOL, 1, POOL // 2, count_include_pad=False)[0, : len(vote)]
        lost.append(_outside(sequence, layer, vote[None], pooled[None], slice(head, head + 1)))
    return np.stack(lost, 1)


def _foretold(sequence: Sequence, layer: int, votes: list[torch.Tensor]) -> np.ndarray:
    """The same if the layer keeps about what `kvzap` would, its heads sharing the room: mean over them, [KEPT]."""
    _, pos = sequence.slots(layer)
    credit = sequence.credits[NAME][layer]
    known = np.minimum(pos.reshape(len(pos), -1), credit.shape[1] - 1).clip(0)  # of an unused slot: never read
    scores = torch.from_numpy(np.take_along_axis(credit, known, 1)).to(votes[0].device)
    return _outside(sequence, layer, torch.stack(votes), scores, slice(None)) / len(votes)


def _outside(sequence: Sequence, layer: int, votes: torch.Tensor, scores: torch.Tensor, heads: slice) -> np.ndarray:
    """The votes [H, P * 64] of the sealed slots outside the best of these heads together, for each share KEPT."""
    used, pos = (x[heads].reshape(len(votes), -1) for x in sequence.slots(layer))
    sure = used & ((pos < SINKS) | (pos >= sequence.length - RECENT))
    rank = scores.masked_fill(torch.from_numpy(sure).to(votes.device), torch.inf)
    rank = rank.masked_fill(torch.from_numpy(~used).to(votes.device), -torch.inf)
    falling = votes.flatten()[rank.flatten().argsort(descending=True)].cumsum(0).cpu().numpy()
    kept = [len(votes) * max(1, round(share * sequence.length) - sequence.tail_len) for share in KEPT]
    return np.array([falling[-1] - falling[min(n, len(falling)) - 1] for n in kept])


def _norms(sequence: Sequence, layer: int) -> float:
    """How unequal the sealed keys of a head are in length: standard deviation over mean, mean over heads."""
    used, _ = sequence.slots(layer)
    found = []
    for head, here in enumerate(used):
        norms = sequence.keys(layer, head).norm(dim=-1)[torch.from_numpy(here.ravel()).to(sequence.pool.device)]
        found.append(norms.std(unbiased=False) / norms.mean().clamp_min(1e-9))
    return float(torch.stack(found).mean())
