"""The two Triton kernels of decode attention: one split over pages, one merge. `decode` launches them."""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _levels(packed, SLICE: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr, TYPE: tl.constexpr):
    """Levels of one slice of the head dimension, minus the middle of their range, exact in TYPE (float16 or float32).

    packed: words of WORD bytes. Centred levels keep the rounding errors of the probabilities from adding up on the
    value side, where a common offset would be multiplied by every one of them and then cancelled.
    """
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    SHIFT: tl.constexpr = 8 * (SLICE % WORD) + BITS * (SLICE // WORD)
    n = packed.to(tl.int16)
    if SHIFT > 0:
        n = n >> SHIFT
    if SHIFT + BITS != 8 or WORD != 1:
        n = n & ((1 << BITS) - 1)
    # In float16 the bit pattern 0x6400 | n is exactly 1024 + n, cheaper than a conversion.
    if TYPE == tl.float16:  # noqa: SIM300
        return (n | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + MIDDLE)
    return n.to(TYPE) - MIDDLE


@triton.jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _tile_at(rows, col, M: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr, SLICE: tl.constexpr):
    """Where slice SLICE of a [M, D] matrix lies, and its mask: the dims that `_levels` finds in SLICE of each word."""
    if BITS == 16:
        return rows[:, None] * D + col[None, :], (rows[:, None] < M) & (col[None, :] < D)
    GROUP: tl.constexpr = D * BITS // 8  # dims in one bit group
    dim = (SLICE // WORD) * GROUP + col * WORD + SLICE % WORD
    return rows[:, None] * D + dim[None, :], (rows[:, None] < M) & (col[None, :] < GROUP // WORD)


@triton.jit
def _query(
    q_ptr, rows, col, M: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr, SLICE: tl.constexpr
):
    at, mask = _tile_at(rows, col, M, D, BITS, WORD, SLICE)
    return tl.load(q_ptr + at, mask=mask, other=0.0)


@triton.jit
def _store(
    ptr, acc, rows, col, M: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr, SLICE: tl.constexpr
):
    at, mask = _tile_at(rows, col, M, D, BITS, WORD, SLICE)
    tl.store(ptr + at, acc, mask=mask)


@triton.jit
def split_kernel(
    q_ptr, k_ptr, v_ptr, half_ptr,
    k_off_ptr, v_off_ptr, count_ptr, k_off_stride, v_off_stride, count_stride,
    out_ptr, lse_ptr, page_lse_ptr, pages, scale, softcap,
    M: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    K_TYPE: tl.constexpr, V_TYPE: tl.constexpr, K_WORD: tl.constexpr, V_WORD: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, PAGE: tl.constexpr,
    FULL: tl.constexpr, CAP: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    rows = tl.arange(0, BM)
    slot = tl.arange(0, PAGE)
    k_col = tl.arange(0, BK)
    v_col = tl.arange(0, BV)
    # A packed slot is WK words, each holding one element of every slice; a native slot is one slice of elements.
    K_PARTS: tl.constexpr = 1 if K_BITS == 16 else K_WORD * 8 // K_BITS
    V_PARTS: tl.constexpr = 1 if V_BITS == 16 else V_WORD * 8 // V_BITS
    WK: tl.constexpr = DK // K_PARTS
    WV: tl.constexpr = DV // V_PARTS
    K_MIDDLE: tl.constexpr = 0 if K_BITS == 16 else 1 << (K_BITS - 1)
    V_MIDDLE: tl.constexpr = 0 if V_BITS == 16 else 1 << (V_BITS - 1)

    q_ptr += head * M * DK
    q0 = _query(q_ptr, rows, k_col, M, DK, K_BITS, K_WORD, 0).to(K_TYPE)
    q_sum = tl.sum(q0.to(tl.float32), 1)
    if K_PARTS >= 2:
        q1 = _query(q_ptr, rows, k_col, M, DK, K_BITS, K_WORD, 1).to(K_TYPE)
        q_sum += tl.sum(q1.to(tl.float32), 1)
    if K_PARTS == 4:
        q2 = _query(q_ptr, rows, k_col, M, DK, K_BITS, K_WORD, 2).to(K_TYPE)
        q3 = _query(q_ptr, rows, k_col, M, DK, K_BITS, K_WORD, 3).to(K_TYPE)
        q_sum += tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)

    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    shift = tl.zeros([BM], tl.float32)
    acc0 = tl.zeros([BM, BV], tl.float32)
    acc1 = tl.zeros([BM, BV], tl.float32)
    acc2 = tl.zeros([BM, BV], tl.float32)
    acc3 = tl.zeros([BM, BV], tl.float32)

    for page in range(split, pages, splits):
        # The pipeline may run ahead of the last page: the mask makes it see offset 0 there, at no measurable cost.
        here = page < pages
        k_off = tl.multiple_of(tl.load(k_off_ptr + head * k_off_stride + page, mask=here, other=0), 256)
        v_off = tl.multiple_of(tl.load(v_off_ptr + head * v_off_stride + page, mask=here, other=0), 256)
        if FULL:
            used = slot < PAGE
        else:  # an absent page has no used slot, so nothing of it is loaded
            used = slot < tl.load(count_ptr + head * count_stride + page, mask=here, other=0)

        # Scores, in units of log 2.
        k_at = slot[:, None] * WK + k_col[None, :]
        k_mask = used[:, None] & (k_col[None, :] < WK)
        scores = tl.zeros([BM, PAGE], tl.float32)
        if K_BITS == 16:
            k = tl.load(k_ptr + k_off // K_WORD + k_at, mask=k_mask, other=0.0)
            scores = _dot(q0, tl.trans(k.to(K_TYPE)), scores) * scale
        else:
            k = tl.load(k_ptr + k_off // K_WORD + k_at, mask=k_mask, other=0)
            pair = half_ptr + k_off // 2 + PAGE * WK * K_WORD // 2
            k_step = tl.load(pair + slot, mask=used, other=0.0).to(tl.float32) * scale
            k_zero = tl.load(pair + PAGE + slot, mask=used, other=0.0).to(tl.float32) * scale + K_MIDDLE * k_step
            scores = _dot(q0, tl.trans(_levels(k, 0, K_BITS, K_WORD, K_TYPE)), scores)
            if K_PARTS >= 2:
                scores = _dot(q1, tl.trans(_levels(k, 1, K_BITS, K_WORD, K_TYPE)), scores)
            if K_PARTS == 4:
                scores = _dot(q2, tl.trans(_levels(k, 2, K_BITS, K_WORD, K_TYPE)), scores)
                scores = _dot(q3, tl.trans(_levels(k, 3, K_BITS, K_WORD, K_TYPE)), scores)
            scores = scores * k_step[None, :] + q_sum[:, None] * k_zero[None, :]
        if CAP:  # tanh(x) = 2 sigmoid(2x) - 1
            scores = (2.0 * tl.sigmoid(scores * (2.0 / softcap)) - 1.0) * (softcap * _LOG2E)
        if not FULL:
            scores = tl.where(used[None, :], scores, -float("inf"))

        # Online softmax; a finite floor keeps -inf - -inf out of rows that have seen no key yet.
        new_top = tl.maximum(top, tl.max(scores, 1))
        floor = tl.maximum(new_top, -1e38)
        weights = tl.exp2(scores - floor[:, None])
        fade = tl.exp2(top - floor)
        mass = tl.sum(weights, 1)
        total = total * fade + mass
        top = new_top
        if STATS:
            page_lse = (floor + tl.log2(mass)) * _LN2
            tl.store(page_lse_ptr + (head * pages + page) * M + rows, page_lse, mask=rows < M)

        # Values.
        v_at = slot[:, None] * WV + v_col[None, :]
        v_mask = used[:, None] & (v_col[None, :] < WV)
        acc0 = acc0 * fade[:, None]
        if V_BITS == 16:
            v = tl.load(v_ptr + v_off // V_WORD + v_at, mask=v_mask, other=0.0)
            acc0 = _dot(weights.to(V_TYPE), v.to(V_TYPE), acc0)
        else:
            v = tl.load(v_ptr + v_off // V_WORD + v_at, mask=v_mask, other=0)
            pair = half_ptr + v_off // 2 + PAGE * WV * V_WORD // 2
            v_step = tl.load(pair + slot, mask=used, other=0.0).to(tl.float32)
            v_zero = tl.load(pair + PAGE + slot, mask=used, other=0.0).to(tl.float32) + V_MIDDLE * v_step
            shift = shift * fade + tl.sum(weights * v_zero[None, :], 1)
            scaled = (weights * v_step[None, :]).to(V_TYPE)
            acc0 = _dot(scaled, _levels(v, 0, V_BITS, V_WORD, V_TYPE), acc0)
            if V_PARTS >= 2:
                acc1 = _dot(scaled, _levels(v, 1, V_BITS, V_WORD, V_TYPE), acc1 * fade[:, None])
            if V_PARTS >= 4:
                acc2 = _dot(scaled, _levels(v, 2, V_BITS, V_WORD, V_TYPE), acc2 * fade[:, None])
                acc3 = _dot(scaled, _levels(v, 3, V_BITS, V_WORD, V_TYPE), acc3 * fade[:, None])

    at = head * splits + split
    out_ptr += at * M * DV
    norm = (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    tl.store(lse_ptr + at * M + rows, (tl.maximum(top, -1e38) + tl.log2(total)) * _LN2, mask=rows < M)
    _store(out_ptr, (acc0 + shift[:, None]) * norm, rows, v_col, M, DV, V_BITS, V_WORD, 0)
    if V_PARTS >= 2:
        _store(out_ptr, (acc1 + shift[:, None]) * norm, rows, v_col, M, DV, V_BITS, V_WORD, 1)
    if V_PARTS >= 4:
        _store(out_ptr, (acc2 + shift[:, None]) * norm, rows, v_col, M, DV, V_BITS, V_WORD, 2)
        _store(out_ptr, (acc3 + shift[:, None]) * norm, rows, v_col, M, DV, V_BITS, V_WORD, 3)


@triton.jit
def merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, splits,
    M: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    s = tl.arange(0, BS)
    col = tl.arange(0, BV)
    lse = tl.load(part_lse_ptr + (head * splits + s) * M + row, mask=s < splits, other=-float("inf"))
    floor = tl.maximum(tl.max(lse, 0), -1e38)
    total = tl.sum(tl.exp(lse - floor), 0)
    acc = tl.zeros([BV], tl.float32)
    CHUNK: tl.constexpr = 16  # rows in flight: enough to hide latency, few enough for registers
    for start in range(0, splits, CHUNK):
        i = start + tl.arange(0, CHUNK)
        at = (head * splits + i) * M + row
        weight = tl.exp(tl.load(part_lse_ptr + at, mask=i < splits, other=-float("inf")) - floor)
        mask = (i[:, None] < splits) & (col[None, :] < DV)
        part = tl.load(part_ptr + at[:, None] * DV + col[None, :], mask=mask, other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
    tl.store(out_ptr + (head * M + row) * DV + col, acc / tl.where(total > 0, total, 1.0), mask=col < DV)
    tl.store(lse_ptr + head * M + row, floor + tl.log(total))
