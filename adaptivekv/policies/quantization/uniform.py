"""Uniform low-bit pages: 8, 4 or 2 bits for keys and values, Hadamard-rotated below 8 (QuaRot, arXiv 2404.00456)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from adaptivekv.memory.formats import BY_CODE, FORMATS, Format
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import Stage, settled, whole


@dataclass(frozen=True)
class Uniform(Stage):
    """Pages older than the last `window` tokens are stored in the stage's format; the window stays native.

    The rotation spreads outlier channels over the head, so one scale and zero a slot is enough; the kernel rotates
    the query instead of the page. Pages only ever lose bits: one that already has fewer stays as it is.
    """

    window: int = 64
    sinks: int = 4
    rotate: bool = True

    kind: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.00456"

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", whole("window", self.window))
        object.__setattr__(self, "sinks", whole("sinks", self.sinks))
        object.__setattr__(self, "rotate", bool(self.rotate))

    @property
    def format(self) -> Format:
        return FORMATS[self.name + ("r" if self.rotate else "")]

    def apply(self, sequence: Sequence) -> None:
        lowers = np.array([fmt.demotes(self.format) for fmt in BY_CODE])
        select = [
            settled(sequence, layer, self.window, self.sinks) & lowers[sequence.pool.code[ids]]
            for layer, ids in enumerate(sequence.ids)
        ]
        sequence.convert(select, self.format)

    def features(self) -> dict[str, float]:
        return {"k_bits": float(self.format.k.bits), "v_bits": float(self.format.v.bits)}


@dataclass(frozen=True)
class Int8(Uniform):
    rotate: bool = False  # 8 bits need no help from a rotation
    name: ClassVar[str] = "int8"
    formula: ClassVar[str] = "(8 + 32 / head size) / 16 x native"


@dataclass(frozen=True)
class Int4(Uniform):
    name: ClassVar[str] = "int4"
    formula: ClassVar[str] = "(4 + 32 / head size) / 16 x native"


@dataclass(frozen=True)
class K4V2(Uniform):
    """Keys need 4 bits, values live with 2 (docs/methods.md)."""

    name: ClassVar[str] = "k4v2"
    formula: ClassVar[str] = "(3 + 32 / head size) / 16 x native"


@dataclass(frozen=True)
class Int2(Uniform):
    name: ClassVar[str] = "int2"
    formula: ClassVar[str] = "(2 + 32 / head size) / 16 x native"
