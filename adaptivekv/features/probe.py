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

WINDOW = 32  # queries asked
POOL = 32  # neighbouring slots that are kept or lost together
SINKS, RECENT = 4, 64  # tokens no plan touches


def probe_features(sequence: Sequence) -> dict[str, float]:
    """Empty without queries in the observation ring or pages to change.

    lost_K: attention to the sealed slots outside the K percent that it looks at most, of 1, mean over heads; spread:
    standard deviation over heads of the same at 50 percent. norms: that of the key norms over their mean.
    error_F: squared error of the layer's attention output with its pages in format F, over the squared output.
    sink, recent, entropy, top: of the page mass of these queries (attention.py).
    """
    if not (sequence.ring and sequence.ring_fill and sequence.ids[0].size):
        return {}
    out: dict[str, float] = {}
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
        out[f"norms_{group}"] = _norms(sequence, layer)
        ids, pool = sequence.ids[layer], sequence.pool
        settled = (ids >= 0) & (pool.first[ids] >= SINKS) & (pool.last[ids] < sequence.length - RECENT)
        errors = distortion(sequence, layer, settled, tuple(FORMATS[name + "r"] for name in NARROWED), WINDOW)
        out |= {f"error_{name}_{group}": float(x) for name, x in zip(NARROWED, errors, strict=True)}
    return out


def _lost(sequence: Sequence, layer: int, votes: list[torch.Tensor]) -> np.ndarray:
    """Attention lost if a head keeps the shares KEPT of its slots, the most looked at and the recent: [KEPT, H]."""
    used, pos = sequence.slots(layer)
    lost = np.zeros((len(KEPT), len(used)))
    for head, vote in enumerate(votes):
        pooled = functional.avg_pool1d(vote[None], POOL, 1, POOL // 2, count_include_pad=False)[0, : len(vote)]
        at, here = pos[head].ravel(), used[head].ravel()
        sure = (at < SINKS) | (at >= sequence.length - RECENT)
        score = pooled.masked_fill(torch.from_numpy(sure & here).to(vote.device), torch.inf)
        score = score.masked_fill(torch.from_numpy(~here).to(vote.device), -torch.inf)
        falling = vote[score.argsort(descending=True)].cumsum(0).cpu().numpy()
        kept = [max(1, round(share * sequence.length) - sequence.tail_len) for share in KEPT]
        lost[:, head] = [falling[-1] - falling[min(n, len(falling)) - 1] for n in kept]
    return lost


def _norms(sequence: Sequence, layer: int) -> float:
    """How unequal the sealed keys of a head are in length: standard deviation over mean, mean over heads."""
    used, _ = sequence.slots(layer)
    found = []
    for head, here in enumerate(used):
        norms = sequence.keys(layer, head).norm(dim=-1)[torch.from_numpy(here.ravel()).to(sequence.pool.device)]
        found.append(norms.std(unbiased=False) / norms.mean().clamp_min(1e-9))
    return float(torch.stack(found).mean())
