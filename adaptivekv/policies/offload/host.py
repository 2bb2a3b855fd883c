"""Offload: part of the pages live in host memory and are attended from there. Nothing is lost.

The idea is FlexGen's (arXiv 2303.06865), at page granularity: which pages leave is decided by their attention mass. Or
whole layers leave, as in LayerKV (arXiv 2410.00428): every transfer is one long run, known before the step begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import numpy as np

from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, HOST
from adaptivekv.policies.base import Stage, choice, share, worth


@dataclass(frozen=True)
class Offload(Stage):
    """At most the share `device` of the sealed bytes stays on the device.

    by=pages: of every layer. Whole columns move (the same page of every head of a layer), least worth first.
    by=layers: whole layers move, evenly spread, so that those that stay hide the reading of the others; the paper sizes
    their number by the queue, so that a prompt is admitted sooner, and prefetches. Here the share is given.
    Pages come back when the share allows it and the device has room.
    """

    device: float
    by: str = "pages"

    name: ClassVar[str] = "offload"
    kind: ClassVar[str] = "offload"
    paper: ClassVar[str] = "https://arxiv.org/abs/2303.06865"
    lossy: ClassVar[bool] = False
    undoable: ClassVar[bool] = True
    formula: ClassVar[str] = "device x (bytes of the other stages) on the device, the rest on the host"

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", share("device", self.device))
        choice("by", self.by, "pages", "layers")

    def apply(self, sequence: Sequence) -> None:
        pool = sequence.pool
        live = [ids >= 0 for ids in sequence.ids]
        sizes = [pool.sizes(ids) * here for ids, here in zip(sequence.ids, live, strict=True)]
        if self.by == "layers":
            layers = self._layers(np.array([size.sum() for size in sizes]))
            stays = [np.full(size.shape[1], stay) for size, stay in zip(sizes, layers, strict=True)]
        else:
            stays = [self._columns(sequence, layer, size.sum(0)) for layer, size in enumerate(sizes)]
        device = [pool.tier[ids] == DEVICE for ids in sequence.ids]
        leave = [a & b & ~c for a, b, c in zip(live, device, stays, strict=True)]
        # a full host tier keeps them on the device, under its own pressure
        if _sum(sizes, leave) <= pool.host_free:
            sequence.move(leave, HOST)
        back = [a & ~b & c for a, b, c in zip(live, device, stays, strict=True)]
        if _sum(sizes, back) <= pool.arena(DEVICE).free_bytes - pool.reserved:
            sequence.move(back, DEVICE)

    def _layers(self, sizes: np.ndarray) -> np.ndarray:
        """Which layers, of so many bytes each, stay: bool [L]. Evenly spread, and as many as the share allows."""
        for number in range(len(sizes), 0, -1):
            steps = np.arange(len(sizes) + 1) * number // len(sizes)
            stays = steps[1:] > steps[:-1]
            if sizes[stays].sum() <= self.device * sizes.sum():
                return stays
        return np.zeros(len(sizes), bool)

    def _columns(self, sequence: Sequence, layer: int, columns: np.ndarray) -> np.ndarray:
        """Which columns of a layer, of so many bytes each, stay on the device: bool [P]."""
        value = np.where(sequence.ids[layer] >= 0, worth(sequence, layer), -np.inf).max(0)
        best = np.argsort(-value, kind="stable")
        stays = np.zeros(len(columns), bool)
        stays[best] = np.cumsum(columns[best]) <= self.device * columns.sum()
        return stays

    def stays(self, held: list[tuple[int, list[int]]]) -> int:
        """Bytes that stay of so many layers with columns of so many bytes each."""
        if self.by == "layers":
            sizes = np.array([sum(columns) for count, columns in held for _ in range(count)])
            return int(sizes[self._layers(sizes)].sum())
        most = ((count, self.device * sum(columns), accumulate(columns)) for count, columns in held)
        return sum(count * max((part for part in parts if part <= room), default=0) for count, room, parts in most)

    def features(self) -> dict[str, float]:
        return {"device_share": self.device}


def _sum(sizes: list[np.ndarray], chosen: list[np.ndarray]) -> int:
    return sum(int(size[mask].sum()) for size, mask in zip(sizes, chosen, strict=True))
