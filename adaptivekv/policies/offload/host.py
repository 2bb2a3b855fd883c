"""Offload: part of the pages live in host memory and are attended from there. Nothing is lost.

The idea is FlexGen's (arXiv 2303.06865), at page granularity: which pages leave is decided by their attention mass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, HOST
from adaptivekv.policies.base import Stage, share, worth


@dataclass(frozen=True)
class Offload(Stage):
    """At most the share `device` of the sealed bytes stays on the device, in every layer.

    Whole columns move (the same page of every head of a layer), least worth first, so that transfers are long runs.
    Pages come back when the share allows it and the device has room.
    """

    device: float

    name: ClassVar[str] = "offload"
    kind: ClassVar[str] = "offload"
    paper: ClassVar[str] = "https://arxiv.org/abs/2303.06865"
    lossy: ClassVar[bool] = False
    undoable: ClassVar[bool] = True
    formula: ClassVar[str] = "device x (bytes of the other stages) on the device, the rest on the host"

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", share("device", self.device))

    def apply(self, sequence: Sequence) -> None:
        pool = sequence.pool
        live = [ids >= 0 for ids in sequence.ids]
        sizes = [pool.sizes(ids) * here for ids, here in zip(sequence.ids, live, strict=True)]
        stays = [self._stays(sequence, layer, size.sum(0)) for layer, size in enumerate(sizes)]
        device = [pool.tier[ids] == DEVICE for ids in sequence.ids]
        leave = [a & b & ~c for a, b, c in zip(live, device, stays, strict=True)]
        # a full host tier keeps them on the device, under its own pressure
        if _sum(sizes, leave) <= pool.host_free:
            sequence.move(leave, HOST)
        back = [a & ~b & c for a, b, c in zip(live, device, stays, strict=True)]
        if _sum(sizes, back) <= pool.arena(DEVICE).free_bytes - pool.reserved:
            sequence.move(back, DEVICE)

    def _stays(self, sequence: Sequence, layer: int, columns: np.ndarray) -> np.ndarray:
        """Which columns of a layer, of so many bytes each, stay on the device: bool [P]."""
        value = np.where(sequence.ids[layer] >= 0, worth(sequence, layer), -np.inf).max(0)
        best = np.argsort(-value, kind="stable")
        stays = np.zeros(len(columns), bool)
        stays[best] = np.cumsum(columns[best]) <= self.device * columns.sum()
        return stays

    def features(self) -> dict[str, float]:
        return {"device_share": self.device}


def _sum(sizes: list[np.ndarray], chosen: list[np.ndarray]) -> int:
    return sum(int(size[mask].sum()) for size, mask in zip(sizes, chosen, strict=True))
