"""More bits for the layers that need them (KVTuner, arXiv 2502.04420), measured on the request itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from adaptivekv.memory.distortion import distortion
from adaptivekv.memory.formats import CODES
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.policies.base import share
from adaptivekv.policies.quantization.base import Mixed, column, demotable

QUERIES = 32


@dataclass(frozen=True)
class Tuned(Mixed):
    """The share `layers` of the layers, those that suffer most from `low`, in `high`; the others in `low`.

    When a request's pages first settle, at the end of its prompt, each layer's attention output for the last 32
    queries is worked out with its pages as they are and as `low` would leave them; the relative error ranks the layers.
    Later pages follow their layer. Without queries (a prompt too short to leave settled pages), the error of the keys
    and values themselves ranks. Layers of one shape compete with each other, so the bytes are known beforehand.

    Differs from the paper: it searches formats per layer offline, on calibration data and by the model's accuracy, with
    keys and values apart; this is its sensitivity measure alone, for this request, between two formats.
    """

    layers: float
    high: str = "int4"
    low: str = "k4v2"
    window: int = 64
    sinks: int = 4
    guard: str = "native"

    name: ClassVar[str] = "tuned"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.04420"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    formula: ClassVar[str] = "layers x high + (1 - layers) x low"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", share("layers", self.layers))
        super().__post_init__()

    @property
    def queries(self) -> int:
        return QUERIES

    def apply(self, sequence: Sequence) -> None:
        (high, low), select = self.formats, self.settled(sequence)
        if any(x.any() for x in select):
            wide = self._wide(sequence, select)
            for fmt, mine in ((low, ~wide), (high, wide)):
                chosen = [x & here for x, here in zip(select, mine, strict=True)]
                sequence.convert(demotable(sequence, chosen, fmt), fmt)
        self.keep_guard(sequence)

    def _wide(self, sequence: Sequence, select: list[np.ndarray]) -> np.ndarray:
        """Which layers get the high format, bool [layers]."""
        high, low = (CODES[fmt.name] for fmt in self.formats)
        codes = [sequence.pool.code[pages] for pages in sequence.pages()]
        shapes, wide = sequence.pool.layers, np.zeros(len(codes), bool)
        if any((code == low).any() for code in codes):  # ranked before: the pages say how
            error = np.array([-1.0 if (code == low).any() else (code == high).sum() for code in codes])
        else:
            error = np.array([distortion(sequence, i, x, self.formats[1], QUERIES) for i, x in enumerate(select)])
        for shape in set(shapes):
            alike = np.array([i for i, s in enumerate(shapes) if s == shape])
            best = np.argsort(-error[alike], kind="stable")
            wide[alike[best[: round(self.layers * len(alike))]]] = True
        return wide

    def columns(self, shape: LayerShape, layers: int, dtype: torch.dtype, n: int) -> list[tuple[int, np.ndarray]]:
        wide = round(self.layers * layers)
        return [
            (some, column(shape, fmt, dtype, n))
            for some, fmt in zip((wide, layers - wide), self.formats, strict=True)
            if some
        ]

    def features(self) -> dict[str, float]:
        return self.mixture(self.layers)
