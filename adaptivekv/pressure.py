"""Keeping the budget: what gives way, in which order, when the device has no room for the next pages."""

from __future__ import annotations

import math

import numpy as np

from adaptivekv.errors import BudgetError
from adaptivekv.memory.formats import BY_CODE, FORMATS
from adaptivekv.memory.pages import DEVICE, HOST
from adaptivekv.memory.sequence import Sequence
from adaptivekv.plan import Plan
from adaptivekv.policies.base import settled, worth

RECENT = 64  # tokens that pressure leaves alone: the newest sealed page


def make_room(sequences: list[Sequence], plans: list[Plan], prefilling: list[bool], need: int) -> list[str]:
    """Free `need` device bytes for sequences of one pool. Returns what was done, in words, for the record.

    Lossless first: pages move to the host. Then the plan's own lossy stages run early, on what has been seen so far;
    then bits go, a format at a time; then the oldest pages. Raises BudgetError when even that is not enough.
    """
    pool = sequences[0].pool
    arena = pool.arena(DEVICE)
    done: list[str] = []
    for relief, what in (
        (_spill, "spilled to host"),
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


def _spill(sequence: Sequence, plan: Plan, early: bool, need: int) -> None:
    """Move the least worthy columns to the host, the same share of every layer."""
    pool = sequence.pool
    missing = need - pool.arena(DEVICE).free_bytes
    sizes = [_sizes(sequence, layer) for layer in range(len(sequence.ids))]
    held = max(1, sum(int(size.sum()) for size in sizes))
    for layer, size in enumerate(sizes):
        here, column = size > 0, size.sum(0)
        order = np.argsort(np.where(here, worth(sequence, layer), np.inf).min(0, initial=np.inf), kind="stable")
        ahead = np.cumsum(column[order]) - column[order]
        leave = np.zeros(len(column), bool)
        leave[order[ahead < math.ceil(missing * column.sum() / held)]] = True
        if missing > 0 and size[:, leave].sum() <= pool.host_free:
            sequence.move(layer, here & leave, HOST)


def _squeeze(sequence: Sequence, plan: Plan, early: bool, need: int) -> None:
    evict, quantize = plan.stage("evict"), plan.stage("quantize")
    if evict and (early or evict.growing):
        evict.apply(sequence)
    if quantize:
        quantize.apply(sequence)


def _demote(sequence: Sequence, plan: Plan, early: bool, need: int) -> None:
    arena = sequence.pool.arena(DEVICE)
    for name in ("int8", "int4r", "k4v2r", "int2r"):
        lowers = np.array([fmt.demotes(FORMATS[name]) for fmt in BY_CODE])
        for layer, ids in enumerate(sequence.ids):
            if arena.free_bytes >= need:
                return
            open_ = settled(sequence, layer, RECENT, 0) & (sequence.pool.tier[ids] == DEVICE)
            sequence.convert(layer, open_ & lowers[sequence.pool.code[ids]], FORMATS[name])


def _evict_oldest(sequence: Sequence, plan: Plan, early: bool, need: int) -> None:
    """StreamingLLM's rule at page granularity: the oldest page behind the first goes, in every layer and head."""
    arena, pool = sequence.pool.arena(DEVICE), sequence.pool
    while arena.free_bytes < need:
        before = arena.free_bytes
        for layer, ids in enumerate(sequence.ids):
            open_ = settled(sequence, layer, RECENT, 4) & (pool.tier[ids] == DEVICE)
            sequence.drop(layer, open_ & (np.cumsum(open_, axis=1) == 1))
        if arena.free_bytes == before:
            return


def bring_back(sequence: Sequence, spare: int) -> None:
    """Host pages return to the device while that leaves `spare` bytes free, layer by layer."""
    pool = sequence.pool
    for layer in range(len(sequence.ids)):
        away = _sizes(sequence, layer, HOST)
        if away.any() and away.sum() <= pool.arena(DEVICE).free_bytes - spare:
            sequence.move(layer, away > 0, DEVICE)


def _sizes(sequence: Sequence, layer: int, tier: int = DEVICE) -> np.ndarray:
    """Bytes of each page on `tier`, 0 elsewhere: [H, P]."""
    pool, ids = sequence.pool, sequence.ids[layer]
    table = np.array([pool.page_bytes(layer, fmt) for fmt in BY_CODE])
    return np.where((ids >= 0) & (pool.tier[ids] == tier), table[pool.code[ids]], 0)
