"""More bits for the pages that attention looks at (MiKV, arXiv 2402.18096)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from adaptivekv.memory.formats import BY_CODE
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.policies.base import share, worth
from adaptivekv.policies.quantization.base import Mixed, column, demotable


@dataclass(frozen=True)
class HotCold(Mixed):
    """The share `hot` of a layer's settled pages, those with most attention mass, in `high`; the rest in `low`.

    The heads of a layer compete for the share. A page that cools down loses bits; one that warms up gains none, so the
    share is taken of what still has the bits. Where no mass is measured (after an eviction), newer pages are hotter.

    Differs from the paper: it decides token by token, by accumulated attention (H2O), and balances outlier channels
    between queries and keys; here whole pages, by their average mass, in the formats of other stages.
    """

    hot: float
    high: str = "int8"
    low: str = "k4v2"
    window: int = 64
    sinks: int = 4

    name: ClassVar[str] = "hotcold"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.18096"
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    formula: ClassVar[str] = "hot x high + (1 - hot) x low"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hot", share("hot", self.hot))
        super().__post_init__()

    def apply(self, sequence: Sequence) -> None:
        high, low = self.formats
        rich = np.array([fmt == high or fmt.demotes(high) for fmt in BY_CODE])
        hot, cold = [], []
        for layer, open_ in enumerate(self.settled(sequence)):
            able = open_ & rich[sequence.pool.code[sequence.ids[layer]]]
            value = np.where(able, worth(sequence, layer), -np.inf).ravel()
            best = np.argsort(-value, kind="stable")[: min(round(self.hot * int(open_.sum())), int(able.sum()))]
            chosen = np.zeros(value.size, bool)
            chosen[best] = True
            hot.append(chosen.reshape(able.shape))
            cold.append(open_ & ~hot[-1])
        sequence.convert(demotable(sequence, cold, low), low)
        sequence.convert(demotable(sequence, hot, high), high)

    def columns(self, shape: LayerShape, layers: int, dtype: torch.dtype, n: int) -> list[tuple[int, np.ndarray]]:
        high, low = (column(shape, fmt, dtype) for fmt in self.formats)
        hot = round(self.hot * n * shape.heads)
        wide = np.diff(hot * np.arange(n + 1) // max(1, n))  # which they are is not known: evenly
        return [(layers, low + wide[:, None] * (high - low) // shape.heads)]

    def features(self) -> dict[str, float]:
        return self.mixture(self.hot)
