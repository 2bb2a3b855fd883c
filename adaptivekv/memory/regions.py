"""Tensors at addresses that never change: the tail and the ring of a sequence, around which compaction goes."""

from __future__ import annotations

from functools import cached_property
from math import prod

import numpy as np
import torch

from adaptivekv.memory.arena import ArenaFull
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.shapes import DEVICE


class Regions:
    """A region of the device arena for each layer, as tensors in the pool's dtype.

    shapes: of the tensors, layer by layer; `tensors` beside them. ArenaFull takes nothing.
    """

    def __init__(self, pool: PagePool, shapes: list[list[tuple[int, ...]]]):
        self.pool = pool
        self.offsets: list[int] = []
        self.tensors: list[list[torch.Tensor]] = []
        try:
            for parts in shapes:
                sizes = [prod(shape) * pool.dtype.itemsize for shape in parts]
                offset, data = pool.region(sum(sizes))
                self.offsets.append(offset)
                raw = data[: sum(sizes)].split(sizes)
                self.tensors.append([x.view(pool.dtype).view(shape) for x, shape in zip(raw, parts, strict=True)])
        except ArenaFull:
            self.free()
            raise

    def bytes(self) -> int:
        return sum(self.pool.regions[offset] for offset in self.offsets)

    @cached_property
    def heads(self) -> list[np.ndarray]:
        """Where each head's part of the tensors [H, ...] starts in the arena: int64 bytes, head by head through all
        layers, for the first tensor of every layer, for the second, and so on."""
        arena = self.pool.arena(DEVICE).data.data_ptr()
        return [
            np.concatenate([x.data_ptr() - arena + np.arange(len(x)) * (x.nbytes // len(x)) for x in alike])
            for alike in zip(*self.tensors, strict=True)
        ]

    def free(self) -> None:
        for offset in self.offsets:
            self.pool.free_region(offset)
        self.offsets, self.tensors = [], []
