"""The Triton kernels behind `pageops`: one program a page part, or a few parts in turn.

A part is worked on as four slices of the head dimension. Packed bytes hold levels of slices that lie dim / 2 (int4) or
dim / 4 (int2) apart (codec.py), so every codec reads and writes whole slices, and a rotation is 16 small products of
slices with tiles of the Hadamard matrix: of +-1, exact in 16 bits, so its sums are those of float32.

Under TRITON_INTERPRET=1 (set before this module is imported) the kernels run on CPU tensors.
"""

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptivekv.kernels import pageops
from adaptivekv.kernels.codec import CUT, PAGE, UNIT, Codec
from adaptivekv.kernels.hadamard import signs

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_COPY = 8192  # bytes that one program copies
_HALF_MAX = tl.constexpr(65504.0)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds a small float32 half to even


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
    kind = dtype if old.native else torch.float16  # levels up to 255 are exact in float16
    # the interpreter multiplies bfloat16 bit patterns as integers
    kind = torch.float32 if _INTERPRETED and kind == torch.bfloat16 else kind
    matrix, block = _signs(dim, src_off.device, kind) if rotate else (src, 1)
    recode_kernel[(len(src_off),)](
        src, _as(src, dtype), _as(src, torch.float16), dst, _as(dst, dtype), _as(dst, torch.float16),
        src_off, dst_off, count, matrix, float(block) ** -0.5,
        D=dim, BW=max(16, triton.next_power_of_2(dim // 4)), OLD=old.bits, NEW=new.bits, ITEM=dtype.itemsize,
        ROTATE=rotate, BLOCK=block, TYPE=_TYPES[kind], NATIVE=_TYPES[dtype], CUT=CUT.get(new.bits, 0.0),
        PAD=new.part_bytes(dim, dtype) - _stored(new, dim, dtype), PAGE=PAGE, UNIT=UNIT,
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
    """`pageops.pack_slots`; bit for bit equal to it."""
    width = codec.payload_bytes(dim, dtype) // PAGE
    word = 4 if width % 4 == 0 else 2 if width % 2 == 0 else 1
    words = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[word]
    pack_kernel[(len(src_off) + len(dst_off),)](
        _as(src, words), _as(src, torch.int16), _as(dst, words), _as(dst, torch.int16), dst,
        src_off, mask, start, dst_off, count, len(src_off),
        WIDTH=width // word, BW=triton.next_power_of_2(width // word), WORD=word, PAIRS=not codec.native,
        PAD=codec.part_bytes(dim, dtype) - _stored(codec, dim, dtype), PAGE=PAGE, UNIT=UNIT,
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


def _stored(codec: Codec, dim: int, dtype: torch.dtype) -> int:
    """Bytes of a part without its padding."""
    return codec.payload_bytes(dim, dtype) + (0 if codec.native else 4 * PAGE)


@functools.lru_cache(maxsize=64)
def _signs(dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The Hadamard matrix of `dim` without its factor: [dim, dim] of -1, 0 and 1, and the size of its blocks."""
    return signs(dim, device)[0].to(dtype), dim & -dim


@triton.jit
def _load(
    byte_ptr, native_ptr, off, slot, col, used,
    S: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    """Slice S of a part, [64, D / 4]: elements, or levels as float32."""
    W: tl.constexpr = D // 4
    mask = used[:, None] & (col[None, :] < W)
    if BITS == 16:
        x = tl.load(native_ptr + off // ITEM + slot[:, None] * D + S * W + col[None, :], mask, 0.0)
    else:
        GROUPS: tl.constexpr = BITS // 2  # slices side by side in the bytes of a slot
        at = off + slot[:, None] * (GROUPS * W) + (S % GROUPS) * W + col[None, :]
        byte = tl.load(byte_ptr + at, mask, 0).to(tl.int32)
        x = ((byte >> (S // GROUPS * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
    return x


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
def _value(
    x, scale, zero, norm, col,
    S: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slice S in float32, from what `_load` and `_rotate` gave."""
    x = x.to(tl.float32)
    if ROTATE:  # and a constant row rotates into the first channel of each block
        x = x * norm
        zero = tl.where(((S * (D // 4) + col) % BLOCK == 0)[None, :], zero / norm, 0.0)
    if BITS != 16:
        x = x * scale + zero
    return x


@triton.jit
def _store(
    byte_ptr, native_ptr, half_ptr, off, slot, col, x, D: tl.constexpr, BITS: tl.constexpr, ITEM: tl.constexpr,
    PAGE: tl.constexpr, NATIVE: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Encode four slices [64, D / 4], float32, into the part at `off`."""
    W: tl.constexpr = D // 4
    inside = col[None, :] < W
    mask = (slot[:, None] < PAGE) & inside
    if BITS == 16:
        for s in tl.static_range(4):
            at = off // ITEM + slot[:, None] * D + s * W + col[None, :]
            tl.store(native_ptr + at, x[s].to(NATIVE), mask)
    else:
        low = tl.full([PAGE], float("inf"), tl.float32)
        high = tl.full([PAGE], -float("inf"), tl.float32)
        for s in tl.static_range(4):
            low = tl.minimum(low, tl.min(tl.where(inside, x[s], float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(inside, x[s], -float("inf")), 1))
        scale, zero = _grid(low, high, BITS, PAGE)
        if CUT > 0:
            ends = (high - low) * CUT
            inner_scale, inner_zero = _grid(low + ends, high - ends, BITS, PAGE)
            inner_error = _error(x, inner_scale, inner_zero, inside, BITS)
            better = inner_error < _error(x, scale, zero, inside, BITS)
            scale = tl.where(better, inner_scale, scale)
            zero = tl.where(better, inner_zero, zero)
        GROUPS: tl.constexpr = BITS // 2
        for g in tl.static_range(GROUPS):
            byte = tl.zeros([PAGE, col.shape[0]], tl.int32)
            for p in tl.static_range(4 // GROUPS):
                byte += _level(x[g + p * GROUPS], scale, zero, BITS).to(tl.int32) << (p * BITS)
            tl.store(byte_ptr + off + slot[:, None] * (GROUPS * W) + g * W + col[None, :], byte.to(tl.uint8), mask)
        pair = half_ptr + (off + PAGE * GROUPS * W) // 2
        tl.store(pair + slot, scale)
        tl.store(pair + PAGE + slot, zero)


@triton.jit
def _grid(low, high, BITS: tl.constexpr, PAGE: tl.constexpr):
    """Scale and zero, float16 [64], of levels over low to high."""
    TOP: tl.constexpr = (1 << BITS) - 1
    scale = tl.minimum(tl.div_rn(high - low, tl.full([PAGE], TOP, tl.float32)), _HALF_MAX).to(tl.float16)
    return scale, tl.minimum(tl.maximum(low, -_HALF_MAX), _HALF_MAX).to(tl.float16)


@triton.jit
def _level(x, scale, zero, BITS: tl.constexpr):
    """Levels of [64, D / 4] in float32, against the rounded pair, the one that decoding sees; a scale of 0 gives 0."""
    TOP: tl.constexpr = (1 << BITS) - 1
    step = scale.to(tl.float32)
    inverse = tl.where(
        step == 0, 0.0, tl.div_rn(tl.full([x.shape[0]], 1.0, tl.float32), tl.where(step == 0, 1.0, step))
    )
    level = tl.minimum(tl.maximum((x - zero.to(tl.float32)[:, None]) * inverse[:, None], 0.0), TOP)
    return (level + _ROUND) - _ROUND


@triton.jit
def _error(x, scale, zero, inside, BITS: tl.constexpr):
    """Squared error of the four slices on this grid: float32 [64]."""
    error = tl.zeros([x[0].shape[0]], tl.float32)
    for s in tl.static_range(4):
        back = _level(x[s], scale, zero, BITS) * scale.to(tl.float32)[:, None] + zero.to(tl.float32)[:, None]
        error += tl.sum(tl.where(inside, (back - x[s]) * (back - x[s]), 0.0), 1)
    return error


@triton.jit
def recode_kernel(
    src_ptr, src_native_ptr, src_half_ptr, dst_ptr, dst_native_ptr, dst_half_ptr,
    src_off_ptr, dst_off_ptr, count_ptr, sign_ptr, norm,
    D: tl.constexpr, BW: tl.constexpr, OLD: tl.constexpr, NEW: tl.constexpr, ITEM: tl.constexpr,
    ROTATE: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr, NATIVE: tl.constexpr,
    CUT: tl.constexpr, PAD: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One part: levels are rotated as they are, exactly, and take their scale and zero afterwards."""
    i = tl.program_id(0)
    src_off = tl.multiple_of(tl.load(src_off_ptr + i), UNIT)
    dst_off = tl.multiple_of(tl.load(dst_off_ptr + i), UNIT)
    slot = tl.arange(0, PAGE)
    col = tl.arange(0, BW)
    used = slot < tl.load(count_ptr + i)

    x = (
        _load(src_ptr, src_native_ptr, src_off, slot, col, used, 0, D, OLD, ITEM),
        _load(src_ptr, src_native_ptr, src_off, slot, col, used, 1, D, OLD, ITEM),
        _load(src_ptr, src_native_ptr, src_off, slot, col, used, 2, D, OLD, ITEM),
        _load(src_ptr, src_native_ptr, src_off, slot, col, used, 3, D, OLD, ITEM),
    )
    if ROTATE:
        x = (
            _rotate(x, sign_ptr, col, 0, D, TYPE),
            _rotate(x, sign_ptr, col, 1, D, TYPE),
            _rotate(x, sign_ptr, col, 2, D, TYPE),
            _rotate(x, sign_ptr, col, 3, D, TYPE),
        )
    scale = tl.zeros([PAGE, 1], tl.float32)
    zero = tl.zeros([PAGE, 1], tl.float32)
    if OLD != 16:
        pair = src_half_ptr + (src_off + PAGE * (OLD // 2) * (D // 4)) // 2
        scale = tl.load(pair + slot, used, 0.0).to(tl.float32)[:, None]
        zero = tl.load(pair + PAGE + slot, used, 0.0).to(tl.float32)[:, None]
    z = (
        _value(x[0], scale, zero, norm, col, 0, D, OLD, ROTATE, BLOCK),
        _value(x[1], scale, zero, norm, col, 1, D, OLD, ROTATE, BLOCK),
        _value(x[2], scale, zero, norm, col, 2, D, OLD, ROTATE, BLOCK),
        _value(x[3], scale, zero, norm, col, 3, D, OLD, ROTATE, BLOCK),
    )
    _store(dst_ptr, dst_native_ptr, dst_half_ptr, dst_off, slot, col, z, D, NEW, ITEM, PAGE, NATIVE, CUT)
    if PAD:
        pad = tl.arange(0, UNIT)
        tl.store(dst_ptr + dst_off + _part_bytes(D, NEW, ITEM, PAGE) + pad, tl.zeros([UNIT], tl.uint8), pad < PAD)


@triton.constexpr_function
def _part_bytes(dim, bits, item, page):
    return page * dim * item if bits == 16 else page * dim * bits // 8 + 4 * page


@triton.jit
def pack_kernel(
    src_ptr, src_pair_ptr, dst_ptr, dst_pair_ptr, dst_byte_ptr, src_off_ptr, mask_ptr, start_ptr, dst_off_ptr,
    count_ptr, parts, WIDTH: tl.constexpr, BW: tl.constexpr, WORD: tl.constexpr, PAIRS: tl.constexpr,
    PAD: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The first `parts` programs scatter the slots of one source part, the others clear what a new part leaves over."""
    i = tl.program_id(0)
    slot = tl.arange(0, PAGE)
    col = tl.arange(0, BW)
    inside = (col < WIDTH)[None, :]
    END: tl.constexpr = PAGE * WIDTH * WORD  # where the scales begin
    if i < parts:
        taken = ((tl.load(mask_ptr + i) >> slot.to(tl.int64)) & 1).to(tl.int32)
        number = tl.load(start_ptr + i) + tl.cumsum(taken, 0) - taken
        used = taken > 0
        src = tl.multiple_of(tl.load(src_off_ptr + i), UNIT)
        dst = tl.load(dst_off_ptr + number // PAGE, used, 0)
        to = number % PAGE
        moved = used[:, None] & inside
        words = tl.load(src_ptr + src // WORD + slot[:, None] * WIDTH + col[None, :], moved, 0)
        tl.store(dst_ptr + (dst // WORD + to * WIDTH)[:, None] + col[None, :], words, moved)
        if PAIRS:
            for at in tl.static_range(END // 2, END // 2 + 2 * PAGE, PAGE):
                tl.store(dst_pair_ptr + dst // 2 + at + to, tl.load(src_pair_ptr + src // 2 + at + slot, used, 0), used)
    else:
        new = tl.multiple_of(tl.load(dst_off_ptr + i - parts), UNIT)
        empty = slot >= tl.load(count_ptr + i - parts)
        none = tl.zeros([PAGE, BW], dst_ptr.dtype.element_ty)
        tl.store(dst_ptr + new // WORD + slot[:, None] * WIDTH + col[None, :], none, empty[:, None] & inside)
        if PAIRS:
            for at in tl.static_range(END // 2, END // 2 + 2 * PAGE, PAGE):
                tl.store(dst_pair_ptr + new // 2 + at + slot, tl.zeros([PAGE], tl.int16), empty)
        if PAD:
            pad = tl.arange(0, UNIT)
            end = dst_byte_ptr + new + END + (4 * PAGE if PAIRS else 0)
            tl.store(end + pad, tl.zeros([UNIT], tl.uint8), pad < PAD)


@triton.jit
def copy_kernel(src_ptr, dst_ptr, src_off_ptr, dst_off_ptr, words, BLOCK: tl.constexpr):
    """BLOCK words of 4 bytes of one run."""
    i = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    src = src_ptr + tl.multiple_of(tl.load(src_off_ptr + i) // 4, 32)
    dst = dst_ptr + tl.multiple_of(tl.load(dst_off_ptr + i) // 4, 32)
    tl.store(dst + at, tl.load(src + at, at < words), at < words)
