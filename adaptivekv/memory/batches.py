"""What eager attention reads of a layer: its pages, or the picked ones, a batch for each format and tier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from adaptivekv.kernels import PageBatch
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory import checksums
from adaptivekv.memory.formats import BY_CODE
from adaptivekv.memory.shapes import DEVICE, TIERS

if TYPE_CHECKING:
    from adaptivekv.memory.sequence import Sequence


class Picker(Protocol):
    """Chooses the pages of a decode step, the share `read` of them."""

    @property
    def read(self) -> float: ...

    def pick(self, sequence: Sequence, layer: int, q: torch.Tensor) -> np.ndarray:
        """q [H, G, k_dim] -> bool like `sequence.ids[layer]`."""


def page_batches(sequence: Sequence, layer: int, pick: np.ndarray) -> list[tuple[PageBatch, np.ndarray]]:
    """The pages of a layer where `pick` (bool like `ids[layer]`) is true, each batch with its columns, -1 absent."""
    pool, ids, shape = sequence.pool, sequence.ids[layer], sequence.pool.layers[layer]
    live = (ids >= 0) & pick
    key = (pool.code[ids].astype(np.int16) * len(TIERS) + pool.tier[ids]) * 2 + pool.split[ids]
    key = np.where(live, key, -1)
    out = []
    for value in np.unique(key[live]):
        mask = key == value
        width = int(mask.sum(1).max())
        cols = np.argsort(~mask, axis=1, kind="stable")[:, :width]
        here = np.take_along_axis(mask, cols, 1)
        cols = np.where(here, cols, -1)
        page = np.where(here, np.take_along_axis(ids, np.maximum(cols, 0), 1), 0)
        fmt, tier, split = BY_CODE[value // 2 // len(TIERS)], int(value // 2 % len(TIERS)), bool(value % 2)
        if tier != DEVICE:
            pool.settle()
            checksums.verify(pool, ids[mask])
        arena, v_arena = pool.arena(DEVICE if split else tier).data, pool.arena(tier).data
        count = np.where(here, pool.count[page], 0).astype(np.int32)
        k_off, v_off = (np.where(here, off[page], 0) for off in (pool.k_off, pool.v_off))
        at = [torch.from_numpy(np.ascontiguousarray(x)) for x in (k_off, v_off, count)]
        k_at, v_at, n_at = at[0].to(arena.device), at[1].to(v_arena.device), at[2].to(arena.device)
        k_dim, v_dim = fmt.dims(shape.k_dim, shape.v_dim)
        bases = sequence.bases.layer(layer) if fmt.rank and sequence.bases else None
        codecs, full = (fmt.k, fmt.v, pool.dtype), bool((count == PAGE).all())
        more = bases, v_arena if split else None
        batch = PageBatch(arena, k_at, v_at, n_at, *codecs, k_dim, v_dim, fmt.rotate, full, *more)
        out.append((batch, cols))
    return out
