"""How one page part is stored: the keys, or the values, of 64 slots of one KV head.

A part is a run of bytes in an arena whose length is a multiple of 256, so that the whole arena can be read as rows.
`native` stores the model's own dtype. `intN` stores N-bit levels with one float16 scale and zero per slot, over the
whole head dimension: `value = level * scale + zero`. One pair per slot is what lets attention fold them into scores
and probabilities instead of touching every element.

    intN part: levels (uint8, 64 * dim * N / 8 bytes) | scale float16 [64] | zero float16 [64] | padding to 256
    int8: byte j of a slot is dim j
    int4: byte j holds dim j in its low nibble and dim j + dim/2 in its high nibble
    int2: byte j holds dims j, j + dim/4, j + dim/2, j + 3*dim/4, from the low bits to the high

These are the codecs of the Triton kernels. Those of `decoded.py` are for plain torch alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptivekv.errors import AdaptiveKVError

PAGE = 64
"""Slots in a page."""

UNIT = 256
"""Bytes; the length and the offset of every page part are multiples of it."""

HALF_MAX = 65504.0
"""The largest finite float16."""

CUT: dict[int, float] = {4: 0.04, 2: 0.19}
"""By bits: the share of a row's range that may be cut off at either end. One far value would set all levels: of 64
normally distributed values the four best levels span 0.6 of the range, with half of the squared error of all of it."""


@dataclass(frozen=True)
class Codec:
    """One way to store a page part. Use the instances in `CODECS` (and `DECODED`).

    name: "native", "int8", "int4" or "int2".
    bits: bits per element; 16 stands for "the model's own dtype" whatever its size.
    kernel: the Triton kernels read and write it; a codec without one is decoded and encoded by torch on any device.
    """

    name: str
    bits: int

    kernel: ClassVar[bool] = True

    @property
    def native(self) -> bool:
        """True when elements are kept in the model's dtype, without scales."""
        return self.bits == 16

    def check(self, dim: int) -> None:
        """Raise AdaptiveKVError unless a head dimension of `dim` packs into whole bytes."""
        group = 1 if self.native else 8 // self.bits
        if dim <= 0 or dim % group:
            raise AdaptiveKVError(f"head dimension {dim} does not fit {self.name}: it must be a multiple of {group}")

    def payload_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Bytes of the elements alone, without scales and padding."""
        return PAGE * dim * dtype.itemsize if self.native else PAGE * dim * self.bits // 8

    def part_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Exact stored bytes of one part, scales included, rounded up to UNIT.

        dim: head dimension; dtype: the model's dtype (used by native). Raises AdaptiveKVError if `dim` does not pack.
        """
        self.check(dim)
        size = self.payload_bytes(dim, dtype) + (0 if self.native else 2 * PAGE * 2)
        return -(-size // UNIT) * UNIT

    def fields(self, dim: int, dtype: torch.dtype) -> list[tuple[int, int]] | None:
        """Where the bytes of the slots lie: runs of 64 equal pieces, as (offset of the run, bytes a slot).

        None where slots share scales: such a slot cannot move to another part without being quantised again.
        """
        end = self.payload_bytes(dim, dtype)
        return [(0, end // PAGE)] + ([] if self.native else [(end, 2), (end + 2 * PAGE, 2)])

    def encode(self, x: Tensor, dtype: torch.dtype | None = None, count: Tensor | None = None) -> Tensor:
        """Encode parts.

        x: [n, 64, dim], any float dtype; dtype: the native storage dtype, by default x's own; count: int [n], used
        slots of each part (None: all), which matter to codecs whose slots share scales.
        Returns uint8 [n, part_bytes]; equal inputs give equal bytes, padding included.
        Raises AdaptiveKVError for a shape that is not [n, 64, dim] or a `dim` that does not pack.
        """
        n, dim = part_shape(x)
        dtype = dtype or x.dtype
        out = x.new_zeros(n, self.part_bytes(dim, dtype), dtype=torch.uint8)
        end = self.payload_bytes(dim, dtype)
        if self.native:
            out[:, :end] = x.to(dtype).reshape(n, PAGE * dim).view(torch.uint8)
            return out
        levels, scale, zero = self._fit(x.float())
        out[:, :end] = self._pack(levels).reshape(n, end)
        out[:, end : end + 2 * PAGE] = scale.reshape(n, PAGE).view(torch.uint8)
        out[:, end + 2 * PAGE : end + 4 * PAGE] = zero.reshape(n, PAGE).view(torch.uint8)
        return out

    def decode(self, raw: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """Decode parts: uint8 [n, part_bytes] -> float32 [n, 64, dim]. dtype: the native storage dtype.

        Slots that were never written decode to anything, NaN included: mask them.
        """
        elements, pair = self.unpack(raw, dim, dtype)
        if pair is None:
            return elements.float()
        scale, zero = pair
        return torch.addcmul(zero[..., None], elements, scale[..., None])

    def unpack(self, raw: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Take parts apart without applying the scales.

        raw: uint8 [n, part_bytes]. Returns (values float32 [n, 64, dim], None) for native, otherwise
        (levels float32 [n, 64, dim], (scale, zero)), both float32 [n, 64].
        """
        n = raw.shape[0]
        end = self.payload_bytes(dim, dtype)
        if self.native:
            return raw[:, :end].view(dtype).view(n, PAGE, dim).float(), None
        pair = raw[:, end : end + 4 * PAGE].view(torch.float16).float()  # [n, 2 * 64]
        packed = raw[:, :end].view(n, PAGE, -1)
        return self._levels(packed, dim), (pair[:, :PAGE], pair[:, PAGE:])

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    def _fit(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`_quantize` over each row's range, or without its ends, whichever leaves the smaller squared error."""
        low, high = x.aminmax(dim=-1, keepdim=True)  # [n, 64, 1]
        scale, zero = self._grid(low, high)
        if self.bits in CUT:
            ends = (high - low) * CUT[self.bits]
            inner = self._grid(low + ends, high - ends)
            better = self._error(x, *inner) < self._error(x, scale, zero)
            scale, zero = torch.where(better, inner[0], scale), torch.where(better, inner[1], zero)
        return self._level(x, scale, zero).to(torch.uint8), scale, zero

    def _quantize(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Levels (uint8, like x), scales and zeros (float16, like `low` and `high`) for values in [low, high]."""
        scale, zero = self._grid(low, high)
        return self._level(x, scale, zero).to(torch.uint8), scale, zero

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero, float16, of levels over low to high."""
        return ((high - low) / self._top).clamp_(max=HALF_MAX).half(), low.clamp(-HALF_MAX, HALF_MAX).half()

    def _level(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Levels as float32, against the rounded pair, the one that decoding sees.

        A scale of 0 (a constant row, or a range below float16) gives level 0, and the row decodes to its zero.
        """
        step = scale.float()
        return (x - zero.float()).div_(step.masked_fill(step == 0, torch.inf)).round_().clamp_(0, self._top)

    def _error(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Squared error of each row [..., 1]. In place: memory is short where pages are encoded."""
        back = self._level(x, scale, zero).mul_(scale.float()).add_(zero.float())
        return back.sub_(x).square_().sum(-1, keepdim=True)

    def _pack(self, levels: Tensor) -> Tensor:
        """uint8 levels [n, 64, dim] -> packed uint8 [n, 64, dim * bits / 8]."""
        parts = levels.chunk(8 // self.bits, dim=-1)
        packed = parts[0].clone()
        for i, part in enumerate(parts[1:], 1):
            packed |= part << (i * self.bits)
        return packed

    def _levels(self, packed: Tensor, dim: int) -> Tensor:
        """Packed uint8 [n, 64, dim * bits / 8] -> float32 levels [n, 64, dim]."""
        if self.bits == 8:
            return packed.float()
        n, width = packed.shape[0], packed.shape[-1]
        levels = packed.new_empty(n, PAGE, dim, dtype=torch.float32)
        for i in range(8 // self.bits):
            part = packed >> (i * self.bits) if i else packed
            # The last group has nothing above it, so its shift alone isolates it.
            levels[..., i * width : (i + 1) * width] = part if (i + 1) * self.bits == 8 else part & self._top
        return levels


def part_shape(x: Tensor) -> tuple[int, int]:
    """n and dim of parts [n, 64, dim]."""
    if x.dim() != 3 or x.shape[1] != PAGE:
        raise AdaptiveKVError(f"a page part is [n, {PAGE}, dim], got {list(x.shape)}")
    return x.shape[0], x.shape[2]


CODECS: dict[str, Codec] = {
    c.name: c for c in (Codec("native", 16), Codec("int8", 8), Codec("int4", 4), Codec("int2", 2))
}
"""Every codec of the Triton kernels by name."""
