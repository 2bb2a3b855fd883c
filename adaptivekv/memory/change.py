"""Changes of sealed pages, of all layers and heads at once: another format, another tier, fewer slots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from adaptivekv.kernels import pageops
from adaptivekv.memory.arena import ArenaFull
from adaptivekv.memory.formats import Format
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.shapes import DEVICE, Kind


def convert(pool: PagePool, ids: np.ndarray, fmt: Format) -> np.ndarray:
    """Re-encode pages of one kind, in place where nobody else refers to a page. Returns the ids to use now.

    Raises ArenaFull if there is no room for copies of the shared ones; the others are converted by then.
    """
    old, shared = pool.kind(ids[0]), pool.ref[ids] > 1
    new, own = replace(old, fmt=fmt), ids[~shared]
    # Beside each other while both fit, else through the staging allowance: a demotion fits the room it leaves.
    least = max(1, pool.staging_bytes // sum(new.sizes))
    frugal = pool.device.type == "cpu"  # its arena takes memory as it is written: small waves keep the peak low
    enough = max(1, least // 8) if frugal else least
    while len(own):
        room = pool.arena(new.tier).room(sum(new.sizes))
        if frugal:
            room = min(room, enough)
        if beside := room >= min(len(own), enough):
            wave, own = own[:room], own[room:]
            off = pool.alloc(new.tier, len(wave), *new.sizes)
            _recode(pool, wave, old, new, off)
        else:
            wave, own = own[:least], own[least:]
            if pool.arena(new.tier).free_bytes + len(wave) * (sum(old.sizes) - sum(new.sizes)) < 0:
                raise ArenaFull(f"arena full: no room for pages of {sum(new.sizes)} bytes")
            copies = staged(pool, new, len(wave))
            _recode(pool, wave, old, new, *copies)
        pool.vacate(wave)
        if not beside:
            off = pool.alloc(new.tier, len(wave), *new.sizes)
            unstage(pool, new, off, *copies)
        pool.place(wave, new, off)
    if not shared.any():
        return ids
    mine, out = ids[shared], ids.copy()
    out[shared] = fresh = pool.claim(pool.layer[mine], new, pool.count[mine])
    pool.set_pos(fresh, pool.pos[mine])
    _recode(pool, mine, old, new, [pool.k_off[fresh], pool.v_off[fresh]])
    pool.release(mine)
    return out


def _recode(
    pool: PagePool, ids: np.ndarray, old: Kind, new: Kind, off: list[np.ndarray], into: torch.Tensor | None = None
) -> None:
    """Write pages of kind `old` as `new` at `off`, in the new kind's arena or in `into`."""
    source = pool.arena(old.tier).data
    target = pool.arena(new.tier).data if into is None else into
    tables = pool.tables(old.tier, pool.k_off[ids], pool.v_off[ids], *off, pool.count[ids])
    for i, (before, after) in enumerate(zip(old.parts, new.parts, strict=True)):
        pageops.recode(
            source, target, tables[i], tables[i + 2], tables[4], before[0], *after, pool.dtype,
            old.fmt.rotate != new.fmt.rotate,
        )  # fmt: skip


def staged(pool: PagePool, kind: Kind, n: int) -> tuple[list[np.ndarray], torch.Tensor]:
    """A temporary place for `n` pages: offsets of keys and values in a buffer, and the buffer."""
    k_size, v_size = kind.sizes
    buffer = torch.empty(n * (k_size + v_size), dtype=torch.uint8, device=pool.device)
    return [np.arange(n) * k_size, n * k_size + np.arange(n) * v_size], buffer


def unstage(pool: PagePool, kind: Kind, off: list[np.ndarray], packed: list[np.ndarray], buffer: torch.Tensor) -> None:
    """Copy pages from their temporary place to `off`."""
    tables = pool.tables(kind.tier, *packed, *off)
    for i, size in enumerate(kind.sizes):
        pageops.copy_parts(buffer, pool.arena(kind.tier).data, tables[i], tables[i + 2], size)


def copy(pool: PagePool, ids: np.ndarray) -> np.ndarray:
    """Copies of pages of one kind, beside them. Returns their ids."""
    kind = pool.kind(ids[0])
    fresh = pool.claim(pool.layer[ids], kind, pool.count[ids])
    pool.set_pos(fresh, pool.pos[ids])
    data = pool.arena(kind.tier).data
    tables = pool.tables(kind.tier, *(off[i] for i in (ids, fresh) for off in (pool.k_off, pool.v_off)))
    for i, size in enumerate(kind.sizes):
        pageops.copy_parts(data, data, tables[i], tables[i + 2], size)
    return fresh


def move(pool: PagePool, ids: np.ndarray, tier: int) -> None:
    """Copy pages to `tier`, bytes unchanged (shared pages too: only where they live changes).

    A kind moves as a whole; what ArenaFull prevents stays.
    """
    ids = ids[pool.tier[ids] != tier]
    for at in pool.kinds(ids):
        group, old = ids[at], pool.kind(ids[at][0])
        new = replace(old, tier=tier)
        off = pool.alloc(tier, len(group), *new.sizes)
        for before, after, size in zip((pool.k_off, pool.v_off), off, new.sizes, strict=True):
            src, dst = pool.arena(old.tier).data, pool.arena(tier).data
            if pool.transfer:
                pool.transfer.copy(src, dst, before[group], after, size)
            else:
                pageops.copy_parts(src, dst, torch.from_numpy(before[group]), torch.from_numpy(after), size)
            pool.moved_bytes += size * len(group)
        if tier == DEVICE:
            pool.fence()
        pool.vacate(group)
        pool.place(group, new, off)


def shorten(pool: PagePool, ids: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Keep only the first `count` slots of each page; shared pages are copied. Returns the ids to use."""
    out, shared = ids.copy(), np.flatnonzero(pool.ref[ids] > 1)
    for at in pool.kinds(ids[shared]):
        try:
            out[shared[at]] = copy(pool, ids[shared[at]])
        except ArenaFull:
            pool.release(out[out != ids])
            raise
    pool.release(ids[out != ids])
    pool.count[out] = count
    pool.set_pos(out)
    return out
