"""The Triton twin of `topslots`: one program a run, which narrows its threshold bit by bit."""

import triton
import triton.language as tl
from torch import Tensor

from adaptivekv.kernels.codec import PAGE

_PAGES = 128  # read at a time: of 32 to 128, and 4 to 32 warps, the fastest for runs of 512 and 4,096 pages


def top_slots(
    score: Tensor,
    pos: Tensor,
    count: Tensor,
    head: Tensor,
    heads: int,
    edges: Tensor,
    keep: Tensor,
    sure: Tensor,
    out: Tensor,
) -> None:
    """`topslots.top_slots`; bit for bit equal to it."""
    if len(keep):
        top_kernel[(len(keep),)](
            score.contiguous(), pos.contiguous(), count, head, heads, edges, keep, sure, out,
            PAGE=PAGE, PAGES=_PAGES, num_warps=16,
        )  # fmt: skip


@triton.jit
def _keys(score_ptr, count_ptr, sure_ptr, page, end, PAGE: tl.constexpr, INF: tl.constexpr):
    """Scores of some pages as integers that sort like them, and which slots are used: [PAGES, 64] each."""
    slot = tl.arange(0, PAGE)[None, :]
    inside = page < end
    used = slot < tl.load(count_ptr + page, inside, 0)[:, None]
    score = tl.load(score_ptr + page.to(tl.int64)[:, None] * PAGE + slot, used, 0.0)
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    sure = (tl.load(sure_ptr + page, inside, 0)[:, None] >> slot.to(tl.int64)) & 1
    return tl.where(sure > 0, INF, key), used


@triton.jit
def _order(pos_ptr, head_ptr, heads, page, tied, PAGE: tl.constexpr):
    """What settles equal scores, of the slots `tied`: the higher stays."""
    pos = tl.load(pos_ptr + page.to(tl.int64)[:, None] * PAGE + tl.arange(0, PAGE)[None, :], tied, 0)
    return pos * heads + tl.load(head_ptr + page, tl.max(tied.to(tl.int32), 1) > 0, 0)[:, None]


@triton.jit
def top_kernel(
    score_ptr, pos_ptr, count_ptr, head_ptr, heads, edge_ptr, keep_ptr, sure_ptr, out_ptr,
    PAGE: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    INF: tl.constexpr = 0x7F800000  # the bits of inf
    run = tl.program_id(0)
    start, end = tl.load(edge_ptr + run).to(tl.int32), tl.load(edge_ptr + run + 1).to(tl.int32)
    keep = tl.load(keep_ptr + run)
    some = tl.arange(0, PAGES)
    slot = tl.arange(0, PAGE)[None, :].to(tl.int64)

    # the highest score that `keep` slots reach; the lowest integer if there are fewer
    least = tl.full([], -(1 << 31), tl.int64)
    for bit in range(31, -1, -1):
        wanted = least + (tl.full([], 1, tl.int64) << bit)
        found = tl.zeros([PAGES], tl.int32)
        for at in range(start, end, PAGES):
            key, used = _keys(score_ptr, count_ptr, sure_ptr, at + some, end, PAGE, INF)
            found += tl.sum((used & (key >= wanted.to(tl.int32))).to(tl.int32), 1)
        least = tl.where(tl.sum(found, 0) >= keep, wanted, least)
    more, same = tl.zeros([PAGES], tl.int32), tl.zeros([PAGES], tl.int32)
    for at in range(start, end, PAGES):
        key, used = _keys(score_ptr, count_ptr, sure_ptr, at + some, end, PAGE, INF)
        more += tl.sum((used & (key > least.to(tl.int32))).to(tl.int32), 1)
        same += tl.sum((used & (key == least.to(tl.int32))).to(tl.int32), 1)
    above, equal = tl.sum(more, 0), tl.sum(same, 0)

    # of those that just reach it, the highest order that the rest of `keep` slots reach
    oldest = tl.full([], 0, tl.int64)
    if above + equal > keep:
        for bit in range(30, -1, -1):
            wanted = oldest + (tl.full([], 1, tl.int64) << bit)
            found = tl.zeros([PAGES], tl.int32)
            for at in range(start, end, PAGES):
                page = at + some
                key, used = _keys(score_ptr, count_ptr, sure_ptr, page, end, PAGE, INF)
                tied = used & (key == least.to(tl.int32))
                order = _order(pos_ptr, head_ptr, heads, page, tied, PAGE)
                found += tl.sum((tied & (order >= wanted.to(tl.int32))).to(tl.int32), 1)
            oldest = tl.where(above + tl.sum(found, 0) >= keep, wanted, oldest)

    for at in range(start, end, PAGES):
        page = at + some
        key, used = _keys(score_ptr, count_ptr, sure_ptr, page, end, PAGE, INF)
        tied = used & (key == least.to(tl.int32))
        order = _order(pos_ptr, head_ptr, heads, page, tied, PAGE)
        best = (used & ((key > least.to(tl.int32)) | (key == INF))) | (tied & (order >= oldest.to(tl.int32)))
        tl.store(out_ptr + page, tl.sum(best.to(tl.int64) << slot, 1), page < end)
