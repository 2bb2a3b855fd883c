"""Which pages a decode step attends to, in tensors of fixed size: a captured CUDA graph reads what was last written."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptivekv.kernels.codec import PAGE, Codec

ROTATED = 16
"""Added to the index of a pair of codecs where keys and values are stored Hadamard-rotated."""

ABSENT = 255
"""Behind the last page of a row, where its format would be."""

FORMATS = 11
"""Most runs of equal formats in a row: the formats of `memory`, and one more."""
FEW = 3
"""Loops, one a pair of codecs, that fit a multiprocessor's instruction cache together (docs/kernels.md)."""

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

    items [I, 4]: row, format, first page, last page + 1; format = index in `PageTable.pairs`, + ROTATED. Item i is the
    first of share i, as long as there are shares; the others follow. slots [I]: where an item's result goes, -1 for an
    empty item; turned [I]: whether the result there is of rotated pages.
    spans [shares, 2]: a share's second item and how many there are from there on; parts [R, 2]: first result of a row
    and how many. claims [groups + 2]: shares taken in a launch, by each group of multiprocessors and in all, 0 between
    launches; and whether shares are claimed at all, which pays for more than FEW loops.
    """

    items: Tensor
    slots: Tensor
    turned: Tensor
    spans: Tensor
    parts: Tensor
    claims: Tensor

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
    chosen: a kernel of the step itself writes the pages and items, so nothing of them may be read ahead of its end.
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
    chosen: bool = False


def page_time(size: int, k_dim: int, v_dim: int) -> int:
    """Relative time of a page of `size` bytes beside pages of other formats (docs/kernels.md): what a program computes
    and waits for weighs more than what it reads, as long as others leave it its share of the bandwidth; and unpacking
    takes a twentieth more with every halving of the bits."""
    native = 2 * PAGE * (k_dim + v_dim)
    return int((size + 170 * (k_dim + v_dim)) * (1 + max(0.0, math.log2(native / size)) / 20))


def plan_work(code: Tensor, time: Tensor, processors: int, together: int) -> Work:
    """Divide the pages of each layer into processors * together shares, evenly by time.

    code: uint8 [L, R, C], format of each page as in `Work.items`, rising in a row, ABSENT behind the last;
    time: int64 [256], what a page of each format takes (0 for ABSENT). There are shares + R * FORMATS items at most.
    Nothing waits for the device.

    Pages are handed out format by format, so that neighbouring shares have one format. A share is no smaller than
    sqrt(pages of a row / 32), for more parts cost more merging than they save.
    """
    layers, rows, columns = code.shape
    shares, device = processors * together, code.device
    room = shares + rows * FORMATS
    code, order = code.view(layers, -1).sort(dim=1, stable=True)  # by format, then row by row
    row, column, live = order // columns, order % columns, code != ABSENT
    cost = time[code.long()]
    before = cost.cumsum(1) - cost
    total, pages = before[:, -1:] + cost[:, -1:], live.sum(1, keepdim=True).clamp(min=1)
    least = (total / pages * (pages / (32 * rows)).sqrt()).long()
    fair = torch.maximum((total + shares - 1).div(shares, rounding_mode="floor"), least).clamp(min=1)
    share = (before // fair).clamp(max=shares - 1)
    # A page starts an item where its format, row or share is not that of the page before.
    first, starts = live.clone(), live.clone()
    first[:, 1:] &= share[:, 1:] != share[:, :-1]
    starts[:, 1:] &= first[:, 1:] | (code[:, 1:] != code[:, :-1]) | (row[:, 1:] != row[:, :-1])
    later = starts & ~first
    item = torch.where(first, share, shares + later.cumsum(1) - 1)  # of a page that starts one
    at = torch.where(starts, item, room)  # what starts none writes to a place that is cut off
    by_row = torch.zeros_like(starts).scatter_(1, order, starts)  # results lie row by row
    slot = (by_row.cumsum(1) - 1).gather(1, order)

    def listed(value: Tensor, where: Tensor = at, empty: int = 0) -> Tensor:
        out = torch.full((layers, room + 1), empty, dtype=torch.int64, device=device)
        return out.scatter_(1, where, value)[:, :room]

    # How many pages follow until the next start: an item's length.
    number = torch.where(live, starts.cumsum(1), 0)
    length = torch.zeros(layers, rows * columns + 1, dtype=torch.int64, device=device).scatter_add_(
        1, number, live.long()
    )
    start = listed(column)
    stop = listed(column + length.gather(1, number))
    items = torch.stack([listed(row), listed(code.long()), start, stop], 2)
    turned = listed((code >= ROTATED).long(), torch.where(starts, slot, room))
    count = torch.zeros(layers, shares, dtype=torch.int64, device=device).scatter_add_(1, share, later.long())
    spans = torch.stack([shares + count.cumsum(1) - count, count], 2)
    per_row = by_row.view(layers, rows, columns).sum(2)
    parts = torch.stack([per_row.cumsum(1) - per_row, per_row], 2)
    loop = torch.where(live, code % ROTATED, ROTATED).long()  # rotated pages take the loop of the others
    loops = torch.zeros(layers, ROTATED + 1, dtype=torch.int32, device=device).scatter_(1, loop, 1)
    claims = torch.zeros(layers, _groups(processors) + 2, dtype=torch.int32, device=device)
    claims[:, -1] = loops[:, :ROTATED].sum(1) > FEW
    return Work(items.int(), listed(slot, empty=-1).int(), turned.int(), spans.int(), parts.int(), claims)


def _groups(processors: int) -> int:
    """Groups of multiprocessors whose programs take neighbouring shares: about a dozen, of equal size."""
    return max(n for n in range(1, 13) if processors % n == 0)
