"""How large the pool of a cache is: what a budget means in bytes, and the capacity of each tier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adaptivekv.errors import BudgetError
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.formats import FORMATS, parse_bytes
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape

if TYPE_CHECKING:
    from adaptivekv.cache import AdaptiveCache


def capacity(size: str | int | None) -> int | None:
    """Bytes of a tier as the caller says them; 0 is none, None leaves it to `make_pool`."""
    return None if size is None else 0 if size in (0, "0") else int(parse_bytes(size))


def full_bytes(shapes: list[LayerShape], tokens: int) -> int:
    """The full 16-bit cache of `tokens` tokens."""
    return sum(s.slot_elements for s in shapes) * 2 * tokens


def budget_bytes(budget: float | int | None, shapes: list[LayerShape], tokens: int) -> int | None:
    """A budget in bytes: a float is a share of the full 16-bit cache of `tokens` tokens."""
    if isinstance(budget, float):
        return int(budget * sum(s.slot_elements for s in shapes) * 2 * tokens)
    return budget


def make_pool(cache: AdaptiveCache, rows: int, tokens: int, budget: int | None) -> PagePool:
    """A pool for `rows` requests of `tokens` tokens each, within `budget` device bytes for all of them (None: no cap).

    Raises BudgetError where the budget does not hold the open tails and a page of every head.
    """
    shapes, dtype, device, native = cache.shapes, cache.dtype, cache.device, FORMATS["native"]
    column = sum(s.heads * native.bytes(s.k_dim, s.v_dim, dtype) for s in shapes)
    fixed = Sequence.fixed_bytes(shapes, dtype, cache.controller.window)
    pages = -(-tokens // PAGE) + 1
    offloads = [plan.stage("offload") for plan in cache.controller.possible]
    host, disk = cache.host, cache.disk
    if host is None:
        host = int(rows * pages * column * max(stage.host if stage else 1.0 for stage in offloads))
    if disk is None:
        disk = rows * pages * column * any(stage and stage.disk for stage in offloads)
    widest = max(s.heads * (s.k_dim + s.v_dim) for s in shapes) * PAGE * 4  # a decoded page of every head
    if budget is None:
        longest = max(tokens, cache.max_tokens or min(cache.positions, _spare(device) // (rows * column // PAGE)))
        room = rows * ((-(-longest // PAGE) + 2) * column + fixed + (1 << 16))
        return PagePool(shapes, dtype, device, room, host, max(4 << 20, widest), disk)
    staging = max(widest, min(budget // 16, 16 << 20))
    least = rows * (fixed + column * (1 if rows * tokens < PAGE else 2)) + staging
    if budget < least:
        raise BudgetError(
            f"budget {budget / 2**20:.2f} MiB is too small for the open tail and one page per head: at least "
            f"{least / 2**20:.2f} MiB"
        )
    return PagePool(shapes, dtype, device, budget - staging, host, staging, disk)


def _spare(device: torch.device) -> int:
    """Bytes an arena without a budget may claim: memory of a CPU is committed only when touched."""
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 1 << 62
