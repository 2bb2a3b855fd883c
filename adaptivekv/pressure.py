"""Keeping the budget: what gives way, in which order, when the device has no room for the next pages."""

from __future__ import annotations

import contextlib
import math
from functools import partial

import numpy as np

from adaptivekv.errors import BudgetError
from adaptivekv.memory.arena import ArenaFull
from adaptivekv.memory.formats import BY_CODE, FORMATS
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, DISK, HOST
from adaptivekv.plan import Plan
from adaptivekv.policies.base import settled, worth

RECENT = 64  # tokens that pressure leaves alone: the newest sealed page


def make_room(sequences: list[Sequence], plans: list[Plan], prefilling: list[bool], need: int) -> list[str]:
    """Free `need` device bytes for sequences of one pool. Returns what was done, in words, for the record.

    Lossless first: pages move to the host, or to disk if there is one. Then the plan's own lossy stages run early, on
    what has been seen so far; then bits go, a format at a time; then the oldest pages. Raises BudgetError when even
    that is not enough.
    """
    pool = sequences[0].pool
    arena = pool.arena(DEVICE)
    done: list[str] = []
    for relief, what in (
        (partial(_spill, tier=HOST), "spilled to host"),
        (partial(_spill, tier=DISK), "spilled to disk"),
        (_squeeze, "plan applied early"),
        (_demote, "demoted"),
        (_evict_oldest, "oldest pages evicted"),
    ):
        if arena.free_bytes >= need:
            return done
        before = arena.free_bytes
        for sequence, plan, early in zip(sequences, plans, prefilling, strict=True):
            relief(sequence, plan, early, need)
        if arena.free_bytes > before:
            done.append(what)
    if arena.free_bytes < need:
        raise BudgetError(
            f"budget: {need / 2**20:.2f} MiB of device memory needed, {arena.free_bytes / 2**20:.2f} MiB left after "
            "demoting, offloading and evicting; raise the budget or shorten the request"
        )
    return done


def _spill(sequence: Sequence, plan: Plan, early: bool, need: int, tier: int) -> None:
    """Move the least worthy columns to a lower tier, the same share of every layer."""
    pool = sequence.pool
    missing = need - pool.arena(DEVICE).free_bytes
    if missing <= 0 or not pool.away_free(tier):
        return
    sizes = [_sizes(sequence, layer) for layer in range(len(sequence.ids))]
    held = max(1, sum(int(size.sum()) for size in sizes))
    chosen, total = [], 0
    for layer, size in enumerate(sizes):
        here, column = size > 0, size.sum(0)
        order = np.argsort(np.where(here, worth(sequence, layer), np.inf).min(0, initial=np.inf), kind="stable")
        ahead = np.cumsum(column[order]) - column[order]
        leave = np.zeros(len(column), bool)
        leave[order[ahead < math.ceil(missing * column.sum() / held)]] = True
        ids = sequence.ids[layer]  # of a split page, what is on the host may have to move as well
        takes = int(np.where(here & leave, pool.sizes(ids) - pool.sizes_on(ids, tier), 0).sum())
        if total + takes > pool.away_free(tier):
            leave[:], takes = False, 0
        total += takes
        chosen.append(here & leave)
    sequence.move(chosen, tier)


def _squeeze(sequence: Sequence, plan: Plan, early: bool, need: int) -> None:
    evict, quantize = plan.stage("evict"), plan.stage("quantize")
    if evict and (early or evict.growing):
        evict.apply(sequence)
    if quantize:
        with contextlib.suppress(ArenaFull):  # for what it keeps beside its pages, or copies of shared ones
            quantize.apply(sequence)


def _demote(sequence: Sequence, plan: Plan, early: bool, need: int) -> None:
    """Take bits from the settled pages, a format at a time and in each no more layers than it needs."""
    pool = sequence.pool
    for name in ("int8", "int4r", "k4v2r", "int2r"):
        lowers = np.array([fmt.demotes(FORMATS[name]) for fmt in BY_CODE])
        missing, chosen = need - pool.arena(DEVICE).free_bytes, []
        for layer, ids in enumerate(sequence.ids):
            open_ = settled(sequence, layer, RECENT, 0) & (pool.tier[ids] == DEVICE) & lowers[pool.code[ids]]
            chosen.append(open_ & (missing > 0))
            pages = ids[chosen[-1]]
            own = pool.ref[pages] == 1  # a shared page is copied and frees nothing
            missing -= int(pool.sizes(pages[own]).sum()) - len(pages) * pool.page_bytes(layer, FORMATS[name])
        sequence.convert(chosen, FORMATS[name])


def _evict_oldest(sequence: Sequence, plan: Plan, early: bool, need: int) -> None:
    """StreamingLLM's rule at page granularity: the oldest page behind the first goes, in every layer and head."""
    arena = sequence.pool.arena(DEVICE)
    while arena.free_bytes < need:
        before = arena.free_bytes
        oldest = []
        for layer in range(len(sequence.ids)):
            open_ = settled(sequence, layer, RECENT, 4) & (_sizes(sequence, layer) > 0)
            oldest.append(open_ & (np.cumsum(open_, axis=1) == 1))
        sequence.drop(oldest)
        if arena.free_bytes == before:
            return


def bring_back(sequence: Sequence, spare: int) -> None:
    """Pages of host and disk return to the device while that leaves `spare` bytes free, layer by layer."""
    room, back = sequence.pool.arena(DEVICE).free_bytes - spare, []
    for layer in range(len(sequence.ids)):
        away = _sizes(sequence, layer, HOST) + _sizes(sequence, layer, DISK)
        fits = away.sum() <= room
        room -= int(away.sum()) * fits
        back.append((away > 0) & fits)
    sequence.move(back, DEVICE)


def _sizes(sequence: Sequence, layer: int, tier: int = DEVICE) -> np.ndarray:
    """Bytes of each page on `tier`: [H, P]."""
    pool, ids = sequence.pool, sequence.ids[layer]
    return np.where(ids >= 0, pool.sizes_on(ids, tier), 0)
