"""Changes of stored page parts, any number of them in one launch: `recode`, `pack_slots`, `copy_parts`.

All take arenas (uint8) and byte offsets, and write in place: nothing decoded ever lies in memory. The functions
of this file are plain torch, the CPU path and the reference; `pagekernels` holds the Triton twins that run in their
place where the offsets lie on a GPU and the codecs have kernels.
Parts that are read must not overlap parts that are written, unless they are the same bytes of a `copy_parts`.
"""

import math

import torch
from torch import Tensor

from adaptivekv.kernels.codec import PAGE, UNIT, Codec
from adaptivekv.kernels.dispatch import has_twin
from adaptivekv.kernels.hadamard import hadamard

_CHUNK = 1 << 20
"""Bytes (float32) that the torch functions decode at a time; the Triton kernels need none."""


def fetch(arena: Tensor, off: Tensor, size: int) -> Tensor:
    """Runs of `size` bytes at multiples of gcd(size, UNIT): uint8 [n, size] on the arena's device, a copy."""
    rows, index = _rows(arena, off, size)
    return rows.index_select(0, index).view(len(off), size)


def store(arena: Tensor, off: Tensor, parts: Tensor) -> None:
    """Write runs of bytes, uint8 [n, size], to offsets [n]."""
    rows, index = _rows(arena, off, parts.shape[1])
    rows.index_copy_(0, index, parts.reshape(len(index), -1).to(arena.device))


def _rows(arena: Tensor, off: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The arena as rows of at most UNIT bytes, and which of them the runs at `off` are."""
    unit = math.gcd(size, UNIT)
    index = (off[:, None] // unit + torch.arange(size // unit, device=off.device)).view(-1)
    return arena[: arena.numel() // unit * unit].view(-1, unit), index.to(arena.device)


@has_twin("pagekernels")
def recode(
    src: Tensor,
    dst: Tensor,
    src_off: Tensor,
    dst_off: Tensor,
    count: Tensor,
    old: Codec,
    new: Codec,
    dim: int,
    dtype: torch.dtype,
    rotate: bool = False,
) -> None:
    """Decode parts of `src` and encode them into `dst`, Hadamard-rotating in between if `rotate` (its own inverse).

    src_off, dst_off: int64 [n] byte offsets; count: int32 [n] used slots, the others are written as zeros.
    dim: elements of a slot; dtype: the native storage dtype. Raises AdaptiveKVError if `dim` does not pack.
    """
    size, step = old.part_bytes(dim, dtype), max(1, _CHUNK // (PAGE * dim * 4))
    for i in range(0, len(src_off), step):
        cut = slice(i, i + step)
        x = old.decode(fetch(src, src_off[cut], size), dim, dtype)
        # zeroed before they are rotated or measured: unused slots may hold anything, NaN included
        x[torch.arange(PAGE, device=x.device) >= count[cut, None].to(x.device)] = 0
        store(dst, dst_off[cut], new.encode(hadamard(x) if rotate else x, dtype, count[cut].to(x.device)))


@has_twin("pagekernels")
def pack_slots(
    src: Tensor,
    dst: Tensor,
    src_off: Tensor,
    mask: Tensor,
    start: Tensor,
    dst_off: Tensor,
    count: Tensor,
    codec: Codec,
    dim: int,
    dtype: torch.dtype,
) -> None:
    """Copy chosen slots of parts into fuller parts of the same codec.

    Where slots stand alone (`Codec.fields`) their bytes move. Packed parts with kernels keep each slot's scale and take
    the mean of the part that their middle slot comes from, so most slots keep all bits; the levels of the others are
    rounded again (`Codec.repack`). Where slots share scales they are decoded, and encoded with their new neighbours.
    src_off: int64 [n]; mask: int64 [n], bit s says that slot s is taken; start: int64 [n], rising, the running number
    of a part's first taken slot. Slot number g lands in slot g % 64 of the part at dst_off[g // 64].
    dst_off: int64 [m]; count: int32 [m] used slots of the new parts, the others are written as zeros.
    """
    size, fields = codec.part_bytes(dim, dtype), codec.fields(dim, dtype)
    step = max(1, _CHUNK // (size if fields else PAGE * dim * 4))
    src_off, mask, start, dst_off, count = (table.to(dst.device) for table in (src_off, mask, start, dst_off, count))
    taken = (mask[:, None] >> torch.arange(PAGE, device=mask.device)) & 1 > 0
    part, slot = taken.nonzero(as_tuple=True)
    number = start[part] + (taken.cumsum(1) - 1)[part, slot]
    order = torch.argsort(number)
    part, slot, number = part[order], slot[order], number[order]
    for i in range(0, len(dst_off), step):
        n = min(step, len(dst_off) - i)
        first, last = torch.searchsorted(number, torch.tensor([i, i + n], device=number.device) * PAGE).tolist()
        from_, at, to = src_off[part[first:last]], slot[first:last], number[first:last] - i * PAGE
        if fields is None and codec.kernel:
            end = codec.payload_bytes(dim, dtype)
            rows = fetch(src, from_ + at * (end // PAGE), end // PAGE).to(dst.device)
            scale, mean = fetch(src, from_ + end, 2 * PAGE + dim).to(dst.device).split([2 * PAGE, dim], 1)
            scale = scale.contiguous().view(torch.float16).gather(1, at[:, None]).squeeze(1)
            mean, new = codec.mean(mean), torch.zeros(n, dim, device=dst.device)
            middle = to % PAGE == count[i + to // PAGE] // 2
            new[to[middle] // PAGE] = mean[middle]
            out = codec.repack(rows, scale, mean, new, to)
        elif fields is None:
            x = _slots(src, from_, at, codec, dim, dtype, step)
            fresh = torch.zeros(n * PAGE, dim, device=dst.device).index_copy_(0, to, x.to(dst.device))
            out = codec.encode(fresh.view(n, PAGE, dim), dtype, count[i : i + n])
        else:
            out = torch.zeros(n, size, dtype=torch.uint8, device=dst.device)
            for run, width in fields:
                piece = fetch(src, from_ + run + at * width, width).to(dst.device)
                out[:, run : run + PAGE * width].view(n, PAGE, width)[to // PAGE, to % PAGE] = piece
        store(dst, dst_off[i : i + n], out)


def _slots(src: Tensor, off: Tensor, slot: Tensor, codec: Codec, dim: int, dtype: torch.dtype, step: int) -> Tensor:
    """Slots of parts, decoded: off, slot int64 [n] -> float32 [n, dim] beside `src`; `step` parts at a time."""
    off, slot = off.to(src.device), slot.to(src.device)
    parts, which = off.unique(return_inverse=True)
    out = torch.empty(len(off), dim, device=src.device)
    for i in range(0, len(parts), step):
        x = codec.decode(fetch(src, parts[i : i + step], codec.part_bytes(dim, dtype)), dim, dtype)
        here = ((which >= i) & (which < i + step)).nonzero().squeeze(1)
        out[here] = x[which[here] - i, slot[here]]
    return out


@has_twin("pagekernels")
def copy_parts(src: Tensor, dst: Tensor, src_off: Tensor, dst_off: Tensor, size: int) -> None:
    """Copy runs of `size` bytes: src_off, dst_off int64 [n]; all of them are multiples of 128."""
    step = max(1, _CHUNK // size)
    for i in range(0, len(src_off), step):
        store(dst, dst_off[i : i + step], fetch(src, src_off[i : i + step], size))
