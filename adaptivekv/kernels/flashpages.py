"""The Triton kernels of prefill attention: blocks of query rows over pages of one format. `prefill` launches them."""

import triton
import triton.language as tl

from adaptivekv.kernels.language import load_means, log2, mean

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _decode_field(words, step, zero, AT: tl.constexpr, BITS: tl.constexpr, INTERPRET: tl.constexpr):
    """level * step + zero as float16, for the level in the BITS bits from bit AT of each 16-bit word.

    words int16, step and zero float16, of one shape. The level's bits are or'ed where they lie into the float16 1024,
    which makes it 1024 + level * 2**(AT % 8), exactly; one multiply-add leaves the level and another the value. The
    bits never leave their half of a register, so an instruction does two of each.
    """
    SHIFT: tl.constexpr = AT // 8 * 8
    MASK: tl.constexpr = ((1 << BITS) - 1) << (AT % 8)
    if INTERPRET:  # it has no inline assembly
        level = (((words >> SHIFT) & MASK) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        return ((level - 1024.0) * (1.0 / (1 << (AT % 8)))).to(tl.float16) * step + zero
    else:
        # float16 bits: 1 is 15 << 10; halving it takes 1 << 10 off. -1024 >> n is (0xE400 - (n << 10)).
        UNIT: tl.constexpr = (15 << 10) - (AT % 8 << 10)
        BASE: tl.constexpr = 0xE400 - (AT % 8 << 10)
        return tl.inline_asm_elementwise(
            f"""{{
                .reg .b32 level, unit, base;
                mov.b32 unit, {UNIT | (UNIT << 16)};
                mov.b32 base, {BASE | (BASE << 16)};
                shr.u32 level, $1, {SHIFT};
                lop3.b32 level, level, {MASK | (MASK << 16)}, {0x64006400}, 0xEA;
                fma.rn.f16x2 level, level, unit, base;
                fma.rn.f16x2 $0, level, $2, $3;
            }}""",
            "=r,r,r,r", [words, step, zero], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _values(words, step, zeros, AT: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr, INTERPRET: tl.constexpr):
    """Bits AT to AT + SPAN of words [N, W] as values [N, W * SPAN / BITS]: the fields of BITS bits side by side.

    Joining before the words' own dimension leaves every value in the thread, and beside the neighbour, that it was
    unpacked in.
    """
    if SPAN == BITS:
        return _decode_field(words, step, zeros[AT // BITS], AT, BITS, INTERPRET)
    else:
        low = _values(words, step, zeros, AT, SPAN // 2, BITS, INTERPRET)
        high = _values(words, step, zeros, AT + SPAN // 2, SPAN // 2, BITS, INTERPRET)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (low.shape[0], 2 * low.shape[1]))


@triton.jit
def _store(ptr, at, value, size, INTERPRET: tl.constexpr):
    """ptr[at] = value where at < size, float32, by the threads that hold the value.

    Before `tl.store` the compiler moves results of a product between warps: two barriers a step, and registers.
    """
    if INTERPRET:
        tl.store(ptr + at, value, mask=at < size)
    else:
        tl.inline_asm_elementwise(
            """{
                .reg .pred inside;
                .reg .b64 to;
                setp.lt.s32 inside, $2, $4;
                mad.wide.s32 to, $2, 4, $1;
                @inside st.global.b32 [to], $3;
                mov.b32 $0, 0;
            }""",
            "=r,l,r,r,r", [ptr.to(tl.int64), at, value, size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _half(wide_ptr, off, index, mask):
    """float16 number `index` after the byte offset `off`, a multiple of 4.

    Read through the 32-bit word it is in, for Triton prefetches nothing narrower.
    """
    word = tl.load(wide_ptr + (off // 4 + index // 2), mask=mask, other=0)
    return (word >> index % 2 * 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _part(
    native_ptr, word_ptr, wide_ptr, off_ptr, page, stop, off, column, used,
    D: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr, FULL: tl.constexpr,
    TYPE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The keys or values of SPAN pages as a tile [N, columns] of TYPE, zero where not used. off: int64 [N], bytes."""
    slot = column % PAGE
    WIDTH: tl.constexpr = D * BITS // 16  # elements or words of a slot
    word = tl.arange(0, W)
    at = (off // 2 + slot * WIDTH)[:, None] + word[None, :]
    mask = used[:, None] & (word < WIDTH)[None, :]
    if BITS == 16:
        return tl.load(native_ptr + at, mask=mask, other=0.0).to(TYPE)
    else:
        words = tl.load(word_ptr + at, mask=mask, other=0)
        step = tl.broadcast_to(_half(wide_ptr, off, PAGE * WIDTH + slot, used)[:, None], words.shape)
        MIDDLE: tl.constexpr = ((1 << BITS) - 1) / 2  # the level of the mean
        means = ()
        for i in tl.static_range(SPAN):  # from scalars: a page's mean is one for all of its slots
            at_means = tl.load(off_ptr + page + i, mask=page + i < stop, other=0) + 2 * PAGE * (WIDTH + 1)
            means = means + (load_means(wide_ptr, at_means, word, (word < WIDTH) & (page + i + 0 * word < stop), BITS),)
        zeros = ()
        for s in tl.static_range(16 // BITS):
            middle = tl.broadcast_to(mean(means[0], word, s, BITS)[None, :], words.shape)
            for i in tl.static_range(1, SPAN):
                middle = tl.where((column // PAGE == i)[:, None], mean(means[i], word, s, BITS)[None, :], middle)
            if not FULL:  # what an absent page holds can be NaN
                middle = tl.where(used[:, None], middle, 0.0)
            zeros = zeros + ((middle - step * MIDDLE).to(tl.float16),)
        return _values(words, step, zeros, 0, 16, BITS, INTERPRET)


@triton.jit
def _dims(D: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr):
    """For each column of a padded tile in the order of dims: its dim, and whether it has one.

    Byte b of a slot holds dims b, b + D * BITS / 8, ... (codec.py): groups, one for each level in a byte. A slot is
    padded to W words (native: elements), and thereby each group to 2 * W dims.
    """
    GROUP: tl.constexpr = D if BITS == 16 else D * BITS // 8
    WIDE: tl.constexpr = W if BITS == 16 else 2 * W
    col = tl.arange(0, W * 16 // BITS)
    return col // WIDE * GROUP + col % WIDE, col % WIDE < GROUP


@triton.jit
def _by_dim(x, BITS: tl.constexpr, W: tl.constexpr):
    """The inverse of `_by_field`."""
    if BITS == 16:
        return x
    else:
        return tl.reshape(tl.permute(tl.reshape(x, (x.shape[0], 2, 8 // BITS, W)), (0, 2, 3, 1)), x.shape)


@triton.jit
def prefill_kernel(
    q_ptr, native_ptr, word_ptr, wide_ptr, k_off_ptr, v_off_ptr, count_ptr, k_stride, v_stride, count_stride,
    out_ptr, lse_ptr, page_lse_ptr, M, pages, scale, softcap,
    DK: tl.constexpr, DV: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    K_TYPE: tl.constexpr, V_TYPE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    SPAN: tl.constexpr, PAGE: tl.constexpr, FULL: tl.constexpr, CAP: tl.constexpr, STATS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One program a block of BM query rows, KV head and split of its pages; SPAN pages a step.

    native_ptr, word_ptr, wide_ptr: the arena as 16-bit elements, 16-bit words and 32-bit words. BK, BV: padded elements
    or words of a slot. scale: positive; in units of log 2 unless CAP. page_lse_ptr: [heads, pages, M], with STATS.
    """
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    start = split * pages // tl.num_programs(2)
    stop = (split + 1) * pages // tl.num_programs(2)
    k_off_ptr += head * k_stride
    v_off_ptr += head * v_stride
    count_ptr += head * count_stride
    column = tl.arange(0, PAGE * SPAN)
    slot = column % PAGE

    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.arange(0, BK * 16 // K_BITS)
    dim, held = col // BK * (DK * K_BITS // 16) + col % BK, col % BK < DK * K_BITS // 16
    q_at = (head * M + rows)[:, None] * DK + dim[None, :]
    q = tl.load(q_ptr + q_at, mask=(rows < M)[:, None] & held[None, :], other=0.0).to(K_TYPE)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV * 16 // V_BITS], tl.float32)
    for page in range(start, stop, SPAN):
        at = page + column // PAGE
        used = at < stop
        k_off = tl.multiple_of(tl.load(k_off_ptr + at, mask=used, other=0), 256)
        v_off = tl.multiple_of(tl.load(v_off_ptr + at, mask=used, other=0), 256)
        if not FULL:  # an absent page has no used slot, so nothing of it is loaded
            used = slot < tl.load(count_ptr + at, mask=used, other=0)

        # Scores, in units of log 2 once multiplied by `rate`.
        k = _part(
            native_ptr, word_ptr, wide_ptr, k_off_ptr, page, stop, k_off, column, used,
            DK, K_BITS, BK, PAGE, SPAN, FULL, K_TYPE, INTERPRET,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k))
        rate = scale
        if CAP:  # tanh(x) = 2 sigmoid(2x) - 1
            scores = (2.0 * tl.sigmoid(scores * (2.0 * scale / softcap)) - 1.0) * (softcap * _LOG2E)
            rate = 1.0
        if not FULL or SPAN > 1:
            # From scalars: the vector above lies as the loads need it, and would be loaded again as scores need it.
            seen = column < 0
            for i in tl.static_range(SPAN):
                here = page + i < stop
                if FULL:
                    count = tl.where(here, PAGE, 0)
                else:
                    count = tl.load(count_ptr + page + i, mask=here, other=0)
                seen = seen | ((column >= i * PAGE) & (column < i * PAGE + count))
            scores = tl.where(seen[None, :], scores, -float("inf"))

        # Online softmax; a finite floor keeps -inf - -inf out of rows that have seen no key yet.
        new_top = tl.maximum(top, tl.max(scores, 1) * rate)
        floor = tl.maximum(new_top, -1e38)
        weights = tl.exp2(scores * rate - floor[:, None])
        fade = tl.exp2(top - floor)
        mass = tl.sum(weights, 1)
        total = total * fade + mass
        top = new_top

        v = _part(
            native_ptr, word_ptr, wide_ptr, v_off_ptr, page, stop, v_off, column, used,
            DV, V_BITS, BV, PAGE, SPAN, FULL, V_TYPE, INTERPRET,
        )  # fmt: skip
        acc = tl.dot(weights.to(V_TYPE), v, acc * fade[:, None])

        if STATS:  # after the product, where registers are free
            for i in tl.static_range(SPAN):
                if SPAN > 1:
                    mass = tl.sum(tl.where(column[None, :] // PAGE == i, weights, 0.0), 1)
                page_lse = (floor + log2(mass, INTERPRET)) * _LN2
                size = tl.where(page + i < stop, M, 0)
                _store(page_lse_ptr + (head * pages + page + i) * M, rows, page_lse, size, INTERPRET)

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    acc = _by_dim(acc, V_BITS, BV)
    dim, held = _dims(DV, V_BITS, BV)
    at = (split * tl.num_programs(1) + head) * M + rows
    tl.store(out_ptr + at[:, None] * DV + dim[None, :], acc, mask=(rows < M)[:, None] & held[None, :])
    tl.store(lse_ptr + at, (tl.maximum(top, -1e38) + tl.log2(total)) * _LN2, mask=rows < M)


@triton.jit
def merge_kernel(part_ptr, part_lse_ptr, out_ptr, lse_ptr, rows, splits, DV: tl.constexpr, BV: tl.constexpr):
    """One program a row: its partial results, [splits, rows, DV], weighted by their log-sum-exps, [splits, rows]."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BV)
    CHUNK: tl.constexpr = 16  # parts in flight: enough to hide latency, few enough for registers
    top, total = -1e38, 0.0
    acc = tl.zeros([BV], tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        here = split < splits
        at = split * rows + row
        lse = tl.load(part_lse_ptr + at, mask=here, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        weight, fade = tl.exp(lse - new_top), tl.exp(top - new_top)
        part = tl.load(part_ptr + at[:, None] * DV + dim[None, :], mask=here[:, None] & (dim < DV)[None, :], other=0.0)
        acc = acc * fade + tl.sum(part * weight[:, None], 0)
        total = total * fade + tl.sum(weight, 0)
        top = new_top
    tl.store(out_ptr + row * DV + dim, acc / tl.where(total > 0, total, 1.0), mask=dim < DV)
    tl.store(lse_ptr + row, top + tl.log(total))
