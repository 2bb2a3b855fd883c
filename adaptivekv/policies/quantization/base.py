"""Quantization: pages that have settled lose bits, and never gain any."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.formats import BY_CODE, FORMATS, Format
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.policies.base import Stage, choice, settled, whole

SCHEMES = {
    "int8": "int8", "fp8": "fp8", "int4": "int4r", "kivi4": "kivi4", "kvquant": "nuq4", "k4v2": "k4v2r",
    "kivi42": "kivi42", "int2": "int2r", "kivi2": "kivi2",
}  # fmt: skip
"""Formats by the stage that uses them: what stages that mix formats may be told."""


class Quantize(Stage):
    """Base: pages behind the first `sinks` tokens and before the last `window` are stored in fewer bits.

    A subclass is a frozen dataclass with the fields `window` and `sinks` that gives `formats`, `apply` and `columns`.
    One with a field `guard` may keep the other pages, where `sinks` and `window` lie, in 8 bits instead of 16.
    """

    window: int
    sinks: int
    guard: str = "native"

    kind: ClassVar[str] = "quantize"

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", whole("window", self.window))
        object.__setattr__(self, "sinks", whole("sinks", self.sinks))
        choice("guard", self.guard, "native", "int8")
        if self.guard != "native" and not self.guarded.demotes(self.format):
            raise AdaptiveKVError(f"guard={self.guard} must have more bits than the pages it guards; leave it out")

    @property
    def formats(self) -> tuple[Format, ...]:
        """What pages become, the widest format first."""
        raise NotImplementedError

    @property
    def format(self) -> Format:
        """The narrowest of `formats`: whatever can become this can come under the stage."""
        return self.formats[-1]

    @property
    def guarded(self) -> Format:
        """What sealed pages that have not settled are kept in."""
        return FORMATS[self.guard]

    def reaches(self, fmt: Format) -> bool:
        """Whether a page in `fmt` can come under the stage, or is there."""
        return fmt == self.format or fmt.demotes(self.format)

    def columns(self, shape: LayerShape, layers: int, dtype: torch.dtype, n: int) -> list[tuple[int, np.ndarray]]:
        """Bytes of the n settled columns (a page of every head) of `layers` layers of one shape, after the prompt.

        Layers that end alike are one entry: how many they are, and the bytes of keys and of values of each column of
        one of them, int64 [n, 2].
        """
        raise NotImplementedError

    def beside(self, shape: LayerShape, layers: int, dtype: torch.dtype) -> int:
        """Device bytes that `layers` layers of one shape take beside their pages, once some have settled."""
        return 0

    def recent(self) -> dict[str, float]:
        return {"log2_recent": math.log2(1 + self.window)}

    def settled(self, sequence: Sequence) -> list[np.ndarray]:
        """The pages that this stage may touch, bool like `sequence.ids[layer]` for each layer."""
        return [settled(sequence, layer, self.window, self.sinks) for layer in range(len(sequence.ids))]

    def keep_guard(self, sequence: Sequence) -> None:
        """To be called once settled pages have their format."""
        if self.guard != "native":
            sequence.convert(demotable(sequence, [ids >= 0 for ids in sequence.ids], self.guarded), self.guarded)


@dataclass(frozen=True)
class Single(Quantize):
    """All settled pages in the one format `target`. A page that has no more bits than it stays as it is."""

    window: int = 64
    sinks: int = 4

    target: ClassVar[str]

    @property
    def formats(self) -> tuple[Format, ...]:
        return (FORMATS[self.target],)

    def apply(self, sequence: Sequence) -> None:
        sequence.convert(demotable(sequence, self.settled(sequence), self.format), self.format)
        self.keep_guard(sequence)

    def columns(self, shape: LayerShape, layers: int, dtype: torch.dtype, n: int) -> list[tuple[int, np.ndarray]]:
        return [(layers, column(shape, self.format, dtype, n))]

    def features(self) -> dict[str, float]:
        return {"k_bits": float(self.format.k.bits), "v_bits": float(self.format.v.bits)} | self.recent()


class Mixed(Quantize):
    """Base: some pages in the format `high`, the others in `low`, by the names of the stages that use them alone."""

    high: str
    low: str

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("high", self.high, *SCHEMES)
        choice("low", self.low, *SCHEMES)
        high, low = self.formats
        if not high.demotes(low):
            raise AdaptiveKVError(f"low={self.low} must have fewer bits than high={self.high}, and no more in any part")

    @property
    def formats(self) -> tuple[Format, ...]:
        return FORMATS[SCHEMES[self.high]], FORMATS[SCHEMES[self.low]]

    def mixture(self, share: float) -> dict[str, float]:
        """`features` where `share` of the pages are in the high format."""
        high, low = self.formats
        return {
            "k_bits": share * high.k.bits + (1 - share) * low.k.bits,
            "v_bits": share * high.v.bits + (1 - share) * low.v.bits,
        } | self.recent()


def column(shape: LayerShape, fmt: Format, dtype: torch.dtype, n: int = 1) -> np.ndarray:
    """Bytes of keys and of values of n columns (a page of every head) in one format: int64 [n, 2]."""
    return np.tile(np.array(fmt.sizes(shape.k_dim, shape.v_dim, dtype), np.int64) * shape.heads, (n, 1))


def demotable(sequence: Sequence, select: list[np.ndarray], fmt: Format) -> list[np.ndarray]:
    """Those of the selected pages that lose bits by becoming `fmt`."""
    lowers = np.array([old.demotes(fmt) for old in BY_CODE])
    return [chosen & lowers[sequence.pool.code[ids]] for chosen, ids in zip(select, sequence.ids, strict=True)]
