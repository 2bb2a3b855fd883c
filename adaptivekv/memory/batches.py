"""What eager attention reads of a layer: its pages, a batch for each format and tier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from adaptivekv.kernels import PageBatch
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.formats import BY_CODE
from adaptivekv.memory.shapes import HOST

if TYPE_CHECKING:
    from adaptivekv.memory.sequence import Sequence


def page_batches(sequence: Sequence, layer: int, pick: np.ndarray) -> list[tuple[PageBatch, np.ndarray]]:
    """The pages of a layer where `pick` (bool like `ids[layer]`) is true, each batch with its columns, -1 absent."""
    pool, ids, shape = sequence.pool, sequence.ids[layer], sequence.pool.layers[layer]
    live = (ids >= 0) & pick
    key = np.where(live, pool.code[ids].astype(np.int16) * 2 + pool.tier[ids], -1)
    out = []
    for value in np.unique(key[live]):
        mask = key == value
        width = int(mask.sum(1).max())
        cols = np.argsort(~mask, axis=1, kind="stable")[:, :width]
        here = np.take_along_axis(mask, cols, 1)
        cols = np.where(here, cols, -1)
        page = np.where(here, np.take_along_axis(ids, np.maximum(cols, 0), 1), 0)
        fmt, tier = BY_CODE[value // 2], int(value % 2)
        if tier == HOST:
            pool.settle()
        arena = pool.arena(tier).data
        count = np.where(here, pool.count[page], 0).astype(np.int32)
        k_off, v_off = (np.where(here, off[page], 0) for off in (pool.k_off, pool.v_off))
        at = [torch.from_numpy(np.ascontiguousarray(x)).to(arena.device) for x in (k_off, v_off, count)]
        dims, full = (pool.dtype, shape.k_dim, shape.v_dim), bool((count == PAGE).all())
        out.append((PageBatch(arena, at[0], at[1], at[2], fmt.k, fmt.v, *dims, fmt.rotate, full), cols))
    return out
