"""Sealing: the full slots of a tail become native pages, of all layers and heads or of none."""

from __future__ import annotations

import numpy as np
import torch

from adaptivekv.kernels import pageops
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.arena import ArenaFull
from adaptivekv.memory.formats import FORMATS
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.shapes import DEVICE, Kind
from adaptivekv.memory.transfer import kernel_tables

NATIVE = FORMATS["native"]


def claim(pool: PagePool, n: int) -> list[np.ndarray]:
    """Native pages with room but no content yet, `n` for every head: ids [H, n] a layer. ArenaFull changes nothing."""
    heads = np.array([s.heads for s in pool.layers])
    layer = np.repeat(np.arange(len(heads)), heads * n)  # of each page
    ids = np.full(len(layer), -1, np.int32)
    try:
        for model in np.unique(pool.model):
            mine, shape = pool.model[layer] == model, pool.layers[model]
            kind = Kind(shape.k_dim, shape.v_dim, pool.dtype, NATIVE, DEVICE)
            ids[mine] = pool.claim(layer[mine], kind, np.full(mine.sum(), PAGE))
    except ArenaFull:
        pool.release(ids[ids >= 0])
        raise
    return np.split(ids.reshape(-1, n), np.cumsum(heads)[:-1])


def write(pool: PagePool, ids: np.ndarray, k: torch.Tensor, v: torch.Tensor, pos: np.ndarray) -> None:
    """Fill claimed pages [H, n] of a layer with the first n * 64 slots of k [H, N, k_dim], v [H, N, v_dim], pos [N]."""
    heads, n = ids.shape
    k, v = (x[:, : n * PAGE].reshape(heads * n, PAGE, -1) for x in (k, v))
    raw = NATIVE.k.encode(k, pool.dtype), NATIVE.v.encode(v, pool.dtype)
    pool.fill(ids.ravel(), raw, np.tile(pos[: n * PAGE].reshape(n, PAGE), (heads, 1)))


def copy_tails(pool: PagePool, ids: np.ndarray, k_from: np.ndarray, v_from: np.ndarray) -> None:
    """Copy tails into native pages on the device: ids [n], and where their keys and values start in its arena, [n]."""
    data, models = pool.arena(DEVICE).data, pool.model[pool.layer[ids]]
    for model in np.unique(models):
        mine, shape = models == model, pool.layers[model]
        tables = kernel_tables(pool, DEVICE, k_from[mine], v_from[mine], pool.k_off[ids[mine]], pool.v_off[ids[mine]])
        for i, dim in enumerate((shape.k_dim, shape.v_dim)):
            pageops.copy_parts(data, data, tables[i], tables[i + 2], PAGE * dim * pool.dtype.itemsize)
