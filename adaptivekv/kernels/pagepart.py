"""Pieces of the page kernels: one page part, decoded and encoded in Triton.

A part is worked on as four slices of the head dimension, [64, D / 4] each. Packed bytes hold levels of slices that lie
dim / 2 (int4) or dim / 4 (int2) apart (codec.py), so every codec reads and writes whole slices.
"""

import triton
import triton.language as tl

from adaptivekv.kernels.codec import HALF_MAX, MEAN_MAX

_HALF_MAX, _MEAN_MAX = tl.constexpr(HALF_MAX), tl.constexpr(MEAN_MAX)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds a small float32 half to even


@triton.jit
def load(
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
def _mean_at(col, S: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Where the means of slice S lie among the means of a part: in the order in which bytes hold levels."""
    W: tl.constexpr = D // 4
    GROUPS: tl.constexpr = BITS // 2
    return ((S % GROUPS) * W + col) * (8 // BITS) + S // GROUPS


@triton.jit
def load_means(byte_ptr, off, col, used, S: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """The means of slice S of the parts whose means lie at `off`, float32; off, col and used broadcast."""
    byte = tl.load(byte_ptr + off + _mean_at(col, S, D, BITS), used & (col < D // 4), 0)
    return (byte.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def decode(
    byte_ptr, native_ptr, half_ptr, off, slot, col, used,
    S: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ITEM: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Slice S of a part, decoded: [64, D / 4], 0 where not used."""
    x = load(byte_ptr, native_ptr, off, slot, col, used, S, D, BITS, ITEM).to(tl.float32)
    if BITS != 16:
        END: tl.constexpr = PAGE * D * BITS // 8
        scale = tl.load(half_ptr + (off + END) // 2 + slot, used, 0.0).to(tl.float32)
        mean = load_means(byte_ptr, off + END + 2 * PAGE, col, col >= 0, S, D, BITS)
        x = (x - ((1 << BITS) - 1) / 2) * scale[:, None] + tl.where(used[:, None], mean[None, :], 0.0)
    return x


@triton.jit
def _float8(x):
    """x rounded to the upper byte of a float16, half to even: as int32 0 to 255."""
    half = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return (half + 0x7F + ((half >> 8) & 1)) >> 8


@triton.jit
def encode(
    byte_ptr, native_ptr, half_ptr, off, slot, col, count, x, D: tl.constexpr, BITS: tl.constexpr, ITEM: tl.constexpr,
    PAGE: tl.constexpr, NATIVE: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """Encode four slices [64, D / 4], float32 and 0 from slot `count` on, into the part at `off`."""
    W: tl.constexpr = D // 4
    inside = col[None, :] < W
    mask = (slot[:, None] < PAGE) & inside
    if BITS == 16:
        for s in tl.static_range(4):
            at = off // ITEM + slot[:, None] * D + s * W + col[None, :]
            tl.store(native_ptr + at, x[s].to(NATIVE), mask)
    else:
        END: tl.constexpr = PAGE * D * BITS // 8
        means = off + END + 2 * PAGE
        away = (
            _away(byte_ptr, means, col, count, x[0], 0, D, BITS),
            _away(byte_ptr, means, col, count, x[1], 1, D, BITS),
            _away(byte_ptr, means, col, count, x[2], 2, D, BITS),
            _away(byte_ptr, means, col, count, x[3], 3, D, BITS),
        )
        most = tl.zeros([PAGE], tl.float32)
        for s in tl.static_range(4):
            most = tl.maximum(most, tl.max(tl.abs(away[s]), 1))
        scale = fit(most, BITS, REACH)
        pack(byte_ptr, half_ptr, off, off + slot[:, None] * (W * BITS // 2), slot, col, away, scale, mask, slot < PAGE,
              D, BITS, PAGE)  # fmt: skip


@triton.jit
def _away(byte_ptr, means, col, count, x, S: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """How far slice S of the slots lies from its mean, which is stored; means: where those of the part begin."""
    bound = tl.minimum(tl.maximum(x, -_MEAN_MAX), _MEAN_MAX)
    mean = _float8(tl.sum(bound, 0) / tl.maximum(count, 1).to(tl.float32))
    tl.store(byte_ptr + means + _mean_at(col, S, D, BITS), mean.to(tl.uint8), col < D // 4)
    value = (mean << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where((col < D // 4)[None, :], x - value[None, :], 0.0)


@triton.jit
def fit(most, BITS: tl.constexpr, REACH: tl.constexpr):
    """Scales, float16, of slots whose elements lie up to `most` away from the mean."""
    return tl.minimum(most * (REACH / (((1 << BITS) - 1) / 2)), _HALF_MAX).to(tl.float16)


@triton.jit
def pack(
    byte_ptr, half_ptr, off, at, slot, col, x, scale, mask, used, D: tl.constexpr, BITS: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Levels and scales of slots whose four slices lie x away from their mean. off: of the part, or one a slot."""
    W: tl.constexpr = D // 4
    GROUPS: tl.constexpr = BITS // 2
    for g in tl.static_range(GROUPS):
        byte = tl.zeros([PAGE, col.shape[0]], tl.int32)
        for p in tl.static_range(4 // GROUPS):
            byte += _level(x[g + p * GROUPS], scale, BITS).to(tl.int32) << (p * BITS)
        tl.store(byte_ptr + at + g * W + col[None, :], byte.to(tl.uint8), mask)
    tl.store(half_ptr + (off + PAGE * GROUPS * W) // 2 + slot, scale, used)


@triton.jit
def _level(x, scale, BITS: tl.constexpr):
    """Levels of [64, D / 4] in float32, against the rounded scale, the one that decoding sees."""
    TOP: tl.constexpr = (1 << BITS) - 1
    step = tl.where(scale == 0, float("inf"), scale.to(tl.float32))
    inverse = tl.div_rn(tl.full([x.shape[0]], 1.0, tl.float32), step)[:, None]
    level = tl.minimum(tl.maximum(x * inverse + TOP / 2, 0.0), TOP)
    return (level + _ROUND) - _ROUND
