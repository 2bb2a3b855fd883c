"""Token eviction that frees real pages: survivors of broken pages are packed into fresh ones.

Native slots move as they are. Packed ones share their page's mean: those that move with it keep every bit, others are
rounded again to the mean of their new page. Where slots share scales (keys of KIVI, all of KVQuant) survivors are
decoded and get the scales of their new page. Either costs up to about half a step each time.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch

from adaptivekv.kernels import CODECS, pageops
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory import checksums
from adaptivekv.memory.arena import ArenaFull
from adaptivekv.memory.change import staged, unstage
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sealed import POS_BYTES, positions
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DISK, HOST, Kind
from adaptivekv.memory.transfer import kernel_tables

_FULL = np.array([(1 << n) - 1 for n in range(PAGE + 1)], np.uint64)  # slots 0 to n - 1, a bit each


def evict(sequence: Sequence, keep: np.ndarray) -> None:
    """Keep the slots in `keep` and repack what is left of broken pages.

    keep: uint64, one a cell (pagelists.py): bit s says that slot s stays; those of unused slots may say anything.
    Whole pages that are kept stay as they are; survivors of the others fill new pages of the same head, format and
    tier, in the order of their positions: on a GPU all at once, where they fit beside the old ones, else head by head.
    Raises ArenaFull where that does not fit either, which only shared pages can cause; heads done by then stay done.
    """
    pool, (row, ids) = sequence.pool, sequence.cells()
    count = np.where(ids >= 0, pool.count[ids], 0)
    bits = _FULL[count] & keep
    broken = np.flatnonzero(np.bitwise_count(bits) < count)
    if not len(broken):
        return
    rows, pages, bits = _some(broken, row, ids, bits)
    cuts: list[np.ndarray] = [np.arange(len(broken))]
    done: list[list[_Stream]] = []
    try:
        if pool.device.type == "cuda":
            with contextlib.suppress(ArenaFull):
                done.append(_repack(pool, rows, pages, bits, beside=True))
        if not done:  # or on a CPU, whose arena takes memory as it is written: the peak stays low
            cuts = np.split(cuts[0], np.flatnonzero(np.diff(rows)) + 1)
            for cut in cuts:
                done.append(_repack(pool, rows[cut], pages[cut], bits[cut], beside=False))
    finally:
        if done:
            gone = np.concatenate(cuts[: len(done)])
            _take(sequence, row, ids, broken[gone], [stream for streams in done for stream in streams])


def _some(at: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Elements `at` of each; the arrays themselves where that is all of them."""
    return arrays if len(at) == len(arrays[0]) else tuple(x[at] for x in arrays)


@dataclass
class _Stream:
    """Survivors of one kind of page, and the pages that they fill.

    pages, bits, start: [n] where survivors lie, which slots, and the running number of the first (`pack_slots`).
    row, layer, basis, count: [m] of the new pages.
    """

    kind: Kind
    pages: np.ndarray
    bits: np.ndarray
    start: np.ndarray
    row: np.ndarray
    layer: np.ndarray
    basis: np.ndarray
    count: np.ndarray
    ids: np.ndarray  # [m], once they are claimed


def _stream(pool: PagePool, rows: np.ndarray, pages: np.ndarray, bits: np.ndarray) -> _Stream:
    """Number the survivors of broken pages, all of one kind, given head by head in table order."""
    first, kind = pool.first[pages], pool.kind(pages[0])
    clash = (rows[1:] == rows[:-1]) & (pool.last[pages[:-1]] >= first[1:])
    if clash.any():  # pages of these heads interleave, as eviction leaves them: take them slot by slot
        slots = np.isin(rows, rows[1:][clash])
        at, slot = np.nonzero(np.unpackbits(bits[slots].view(np.uint8).reshape(-1, 8), axis=1, bitorder="little"))
        at = np.flatnonzero(slots)[at]
        first = np.concatenate([first[~slots], pool.pos[pages[at], slot]])
        bits = np.concatenate([bits[~slots], np.left_shift(np.uint64(1), slot.astype(np.uint64))])
        at = np.concatenate([np.flatnonzero(~slots), at])
        order = np.lexsort((first, rows[at]))
        first, bits, pages, rows = first[order], bits[order], pages[at[order]], rows[at[order]]
    number = np.bitwise_count(bits).astype(np.int64)
    begin = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
    slots = np.add.reduceat(number, begin)  # of each head
    size = (slots + PAGE - 1) // PAGE  # new pages of each head
    ends = np.cumsum(size)
    before = np.cumsum(number) - number
    # every head begins a page of its own
    start = before + np.repeat((ends - size) * PAGE - before[begin], np.diff(begin, append=len(rows)))
    count = np.full(ends[-1], PAGE, np.int32)
    count[ends - 1] = slots - PAGE * (size - 1)
    row, layer, basis = (np.repeat(x, size) for x in (rows[begin], pool.layer[pages[begin]], pool.basis[pages[begin]]))
    return _Stream(kind, pages, bits, start, row, layer, basis, count, np.zeros(0, np.int64))


def _repack(pool: PagePool, rows: np.ndarray, pages: np.ndarray, bits: np.ndarray, beside: bool) -> list[_Stream]:
    """Pack the slots `bits` of broken pages into new ones, release the broken. ArenaFull: nothing happened.

    beside: the new pages get room before the old ones lose theirs; else they wait in a temporary copy.
    """
    rows, live, bits = _some(np.flatnonzero(bits), rows, pages, bits)
    checksums.verify(pool, live)
    streams = [_stream(pool, rows[at], live[at], bits[at]) for at in pool.kinds(live)]
    if beside:
        _claim(pool, streams)
        for s in streams:
            k, v = (pool.arena(tier).data for tier in s.kind.tiers)
            off = pool.k_off[s.ids], pool.v_off[s.ids], s.ids * POS_BYTES
            _pack(pool, s, off, (k, v, positions(pool.pos)))
            checksums.sign(pool, s.ids)
        pool.release(pages)
        return streams
    own = pages[pool.ref[pages] == 1]
    for tier in {tier for s in streams for tier in s.kind.tiers}:
        need = sum(len(s.count) * s.kind.bytes_on(tier) for s in streams)
        if pool.arena(tier).free_bytes + pool.sizes_on(own, tier).sum() < need:
            raise ArenaFull("arena full: no room to pack what eviction keeps of shared pages")
    copies = []
    for s in streams:
        (k_off, v_off), buffer = staged(pool, s.kind, len(s.count))
        pos = torch.empty(len(s.count) * POS_BYTES, dtype=torch.uint8, device=pool.device)
        _pack(pool, s, (k_off, v_off, np.arange(len(s.count)) * POS_BYTES), (buffer, buffer, pos))
        copies.append(([k_off, v_off], buffer, pos))
    pool.release(pages)
    _claim(pool, streams)
    for s, (before, buffer, pos) in zip(streams, copies, strict=True):
        unstage(pool, s.kind, [pool.k_off[s.ids], pool.v_off[s.ids]], before, buffer)
        checksums.sign(pool, s.ids)
        pool.pos[s.ids] = pos.view(torch.int32).view(-1, PAGE).cpu().numpy()
    return streams


def _claim(pool: PagePool, streams: list[_Stream]) -> None:
    """Give every stream its pages, or none."""
    made: list[np.ndarray] = []
    try:
        for s in streams:
            s.ids = pool.claim(s.layer, s.kind, s.count)
            pool.basis[s.ids] = s.basis
            made.append(s.ids)
    except ArenaFull:
        for ids in made:
            pool.release(ids)
        raise


def _pack(pool: PagePool, s: _Stream, off: tuple[np.ndarray, ...], into: tuple[torch.Tensor, ...]) -> None:
    """Write keys, values and positions of the new pages to offsets [m] each in three buffers."""
    (k, v), (k_from, v_from) = s.kind.parts, (pool.arena(tier).data for tier in s.kind.tiers)
    bits = s.bits.view(np.int64)
    before = pool.k_off[s.pages], pool.v_off[s.pages], s.pages * POS_BYTES
    tier = DISK if s.kind.tier == DISK else HOST  # positions live on the host
    tables = kernel_tables(pool, tier, *before, *off, bits, s.start, s.count)
    packs = (k_from, *k, pool.dtype), (v_from, *v, pool.dtype), (positions(pool.pos), CODECS["native"], 1, torch.int32)
    mask, start, count = tables[6:]
    for i, (data, codec, dim, dtype) in enumerate(packs):
        pageops.pack_slots(data, into[i], tables[i], mask, start, tables[i + 3], count, codec, dim, dtype)


def _take(sequence: Sequence, row: np.ndarray, ids: np.ndarray, gone: np.ndarray, streams: list[_Stream]) -> None:
    """Put new pages into the tables in place of the cells `gone` of `row`, `ids`, in the order of positions."""
    pool = sequence.pool
    mass = np.concatenate([m.ravel() for m in sequence.mass])
    hit = np.zeros(row[-1] + 1, bool)
    hit[row[gone]] = True
    mass[hit[row]] = np.nan  # shares of what is no longer there
    ids[gone] = -1
    live = np.flatnonzero(ids >= 0)
    made = np.concatenate([np.zeros(0, np.int64), *(s.ids for s in streams)])
    pool.settle()  # a GPU packs positions as well
    pool.set_pos(made)
    rows, ids = np.concatenate([row[live], *(s.row for s in streams)]), np.concatenate([ids[live], made])
    mass = np.concatenate([mass[live], np.full(len(made), np.nan, np.float32)])
    order = np.argsort(rows << 32 | pool.first[ids], kind="stable")
    sequence.assign(rows[order], ids[order], mass[order])
