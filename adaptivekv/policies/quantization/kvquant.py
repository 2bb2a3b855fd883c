"""KVQuant (arXiv 2401.18079): non-uniform 4-bit levels, with the largest outliers stored apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptivekv.policies.quantization.base import Single


@dataclass(frozen=True)
class KVQuant(Single):
    """Pages older than the last `window` tokens: 16 levels a channel (keys) or slot (values), 1 % of a page in 16 bits.

    Without its outliers a channel has a short range, and levels placed like a normal distribution fit what is left.
    An eviction that packs such pages quantizes them again.

    Differs from the paper: levels are fixed, not fitted offline to each layer by the model's gradients; ranges are
    those of a page of 64 slots, not calibrated; the outliers of a page share one allowance of 1 %, those furthest from
    their channel's (slot's) mean first. A cache only sees keys after the rotary embedding; the paper quantizes them
    before it, where channels are steadier. The first page stays native, as the paper's first token does.
    """

    name: ClassVar[str] = "kvquant"
    target: ClassVar[str] = "nuq4"
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.18079"
    formula: ClassVar[str] = "(4 + 0.32 for outliers + 1 / 2 for keys, 32 / head size for values) / 16 x native"
