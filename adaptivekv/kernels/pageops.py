"""Changes of stored page parts, any number of them in one launch: `recode`, `pack_slots`, `copy_parts`.

All take arenas (uint8) and byte offsets, and write in place: nothing decoded ever lies in memory. The functions
of this file are plain torch, the CPU path and the reference; `pagekernels` holds the Triton twins that run in their
place where the offsets lie on a GPU.
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
        store(dst, dst_off[cut], new.encode(hadamard(x) if rotate else x, dtype))


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
    """Copy chosen slots of parts into fuller parts of the same codec: stored bytes move, nothing is quantised again.

    src_off: int64 [n]; mask: int64 [n], bit s says that slot s is taken; start: int64 [n], the running number of a
    part's first taken slot. Slot number g lands in slot g % 64 of the part at dst_off[g // 64].
    dst_off: int64 [m]; count: int32 [m] used slots of the new parts, the others are written as zeros.
    """
    size, end = codec.part_bytes(dim, dtype), codec.payload_bytes(dim, dtype)
    width, step = end // PAGE, max(1, _CHUNK // size)
    src_off, mask, start, dst_off = (table.to(dst.device) for table in (src_off, mask, start, dst_off))
    taken = (mask[:, None] >> torch.arange(PAGE, device=mask.device)) & 1 > 0
    part, slot = taken.nonzero(as_tuple=True)
    number = start[part] + (taken.cumsum(1) - 1)[part, slot]
    order = torch.argsort(number)
    part, slot, number = part[order], slot[order], number[order]
    for i in range(0, len(dst_off), step):
        n = min(step, len(dst_off) - i)
        first, last = torch.searchsorted(number, torch.tensor([i, i + n], device=number.device) * PAGE).tolist()
        from_, at, to = src_off[part[first:last]], slot[first:last], number[first:last] - i * PAGE
        out = torch.zeros(n, size, dtype=torch.uint8, device=dst.device)
        out[:, :end].view(n, PAGE, width)[to // PAGE, to % PAGE] = fetch(src, from_ + at * width, width).to(dst.device)
        if not codec.native:
            for pair in (end, end + 2 * PAGE):  # scales, then zeros
                two = fetch(src, from_ + pair + at * 2, 2).to(dst.device)
                out[:, pair : pair + 2 * PAGE].view(n, PAGE, 2)[to // PAGE, to % PAGE] = two
        store(dst, dst_off[i : i + n], out)


@has_twin("pagekernels")
def copy_parts(src: Tensor, dst: Tensor, src_off: Tensor, dst_off: Tensor, size: int) -> None:
    """Copy runs of `size` bytes: src_off, dst_off int64 [n]; all of them are multiples of 128."""
    step = max(1, _CHUNK // size)
    for i in range(0, len(src_off), step):
        store(dst, dst_off[i : i + step], fetch(src, src_off[i : i + step], size))
