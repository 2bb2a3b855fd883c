"""The invariants of the memory: what must hold after every operation. Asserts, for tests; slow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory import checksums
from adaptivekv.memory.compact import blocks
from adaptivekv.memory.formats import BY_CODE
from adaptivekv.memory.shapes import DEVICE, HOST

if TYPE_CHECKING:
    from adaptivekv.memory.pages import PagePool
    from adaptivekv.memory.sequence import Sequence


_RANKS = np.array([fmt.rank for fmt in BY_CODE])


def check_pool(pool: PagePool) -> None:
    """References equal counts, nothing leaked, bytes add up, no two blocks overlap, every sequence is sound."""
    pool.settle()
    refs = np.zeros_like(pool.ref)
    for sequence in pool.sequences:
        check_sequence(sequence)
        for ids in sequence.pages():
            np.add.at(refs, ids, 1)
    assert (refs == pool.ref).all(), "reference counts differ from references"
    assert set(pool.free_ids.tolist()) == set(np.flatnonzero(pool.ref == 0).tolist()), "page ids leaked"
    assert (pool.tier[(pool.ref > 0) & pool.split] == HOST).all(), "a split page that is not on the host"
    checksums.verify(pool, np.flatnonzero(pool.ref > 0))
    users = [sequence.bases for sequence in pool.sequences if sequence.bases]
    assert all(users.count(bases) == bases.users for bases in pool.bases.values()), "bases leaked"
    for tier, arena in enumerate(pool.arenas):
        if arena is None:
            continue
        arena.check_integrity()
        off, size, *_ = blocks(pool, tier)
        if tier == DEVICE:  # where tails and rings lie
            off = np.concatenate([off, np.array(list(pool.regions), np.int64)])
            size = np.concatenate([size, np.array(list(pool.regions.values()), np.int64)])
        order = np.argsort(off)
        assert (off[order][:-1] + size[order][:-1] <= off[order][1:]).all(), "blocks overlap"
        assert size.sum() == arena.used, "bytes do not add up"


def check_sequence(sequence: Sequence) -> None:
    """Page lists without gaps, of live pages of their layer, and no position held twice."""
    pool = sequence.pool
    for layer, ids in enumerate(sequence.ids):
        live = ids >= 0
        low = live & (_RANKS[pool.code[ids]] > 0)
        if low.any():
            assert sequence.bases and sequence.bases is pool.bases[sequence.bases.number]
            assert (_RANKS[pool.code[ids[low]]] == sequence.bases.ranks[layer]).all(), "of another rank than its bases"
            assert (pool.basis[ids[low]] == sequence.bases.entry(np.nonzero(low)[0])).all(), "another head's bases"
        assert (np.diff(live.astype(int), axis=1) <= 0).all(), "a gap in a page list"
        pages = ids[live]
        assert (pool.ref[pages] > 0).all() and (pool.layer[pages] == layer).all()
        assert ((pool.count[pages] > 0) & (pool.count[pages] <= PAGE)).all()
        used, pos = sequence.slots(layer)
        for h in range(len(ids)):
            seen = np.concatenate([pos[h][used[h]], sequence.tail_pos[: sequence.tail_len]])
            assert len(np.unique(seen)) == len(seen), "a position is held twice"
            assert not len(seen) or seen.max() < sequence.length
    assert 0 <= sequence.tail_len < PAGE
