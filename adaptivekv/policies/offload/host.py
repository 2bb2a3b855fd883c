"""Offload: part of the pages live in host memory and are attended from there. Nothing is lost.

The idea is FlexGen's (arXiv 2303.06865), at page granularity: which pages leave is decided by their attention mass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from adaptivekv.memory.formats import BY_CODE
from adaptivekv.memory.pages import DEVICE, HOST
from adaptivekv.memory.sequence import Sequence
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
        for layer, ids in enumerate(sequence.ids):
            if not ids.size:
                continue
            size = np.array([pool.page_bytes(layer, fmt) for fmt in BY_CODE])[pool.code[ids]] * (ids >= 0)
            columns = size.sum(0)
            value = np.where(ids >= 0, worth(sequence, layer), -np.inf).max(0)
            best = np.argsort(-value, kind="stable")
            stays = np.zeros(len(columns), bool)
            stays[best] = np.cumsum(columns[best]) <= self.device * columns.sum()
            live = ids >= 0
            leave = live & ~stays & (pool.tier[ids] == DEVICE)
            if size[leave].sum() <= pool.host_free:  # a full host tier keeps them on the device, under its own pressure
                sequence.move(layer, leave, HOST)
            back = live & stays & (pool.tier[ids] == HOST)
            if size[back].sum() <= pool.arena(DEVICE).free_bytes - pool.reserved:
                sequence.move(layer, back, DEVICE)

    def features(self) -> dict[str, float]:
        return {"device_share": self.device}
