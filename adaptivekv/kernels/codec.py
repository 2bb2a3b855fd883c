"""How one page part is stored: the keys, or the values, of 64 slots of one KV head.

A part is a run of bytes in an arena whose length is a multiple of 256, so that the whole arena can be read as rows.
`native` stores the model's own dtype. `intN` stores N-bit levels with one float16 scale a slot and the mean of the
page's slots: `value = (level - (2**N - 1) / 2) * scale + mean`. What is common to a page's slots, often most of a key,
takes none of the levels. One scale a slot is what lets attention fold it into scores and probabilities, and one mean a
page what lets it add both to scores and results once a page, instead of touching every element.

    intN part: levels (uint8, 64 * dim * N / 8 bytes) | scale float16 [64] | mean float8 [dim] | padding to 256
    int8: byte j of a slot is dim j
    int4: byte j holds dim j in its low nibble and dim j + dim/2 in its high nibble
    int2: byte j holds dims j, j + dim/4, j + dim/2, j + 3*dim/4, from the low bits to the high
    mean: the upper byte of a float16 (e5m2), in the order in which the bytes of a slot hold their levels

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

REACH: dict[int, float] = {8: 1.0, 4: 1.0, 2: 0.7}
"""By bits: how far the levels reach, as a share of a slot's largest distance from the mean. One far value would set all
levels: with four of them it is rather cut off (docs/kernels.md)."""

MEAN_MAX = 57344.0
"""The largest finite mean."""


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

    def stored_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Bytes of a part without its padding."""
        return self.payload_bytes(dim, dtype) + (0 if self.native else 2 * PAGE + dim)

    def part_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Exact stored bytes of one part, scales included, rounded up to UNIT.

        dim: head dimension; dtype: the model's dtype (used by native). Raises AdaptiveKVError if `dim` does not pack.
        """
        self.check(dim)
        return -(-self.stored_bytes(dim, dtype) // UNIT) * UNIT

    def fields(self, dim: int, dtype: torch.dtype) -> list[tuple[int, int]] | None:
        """Where the bytes of the slots lie: runs of 64 equal pieces, as (offset of the run, bytes a slot).

        None where slots share scales or a mean: such a slot cannot move to another part as it is.
        """
        return [(0, self.payload_bytes(dim, dtype) // PAGE)] if self.native else None

    def encode(self, x: Tensor, dtype: torch.dtype | None = None, count: Tensor | None = None) -> Tensor:
        """Encode parts.

        x: [n, 64, dim], any float dtype; dtype: the native storage dtype, by default x's own; count: int [n], used
        slots of each part (None: all): the others matter to no scale and no mean.
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
        x = x.float()
        if count is not None:
            x = x.masked_fill(torch.arange(PAGE, device=x.device)[:, None] >= count[:, None, None], 0.0)
        size = PAGE if count is None else count[:, None].clamp(min=1)
        mean = float8(x.clamp(-MEAN_MAX, MEAN_MAX).sum(1) / size)
        x = x - mean[:, None]
        scale = self._scale(x.abs().amax(-1))
        return self._lay(out, self._level(x, scale), scale, mean)

    def repack(self, rows: Tensor, scale: Tensor, old: Tensor, mean: Tensor, to: Tensor) -> Tensor:
        """Packed slots in new parts of other means, each with its old scale wherever that reaches.

        rows: uint8 [k, bytes of a slot]; scale: float16 [k]; old: [k, dim], the mean of each slot's part; mean: [n,
        dim], of the new parts; slot i becomes slot to[i] % 64 of part to[i] // 64. Returns uint8 [n, part_bytes],
        zeros where no slot came. Slots whose mean stays keep all their bits.
        """
        n, dim = mean.shape
        step = scale.float()
        x = self._levels(rows, dim).sub_(self.offset).mul_(step[:, None]).add_(old - mean[to // PAGE])
        most = x.abs().amax(-1)
        scale = torch.where(most > step * (self.offset + 0.5), self._scale(most), scale)
        levels, scales = rows.new_zeros(n * PAGE, dim), scale.new_zeros(n * PAGE)
        levels[to], scales[to] = self._level(x, scale), scale
        out = rows.new_zeros(n, self.part_bytes(dim, torch.uint8))
        return self._lay(out, levels.view(n, PAGE, dim), scales.view(n, PAGE), mean)

    def decode(self, raw: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """Decode parts: uint8 [n, part_bytes] -> float32 [n, 64, dim]. dtype: the native storage dtype.

        Slots that were never written decode to anything, NaN included: mask them.
        """
        elements, packed = self.unpack(raw, dim, dtype)
        if packed is None:
            return elements.float()
        scale, mean = packed
        return torch.addcmul(mean[:, None], elements, scale[..., None])

    def unpack(self, raw: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Take parts apart without applying scales and means.

        raw: uint8 [n, part_bytes]. Returns (values float32 [n, 64, dim], None) for native, otherwise
        (levels less `offset`, float32 [n, 64, dim], (scale [n, 64], mean [n, dim])), both float32.
        """
        n = raw.shape[0]
        if self.native:
            return raw[:, : self.payload_bytes(dim, dtype)].view(dtype).view(n, PAGE, dim).float(), None
        end = self.payload_bytes(dim, dtype)
        scale = raw[:, end : end + 2 * PAGE].view(torch.float16).float()
        mean = self.mean(raw[:, end + 2 * PAGE : end + 2 * PAGE + dim])
        return self._levels(raw[:, :end].view(n, PAGE, -1), dim).sub_(self.offset), (scale, mean)

    def mean(self, stored: Tensor) -> Tensor:
        """Means as parts hold them, uint8 [n, dim] -> float32."""
        by_dim = stored.unflatten(1, (-1, 8 // self.bits)).transpose(1, 2)
        return by_dim.reshape(stored.shape).view(torch.float8_e5m2).float()

    @property
    def offset(self) -> float:
        """The level that stands for the mean; a half, so no level is that itself."""
        return self._top / 2

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    def _scale(self, most: Tensor) -> Tensor:
        """Scales, float16, of slots whose elements lie up to `most` away from the mean."""
        return (most * (REACH[self.bits] / self.offset)).clamp_(max=HALF_MAX).half()

    def _level(self, x: Tensor, scale: Tensor) -> Tensor:
        """Levels (uint8) of x [..., dim], the distances from the mean, against the rounded scale [...]."""
        step = scale.float().masked_fill_(scale == 0, torch.inf)[..., None]  # 0: a slot that is the mean, or nearly
        return (x * step.reciprocal_()).add_(self.offset).round_().clamp_(0, self._top).to(torch.uint8)

    def _lay(self, out: Tensor, levels: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
        """Levels uint8 [n, 64, dim], scales float16 [n, 64] and means [n, dim] into zeroed parts [n, part_bytes]."""
        n, _, dim = levels.shape
        end = PAGE * dim * self.bits // 8
        out[:, :end] = self._pack(levels).reshape(n, end)
        out[:, end : end + 2 * PAGE] = scale.view(torch.uint8)
        stored = mean.to(torch.float8_e5m2).view(torch.uint8).unflatten(1, (8 // self.bits, -1))
        out[:, end + 2 * PAGE : end + 2 * PAGE + dim] = stored.transpose(1, 2).reshape(n, dim)
        return out

    def _pack(self, levels: Tensor) -> Tensor:
        """uint8 levels [n, 64, dim] -> packed uint8 [n, 64, dim * bits / 8]."""
        parts = levels.chunk(8 // self.bits, dim=-1)
        packed = parts[0].clone()
        for i, part in enumerate(parts[1:], 1):
            packed |= part << (i * self.bits)
        return packed

    def _levels(self, packed: Tensor, dim: int) -> Tensor:
        """Packed uint8 [..., dim * bits / 8] -> float32 levels [..., dim]."""
        if self.bits == 8:
            return packed.float()
        width = packed.shape[-1]
        levels = packed.new_empty(*packed.shape[:-1], dim, dtype=torch.float32)
        for i in range(8 // self.bits):
            part = packed >> (i * self.bits) if i else packed
            # The last group has nothing above it, so its shift alone isolates it.
            levels[..., i * width : (i + 1) * width] = part if (i + 1) * self.bits == 8 else part & self._top
        return levels


def float8(x: Tensor) -> Tensor:
    """x, within MEAN_MAX, rounded to what a mean can be: 3 significant bits. The levels take up what it lacks."""
    return x.half().to(torch.float8_e5m2).float()


def part_shape(x: Tensor) -> tuple[int, int]:
    """n and dim of parts [n, 64, dim]."""
    if x.dim() != 3 or x.shape[1] != PAGE:
        raise AdaptiveKVError(f"a page part is [n, {PAGE}, dim], got {list(x.shape)}")
    return x.shape[0], x.shape[2]


CODECS: dict[str, Codec] = {
    c.name: c for c in (Codec("native", 16), Codec("int8", 8), Codec("int4", 4), Codec("int2", 2))
}
"""Every codec of the Triton kernels by name."""
