"""Uniform low-bit pages: 8, 4 or 2 bits for keys and values, Hadamard-rotated below 8 (QuaRot, arXiv 2404.00456)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptivekv.memory.formats import FORMATS, Format
from adaptivekv.policies.quantization.base import Single


@dataclass(frozen=True)
class Uniform(Single):
    """Pages older than the last `window` tokens are stored in the stage's format; the window stays native.

    The page with the first tokens stays native too, in each head: half of what a short prompt takes once few tokens are
    left in few bits. `guard=int8` keeps both in 8 bits and loses next to nothing by it (docs/methods.md).
    Levels hold distances from the mean of a page. The rotation spreads outlier channels over the head, so one scale a
    slot is enough; the kernel rotates the query instead of the page. Pages only ever lose bits: one that already has
    fewer stays as it is.
    """

    rotate: bool = True
    guard: str = "native"

    paper: ClassVar[str] = "https://arxiv.org/abs/2404.00456"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rotate", bool(self.rotate))

    @property
    def formats(self) -> tuple[Format, ...]:
        return (FORMATS[self.name + ("r" if self.rotate else "")],)


@dataclass(frozen=True)
class Int8(Uniform):
    rotate: bool = False  # 8 bits need no help from a rotation
    name: ClassVar[str] = "int8"
    formula: ClassVar[str] = "(8 + 1 / 8 + 16 / head size) / 16 x native"


@dataclass(frozen=True)
class Int4(Uniform):
    name: ClassVar[str] = "int4"
    formula: ClassVar[str] = "(4 + 1 / 8 + 16 / head size) / 16 x native"


@dataclass(frozen=True)
class K4V2(Uniform):
    """Keys need 4 bits, values live with 2 (docs/methods.md)."""

    name: ClassVar[str] = "k4v2"
    formula: ClassVar[str] = "(3 + 1 / 8 + 16 / head size) / 16 x native"


@dataclass(frozen=True)
class Int2(Uniform):
    name: ClassVar[str] = "int2"
    formula: ClassVar[str] = "(2 + 1 / 8 + 16 / head size) / 16 x native"
