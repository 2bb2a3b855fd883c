"""KIVI (arXiv 2402.02750): keys quantized channel by channel, values slot by slot in groups of 32 channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptivekv.policies.quantization.base import Single


@dataclass(frozen=True)
class Kivi(Single):
    """Pages older than the last `window` tokens; the window is the paper's residual and stays native.

    Keys have channels that are large in every token: a scale for each channel keeps them apart without a rotation.
    Values have none, so a slot keeps its own scales. An eviction that packs such pages quantizes their keys again.

    Differs from the paper: a group of tokens is a page, 64 of them (the paper: 32); the residual is 64 tokens by
    default (the paper: 128) and ends at a page; the first page stays native as well (`sinks`).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2402.02750"


@dataclass(frozen=True)
class Kivi4(Kivi):
    name: ClassVar[str] = "kivi4"
    target: ClassVar[str] = "kivi4"
    formula: ClassVar[str] = "keys (4 + 1 / 2) / 16, values (4 + 1) / 16 x native"


@dataclass(frozen=True)
class Kivi42(Kivi):
    """Keys in 4 bits, values in 2: KIVI's scales in the mixture of `k4v2`."""

    name: ClassVar[str] = "kivi42"
    target: ClassVar[str] = "kivi42"
    formula: ClassVar[str] = "keys (4 + 1 / 2) / 16, values (2 + 1) / 16 x native"


@dataclass(frozen=True)
class Kivi2(Kivi):
    name: ClassVar[str] = "kivi2"
    target: ClassVar[str] = "kivi2"
    formula: ClassVar[str] = "keys (2 + 1 / 2) / 16, values (2 + 1) / 16 x native"
