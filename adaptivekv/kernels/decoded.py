"""Codecs that the Triton kernels do not know: float8, KIVI and KVQuant. Attention decodes their parts to floats.

A part is a few arrays one after another, padded to a multiple of 256 bytes; levels lie as `codec.py` packs them.

    fp8      e4m3 [64, dim] | scale [64]                                              64 dim + 128
    kiviNk   levels [64, dim] | scale [dim] | zero [dim]                              8 N dim + 4 dim
    kiviNv   levels [64, dim] | scale [64, groups] | zero [64, groups]                8 N dim + 256 groups
    nuq4k    levels [64, dim] | scale [dim] | centre [dim] | indices | outliers       32 dim + 4 dim + 4 outliers
    nuq4v    levels [64, dim] | scale [64] | centre [64] | indices | outliers         32 dim + 256 + 4 outliers

groups = dim / 32, rounded up; outliers = 1 % of 64 dim, rounded up. Scales, zeros, centres and outliers are float16,
indices 16 bits. `encode` needs `count` where a page is not full: what lies in unused slots then changes nothing.
"""

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from adaptivekv.kernels.codec import HALF_MAX, PAGE, UNIT, Codec, part_shape

GROUP = 32
"""Channels of a value that share a scale (KIVI)."""

OUTLIERS = 0.01
"""Share of a part's elements that are stored apart, in float16 (KVQuant)."""

_FLOAT8_MAX = 448.0  # of e4m3


@dataclass(frozen=True)
class Decoded(Codec):
    """Base of the codecs of this file: subclasses say which arrays a part has, and how to write and read them."""

    kernel: ClassVar[bool] = False

    def layout(self, dim: int) -> list[tuple[int, torch.dtype]]:
        """Elements and dtype of each array of a part, in the order in which they lie."""
        raise NotImplementedError

    def _write(self, x: Tensor, used: Tensor) -> list[Tensor]:
        """x float32 [n, 64, dim], 0 where not used (bool [n, 64, 1]) -> the arrays, each [n, ...]."""
        raise NotImplementedError

    def _read(self, arrays: list[Tensor], dim: int) -> Tensor:
        """The arrays, each [n, elements] -> float32 [n, 64, dim]."""
        raise NotImplementedError

    def part_bytes(self, dim: int, dtype: torch.dtype) -> int:
        self.check(dim)
        return -(-sum(n * kind.itemsize for n, kind in self.layout(dim)) // UNIT) * UNIT

    def fields(self, dim: int, dtype: torch.dtype) -> list[tuple[int, int]] | None:
        return None

    def encode(self, x: Tensor, dtype: torch.dtype | None = None, count: Tensor | None = None) -> Tensor:
        n, dim = part_shape(x)
        used = torch.ones(n, PAGE, 1, dtype=torch.bool, device=x.device)
        if count is not None:
            used = (torch.arange(PAGE, device=x.device) < count[:, None])[..., None]
        out = x.new_zeros(n, self.part_bytes(dim, dtype or x.dtype), dtype=torch.uint8)
        at = 0
        for array in self._write(x.float().masked_fill(~used, 0.0), used):
            raw = array.reshape(n, -1).view(torch.uint8)
            out[:, at : at + raw.shape[1]] = raw
            at += raw.shape[1]
        return out

    def unpack(self, raw: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, None]:
        arrays, at = [], 0
        for n, kind in self.layout(dim):
            size = n * kind.itemsize
            arrays.append(raw[:, at : at + size].contiguous().view(kind))  # an odd offset has no view of wider types
            at += size
        return self._read(arrays, dim), None

    def _runs(self, dim: int) -> list[tuple[int, int]]:
        """`fields` of a layout all of whose arrays have a piece for each slot."""
        out, at = [], 0
        for n, kind in self.layout(dim):
            out.append((at, n * kind.itemsize // PAGE))
            at += n * kind.itemsize
        return out


@dataclass(frozen=True)
class Float8(Decoded):
    """e4m3 with one scale a slot, so that its largest element becomes 448 (FP8 formats, arXiv 2209.05433).

    Differs from the paper, which scales tensors, weights and activations of a training step: a slot is the unit here.
    """

    def layout(self, dim: int) -> list[tuple[int, torch.dtype]]:
        return [(PAGE * dim, torch.float8_e4m3fn), (PAGE, torch.float16)]

    def fields(self, dim: int, dtype: torch.dtype) -> list[tuple[int, int]]:
        return self._runs(dim)

    def _write(self, x: Tensor, used: Tensor) -> list[Tensor]:
        scale = (x.abs().amax(-1, keepdim=True) / _FLOAT8_MAX).clamp_(max=HALF_MAX).half()
        step = scale.float()
        x = (x / step.masked_fill(step == 0, torch.inf)).clamp_(-_FLOAT8_MAX, _FLOAT8_MAX)  # beyond them lies NaN
        return [x.to(torch.float8_e4m3fn), scale]

    def _read(self, arrays: list[Tensor], dim: int) -> Tensor:
        levels, scale = arrays
        return levels.view(-1, PAGE, dim).float().mul_(scale.float()[..., None])


@dataclass(frozen=True)
class Channels(Decoded):
    """KIVI's keys (arXiv 2402.02750): `bits` levels between the smallest and largest value of a channel in a page.

    Differs from the paper: a group of tokens is a page, 64 of them (the paper's has 32).
    """

    def layout(self, dim: int) -> list[tuple[int, torch.dtype]]:
        return [(PAGE * dim * self.bits // 8, torch.uint8), (dim, torch.float16), (dim, torch.float16)]

    def _write(self, x: Tensor, used: Tensor) -> list[Tensor]:
        low, high = _range(x, used, 1)
        levels, scale, zero = _quantize(x, low, high, self.bits)
        return [self._pack(levels), scale, zero]

    def _read(self, arrays: list[Tensor], dim: int) -> Tensor:
        levels, scale, zero = arrays
        x = self._levels(levels.view(len(levels), PAGE, -1), dim)
        return x.mul_(scale.float()[:, None]).add_(zero.float()[:, None])


@dataclass(frozen=True)
class Groups(Decoded):
    """KIVI's values (arXiv 2402.02750): `bits` levels for each slot and 32 channels; the last group may be short."""

    def layout(self, dim: int) -> list[tuple[int, torch.dtype]]:
        pairs = (PAGE * -(-dim // GROUP), torch.float16)
        return [(PAGE * dim * self.bits // 8, torch.uint8), pairs, pairs]

    def fields(self, dim: int, dtype: torch.dtype) -> list[tuple[int, int]]:
        return self._runs(dim)

    def _write(self, x: Tensor, used: Tensor) -> list[Tensor]:
        dim = x.shape[2]
        # The last element again, as often as a short group lacks some: that changes no smallest or largest.
        groups = pad(x, (0, -dim % GROUP), mode="replicate").unflatten(2, (-1, GROUP))  # [n, 64, groups, 32]
        low, high = groups.aminmax(dim=-1, keepdim=True)
        levels, scale, zero = _quantize(groups, low, high, self.bits)
        return [self._pack(levels.flatten(2)[..., :dim]), scale, zero]

    def _read(self, arrays: list[Tensor], dim: int) -> Tensor:
        levels, scale, zero = arrays
        x = self._levels(levels.view(len(levels), PAGE, -1), dim)
        scale, zero = (
            pair.float().view(len(levels), PAGE, -1).repeat_interleave(GROUP, 2)[..., :dim] for pair in (scale, zero)
        )
        return x.mul_(scale).add_(zero)


@dataclass(frozen=True)
class NonUniform(Decoded):
    """KVQuant (arXiv 2401.18079): levels that lie denser near the centre, and outliers stored apart in float16.

    by_channel: levels span the range of a channel in the page (keys) instead of a slot (values), outliers left out.
    Outliers are the elements of the part that lie furthest from the mean of their channel (slot), in its standard
    deviations, a fixed number of them, so that all parts have one size.

    Differs from the paper: levels are those of a normal distribution, not fitted to a layer's calibration data weighted
    by its gradients; ranges are those of a page, not calibrated; outliers share the part's allowance instead of 1 % of
    each channel. A cache sees keys after the rotary embedding, the paper quantises them before it.
    """

    by_channel: bool

    def outliers(self, dim: int) -> int:
        """Elements of a part that are stored apart."""
        return -(-PAGE * dim * round(100 * OUTLIERS) // 100)

    def layout(self, dim: int) -> list[tuple[int, torch.dtype]]:
        ranges = (dim if self.by_channel else PAGE, torch.float16)
        index = torch.int16 if PAGE * dim <= 1 << 16 else torch.int32
        apart = self.outliers(dim)
        levels = (PAGE * dim * self.bits // 8, torch.uint8)
        return [levels, ranges, ranges, (apart, index), (apart, torch.float16)]

    def _write(self, x: Tensor, used: Tensor) -> list[Tensor]:
        dim, axis = x.shape[2], 1 if self.by_channel else 2
        x = x.clamp(-HALF_MAX, HALF_MAX)
        live = used.expand_as(x)
        size = live.sum(axis, keepdim=True).clamp_(min=1)
        away = (x - x.sum(axis, keepdim=True) / size).masked_fill_(~live, 0.0)
        spread = (away.square().sum(axis, keepdim=True) / size).sqrt_().clamp_(min=1e-30)
        score = (away.abs_() / spread).masked_fill_(~live, -1.0)
        index = score.flatten(1).topk(self.outliers(dim)).indices.sort(dim=1).values  # [n, outliers]
        value = x.flatten(1).gather(1, index).half()
        inside = live.flatten(1).scatter(1, index, False).view_as(x)
        low, high = _range(x, inside, axis)
        scale, centre = ((high - low) / 2).half(), ((high + low) / 2).half()
        step = scale.float()
        x = (x - centre.float()) / step.masked_fill(step == 0, torch.inf)
        points = codebook(self.bits, x.device)
        levels = torch.bucketize(x, (points[1:] + points[:-1]) / 2)
        kind = self.layout(dim)[3][1]  # indices above 32767 wrap to negative ones
        return [self._pack(levels.to(torch.uint8)), scale, centre, index.to(kind), value]

    def _read(self, arrays: list[Tensor], dim: int) -> Tensor:
        packed, scale, centre, index, value = arrays
        n, axis = len(packed), 1 if self.by_channel else 2
        levels = self._levels(packed.view(n, PAGE, -1), dim).int()
        x = codebook(self.bits, packed.device)[levels]
        x = x.mul_(scale.float().unsqueeze(axis)).add_(centre.float().unsqueeze(axis))
        index = index.long() & (0xFFFF if index.dtype == torch.int16 else -1)
        # clamped: the bytes of an absent page may say anything
        return x.flatten(1).scatter_(1, index.clamp_(0, PAGE * dim - 1), value.float()).view(n, PAGE, dim)


def _quantize(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (uint8, like x), scales and zeros (float16, like `low` and `high`) for values in [low, high].

    A scale of 0 (a constant, or a range below float16) gives level 0, which decodes to the zero.
    """
    top = (1 << bits) - 1
    scale, zero = ((high - low) / top).clamp_(max=HALF_MAX).half(), low.clamp(-HALF_MAX, HALF_MAX).half()
    step = scale.float().masked_fill_(scale == 0, torch.inf)
    levels = (x - zero.float()).div_(step).round_().clamp_(0, top)
    return levels.to(torch.uint8), scale, zero


def _range(x: Tensor, used: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest of the used elements along an axis, which is kept; 0 and 0 where there are none."""
    low = x.masked_fill(~used, torch.inf).amin(axis, keepdim=True)
    high = x.masked_fill(~used, -torch.inf).amax(axis, keepdim=True)
    none = low > high
    return low.masked_fill_(none, 0.0), high.masked_fill_(none, 0.0)


@lru_cache(maxsize=16)
def codebook(bits: int, device: torch.device) -> Tensor:
    """2 ** bits levels from -1 to 1: quantiles of the normal distribution, at the middles of equal shares of it.

    float32, rising, symmetric. (The shape is also that of least mean squared error for normal data and many levels.)
    """
    n, normal = 1 << bits, NormalDist()
    with torch.inference_mode(False), torch.no_grad():
        points = torch.tensor([normal.inv_cdf((i + 0.5) / n) for i in range(n)], dtype=torch.float64)
        return (points / points[-1]).float().to(device)


DECODED: dict[str, Codec] = {
    c.name: c
    for c in (
        Float8("fp8", 8), Channels("kivi4k", 4), Channels("kivi2k", 2), Groups("kivi4v", 4), Groups("kivi2v", 2),
        NonUniform("nuq4k", 4, True), NonUniform("nuq4v", 4, False),
    )
}  # fmt: skip
"""Every codec of this file by name."""
