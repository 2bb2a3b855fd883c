"""Compaction: make one run of the free room when no single extent fits a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from adaptivekv.kernels import pageops
from adaptivekv.memory.bounds import bounds_bytes
from adaptivekv.memory.shapes import DEVICE
from adaptivekv.memory.transfer import kernel_tables

if TYPE_CHECKING:
    from adaptivekv.memory.pages import PagePool


def compact(pool: PagePool, tier: int) -> None:
    """Slide pages and bases down around the fixed regions until the free room is in few extents."""
    arena = pool.arena(tier)
    off, size, part, owner = blocks(pool, tier)
    fixed = np.array(sorted(pool.regions.items()) if tier == DEVICE else [], np.int64).reshape(-1, 2)
    new = _slide(size, fixed, arena.capacity)
    moved = np.flatnonzero(new != off)
    data, step = arena.data, max(1, pool.staging_bytes)
    # In address order through a buffer: nothing lands beyond where it started, so a wave never meets a later one.
    wave = np.cumsum(size[moved]) // step
    for now in np.split(moved, np.flatnonzero(np.diff(wave)) + 1):
        held = []
        for length in np.unique(size[now]).tolist():
            at = now[size[now] == length]
            source, target = kernel_tables(pool, tier, off[at], new[at])
            buffer = torch.empty(len(at) * length, dtype=torch.uint8, device=pool.device)
            packed = torch.arange(len(at), device=source.device) * length
            pageops.copy_parts(data, buffer, source, packed, length)
            held.append((buffer, packed, target, length))
        for buffer, packed, target, length in held:
            pageops.copy_parts(buffer, data, packed, target, length)
    for i, where in enumerate((pool.k_off, pool.v_off, pool.b_off)):
        where[owner[part == i]] = new[part == i]
    pool.mark(owner[part < 3])
    number, layer = np.divmod(owner, len(pool.layers))
    for bases in pool.bases.values():
        mine = (part == 3) & (number == bases.number)
        if mine.any():
            bases.offsets[layer[mine]] = new[mine]
    edges = np.concatenate([np.stack([new, size], 1), fixed])
    edges = edges[np.argsort(edges[:, 0])]
    starts = np.concatenate([[0], edges[:, 0] + edges[:, 1]])
    ends = np.concatenate([edges[:, 0], [arena.capacity]])
    arena.starts, arena.ends = starts[starts < ends], ends[starts < ends]
    for sequence in pool.sequences:
        sequence.touch()


def blocks(pool: PagePool, tier: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every block on a tier that can move, by address: offsets, bytes, what it is, whose; [n] each.

    0 to 2 are keys, values and bounds of a page; 3 is a layer of bases, number of the bases x layers + layer.
    """
    keys = np.flatnonzero((pool.ref > 0) & (np.where(pool.split, DEVICE, pool.tier) == tier))
    values = np.flatnonzero((pool.ref > 0) & (pool.tier == tier))
    bound = np.flatnonzero((pool.ref > 0) & (pool.b_off >= 0)) if tier == DEVICE else keys[:0]
    k_size = pool.k_bytes[pool.layer[keys], pool.code[keys]]
    v_size = pool.v_bytes[pool.layer[values], pool.code[values]]
    bounds_size = np.array([bounds_bytes(pool, layer) for layer in range(len(pool.layers))])
    owned = list(pool.bases.values()) if tier == DEVICE else []
    whose = [one.number * len(pool.layers) + np.arange(len(pool.layers)) for one in owned]
    off = np.concatenate([pool.k_off[keys], pool.v_off[values], pool.b_off[bound], *(x.offsets for x in owned)])
    size = [k_size, v_size, bounds_size[pool.layer[bound]], *(x.sizes for x in owned)]
    part = np.repeat([0, 1, 2, 3], [len(keys), len(values), len(bound), len(owned) * len(pool.layers)])
    order = np.argsort(off)
    owner = np.concatenate([keys, values, bound, *whose])
    return off[order], np.concatenate(size)[order], part[order], owner[order]


def _slide(size: np.ndarray, fixed: np.ndarray, capacity: int) -> np.ndarray:
    """Lowest addresses for blocks of `size` bytes in their order, around the fixed regions [n, 2] (offset, bytes)."""
    new, total, done, cursor = np.zeros_like(size), np.concatenate([[0], np.cumsum(size)]), 0, 0
    for start, length in [*fixed.tolist(), [capacity, 0]]:
        fits = int(np.searchsorted(total, total[done] + start - cursor, "right")) - 1
        new[done:fits] = cursor + total[done:fits] - total[done]
        done, cursor = max(done, fits), start + length
    return new
