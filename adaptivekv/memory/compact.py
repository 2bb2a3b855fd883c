"""Compaction: make one run of the free room when no single extent fits a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from adaptivekv.memory.pages import PagePool


def compact(pool: PagePool, tier: int) -> None:
    """Slide pages down around the fixed regions until the free room is in few extents."""
    arena, taken = pool.arena(tier), []
    fixed = sorted(pool.regions.items()) if tier == 0 else []
    cursor, k = 0, 0
    for off, size, where, page in pool.blocks(tier):
        while k < len(fixed) and cursor + size > fixed[k][0]:
            cursor, k = max(cursor, fixed[k][0] + fixed[k][1]), k + 1
        if cursor < off:
            arena.data[cursor : cursor + size] = arena.data[off : off + size].clone()
            where[page] = off = cursor
        cursor = off + size
        taken.append((off, size))
    edges = np.array(sorted(taken + fixed), np.int64).reshape(-1, 2)
    starts = np.concatenate([[0], edges[:, 0] + edges[:, 1]])
    ends = np.concatenate([edges[:, 0], [arena.capacity]])
    arena.starts, arena.ends = starts[starts < ends], ends[starts < ends]
    for sequence in pool.sequences:
        sequence.touch()
