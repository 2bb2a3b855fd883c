"""The split kernel of decode attention: programs attend to runs of pages, each run in a format of its own."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adaptivekv.kernels.language import load_means, log2, mean

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_SHRINK = tl.constexpr(16777216.0)  # 2**24: a level read as a float16 bit pattern is 2**-24 of itself


@triton.jit
def _field(words, AT: tl.constexpr, BITS: tl.constexpr, INTERPRET: tl.constexpr):
    """The BITS bits from bit AT of each 16-bit word, as the float16 whose bit pattern they are: n * 2**(AT % 8 - 24).

    A pattern below 1024 is a subnormal float16, exact, and tensor cores take those at full speed: two levels unpack in
    one or two instructions, without conversion and without a bias that would have to cancel.
    """
    SHIFT: tl.constexpr = AT // 8 * 8
    MASK: tl.constexpr = ((1 << BITS) - 1) << (AT % 8)
    if INTERPRET:  # it has no inline assembly
        return ((words >> SHIFT) & MASK).to(tl.int16).to(tl.float16, bitcast=True)
    if SHIFT == 0:
        return tl.inline_asm_elementwise(
            f"and.b32 $0, $1, {MASK | (MASK << 16)};", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    return tl.inline_asm_elementwise(
        f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; and.b32 $0, t, {MASK | (MASK << 16)}; }}",
        "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _tile_at(rows, col, M: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, SLICE: tl.constexpr):
    """Where slice SLICE of a [M, D] matrix lies, transposed, and its mask.

    Byte b of a slot holds dims b, b + D * BITS / 8, ... (codec.py), and word j holds bytes 2j and 2j + 1.
    """
    PER: tl.constexpr = 1 if BITS == 16 else 8 // BITS  # levels in a byte
    if BITS == 16:
        dim = col
    else:
        dim = (SLICE % PER) * (D // PER) + 2 * col + SLICE // PER
    return rows[None, :] * D + dim[:, None], (rows[None, :] < M) & (col[:, None] < D * BITS // 16)


@triton.jit
def _query(q_ptr, rows, M: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, BK: tl.constexpr, TYPE: tl.constexpr):
    """The slices [BK, rows] of the query, scaled against what `_field` leaves in place, and its sum over the head."""
    col = tl.arange(0, BK)
    q = ()
    total = tl.zeros([rows.shape[0]], tl.float32)
    for s in tl.static_range(1 if BITS == 16 else 16 // BITS):
        at, mask = _tile_at(rows, col, M, D, BITS, s)
        part = tl.load(q_ptr + at, mask=mask, other=0.0).to(TYPE)
        total += tl.sum(part.to(tl.float32), 0)
        if BITS != 16:
            part = part * (1.0 / (1 << (s * BITS % 8)))
        q = q + (part.to(TYPE),)
    return q, total


@triton.jit
def _attend(
    q_ptr, native_ptr, word_ptr, half_ptr, wide_ptr, key_ptr, value_ptr, count_ptr, start, stop, tail,
    out_ptr, lse_ptr, page_lse_ptr, scale, softcap,
    M: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    TYPE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, PAGE: tl.constexpr, SUB: tl.constexpr,
    ITEM: tl.constexpr, CAP: tl.constexpr, STATS: tl.constexpr, CLEAN: tl.constexpr, STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One item: all query rows of a KV head over the pages start to stop of its list, which share a format.

    Scores and results are held transposed: slots or dims fill the 16 rows of a tensor-core product, and the few query
    rows its 8 columns. Half the padding, so half the exponentials, products and registers.
    """
    rows = tl.arange(0, BM)
    N: tl.constexpr = PAGE // SUB  # slots a step
    k_col = tl.arange(0, BK)
    v_col = tl.arange(0, BV)
    WIDE: tl.constexpr = TYPE == tl.float32  # noqa: SIM300
    K_TYPE: tl.constexpr = TYPE if K_BITS == 16 or WIDE else tl.float16
    V_TYPE: tl.constexpr = TYPE if V_BITS == 16 or WIDE else tl.float16
    K_WIDTH: tl.constexpr = DK if K_BITS == 16 else DK * K_BITS // 16  # elements or words of a slot
    V_WIDTH: tl.constexpr = DV if V_BITS == 16 else DV * V_BITS // 16

    K_MIDDLE: tl.constexpr = ((1 << K_BITS) - 1) / 2  # the level of the mean
    V_MIDDLE: tl.constexpr = ((1 << V_BITS) - 1) / 2

    q, q_sum = _query(q_ptr, rows, M, DK, K_BITS, BK, K_TYPE)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    shift = tl.zeros([BM], tl.float32)
    half_lse = tl.zeros([BM], tl.float32)
    accs = ()
    for _ in tl.static_range(1 if V_BITS == 16 else 16 // V_BITS):
        accs = accs + (tl.zeros([BV, BM], tl.float32),)

    for step in tl.range(start * SUB, stop * SUB, num_stages=STAGES):
        page = step // SUB
        slot = step % SUB * N + tl.arange(0, N)
        # The pipeline may run ahead of the last page: the mask makes it see offset 0 there, at no measurable cost.
        here = page < stop
        all_slots = page + tl.zeros([N], tl.int32) < stop
        k_off = tl.multiple_of(tl.load(key_ptr + page, mask=here, other=0) & -256, 256)
        v_off = tl.multiple_of(tl.load(value_ptr + page, mask=here, other=0), 256)
        # The same entry again through another pointer: no load of keys waits for the count, only its use does.
        count = tl.load(count_ptr + 2 * page, mask=here, other=0) & 255
        used = slot < tl.where(count > PAGE, tail, count)

        # Scores, in units of log 2.
        k_at = slot[:, None] * K_WIDTH + k_col[None, :]
        k_mask = all_slots[:, None] & (k_col[None, :] < K_WIDTH)
        scores = tl.zeros([N, BM], tl.float32)
        if K_BITS == 16:
            k = tl.load(native_ptr + k_off // ITEM + k_at, mask=k_mask, other=0.0)
            scores = _dot(k.to(K_TYPE), q[0], scores) * scale
        else:
            k = tl.load(word_ptr + k_off // 2 + k_at, mask=k_mask, other=0)
            k_here = (k_col < K_WIDTH) & (page + 0 * k_col < stop)
            means = load_means(wide_ptr, k_off + 2 * PAGE * (K_WIDTH + 1), k_col, k_here, K_BITS)
            k_step = tl.load(half_ptr + k_off // 2 + PAGE * K_WIDTH + slot, mask=all_slots, other=0.0).to(tl.float32)
            scores += (q_sum * (-K_MIDDLE / _SHRINK))[None, :]
            common = tl.zeros([16, BM], tl.float32)  # of query and mean, in every row: a product has no fewer
            for s in tl.static_range(16 // K_BITS):
                scores = _dot(_field(k, s * K_BITS, K_BITS, INTERPRET).to(K_TYPE), q[s], scores)
                middle = mean(means, k_col, s, K_BITS) * ((1 << (s * K_BITS % 8)) / 256)
                common = _dot(tl.broadcast_to(middle.to(K_TYPE)[None, :], [16, BK]), q[s], common)
            scores = scores * (k_step * (scale * _SHRINK))[:, None] + (tl.max(common, 0) * (scale * 256))[None, :]
        if CAP:  # tanh(x) = 2 sigmoid(2x) - 1
            scores = (2.0 * tl.sigmoid(scores * (2.0 / softcap)) - 1.0) * (softcap * _LOG2E)
        scores = tl.where(used[:, None], scores, -float("inf"))

        # Online softmax; a finite floor keeps -inf - -inf out of rows that have seen no key yet.
        new_top = tl.maximum(top, tl.max(scores, 0))
        floor = tl.maximum(new_top, -1e38)
        weights = tl.exp2(scores - floor[None, :])
        fade = tl.exp2(top - floor)
        mass = tl.sum(weights, 0)
        total = total * fade + mass
        top = new_top
        if STATS:
            page_lse = floor + log2(mass, INTERPRET)
            if SUB == 2:  # the second half of a page adds the first
                far = -tl.abs(page_lse - half_lse)
                both = tl.maximum(page_lse, half_lse) + log2(1.0 + tl.exp2(far), INTERPRET)
                both = tl.where(both > -1e37, both, -float("inf"))
                page_lse = tl.where(step % 2 == 1, both, page_lse)
                half_lse = tl.maximum(page_lse, -1e38)
            tl.store(page_lse_ptr + page * M + rows, page_lse * _LN2, mask=rows < M)

        # Values.
        v_at = slot[None, :] * V_WIDTH + v_col[:, None]
        v_mask = all_slots[None, :] & (v_col[:, None] < V_WIDTH)
        if V_BITS == 16:
            v = tl.load(native_ptr + v_off // ITEM + v_at, mask=v_mask, other=0.0)
            if CLEAN:  # what an unused slot holds can be NaN, and 0 * NaN is NaN
                v = tl.where(used[None, :], v, 0.0)
            accs = (_dot(v.to(V_TYPE), weights.to(V_TYPE), accs[0] * fade[None, :]),)
        else:
            v = tl.load(word_ptr + v_off // 2 + v_at, mask=v_mask, other=0)
            v_here = (v_col < V_WIDTH) & (page + 0 * v_col < stop)
            means = load_means(wide_ptr, v_off + 2 * PAGE * (V_WIDTH + 1), v_col, v_here, V_BITS)
            v_step = tl.load(half_ptr + v_off // 2 + PAGE * V_WIDTH + slot, mask=all_slots, other=0.0).to(tl.float32)
            v_step = tl.where(used, v_step, 0.0)  # an unused slot's scale can be NaN, and 0 * NaN is NaN
            scaled = (weights * v_step[:, None]).to(V_TYPE)
            shift = shift * fade + tl.sum(scaled.to(tl.float32), 0)
            new = ()
            for s in tl.static_range(16 // V_BITS):
                levels = _field(v, s * V_BITS, V_BITS, INTERPRET).to(V_TYPE)
                middle = tl.where(count > 0, mean(means, v_col, s, V_BITS).to(tl.float32), 0.0)  # of an absent page
                common = middle[:, None] * (mass * ((1 << (s * V_BITS % 8)) / _SHRINK))[None, :]
                new = new + (_dot(levels, scaled, accs[s] * fade[None, :] + common),)
            accs = new

    norm = (1.0 / tl.where(total > 0, total, 1.0))[None, :]
    tl.store(lse_ptr + rows, (tl.maximum(top, -1e38) + tl.log2(total)) * _LN2, mask=rows < M)
    for s in tl.static_range(1 if V_BITS == 16 else 16 // V_BITS):
        at, mask = _tile_at(rows, v_col, M, DV, V_BITS, s)
        if V_BITS == 16:
            tl.store(out_ptr + at, accs[s] * norm, mask=mask)
        else:
            levels = accs[s] * (_SHRINK / (1 << (s * V_BITS % 8)))
            tl.store(out_ptr + at, (levels - V_MIDDLE * shift[None, :]) * norm, mask=mask)


@triton.jit
def split_kernel(
    q_ptr, native_ptr, word_ptr, half_ptr, wide_ptr, key_ptr, value_ptr, count_ptr, item_ptr, slot_ptr, more_ptr,
    claim_ptr, tail_ptr, out_ptr, lse_ptr, page_lse_ptr, all_rows, columns, heads, scale, softcap, processors,
    M: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr, TYPE: tl.constexpr, BM: tl.constexpr,
    PAGE: tl.constexpr, SUBS: tl.constexpr, ITEM: tl.constexpr, CAP: tl.constexpr, STATS: tl.constexpr,
    CLEAN: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One program a share of the work: its first item, and those of its span. Each item has a result of its own."""
    share = tl.program_id(0)
    claimed = -1
    crowded = tl.load(claim_ptr + GROUPS + 1)  # not waited for: the loads below are right nearly always
    more = tl.load(more_ptr + share * 2)
    many = tl.load(more_ptr + share * 2 + 1)
    row, code, start, stop, to = _item(item_ptr, slot_ptr, share, True)
    if crowded != 0:
        share, claimed = _claim(claim_ptr, processors, GROUPS, INTERPRET)
        more = tl.load(more_ptr + share * 2)
        many = tl.load(more_ptr + share * 2 + 1)
        row, code, start, stop, to = _item(item_ptr, slot_ptr, share, True)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()  # for the query and the tail; the table was complete before
    for item in range(more, more + many + 1):
        result = to * M
        if start < stop:
            tail = tl.load(tail_ptr + row // heads)
            plane = q_ptr + ((code // 16) * all_rows + row) * M * DK  # the second plane is the rotated query
            for i in tl.static_range(len(PAIRS)):
                if code % 16 == i:
                    _attend(
                        plane, native_ptr, word_ptr, half_ptr, wide_ptr,
                        key_ptr + row * columns, value_ptr + row * columns, count_ptr + 2 * row * columns,
                        start, stop, tail, out_ptr + result * DV, lse_ptr + result, page_lse_ptr + row * columns * M,
                        scale, softcap, M, DK, DV, PAIRS[i][0], PAIRS[i][1], TYPE,
                        _tile(DK, PAIRS[i][0]), _tile(DV, PAIRS[i][1]), BM, PAGE, SUBS[i], ITEM, CAP, STATS, CLEAN,
                        STAGES, INTERPRET,
                    )  # fmt: skip
        elif to >= 0:  # pages were chosen, and none of this run
            rows = tl.arange(0, BM)
            col = tl.arange(0, triton.next_power_of_2(DV))
            tl.store(lse_ptr + result + rows, tl.full([BM], -float("inf"), tl.float32), mask=rows < M)
            mask = (rows[:, None] < M) & (col[None, :] < DV)
            at = result * DV + rows[:, None] * DV + col[None, :]
            tl.store(out_ptr + at, tl.zeros([BM, triton.next_power_of_2(DV)], tl.float32), mask=mask)
        row, code, start, stop, to = _item(item_ptr, slot_ptr, item, item < more + many)
    if claimed == tl.num_programs(0) - 1:  # the last to claim: nobody will before the next launch
        group = tl.arange(0, triton.next_power_of_2(GROUPS + 1))
        tl.store(claim_ptr + group, tl.zeros_like(group), mask=group <= GROUPS)


@triton.jit
def _claim(claim_ptr, processors, GROUPS: tl.constexpr, INTERPRET: tl.constexpr):
    """A share of the work that no other program has, and how many had claimed one before.

    Neighbouring shares are mostly of one format. A group of multiprocessors takes them from a stretch of its own, so
    that few loops run on each: all formats' together do not fit its instruction cache. What a group has too few
    programs for, since the hardware places them freely, others take.
    """
    SIZE = tl.num_programs(0) // GROUPS
    here = 0
    if not INTERPRET:
        here = tl.inline_asm_elementwise(
            "mov.u32 $0, %smid; // $1", "=r,r", [SIZE], dtype=tl.int32, is_pure=False, pack=1
        )
    group = tl.minimum(here * GROUPS // processors, GROUPS - 1)
    share = tl.atomic_add(claim_ptr + group, 1, sem="relaxed")
    while share >= SIZE:
        group = (group + 1) % GROUPS
        share = tl.atomic_add(claim_ptr + group, 1, sem="relaxed")
    # Counted when it has its share, not before: the last one to be counted clears the groups that all others took from.
    claimed = tl.atomic_add(claim_ptr + GROUPS, 1, sem="relaxed")
    return group * SIZE + share, claimed


@triton.jit
def _item(item_ptr, slot_ptr, item, here):
    """Row, format, first page, last page + 1 and place of the result of an item; an empty one has place -1."""
    row = tl.load(item_ptr + item * 4, mask=here, other=0).to(tl.int64)
    code = tl.load(item_ptr + item * 4 + 1, mask=here, other=0)
    start = tl.load(item_ptr + item * 4 + 2, mask=here, other=0)
    stop = tl.load(item_ptr + item * 4 + 3, mask=here, other=0)
    return row, code, start, stop, tl.load(slot_ptr + item, mask=here, other=-1)


@triton.constexpr_function
def _tile(dim, bits):
    """Padded width of one slice; 16 is the least that a tensor-core product takes."""
    return max(16, triton.next_power_of_2(dim if bits == 16 else dim * bits // 16))
