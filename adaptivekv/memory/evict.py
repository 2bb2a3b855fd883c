"""Token eviction that frees real pages: survivors of broken pages are packed into fresh ones."""

from __future__ import annotations

import numpy as np
import torch

from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.arena import ArenaFull
from adaptivekv.memory.formats import BY_CODE, Format
from adaptivekv.memory.sequence import Sequence


def evict(sequence: Sequence, layer: int, keep: np.ndarray) -> None:
    """Keep the slots where `keep` [H, P, 64] is true and repack what is left of broken pages, head by head.

    Whole pages that are kept stay as they are; survivors of the others fill new pages of the same format and
    tier, so the freed pages are room at once.
    """
    used, _ = sequence.slots(layer)
    keep, pool = keep & used, sequence.pool
    for h in range(len(sequence.ids[layer])):
        ids = sequence.ids[layer][h]
        left, had = keep[h].sum(1), used[h].sum(1)
        broken = (ids >= 0) & (left < had)
        if not broken.any():
            continue
        survivors = []
        for group in pool.groups(ids[broken & (left > 0)]):
            k, v = pool.read(group)
            at = np.array([np.flatnonzero(ids == page)[0] for page in group])
            index = torch.from_numpy(keep[h][at]).to(k.device)
            k, v = k[index].to(pool.dtype), v[index].to(pool.dtype)
            survivors.append((int(group[0]), k, v, pool.pos[group][keep[h][at]]))
        kinds = [(BY_CODE[pool.code[page]], int(pool.tier[page])) for page, *_ in survivors]
        _check_room(sequence, layer, ids[broken], kinds, survivors)
        pool.release(ids[broken])
        fresh = []
        for kind in dict.fromkeys(kinds):
            parts = [s for s, other in zip(survivors, kinds, strict=True) if other == kind]
            k, v = torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
            fresh.append(_pack(sequence, layer, k, v, np.concatenate([p[3] for p in parts]), *kind))
        kept = np.concatenate([ids[(ids >= 0) & ~broken], *fresh])
        kept = kept[np.argsort(pool.pos[kept, 0], kind="stable")] if len(kept) else kept
        sequence.ids[layer][h] = -1
        sequence.ids[layer][h, : len(kept)] = kept
        sequence.mass[layer][h] = np.nan
    sequence.close_gaps(layer)


def _check_room(sequence: Sequence, layer: int, broken: np.ndarray, kinds: list, survivors: list) -> None:
    """Raise ArenaFull before anything is given up, if the fresh pages have no room (shared ones free none)."""
    pool = sequence.pool
    own = broken[pool.ref[broken] == 1]
    for fmt, tier in dict.fromkeys(kinds):
        slots = sum(len(s[3]) for s, kind in zip(survivors, kinds, strict=True) if kind == (fmt, tier))
        freed = sum(pool.page_bytes(layer, BY_CODE[code]) for code in pool.code[own[pool.tier[own] == tier]])
        if pool.arena(tier).free_bytes + freed < -(-slots // PAGE) * pool.page_bytes(layer, fmt):
            raise ArenaFull("arena full: no room to pack what eviction keeps of shared pages")


def _pack(
    sequence: Sequence, layer: int, k: torch.Tensor, v: torch.Tensor, pos: np.ndarray, fmt: Format, tier: int
) -> np.ndarray:
    """Seal [n, dim] slots of one head, in position order, into as few pages as they need."""
    order = np.argsort(pos, kind="stable")
    index = torch.from_numpy(order).to(k.device)
    n = -(-len(pos) // PAGE)
    pages = [x.new_zeros(n * PAGE, x.shape[1]) for x in (k, v)]
    for page, x in zip(pages, (k, v), strict=True):
        page[: len(pos)] = x[index]
    page_pos = np.zeros(n * PAGE, np.int32)
    page_pos[: len(pos)] = pos[order]
    count = np.minimum(len(pos) - PAGE * np.arange(n), PAGE)
    return sequence.pool.write(
        layer, pages[0].view(n, PAGE, -1), pages[1].view(n, PAGE, -1), count, page_pos.reshape(n, PAGE), fmt, tier
    )
