"""Changes of sealed pages, of all layers and heads at once: another format, another tier, fewer slots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from adaptivekv.errors import CacheFileError
from adaptivekv.kernels import pageops
from adaptivekv.memory import checksums
from adaptivekv.memory.arena import ArenaFull
from adaptivekv.memory.bases import clean, project
from adaptivekv.memory.formats import Format
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.shapes import DEVICE, HOST, Kind
from adaptivekv.memory.transfer import kernel_tables


def convert(pool: PagePool, ids: np.ndarray, fmt: Format) -> np.ndarray:
    """Re-encode pages of one kind, in place where nobody else refers to a page. Returns the ids to use now.

    Of pages that become low-rank ones, `pool.basis` says in which bases.
    Raises ArenaFull if there is no room for copies of the shared ones; the others are converted by then.
    """
    checksums.verify(pool, ids)
    old, shared = pool.kind(ids[0]), pool.ref[ids] > 1
    new, own = replace(old, fmt=fmt), ids[~shared]
    # Beside each other while both fit, else through the staging allowance: a demotion fits the room it leaves.
    least = max(1, pool.staging_bytes // sum(new.sizes))
    frugal = pool.device.type == "cpu"  # its arena takes memory as it is written: small waves keep the peak low
    enough = max(1, least // 8) if frugal else least
    while len(own):
        room = _room(pool, new)
        if frugal:
            room = min(room, enough)
        if beside := room >= min(len(own), enough):
            wave, own = own[:room], own[room:]
            off = pool.room_for(new, len(wave))
            _recode(pool, wave, old, new, off)
        else:
            wave, own = own[:least], own[least:]
            if any(pool.arena(t).free_bytes + len(wave) * (old.bytes_on(t) - new.bytes_on(t)) < 0 for t in new.tiers):
                raise ArenaFull(f"arena full: no room for pages of {sum(new.sizes)} bytes")
            copies = staged(pool, new, len(wave))
            _recode(pool, wave, old, new, *copies)
        pool.vacate(wave)
        if not beside:
            off = pool.room_for(new, len(wave))
            unstage(pool, new, off, *copies)
        pool.place(wave, new, off)
        checksums.sign(pool, wave)
    if not shared.any():
        return ids
    mine, out = ids[shared], ids.copy()
    out[shared] = fresh = pool.claim(pool.layer[mine], new, pool.count[mine])
    pool.set_pos(fresh, pool.pos[mine])
    pool.basis[fresh] = pool.basis[mine]
    _recode(pool, mine, old, new, [pool.k_off[fresh], pool.v_off[fresh]])
    checksums.sign(pool, fresh)
    pool.release(mine)
    return out


def _room(pool: PagePool, kind: Kind) -> int:
    """How many pages of a kind fit as the free extents lie."""
    return min(pool.arena(tier).room(kind.bytes_on(tier)) for tier in kind.tiers)


def _recode(
    pool: PagePool, ids: np.ndarray, old: Kind, new: Kind, off: list[np.ndarray], into: torch.Tensor | None = None
) -> None:
    """Write pages of kind `old` as `new` at `off`, in the new kind's arenas or in `into`."""
    targets = [pool.arena(tier).data if into is None else into for tier in new.tiers]
    if new.fmt.rank:
        return _project(pool, ids, new, off, targets)
    tables = kernel_tables(pool, old.tier, pool.k_off[ids], pool.v_off[ids], *off, pool.count[ids])
    for i, (before, after) in enumerate(zip(old.parts, new.parts, strict=True)):
        pageops.recode(
            pool.arena(old.tiers[i]).data, targets[i], tables[i], tables[i + 2], tables[4], before[0], *after,
            pool.dtype, old.fmt.rotate != new.fmt.rotate,
        )  # fmt: skip


def _project(pool: PagePool, ids: np.ndarray, new: Kind, off: list[np.ndarray], targets: list[torch.Tensor]) -> None:
    """Write pages as the low-rank pages `new` at `off` in the targets of keys and values, a few at a time."""
    order = np.argsort(ids)
    for group in pool.groups(ids):
        at = order[np.searchsorted(ids, group, sorter=order)]
        count = torch.from_numpy(pool.count[group]).to(pool.device)
        for part, (x, (codec, _)) in enumerate(zip(pool.read(group), new.parts, strict=True)):
            raw = codec.encode(project(pool, group, part, clean(pool, group, x)), pool.dtype, count)
            pageops.store(targets[part], torch.from_numpy(off[part][at]), raw)


def staged(pool: PagePool, kind: Kind, n: int) -> tuple[list[np.ndarray], torch.Tensor]:
    """A temporary place for `n` pages: offsets of keys and values in a buffer, and the buffer."""
    k_size, v_size = kind.sizes
    buffer = torch.empty(n * (k_size + v_size), dtype=torch.uint8, device=pool.device)
    return [np.arange(n) * k_size, n * k_size + np.arange(n) * v_size], buffer


def unstage(pool: PagePool, kind: Kind, off: list[np.ndarray], packed: list[np.ndarray], buffer: torch.Tensor) -> None:
    """Copy pages from their temporary place to `off`."""
    tables = kernel_tables(pool, kind.tier, *packed, *off)
    for i, size in enumerate(kind.sizes):
        pageops.copy_parts(buffer, pool.arena(kind.tiers[i]).data, tables[i], tables[i + 2], size)


def copy(pool: PagePool, ids: np.ndarray) -> np.ndarray:
    """Copies of pages of one kind, beside them. Returns their ids."""
    checksums.verify(pool, ids)
    kind = pool.kind(ids[0])
    fresh = pool.claim(pool.layer[ids], kind, pool.count[ids])
    pool.set_pos(fresh, pool.pos[ids])
    pool.basis[fresh] = pool.basis[ids]
    tables = kernel_tables(pool, kind.tier, *(off[i] for i in (ids, fresh) for off in (pool.k_off, pool.v_off)))
    for i, size in enumerate(kind.sizes):
        data = pool.arena(kind.tiers[i]).data
        pageops.copy_parts(data, data, tables[i], tables[i + 2], size)
    checksums.sign(pool, fresh)
    return fresh


def move(pool: PagePool, ids: np.ndarray, tier: int, split: bool = False) -> None:
    """Copy pages to `tier`, bytes unchanged (shared pages too: only where they live changes).

    split: to the host the values alone, the keys to the device. A kind moves as a whole; what ArenaFull prevents stays.
    """
    split = split and tier == HOST
    ids = ids[(pool.tier[ids] != tier) | (pool.split[ids] != split)]
    checksums.verify(pool, ids)
    for at in pool.kinds(ids):
        group, old = ids[at], pool.kind(ids[at][0])
        new = replace(old, tier=tier, split=split)
        parts = tuple(i for i in (0, 1) if old.tiers[i] != new.tiers[i])
        fresh = dict(zip(parts, pool.room_for(new, len(group), parts), strict=True))
        off = [pool.k_off[group], pool.v_off[group]]
        for i, after in fresh.items():
            _transfer(pool, off[i], after, old.sizes[i], old.tiers[i], new.tiers[i])
        for i, after in fresh.items():
            pool.arena(old.tiers[i]).free(off[i], old.sizes[i])
            off[i] = after
        pool.place(group, new, off)
        checksums.sign(pool, group)


def _transfer(pool: PagePool, before: np.ndarray, after: np.ndarray, size: int, old: int, new: int) -> None:
    """Copy parts of `size` bytes from offsets on the tier `old` to offsets on the tier `new`."""
    src, dst = pool.arena(old).data, pool.arena(new).data
    if pool.transfer and DEVICE in (old, new):  # a file's parts go through pinned memory of the driver's own
        pool.transfer.copy(src, dst, before, after, size)
        if new == DEVICE:
            pool.fence()
    else:
        pool.settle()
        pageops.copy_parts(src, dst, torch.from_numpy(before), torch.from_numpy(after), size)
    pool.moved_bytes += size * len(before)


def shorten(pool: PagePool, ids: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Keep only the first `count` slots of each page; shared pages are copied. Returns the ids to use."""
    out, shared = ids.copy(), np.flatnonzero(pool.ref[ids] > 1)
    for at in pool.kinds(ids[shared]):
        try:
            out[shared[at]] = copy(pool, ids[shared[at]])
        except (ArenaFull, CacheFileError):
            pool.release(out[out != ids])
            raise
    pool.release(ids[out != ids])
    pool.count[out] = count
    pool.set_pos(out)
    return out
