"""8-bit floating point pages (FP8 formats for deep learning, arXiv 2209.05433)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptivekv.policies.quantization.base import Single


@dataclass(frozen=True)
class FP8(Single):
    """Pages older than the last `window` tokens are stored as e4m3 with one float16 scale a slot, not rotated.

    3 bits of mantissa lose more than the 8 even levels of bits of `int8`; outliers cost their neighbours less.

    Differs from the paper: it scales whole tensors; here a scale serves one slot of one head.
    """

    name: ClassVar[str] = "fp8"
    target: ClassVar[str] = "fp8"
    paper: ClassVar[str] = "https://arxiv.org/abs/2209.05433"
    formula: ClassVar[str] = "(8 + 16 / head size) / 16 x native"
