"""Offload: part of the pages live in host memory or on disk and are attended from there. Nothing is lost.

The idea is FlexGen's (arXiv 2303.06865), at page granularity: which pages leave is decided by their attention mass. Or
whole layers leave, as in LayerKV (arXiv 2410.00428): every transfer is one long run, known before the step begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, DISK, HOST, TIERS
from adaptivekv.policies.base import Stage, choice, share, worth


@dataclass(frozen=True)
class Offload(Stage):
    """At most the share `device` of the sealed bytes stays on the device, at most the share `host` in host memory.

    What is left after both goes to disk; host=1 leaves nothing, host=0 is a cache of device and disk alone.
    by=pages: of every layer. Whole columns move (the same page of every head of a layer), least worth first.
    by=layers: whole layers move, evenly spread, so that those that stay hide the reading of the others; the paper sizes
    their number by the queue, so that a prompt is admitted sooner, and prefetches. Here the share is given.
    by=values: the keys stay, and the values of columns leave for host memory, least worth first; where the keys alone
    pass the share, all values do. Under `retrieve(by=keys)` only the values of pages that count are then fetched, as in
    ShadowKV (arXiv 2410.21465).
    Pages come back when the share allows it and the tier above has room.

    Disk pages are attended through a mapped file: the operating system reads them, and keeps in memory what it has
    room for. On a GPU they are gathered by the processor, and decode steps are not captured.
    """

    device: float
    by: str = "pages"
    host: float = 1.0

    name: ClassVar[str] = "offload"
    kind: ClassVar[str] = "offload"
    paper: ClassVar[str] = "https://arxiv.org/abs/2303.06865"
    lossy: ClassVar[bool] = False
    undoable: ClassVar[bool] = True
    formula: ClassVar[str] = "device x (bytes of the other stages) on the device, host x on the host, the rest on disk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", share("device", self.device))
        choice("by", self.by, "pages", "layers", "values")
        if isinstance(self.host, bool) or not isinstance(self.host, int | float) or not 0 <= self.host <= 1:
            raise AdaptiveKVError(f"host={self.host} must be a share from 0 to 1")
        if self.by == "values" and self.host < 1:
            raise AdaptiveKVError(f"host={self.host:g}: by=values sends nothing to disk; leave host out")
        object.__setattr__(self, "host", float(self.host))

    @property
    def disk(self) -> bool:
        """Whether pages may have to go to disk."""
        return self.host < 1

    def apply(self, sequence: Sequence) -> None:
        pool, split = sequence.pool, self.by == "values"
        live = [ids >= 0 for ids in sequence.ids]
        parts = [
            np.stack([size[pool.layer[ids], pool.code[ids]] for size in (pool.k_bytes, pool.v_bytes)], 2)
            * here[..., None]
            for ids, here in zip(sequence.ids, live, strict=True)
        ]  # [H, P, 2] a layer
        if self.by == "layers":
            layers = self._layers(np.array([size.sum() for size in parts]))
            goals = [np.full(size.shape[1], tier) for size, tier in zip(parts, layers, strict=True)]
        else:
            goals = [self._columns(sequence, layer, size.sum(0)) for layer, size in enumerate(parts)]
        _, ids = sequence.cells()
        goal = np.concatenate([np.tile(aim, len(held)) for aim, held in zip(goals, sequence.ids, strict=True)])
        ends = np.cumsum([held.size for held in sequence.ids])[:-1]
        # the lowest tier first, so that each leaves room for the next, and twice: pages that pressure has sent away may
        # stand where others go. What finds no room stays where it is.
        for tier, origin in [*product((DISK, HOST, DEVICE), (DEVICE, HOST, DISK))] * 2:
            apart = split and tier == HOST
            wrong = (ids >= 0) & (goal == tier) & (pool.tier[ids] == origin)
            wrong &= (origin != tier) | (pool.split[ids] != apart)
            if wrong.any():
                chosen = [
                    mask.reshape(held.shape) for mask, held in zip(np.split(wrong, ends), sequence.ids, strict=True)
                ]
                tiers = DEVICE if apart else tier, tier
                sequence.move(self._fitting(sequence, chosen, parts, tiers), tier, apart)

    @staticmethod
    def _fitting(
        sequence: Sequence, chosen: list[np.ndarray], parts: list[np.ndarray], tiers: tuple[int, int]
    ) -> list[np.ndarray]:
        """The first of the chosen columns, as many as there is room for with keys and values on these tiers."""
        pool, ends = sequence.pool, np.cumsum([ids.shape[1] for ids in sequence.ids])
        fits = np.ones(ends[-1], bool)
        for tier in set(tiers):
            need = []
            for ids, mask, size in zip(sequence.ids, chosen, parts, strict=True):
                wanted = sum(size[..., i] for i in (0, 1) if tiers[i] == tier)
                need.append(((wanted - pool.sizes_on(ids, tier)).clip(0) * mask).sum(0))
            room = pool.arena(DEVICE).free_bytes - pool.reserved if tier == DEVICE else pool.away_free(tier)
            fits &= np.cumsum(np.concatenate(need)) <= max(0, room)
        return [mask & some for mask, some in zip(chosen, np.split(fits, ends[:-1]), strict=True)]

    def _layers(self, sizes: np.ndarray) -> np.ndarray:
        """The tier of each layer, of so many bytes each: int [L]. As many as the shares allow, each evenly spread."""
        tiers = np.full(len(sizes), DISK)
        for tier, room in ((DEVICE, self.device), (HOST, self.host)):
            rest = np.flatnonzero(tiers == DISK)
            tiers[rest[_spread(sizes[rest], room * sizes.sum())]] = tier
        return tiers

    def _columns(self, sequence: Sequence, layer: int, columns: np.ndarray) -> np.ndarray:
        """The tier of each column (by=values: of its values) of a layer; columns [P, 2] bytes. int [P]."""
        value = np.where(sequence.ids[layer] >= 0, worth(sequence, layer), -np.inf).max(0)
        best = np.argsort(-value, kind="stable")
        tiers = np.zeros(len(columns), np.int64)
        tiers[best] = self._filled(columns[best])
        return tiers

    def _filled(self, columns: np.ndarray) -> np.ndarray:
        """The tier of each column (by=values: of its values), best first: columns [n, 2] bytes -> int [n]."""
        total, always = columns.sum(), 0
        if self.by == "values":
            always, columns = columns[:, 0].sum(), columns[:, 1:]
        ends = np.cumsum(columns.sum(1))
        stays = always + ends <= self.device * total
        beyond = ends - columns[stays].sum()
        return np.where(stays, DEVICE, np.where(beyond <= self.host * total, HOST, DISK))

    def placed(self, held: list[tuple[int, np.ndarray]]) -> list[int]:
        """Bytes on device, host and disk of so many layers with columns of so many bytes of keys and values, [n, 2]."""
        if self.by == "layers":
            sizes = np.array([columns.sum() for count, columns in held for _ in range(count)], np.int64)
            if (sizes != sizes[:1]).any():  # which of them go where is not known: the most that it can be
                total = int(sizes.sum())
                device, host = int(self.device * total), int(self.host * total)
                leaves = total - int(np.sort(sizes)[: device // int(sizes.max())].sum())
                return [device, min(host, leaves), max(0, total - device - host)]
            tiers = self._layers(sizes)
        else:
            tiers = np.concatenate([self._filled(columns) for _, columns in held])
            sizes = np.concatenate([count * columns for count, columns in held])  # [n, 2]
            tiers = np.stack([np.zeros_like(tiers) if self.by == "values" else tiers, tiers], 1)
        return [int(sizes[tiers == tier].sum()) for tier in range(len(TIERS))]

    def features(self) -> dict[str, float]:
        return {"device_share": self.device}


def _spread(sizes: np.ndarray, room: float) -> np.ndarray:
    """Which of some layers, evenly spread and as many as possible, take at most `room` bytes: bool like `sizes`."""
    for number in range(len(sizes), 0, -1):
        steps = np.arange(len(sizes) + 1) * number // len(sizes)
        chosen = steps[1:] > steps[:-1]
        if sizes[chosen].sum() <= room:
            return chosen
    return np.zeros(len(sizes), bool)
