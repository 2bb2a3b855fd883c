"""Which pages a decode step attends to, in tensors of fixed size: a captured CUDA graph reads what was last written."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptivekv.kernels.codec import Codec

ROTATED = 16
"""Added to the index of a pair of codecs where keys and values are stored Hadamard-rotated."""

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
    items: int32 [I, 4] (row, format, first page, last page + 1), one program each; format = index in `pairs`,
    + ROTATED; first = last + 1: nothing to do. parts: int32 [R, 2], first item of a row and how many it has.
    tails: int32 [R // heads], slots in the tail of each request. pairs: codecs of keys and values.
    dtype: of native pages. k_dim, v_dim: head dimensions. rotated: whether a page may be Hadamard-rotated.
    clean: unused slots of native values may hold NaN; not so in pages and tails as `memory` writes them.
    """

    arena: Tensor
    keys: Tensor
    values: Tensor
    items: Tensor
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


def page_time(size: int, k_dim: int, v_dim: int) -> float:
    """Relative time of a page of `size` bytes: what it reads and, per element, what it computes (docs/kernels.md)."""
    return size + 40.0 * (k_dim + v_dim)


def share(pages: np.ndarray, weight: np.ndarray, codes: np.ndarray, programs: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide runs of pages among programs so that the longest takes as little time as possible.

    pages: int [R, F], pages of each row in each of F formats, laid out in this order; weight: float [F], time of a
    page; codes: int [F]; programs: how many run at once (more only where there are more runs). Returns items int32
    [n, 4] and parts int32 [R, 2] as in `PageTable`.
    """
    rows, formats = pages.shape
    programs = max(programs, int((pages > 0).sum()))
    low, high = float((pages * weight).sum()) / programs, float((pages * weight).max(initial=0.0)) + 1e-9
    for _ in range(24):  # the smallest time in which the pages of any program can be done
        middle = (low + high) / 2
        if _pieces(pages, weight, middle).sum() <= programs:
            high = middle
        else:
            low = middle
    of = _pieces(pages, weight, high).ravel()
    n = of.reshape(rows, formats).sum(1)
    piece = np.arange(of.sum()) - np.repeat(np.cumsum(of) - of, of)  # within its run
    length, many = np.repeat(pages.ravel(), of), np.repeat(of, of)
    first = np.repeat((np.cumsum(pages, 1) - pages).ravel(), of)
    row = np.repeat(np.arange(rows), n)
    code = np.repeat(np.tile(codes, rows), of)
    items = np.stack([row, code, first + piece * length // many, first + (piece + 1) * length // many], 1)
    return items.astype(np.int32), np.stack([np.cumsum(n) - n, n], 1).astype(np.int32)


def _pieces(pages: np.ndarray, weight: np.ndarray, time: float) -> np.ndarray:
    """Into how many programs each run is cut if none may take longer than `time` (or one page)."""
    return -(-pages // np.maximum(1, (time / weight).astype(np.int64)))
