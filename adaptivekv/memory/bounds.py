"""Page bounds: the smallest and largest key of a page, channel by channel (Quest, arXiv 2406.10774)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from adaptivekv.kernels import pageops
from adaptivekv.kernels.codec import PAGE, UNIT

if TYPE_CHECKING:
    from adaptivekv.memory.pages import PagePool


def bounds_bytes(pool: PagePool, layer: int) -> int:
    """Device bytes of one page's bounds."""
    return -(-2 * pool.layers[layer].k_dim * pool.dtype.itemsize // UNIT) * UNIT


def bounds(pool: PagePool, ids: np.ndarray) -> torch.Tensor:
    """Bounds of distinct pages of one layer, [n, 2, k_dim] in the pool's dtype, measured at the first call for a page.

    They stay on the device wherever the page itself lives, until the page is released.
    """
    layer = int(pool.layer[ids[0]])
    dim, size = pool.layers[layer].k_dim, bounds_bytes(pool, layer)
    for group in pool.groups(np.unique(ids[pool.b_off[ids] < 0])):
        keys = pool.keys(group)
        used = (torch.arange(PAGE) < torch.from_numpy(pool.count[group])[:, None]).to(keys.device)[..., None]
        low = keys.masked_fill(~used, torch.inf).amin(1)
        high = keys.masked_fill(~used, -torch.inf).amax(1)
        both = torch.stack([low, high], 1).to(pool.dtype).view(len(group), -1).view(torch.uint8)
        raw = torch.zeros(len(group), size, dtype=torch.uint8, device=keys.device)
        raw[:, : both.shape[1]] = both
        (off,) = pool.alloc(0, len(group), size)
        pageops.store(pool.arena(0).data, torch.from_numpy(off), raw)
        pool.b_off[group] = off
        pool.mark(group)
    raw = pageops.fetch(pool.arena(0).data, torch.from_numpy(pool.b_off[ids]), size)
    return raw[:, : 2 * dim * pool.dtype.itemsize].contiguous().view(pool.dtype).view(len(ids), 2, dim)
