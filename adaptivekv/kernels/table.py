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
class PageTable:
    """Pages of one layer for R rows (requests x KV heads), sorted within a row so that equal formats are together.

    arena: uint8 [bytes], contiguous. keys, values: int64 [R, C], byte offsets of the parts, multiples of 256, relative
    to the arena; one may lie outside of it, in pinned host memory that the GPU can read. The low byte of a `keys` entry
    is the page's used slots: 0 for no page, `TAIL` for the open tail of the row's request.
    items: int32 [I, 4] (row, format, first page, last page + 1); format = index in `pairs`, + ROTATED. spans: int32
    [programs, 2], first item of a program and how many it has. parts: int32 [R, 2], the same of a row.
    tails: int32 [R // heads], slots in the tail of each request. pairs: codecs of keys and values.
    dtype: of native pages. k_dim, v_dim: head dimensions. rotated: whether a page may be Hadamard-rotated.
    clean: unused slots of native values may hold NaN; not so in pages and tails as `memory` writes them.
    """

    arena: Tensor
    keys: Tensor
    values: Tensor
    items: Tensor
    spans: Tensor
    parts: Tensor
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


def plan_work(code: Tensor, time: Tensor, programs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Divide the pages of each layer among programs, in order and evenly by time.

    code: uint8 [L, R, C], format of each page as in `PageTable.items`, rising in a row, ABSENT behind the last;
    time: int64 [256], what a page of each format takes (0 for ABSENT). Returns items [L, I, 4], spans [L, programs, 2]
    and parts [L, R, 2] as in `PageTable`, int32; I is programs + R * the formats there can be, beyond which none start.
    Nothing waits for the device.
    """
    layers, rows, columns = code.shape
    room = programs + rows * FORMATS
    cost = time[code.long()].view(layers, -1)  # [L, R * C]
    before = cost.cumsum(1) - cost
    fair = (before[:, -1:] + cost[:, -1:]).add_(programs - 1).div_(programs, rounding_mode="floor").clamp_(min=1)
    program = (before // fair).view(code.shape)
    live = code != ABSENT
    starts = live.clone()  # a page starts an item where its row, format or program differs from the page before
    starts[..., 1:] &= (code[..., 1:] != code[..., :-1]) | (program[..., 1:] != program[..., :-1])
    flat = starts.view(layers, -1)
    item = flat.cumsum(1) - 1  # [L, R * C]
    slot = torch.where(live.view(layers, -1), item, room)  # absent pages write to a slot that is cut off
    items = torch.zeros(layers, room + 1, 4, dtype=torch.int64, device=code.device)
    row = torch.arange(rows, device=code.device)[:, None].expand(rows, columns).reshape(1, -1).expand(layers, -1)
    column = torch.arange(columns, device=code.device).repeat(rows).expand(layers, -1)
    items[..., 0].scatter_(1, slot, row)
    items[..., 1].scatter_(1, slot, code.view(layers, -1).long())
    items[..., 3].scatter_add_(1, slot, torch.ones_like(slot))  # pages
    items[..., 2].scatter_(1, torch.where(flat, item, room), column)
    items[..., 3] += items[..., 2]
    spans = torch.zeros(layers, programs, 2, dtype=torch.int64, device=code.device)
    spans[..., 1].scatter_add_(1, program.view(layers, -1).clamp(max=programs - 1), flat.long())
    parts = torch.zeros(layers, rows, 2, dtype=torch.int64, device=code.device)
    parts[..., 1] = starts.sum(2)
    for counted in (spans, parts):
        counted[..., 0] = counted[..., 1].cumsum(1) - counted[..., 1]
    return items[:, :room].int(), spans.int(), parts.int()
