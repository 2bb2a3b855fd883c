"""Which pages a decode step attends to, in tensors of fixed size: a captured CUDA graph reads what was last written."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptivekv.kernels.codec import Codec

ROTATED = 16
"""Added to the index of a pair of codecs where keys and values are stored Hadamard-rotated."""

ABSENT = 255
"""Behind the last page of a row, where its format would be."""

FORMATS = 11
"""Most runs of equal formats in a row: the formats of `memory`, and one more."""

TAIL = 255
"""In the low byte of a `keys` entry: as many slots as `tails` says."""


@dataclass(frozen=True)
class Launch:
    """How the split kernel is compiled: warps a program, pipeline depth, tiles that a native and an 8-bit page is read
    in, and how many programs the work is divided among for each multiprocessor: as many as run at once."""

    warps: int = 1
    stages: int = 3
    native_tiles: int = 2
    int8_tiles: int = 1
    programs: int = 8


@dataclass
class Work:
    """Who attends to what, int32, for the R rows of one layer, or of layers [L, ...]; written in place.

    items [I, 4]: row, format, first page, last page + 1; format = index in `PageTable.pairs`, + ROTATED.
    slots [I]: where an item's result goes; turned [I]: whether the result there is of rotated pages.
    spans [programs, 2]: first item of a program and how many it has; parts [R, 2]: first result of a row and how many.
    """

    items: Tensor
    slots: Tensor
    turned: Tensor
    spans: Tensor
    parts: Tensor

    def copy_(self, other: "Work") -> None:
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(theirs)

    def layer(self, i: int) -> "Work":
        return Work(*(x[i] for x in vars(self).values()))


@dataclass
class PageTable:
    """Pages of one layer for R rows (requests x KV heads), sorted within a row so that equal formats are together.

    arena: uint8 [bytes], contiguous. keys, values: int64 [R, C], byte offsets of the parts, multiples of 256, relative
    to the arena; one may lie outside of it, in pinned host memory that the GPU can read. The low byte of a `keys` entry
    is the page's used slots: 0 for no page, `TAIL` for the open tail of the row's request.
    tails: int32 [R // heads], slots in the tail of each request. pairs: codecs of keys and values.
    dtype: of native pages. k_dim, v_dim: head dimensions. rotated: whether a page may be Hadamard-rotated.
    clean: unused slots of native values may hold NaN; not so in pages and tails as `memory` writes them.
    """

    arena: Tensor
    keys: Tensor
    values: Tensor
    work: Work
    tails: Tensor
    heads: int
    pairs: tuple[tuple[Codec, Codec], ...]
    dtype: torch.dtype
    k_dim: int
    v_dim: int
    rotated: bool = True
    clean: bool = False
    launch: Launch = Launch()


def page_time(size: int, k_dim: int, v_dim: int) -> int:
    """Relative time of a page of `size` bytes: what it reads and, per element, what it computes (docs/kernels.md)."""
    return size + 40 * (k_dim + v_dim)


def plan_work(code: Tensor, time: Tensor, processors: int, together: int) -> Work:
    """Divide the pages of each layer among processors * together programs, evenly by time.

    code: uint8 [L, R, C], format of each page as in `Work.items`, rising in a row, ABSENT behind the last;
    time: int64 [256], what a page of each format takes (0 for ABSENT). There are programs + R * FORMATS items at most;
    unused ones are zero. Nothing waits for the device.

    Pages are handed out format by format, and `together` programs in a row to one processor (block i runs on processor
    i modulo their number): the loops of several formats do not fit its instruction cache. A program gets no less than
    the square root of an eighth of a row's pages, for more parts cost more merging than they save.
    """
    layers, rows, columns = code.shape
    programs, device = processors * together, code.device
    room = programs + rows * FORMATS
    code, order = code.view(layers, -1).sort(dim=1, stable=True)  # by format, then row by row
    row, column, live = order // columns, order % columns, code != ABSENT
    cost = time[code.long()]
    before = cost.cumsum(1) - cost
    total, pages = before[:, -1:] + cost[:, -1:], live.sum(1, keepdim=True).clamp(min=1)
    least = (total / pages * (pages / (8 * rows)).sqrt()).long()
    fair = torch.maximum((total + programs - 1).div(programs, rounding_mode="floor"), least).clamp(min=1)
    chunk = (before // fair).clamp(max=programs - 1)
    # A page starts an item where its format, row or program is not that of the page before.
    changed = (code[:, 1:] != code[:, :-1]) | (row[:, 1:] != row[:, :-1]) | (chunk[:, 1:] != chunk[:, :-1])
    starts = live.clone()
    starts[:, 1:] &= changed
    item = torch.where(live, starts.cumsum(1) - 1, room)  # absent pages write to a slot that is cut off
    first = torch.where(starts, item, room)
    by_row = torch.zeros_like(starts).scatter_(1, order, starts)  # results lie row by row
    slot = (by_row.cumsum(1) - 1).gather(1, order)

    def listed(at: Tensor, value: Tensor) -> Tensor:
        return torch.zeros(layers, room + 1, dtype=torch.int64, device=device).scatter_(1, at, value)[:, :room]

    length = torch.zeros(layers, room + 1, dtype=torch.int64, device=device).scatter_add_(1, item, live.long())
    start = listed(first, column)
    items = torch.stack([listed(first, row), listed(first, code.long()), start, start + length[:, :room]], 2)
    turned = listed(torch.where(starts, slot, room), (code >= ROTATED).long())
    count = torch.zeros(layers, programs, dtype=torch.int64, device=device).scatter_add_(1, chunk, starts.long())
    begin = count.cumsum(1) - count
    at = torch.arange(programs, device=device)
    place = (at % together * processors + at // together).expand(layers, -1)
    spans = torch.stack([torch.zeros_like(x).scatter_(1, place, x) for x in (begin, count)], 2)
    per_row = by_row.view(layers, rows, columns).sum(2)
    parts = torch.stack([per_row.cumsum(1) - per_row, per_row], 2)
    return Work(items.int(), listed(first, slot).int(), turned.int(), spans.int(), parts.int())
