"""Bases of low-rank pages: per layer and head the few directions that a request's keys, and its values, are stored in.

A page of rank r stores x B [64, r] instead of x [64, dim]; B [dim, r] has orthonormal columns, the same for all pages
of a head. Attention never turns pages back: it turns the query by B, and the output by B transposed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from adaptivekv.kernels import hadamard
from adaptivekv.kernels.codec import PAGE, UNIT
from adaptivekv.memory.formats import FORMATS, low_rank
from adaptivekv.memory.shapes import DEVICE, LayerShape

if TYPE_CHECKING:
    from adaptivekv.memory.pages import PagePool

_HEADS = 1 << 16  # page entry: number of the bases x _HEADS + head within the layer


def bases_bytes(shape: LayerShape, rank: int, dtype: torch.dtype) -> int:
    """Device bytes of one layer's bases for pages of `rank` eighths."""
    k_rank, v_rank = ranks(shape, rank)
    size = shape.heads * (shape.k_dim * k_rank + shape.v_dim * v_rank) * dtype.itemsize
    return -(-size // UNIT) * UNIT


def ranks(shape: LayerShape, rank: int) -> tuple[int, int]:
    """How many directions of keys and of values `rank` eighths are."""
    return FORMATS[low_rank(rank, "native")].dims(shape.k_dim, shape.v_dim)


class Bases:
    """Bases of all layers, in blocks of the device arena that compaction may move.

    ranks: of each layer, in eighths; offsets, sizes: int64 [L] of their blocks. Sequences that share pages share them;
    the last one to `leave` frees them. ArenaFull changes nothing.
    """

    def __init__(self, pool: PagePool, eighths: list[int]):
        self.pool, self.users, self.ranks = pool, 1, list(eighths)
        self.sizes = np.array([bases_bytes(s, n, pool.dtype) for s, n in zip(pool.layers, eighths, strict=True)])
        self.offsets = np.concatenate(pool.alloc(DEVICE, 1, *self.sizes.tolist()))
        self.number = max(pool.bases, default=0) + 1
        pool.bases[self.number] = self

    def leave(self) -> None:
        """A sequence does not use them any more."""
        self.users -= 1
        if not self.users:
            for offset, size in zip(self.offsets, self.sizes.tolist(), strict=True):
                self.pool.arena(DEVICE).free(np.array([offset]), size)
            del self.pool.bases[self.number]

    def bytes(self) -> int:
        return int(self.sizes.sum())

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Of keys [H, k_dim, k_rank] and of values [H, v_dim, v_rank], where they lie until the next compaction."""
        pool, shape = self.pool, self.pool.layers[layer]
        k_rank, v_rank = ranks(shape, self.ranks[layer])
        sizes = [shape.heads * shape.k_dim * k_rank, shape.heads * shape.v_dim * v_rank]
        start = int(self.offsets[layer])
        raw = pool.arena(DEVICE).data[start : start + sum(sizes) * pool.dtype.itemsize]
        k, v = raw.view(pool.dtype).split(sizes)
        return k.view(shape.heads, shape.k_dim, k_rank), v.view(shape.heads, shape.v_dim, v_rank)

    def name(self, ids: np.ndarray, head: np.ndarray) -> None:
        """Say that pages, of so-numbered heads of their layer, are in these bases."""
        self.pool.basis[ids] = self.entry(head)

    def entry(self, head: np.ndarray) -> np.ndarray:
        """What `pool.basis` says of pages of these heads."""
        return self.number * _HEADS + head

    def fill(self, layer: int, axes: tuple[Tensor, Tensor]) -> None:
        """Take the last directions of a layer's keys and of its values: [H, dim, dim] each, orthonormal columns.

        They are mixed by a Hadamard rotation, so that quantized latents have no large and small channels.
        """
        for out, columns in zip(self.layer(layer), axes, strict=True):
            out.copy_(hadamard(columns[..., -out.shape[2] :]))


def moments(pool: PagePool, ids: np.ndarray, head: np.ndarray, shape: LayerShape) -> tuple[Tensor, Tensor]:
    """Sums of k k^T and of v v^T over the slots of a layer's pages, of so-numbered heads: [H, dim, dim] on the host."""
    out = [torch.zeros(shape.heads, dim, dim) for dim in (shape.k_dim, shape.v_dim)]
    for h in np.unique(head):
        for group in pool.groups(ids[head == h]):
            for total, x in zip(out, pool.read(group), strict=True):
                flat = clean(pool, group, x).flatten(0, 1)
                total[h] += (flat.T @ flat).cpu()
    return out[0], out[1]


def clean(pool: PagePool, ids: np.ndarray, x: Tensor) -> Tensor:
    """x [n, 64, dim] with unused slots made 0: they may hold anything."""
    used = torch.arange(PAGE) < torch.from_numpy(pool.count[ids])[:, None]
    return x.masked_fill_(~used[..., None].to(x.device), 0.0)


def project(pool: PagePool, ids: np.ndarray, part: int, x: Tensor, back: bool = False) -> Tensor:
    """Keys (part 0) or values of pages of one kind, [n, 64, dim], in their bases: [n, 64, rank]; `back`: from there."""
    pieces, order = [], []
    where = np.stack([pool.basis[ids], pool.layer[ids]], 1)
    for entry, layer in np.unique(where, axis=0).tolist():
        at = np.flatnonzero((where == (entry, layer)).all(1))
        basis = pool.bases[entry // _HEADS].layer(layer)[part][entry % _HEADS].to(x.dtype)  # [dim, rank]
        pieces.append(x[torch.from_numpy(at).to(x.device)] @ (basis.T if back else basis))
        order.append(at)
    out = torch.cat(pieces)
    return out[torch.from_numpy(np.argsort(np.concatenate(order))).to(out.device)]
