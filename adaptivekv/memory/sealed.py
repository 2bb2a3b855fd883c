"""Where the sealed slots of a request stand, beside the keys: what an eviction scores and chooses from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from adaptivekv.kernels import pageops
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.shapes import HOST
from adaptivekv.memory.transfer import kernel_tables

if TYPE_CHECKING:
    from adaptivekv.memory.sequence import Sequence

POS_BYTES = PAGE * 4


@dataclass(frozen=True)
class Sealed:
    """Of the cells (pagelists.py) of some layers, on the pool's device: pos, original positions, int32 [n, 64],
    anything for unused slots; count, used slots, int32 [n], 0 where there is no page.

    layers: those whose cells these are; shapes: heads and columns of each.
    """

    pos: Tensor
    count: Tensor
    layers: range
    shapes: list[tuple[int, ...]]

    @classmethod
    def of(cls, sequence: Sequence, layers: range) -> Sealed:
        pool, lists = sequence.pool, [sequence.ids[layer] for layer in layers]
        ids = np.concatenate([x.ravel() for x in lists], dtype=np.int64)
        count, first = np.where(ids >= 0, pool.count[ids], 0), pool.first[ids]
        held = torch.from_numpy(count).to(pool.device)
        if ((pool.last[ids] - first == count - 1) | (count == 0)).all():  # as the prompt left them
            pos = torch.from_numpy(first).to(pool.device)[:, None] + torch.arange(PAGE, dtype=torch.int32).to(held)
        elif pool.device.type == "cuda":  # 256 bytes a page over the bus, by a kernel
            raw = torch.empty(len(ids) * POS_BYTES, dtype=torch.uint8, device=pool.device)
            here, there = np.maximum(ids, 0) * POS_BYTES, np.arange(len(ids)) * POS_BYTES
            src, dst = kernel_tables(pool, HOST, here, there)
            pageops.copy_parts(positions(pool.pos), raw, src, dst, POS_BYTES)
            pos = raw.view(torch.int32).view(-1, PAGE)
        else:
            pos = torch.from_numpy(pool.pos[ids])
        return cls(pos, held, layers, [x.shape for x in lists])

    @cached_property
    def used(self) -> Tensor:
        """Bool [n, 64]."""
        return torch.arange(PAGE, device=self.pos.device) < self.count[:, None]

    @cached_property
    def head(self) -> Tensor:
        """Of its layer, int32 [n]."""
        head = np.concatenate([np.repeat(np.arange(heads, dtype=np.int32), columns) for heads, columns in self.shapes])
        return torch.from_numpy(head).to(self.pos.device)

    @cached_property
    def edges(self) -> list[int]:
        """Where the cells of each layer begin, and where the last ends."""
        return list(accumulate((heads * columns for heads, columns in self.shapes), initial=0))

    @property
    def head_edges(self) -> list[int]:
        """Where the cells of each head begin, and where the last ends."""
        return list(accumulate((columns for heads, columns in self.shapes for _ in range(heads)), initial=0))

    def part(self, values: Tensor, layer: int) -> Tensor:
        """Values of all cells, [n, 64], of one layer: [H, P, 64]."""
        at = layer - self.layers.start
        start, end = self.edges[at : at + 2]
        return values[start:end].view(*self.shapes[at], PAGE)


def sealed(sequence: Sequence, layer: int) -> Sealed:
    """Made once until pages change or another layer is wanted: of all layers together on a GPU, which wants few
    launches, of the layer alone on a CPU, which wants little memory."""
    if sequence.sealed is None or layer not in sequence.sealed.layers:
        gpu = sequence.pool.device.type == "cuda"
        sequence.sealed = Sealed.of(sequence, range(len(sequence.ids)) if gpu else range(layer, layer + 1))
    return sequence.sealed


def groups(sequence: Sequence) -> Iterator[Sealed]:
    """`sealed` of every layer, one after the other."""
    layer = 0
    while layer < len(sequence.ids):
        yield (group := sealed(sequence, layer))
        layer = group.layers.stop


def standing(sequence: Sequence, layer: int) -> tuple[Tensor, Tensor]:
    """`Sequence.slots` on the pool's device: used (bool) and pos, [H, P, 64] each."""
    here = sealed(sequence, layer)
    return here.part(here.used, layer), here.part(here.pos, layer)


def positions(pos: np.ndarray) -> Tensor:
    """Positions of pages, int32 [n, 64], as bytes: a page is 64 slots of one int32."""
    return torch.from_numpy(pos).view(torch.uint8).view(-1)
