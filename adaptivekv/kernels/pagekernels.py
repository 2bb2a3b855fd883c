"""The Triton kernels behind `pageops`: one program a page part, or a few parts in turn.

A part is worked on as four slices of the head dimension (pagepart.py). A rotation is 16 small products of slices with
tiles of the Hadamard matrix: of +-1, exact in 16 bits, so its sums are those of float32.

Under TRITON_INTERPRET=1 (set before this module is imported) the kernels run on CPU tensors.
"""

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptivekv.kernels import pageops
from adaptivekv.kernels.codec import PAGE, REACH, UNIT, Codec
from adaptivekv.kernels.hadamard import signs
from adaptivekv.kernels.pagepart import decode, encode, fit, load, load_means, pack

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_COPY = 8192  # bytes that one program copies


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
    """`pageops.recode`, equal to it up to ties of rounding; it runs itself where `dim` is no multiple of 4."""
    new.check(dim)
    if not len(src_off):
        return
    if dim % 4:
        pageops.recode.__wrapped__(src, dst, src_off, dst_off, count, old, new, dim, dtype, rotate)  # type: ignore[attr-defined]
        return
    kind = dtype if old.native else torch.float32  # values, not levels, are rotated
    # the interpreter multiplies bfloat16 bit patterns as integers
    kind = torch.float32 if _INTERPRETED and kind == torch.bfloat16 else kind
    matrix, block = _signs(dim, src_off.device, kind) if rotate else (src, 1)
    recode_kernel[(len(src_off),)](
        src, _as(src, dtype), _as(src, torch.float16), dst, _as(dst, dtype), _as(dst, torch.float16),
        src_off, dst_off, count, matrix, float(block) ** -0.5,
        D=dim, BW=max(16, triton.next_power_of_2(dim // 4)), OLD=old.bits, NEW=new.bits, ITEM=dtype.itemsize,
        ROTATE=rotate, TYPE=_TYPES[kind], NATIVE=_TYPES[dtype], REACH=REACH.get(new.bits, 0.0),
        PAD=new.part_bytes(dim, dtype) - new.stored_bytes(dim, dtype), PAGE=PAGE, UNIT=UNIT,
        num_warps=8 if dim > 128 else 4,
    )  # fmt: skip


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
    """`pageops.pack_slots`, equal to it up to ties of rounding; it runs itself for packed parts of odd dimensions."""
    if not codec.native and dim % 4:
        pageops.pack_slots.__wrapped__(src, dst, src_off, mask, start, dst_off, count, codec, dim, dtype)  # type: ignore[attr-defined]
        return
    pad = codec.part_bytes(dim, dtype) - codec.stored_bytes(dim, dtype)
    if not codec.native:
        middle = torch.arange(len(dst_off), device=start.device) * PAGE + count // 2
        centre = src_off[(torch.searchsorted(start, middle, right=True) - 1).clamp_(min=0)]
        repack_kernel[(len(src_off) + len(dst_off),)](
            src, _as(src, torch.float16), dst, _as(dst, torch.float16), src_off, mask, start, dst_off, count, centre,
            len(src_off), D=dim, BW=triton.next_power_of_2(dim // 4), BITS=codec.bits, REACH=REACH[codec.bits],
            PAD=pad, PAGE=PAGE, UNIT=UNIT,
        )  # fmt: skip
        return
    width = codec.payload_bytes(dim, dtype) // PAGE
    word = 4 if width % 4 == 0 else 2
    words = {4: torch.int32, 2: torch.int16}[word]
    pack_kernel[(len(src_off) + len(dst_off),)](
        _as(src, words), _as(dst, words), dst, src_off, mask, start, dst_off, count, len(src_off),
        WIDTH=width // word, BW=triton.next_power_of_2(width // word), WORD=word, PAD=pad, PAGE=PAGE, UNIT=UNIT,
    )  # fmt: skip


def copy_parts(src: Tensor, dst: Tensor, src_off: Tensor, dst_off: Tensor, size: int) -> None:
    """`pageops.copy_parts`; bit for bit equal to it."""
    if len(src_off):
        copy_kernel[(len(src_off), triton.cdiv(size, _COPY))](
            _as(src, torch.int32), _as(dst, torch.int32), src_off, dst_off, size // 4,
            BLOCK=min(_COPY, triton.next_power_of_2(size)) // 4,
        )  # fmt: skip


def _as(arena: Tensor, dtype: torch.dtype) -> Tensor:
    return arena[: arena.numel() // UNIT * UNIT].view(dtype)


@functools.lru_cache(maxsize=64)
def _signs(dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The Hadamard matrix of `dim` without its factor: [dim, dim] of -1, 0 and 1, and the size of its blocks."""
    return signs(dim, device)[0].to(dtype), dim & -dim


@triton.jit
def _rotate(x, sign_ptr, col, T: tl.constexpr, D: tl.constexpr, TYPE: tl.constexpr):
    """Slice T of the rotated part, without the factor of the rotation: float32 [64, D / 4]."""
    W: tl.constexpr = D // 4
    row = tl.arange(0, col.shape[0])
    mask = (row[:, None] < W) & (col[None, :] < W)
    acc = tl.zeros([x[0].shape[0], col.shape[0]], tl.float32)
    for s in tl.static_range(4):
        signs = tl.load(sign_ptr + (s * W + row[:, None]) * D + T * W + col[None, :], mask, 0.0)
        acc = tl.dot(x[s].to(TYPE), signs, acc, input_precision="tf32x3")  # signs are exact in any precision
    return acc


@triton.jit
def recode_kernel(
    src_ptr, src_native_ptr, src_half_ptr, dst_ptr, dst_native_ptr, dst_half_ptr,
    src_off_ptr, dst_off_ptr, count_ptr, sign_ptr, norm,
    D: tl.constexpr, BW: tl.constexpr, OLD: tl.constexpr, NEW: tl.constexpr, ITEM: tl.constexpr,
    ROTATE: tl.constexpr, TYPE: tl.constexpr, NATIVE: tl.constexpr,
    REACH: tl.constexpr, PAD: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One part."""
    i = tl.program_id(0)
    src_off = tl.multiple_of(tl.load(src_off_ptr + i), UNIT)
    dst_off = tl.multiple_of(tl.load(dst_off_ptr + i), UNIT)
    slot = tl.arange(0, PAGE)
    col = tl.arange(0, BW)
    count = tl.load(count_ptr + i).to(tl.int32)
    used = slot < count

    x = (
        decode(src_ptr, src_native_ptr, src_half_ptr, src_off, slot, col, used, 0, D, OLD, ITEM, PAGE),
        decode(src_ptr, src_native_ptr, src_half_ptr, src_off, slot, col, used, 1, D, OLD, ITEM, PAGE),
        decode(src_ptr, src_native_ptr, src_half_ptr, src_off, slot, col, used, 2, D, OLD, ITEM, PAGE),
        decode(src_ptr, src_native_ptr, src_half_ptr, src_off, slot, col, used, 3, D, OLD, ITEM, PAGE),
    )
    if ROTATE:
        x = (
            _rotate(x, sign_ptr, col, 0, D, TYPE) * norm,
            _rotate(x, sign_ptr, col, 1, D, TYPE) * norm,
            _rotate(x, sign_ptr, col, 2, D, TYPE) * norm,
            _rotate(x, sign_ptr, col, 3, D, TYPE) * norm,
        )
    encode(dst_ptr, dst_native_ptr, dst_half_ptr, dst_off, slot, col, count, x, D, NEW, ITEM, PAGE, NATIVE, REACH)
    if PAD:
        pad = tl.arange(0, UNIT)
        tl.store(dst_ptr + dst_off + _stored_bytes(D, NEW, ITEM, PAGE) + pad, tl.zeros([UNIT], tl.uint8), pad < PAD)


@triton.constexpr_function
def _stored_bytes(dim, bits, item, page):
    return page * dim * item if bits == 16 else page * dim * bits // 8 + 2 * page + dim


@triton.jit
def _taken(mask_ptr, start_ptr, i, slot):
    """Which slots of source part i are taken, and the running number of each."""
    taken = ((tl.load(mask_ptr + i) >> slot.to(tl.int64)) & 1).to(tl.int32)
    return taken > 0, tl.load(start_ptr + i) + tl.cumsum(taken, 0) - taken


@triton.jit
def pack_kernel(
    src_ptr, dst_ptr, dst_byte_ptr, src_off_ptr, mask_ptr, start_ptr, dst_off_ptr, count_ptr, parts,
    WIDTH: tl.constexpr, BW: tl.constexpr, WORD: tl.constexpr, PAD: tl.constexpr, PAGE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Native: the first `parts` programs scatter the slots of one part, the others clear what a new one leaves over."""
    i = tl.program_id(0)
    slot = tl.arange(0, PAGE)
    col = tl.arange(0, BW)
    inside = (col < WIDTH)[None, :]
    if i < parts:
        used, number = _taken(mask_ptr, start_ptr, i, slot)
        src = tl.multiple_of(tl.load(src_off_ptr + i), UNIT)
        dst = tl.load(dst_off_ptr + number // PAGE, used, 0)
        moved = used[:, None] & inside
        words = tl.load(src_ptr + src // WORD + slot[:, None] * WIDTH + col[None, :], moved, 0)
        tl.store(dst_ptr + (dst // WORD + number % PAGE * WIDTH)[:, None] + col[None, :], words, moved)
    else:
        new = tl.multiple_of(tl.load(dst_off_ptr + i - parts), UNIT)
        empty = slot >= tl.load(count_ptr + i - parts)
        none = tl.zeros([PAGE, BW], dst_ptr.dtype.element_ty)
        tl.store(dst_ptr + new // WORD + slot[:, None] * WIDTH + col[None, :], none, empty[:, None] & inside)
        if PAD:
            pad = tl.arange(0, UNIT)
            tl.store(dst_byte_ptr + new + PAGE * WIDTH * WORD + pad, tl.zeros([UNIT], tl.uint8), pad < PAD)


@triton.jit
def _shifted(
    byte_ptr, off, old, new, slot, col, used, step, moved, S: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """How far slice S of a part's slots lies from the means at `new`, one a slot, instead of its own at `old`."""
    level = load(byte_ptr, byte_ptr, off, slot, col, used, S, D, BITS, 1) - ((1 << BITS) - 1) / 2
    mean = load_means(byte_ptr, old, col, col >= 0, S, D, BITS)[None, :]
    shift = mean - load_means(byte_ptr, new[:, None], col[None, :], used[:, None], S, D, BITS)
    return tl.where(moved, level * step[:, None] + shift, 0.0)


@triton.jit
def repack_kernel(
    src_ptr, src_half_ptr, dst_ptr, dst_half_ptr, src_off_ptr, mask_ptr, start_ptr, dst_off_ptr, count_ptr, centre_ptr,
    parts, D: tl.constexpr, BW: tl.constexpr, BITS: tl.constexpr, REACH: tl.constexpr, PAD: tl.constexpr,
    PAGE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """`pack_kernel` for packed parts: a new part takes the mean of the part at `centre`, and slots their distance."""
    i = tl.program_id(0)
    slot = tl.arange(0, PAGE)
    col = tl.arange(0, BW)
    W: tl.constexpr = D // 4
    WIDTH: tl.constexpr = D * BITS // 8
    END: tl.constexpr = PAGE * WIDTH
    OFFSET: tl.constexpr = ((1 << BITS) - 1) / 2
    inside = (col < W)[None, :]
    if i < parts:
        used, number = _taken(mask_ptr, start_ptr, i, slot)
        src = tl.multiple_of(tl.load(src_off_ptr + i), UNIT)
        dst = tl.load(dst_off_ptr + number // PAGE, used, 0)
        centre = tl.load(centre_ptr + number // PAGE, used, 0)
        scale = tl.load(src_half_ptr + (src + END) // 2 + slot, used, 0.0)
        step = scale.to(tl.float32)
        old, new = src + END + 2 * PAGE, centre + END + 2 * PAGE
        moved = used[:, None] & inside
        away = (
            _shifted(src_ptr, src, old, new, slot, col, used, step, moved, 0, D, BITS),
            _shifted(src_ptr, src, old, new, slot, col, used, step, moved, 1, D, BITS),
            _shifted(src_ptr, src, old, new, slot, col, used, step, moved, 2, D, BITS),
            _shifted(src_ptr, src, old, new, slot, col, used, step, moved, 3, D, BITS),
        )
        most = tl.zeros([PAGE], tl.float32)
        for s in tl.static_range(4):
            most = tl.maximum(most, tl.max(tl.abs(away[s]), 1))
        scale = tl.where(most > step * (OFFSET + 0.5), fit(most, BITS, REACH), scale)
        at = (dst + number % PAGE * WIDTH)[:, None]
        pack(dst_ptr, dst_half_ptr, dst, at, number % PAGE, col, away, scale, moved, used,
              D, BITS, PAGE)  # fmt: skip
    else:
        to = tl.multiple_of(tl.load(dst_off_ptr + i - parts), UNIT)
        count = tl.load(count_ptr + i - parts)
        empty = slot >= count
        means = tl.load(centre_ptr + i - parts) + END + 2 * PAGE
        none = tl.zeros([PAGE, BW], tl.uint8)
        for s in tl.static_range(BITS // 2):
            tl.store(dst_ptr + to + slot[:, None] * WIDTH + s * W + col[None, :], none, empty[:, None] & inside)
        for s in tl.static_range(4):
            byte = tl.load(src_ptr + means + s * W + col, (col < W) & (col < count * BW), 0)
            tl.store(dst_ptr + to + END + 2 * PAGE + s * W + col, byte, col < W)
        tl.store(dst_half_ptr + (to + END) // 2 + slot, tl.zeros([PAGE], tl.float16), empty)
        if PAD:
            pad = tl.arange(0, UNIT)
            tl.store(dst_ptr + to + END + 2 * PAGE + D + pad, tl.zeros([UNIT], tl.uint8), pad < PAD)


@triton.jit
def copy_kernel(src_ptr, dst_ptr, src_off_ptr, dst_off_ptr, words, BLOCK: tl.constexpr):
    """BLOCK words of 4 bytes of one run."""
    i = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    src = src_ptr + tl.multiple_of(tl.load(src_off_ptr + i) // 4, 32)
    dst = dst_ptr + tl.multiple_of(tl.load(dst_off_ptr + i) // 4, 32)
    tl.store(dst + at, tl.load(src + at, at < words), at < words)
