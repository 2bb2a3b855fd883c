"""Query-aware choice of pages inside a decode step (Quest, arXiv 2406.10774), without the host.

Each page's bound on its scores comes from the smallest and largest key per channel; a row reads its best pages. What a
program reads is its own run of pages with the others left out, so formats stay together and a step's grid stays fixed.
`Retrieve.pick` (policies/retrieval) is the same on the host, and what the tests compare with.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptivekv.kernels.table import PageTable

_PAGES = 16  # pages a program bounds


@dataclass
class Selection:
    """What choosing needs besides the table, for the same rows and columns.

    bounds: int64 [R, C], byte offset in the arena of a page's bounds (native [2, k_dim]: smallest, largest), 0 for a
    page that is always read. take: int64 [R, 1], pages a row reads, at least. picked: a table of the same arena whose
    keys, values and items are written in each step.
    """

    bounds: Tensor
    take: Tensor
    picked: PageTable


def select_pages(q: Tensor, table: PageTable, selection: Selection) -> PageTable:
    """Choose pages for q [R, M, k_dim], not rotated; returns `selection.picked`, filled."""
    rows, m, dim = q.shape
    columns = table.keys.shape[1]
    bound = torch.empty(rows, columns, device=q.device)
    native = table.arena.view(table.dtype)
    bound_kernel[rows, triton.cdiv(columns, _PAGES)](
        q.contiguous(), native, table.keys.view(torch.int32), selection.bounds, bound, columns,
        M=m, D=dim, BD=triton.next_power_of_2(dim), ITEM=table.dtype.itemsize, PAGES=_PAGES,
    )  # fmt: skip
    least = bound.sort(1, descending=True).values.gather(1, selection.take)
    picked = selection.picked
    pick_kernel[(len(table.work.items),)](
        table.keys, table.values, table.work.items, bound, least, picked.keys, picked.values, picked.work.items,
        columns, CHUNK=64, num_warps=1,
    )  # fmt: skip
    return picked


def with_picked(table: PageTable, bounds: Tensor, take: Tensor) -> Selection:
    """Room for choosing among the pages of `table`."""
    keys, values, items = (torch.zeros_like(x) for x in (table.keys, table.values, table.work.items))
    work = replace(table.work, items=items)
    return Selection(bounds, take, replace(table, keys=keys, values=values, work=work, chosen=True))


@triton.jit
def bound_kernel(
    q_ptr, native_ptr, count_ptr, bounds_ptr, bound_ptr, columns,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ITEM: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    page = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    dim = tl.arange(0, BD)
    here = page < columns
    held = (tl.load(count_ptr + 2 * (row * columns + page), mask=here, other=0) & 255) > 0
    at = tl.load(bounds_ptr + row * columns + page, mask=here, other=0)
    bounded = held & (at > 0)
    mask = bounded[:, None] & (dim[None, :] < D)
    low = tl.load(native_ptr + (at // ITEM)[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(native_ptr + (at // ITEM + D)[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    best = tl.full([PAGES], -float("inf"), tl.float32)
    for m in range(M):
        q = tl.load(q_ptr + (row * M + m) * D + dim, mask=dim < D, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.sum(tl.maximum(q[None, :] * low, q[None, :] * high), 1))
    best = tl.where(bounded, best, tl.where(held, float("inf"), -float("inf")))
    tl.store(bound_ptr + row * columns + page, best, mask=here)


@triton.jit
def pick_kernel(
    key_ptr, value_ptr, item_ptr, bound_ptr, least_ptr, out_key_ptr, out_value_ptr, out_item_ptr, columns,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program an item: its chosen pages move to the front of its run."""
    item = tl.program_id(0)
    row = tl.load(item_ptr + item * 4).to(tl.int64)
    start = tl.load(item_ptr + item * 4 + 2)
    stop = tl.load(item_ptr + item * 4 + 3)
    tl.store(out_item_ptr + item * 4, row.to(tl.int32))
    tl.store(out_item_ptr + item * 4 + 1, tl.load(item_ptr + item * 4 + 1))
    tl.store(out_item_ptr + item * 4 + 2, start)
    least = tl.load(least_ptr + row)
    end = start
    for first in range(start, stop, CHUNK):
        page = first + tl.arange(0, CHUNK)
        here = page < stop
        at = row * columns + page
        chosen = here & (tl.load(bound_ptr + at, mask=here, other=-float("inf")) >= least)
        to = row * columns + end + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(out_key_ptr + to, tl.load(key_ptr + at, mask=chosen, other=0), mask=chosen)
        tl.store(out_value_ptr + to, tl.load(value_ptr + at, mask=chosen, other=0), mask=chosen)
        end += tl.sum(chosen.to(tl.int32), 0)
    tl.store(out_item_ptr + item * 4 + 3, end)
