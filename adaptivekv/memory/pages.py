"""The page pool: sealed, reference-counted pages in device and host arenas, and what is known of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from adaptivekv.errors import BudgetError
from adaptivekv.kernels import hadamard
from adaptivekv.kernels.codec import PAGE, UNIT
from adaptivekv.memory.arena import Arena, ArenaFull
from adaptivekv.memory.bounds import bounds_bytes
from adaptivekv.memory.compact import compact
from adaptivekv.memory.formats import BY_CODE, CODES, Format

if TYPE_CHECKING:
    from adaptivekv.memory.sequence import Sequence

DEVICE, HOST = 0, 1
TIERS = ("device", "host")


@dataclass(frozen=True)
class LayerShape:
    """One full-attention layer: KV heads, query heads, key size, value size (elements)."""

    heads: int
    q_heads: int
    k_dim: int
    v_dim: int

    @property
    def slot_elements(self) -> int:
        """Elements of one token in this layer, keys and values of all KV heads."""
        return self.heads * (self.k_dim + self.v_dim)


class PagePool:
    """Physical pages for any number of sequences of one model.

    A page holds `PAGE` slots of one KV head of one layer in one format on one tier. It is immutable once written;
    converting a shared page copies it. Where a slot stood in its request (`pos`) and how many slots are used
    (`count`) is host metadata: no kernel reads positions, since keys keep their rotary position.

    device_bytes, host_bytes: capacities of the two arenas. The host arena is made on first use, pinned if the device
    is a GPU. staging_bytes bounds the temporary copies of `read` and `convert`; callers count it beside the arena.
    """

    def __init__(
        self,
        layers: list[LayerShape],
        dtype: torch.dtype,
        device: torch.device | str,
        device_bytes: int,
        host_bytes: int = 0,
        staging_bytes: int = 4 << 20,
    ):
        self.layers, self.dtype, self.device = layers, dtype, torch.device(device)
        self.staging_bytes, self.host_capacity = staging_bytes, host_bytes
        self.arenas: list[Arena | None] = [Arena(device_bytes, self.device), None]
        self.sequences: list[Sequence] = []
        self.regions: dict[int, int] = {}  # offset -> bytes: tails and rings, at fixed addresses
        self.ref = np.zeros(0, np.int32)
        # one entry a page: where its keys, values and bounds (-1: none) start, format code, tier, used slots, layer
        self.k_off, self.v_off, self.b_off = (np.zeros(0, np.int64) for _ in range(3))
        self.code, self.tier = np.zeros(0, np.int8), np.zeros(0, np.int8)
        self.count, self.layer = np.zeros(0, np.int32), np.zeros(0, np.int16)
        self.pos = np.zeros((0, PAGE), np.int32)
        self.free_ids = np.zeros(0, np.int32)
        self.moved_bytes = 0  # between tiers, both directions
        self.reserved = 0  # device bytes kept free for the step under way

    # -- arenas and regions ------------------------------------------------------------------------------------------

    def arena(self, tier: int) -> Arena:
        if (arena := self.arenas[tier]) is None:
            arena = self.arenas[tier] = Arena(self.host_capacity, "cpu", pinned=self.device.type == "cuda")
        return arena

    @property
    def device_used(self) -> int:
        return self.arena(DEVICE).used

    @property
    def host_used(self) -> int:
        host = self.arenas[HOST]
        return host.used if host else 0

    @property
    def host_free(self) -> int:
        return self.host_capacity - self.host_used

    def region(self, size: int) -> tuple[int, torch.Tensor]:
        """A fixed run of `size` device bytes (a tail, a ring). Returns its offset and a uint8 view."""
        size = -(-size // UNIT) * UNIT
        offset = int(self._alloc(DEVICE, size, 1)[0])
        self.regions[offset] = size
        return offset, self.arena(DEVICE).data[offset : offset + size]

    def free_region(self, offset: int) -> None:
        self.arena(DEVICE).free(np.array([offset]), self.regions.pop(offset))

    def _alloc(self, tier: int, size: int, n: int) -> np.ndarray:
        arena = self.arena(tier)
        try:
            return arena.alloc(size, n)
        except ArenaFull:
            if arena.free_bytes < n * size:
                raise
            compact(self, tier)
            return arena.alloc(size, n)

    # -- pages -------------------------------------------------------------------------------------------------------

    def page_bytes(self, layer: int, fmt: Format) -> int:
        shape = self.layers[layer]
        return fmt.bytes(shape.k_dim, shape.v_dim, self.dtype)

    def column_bytes(self, fmt: Format) -> int:
        """One page for every head of every layer: what sealing a full tail takes."""
        return sum(s.heads * fmt.bytes(s.k_dim, s.v_dim, self.dtype) for s in self.layers)

    def _parts(self, layer: int, fmt: Format) -> tuple[int, int]:
        shape = self.layers[layer]
        return fmt.k.part_bytes(shape.k_dim, self.dtype), fmt.v.part_bytes(shape.v_dim, self.dtype)

    def _take_ids(self, n: int) -> np.ndarray:
        if len(self.free_ids) < n:
            old, grow = len(self.ref), max(n, 256, len(self.ref))
            for name in ("ref", "k_off", "v_off", "b_off", "code", "tier", "count", "layer"):
                entries = getattr(self, name)
                empty = np.full(grow, -1 if name == "b_off" else 0, entries.dtype)
                setattr(self, name, np.concatenate([entries, empty]))
            self.pos = np.concatenate([self.pos, np.zeros((grow, PAGE), np.int32)])
            self.free_ids = np.concatenate([self.free_ids, np.arange(old, old + grow, dtype=np.int32)])
        ids, self.free_ids = self.free_ids[:n], self.free_ids[n:]
        return ids

    def _place(self, ids: np.ndarray, layer: int, fmt: Format, tier: int) -> None:
        """Give `ids` room for their parts; all or nothing."""
        k_size, v_size = self._parts(layer, fmt)
        k_off = self._alloc(tier, k_size, len(ids))
        try:
            v_off = self.arena(tier).alloc(v_size, len(ids))
        except ArenaFull:
            self.arena(tier).free(k_off, k_size)
            if self.arena(tier).free_bytes < len(ids) * (k_size + v_size):
                raise
            compact(self, tier)
            k_off, v_off = self.arena(tier).alloc(k_size, len(ids)), self.arena(tier).alloc(v_size, len(ids))
        self.k_off[ids], self.v_off[ids] = k_off, v_off
        self.code[ids], self.tier[ids], self.layer[ids] = CODES[fmt.name], tier, layer

    def _vacate(self, ids: np.ndarray) -> None:
        """Free the bytes of pages, whatever their tier, format and layer."""
        key = self.tier[ids].astype(np.int64) * 10**6 + self.layer[ids].astype(np.int64) * 100 + self.code[ids]
        for value in np.unique(key):
            group = ids[key == value]
            tier, layer, fmt = int(self.tier[group[0]]), int(self.layer[group[0]]), BY_CODE[self.code[group[0]]]
            k_size, v_size = self._parts(layer, fmt)
            sizes = np.repeat([k_size, v_size], len(group))
            self.arena(tier).free(np.concatenate([self.k_off[group], self.v_off[group]]), sizes)
        self.tier[ids] = -1  # nowhere, until placed again

    def write(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        count: np.ndarray,
        pos: np.ndarray,
        fmt: Format,
        tier: int = DEVICE,
    ) -> np.ndarray:
        """Seal new pages. k [n, 64, k_dim], v [n, 64, v_dim] un-rotated, count [n], pos [n, 64]. Returns ids [n]."""
        return self.adopt(layer, self._encode(k, v, fmt), count, pos, fmt, tier)

    def adopt(
        self,
        layer: int,
        raw: tuple[torch.Tensor, torch.Tensor],
        count: np.ndarray,
        pos: np.ndarray,
        fmt: Format,
        tier: int,
    ) -> np.ndarray:
        """New pages from stored bytes (uint8 [n, k_bytes], [n, v_bytes]), as `raw` gives them."""
        ids = self._take_ids(len(raw[0]))
        try:
            self._place(ids, layer, fmt, tier)
        except ArenaFull:
            self.free_ids = np.concatenate([ids, self.free_ids])
            raise
        self._put(ids, raw)
        self.count[ids], self.pos[ids], self.ref[ids] = count, pos, 1
        return ids

    def _encode(self, k: torch.Tensor, v: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
        if fmt.rotate:
            k, v = hadamard(k.float()), hadamard(v.float())
        return fmt.k.encode(k, self.dtype), fmt.v.encode(v, self.dtype)

    def _put(self, ids: np.ndarray, raw: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Copy stored bytes to where `ids` (one tier) are placed."""
        if not len(ids):
            return
        arena = self.arena(int(self.tier[ids[0]]))
        for off, part in zip((self.k_off, self.v_off), raw, strict=True):
            rows, index = self._rows(arena, off[ids], part.shape[1])
            rows.index_copy_(0, index, part.reshape(-1, UNIT).to(rows.device))

    @staticmethod
    def _rows(arena: Arena, off: np.ndarray, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The arena as rows of UNIT bytes, and the rows of blocks of `size` bytes at `off`."""
        index = (off[:, None] // UNIT + np.arange(size // UNIT)).reshape(-1)
        return arena.data.view(-1, UNIT), torch.from_numpy(index).to(arena.data.device)

    def raw(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored bytes of pages of one layer, format and tier: uint8 [n, k_bytes], [n, v_bytes], on that tier."""
        arena, fmt = self.arena(int(self.tier[ids[0]])), BY_CODE[self.code[ids[0]]]
        k_size, v_size = self._parts(int(self.layer[ids[0]]), fmt)
        return self._fetch(arena, self.k_off[ids], k_size), self._fetch(arena, self.v_off[ids], v_size)

    def _fetch(self, arena: Arena, off: np.ndarray, size: int) -> torch.Tensor:
        rows, index = self._rows(arena, off, size)
        return rows.index_select(0, index).view(len(off), size)

    def read(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages of one layer, format and tier, decoded and un-rotated: float32 [n, 64, k_dim], [n, 64, v_dim]."""
        shape, fmt = self.layers[self.layer[ids[0]]], BY_CODE[self.code[ids[0]]]
        k_raw, v_raw = (r.to(self.device) for r in self.raw(ids))
        k = fmt.k.decode(k_raw, shape.k_dim, self.dtype)
        v = fmt.v.decode(v_raw, shape.v_dim, self.dtype)
        return (hadamard(k), hadamard(v)) if fmt.rotate else (k, v)

    def keys(self, ids: np.ndarray) -> torch.Tensor:
        """The keys alone, as `read` gives them: float32 [n, 64, k_dim]."""
        layer, fmt, arena = int(self.layer[ids[0]]), BY_CODE[self.code[ids[0]]], self.arena(int(self.tier[ids[0]]))
        raw = self._fetch(arena, self.k_off[ids], self._parts(layer, fmt)[0]).to(self.device)
        k = fmt.k.decode(raw, self.layers[layer].k_dim, self.dtype)
        return hadamard(k) if fmt.rotate else k

    def place_bounds(self, raw: torch.Tensor) -> np.ndarray:
        """Room on the device for page bounds, uint8 [n, bytes]. Returns offsets [n]."""
        off = self._alloc(DEVICE, raw.shape[1], len(raw))
        rows, index = self._rows(self.arena(DEVICE), off, raw.shape[1])
        rows.index_copy_(0, index, raw.view(-1, UNIT))
        return off

    def fetch_device(self, off: np.ndarray, size: int) -> torch.Tensor:
        """Blocks of `size` bytes of the device arena: uint8 [n, size]."""
        return self._fetch(self.arena(DEVICE), off, size)

    def groups(self, ids: np.ndarray) -> Iterable[np.ndarray]:
        """Split ids of one layer by format and tier, in runs small enough for the staging allowance."""
        if not len(ids):
            return
        key = self.code[ids].astype(np.int32) * 2 + self.tier[ids]
        shape = self.layers[self.layer[ids[0]]]
        step = max(1, self.staging_bytes // (PAGE * (shape.k_dim + shape.v_dim) * 4))
        for value in np.unique(key):
            group = ids[key == value]
            for i in range(0, len(group), step):
                yield group[i : i + step]

    def retain(self, ids: np.ndarray) -> None:
        np.add.at(self.ref, ids, 1)

    def release(self, ids: np.ndarray) -> None:
        """Drop one reference each; pages nobody refers to any more give their bytes back."""
        np.subtract.at(self.ref, ids, 1)
        assert (self.ref[ids] >= 0).all(), "page released twice"
        dead = np.unique(ids[self.ref[ids] == 0])
        self._vacate(dead)
        for layer in np.unique(self.layer[dead]):
            bound = dead[(self.layer[dead] == layer) & (self.b_off[dead] >= 0)]
            self.arena(DEVICE).free(self.b_off[bound], bounds_bytes(self, layer))
            self.b_off[bound] = -1
        self.free_ids = np.concatenate([dead.astype(np.int32), self.free_ids])

    def convert(self, ids: np.ndarray, fmt: Format) -> np.ndarray:
        """Re-encode one of `groups`, in place where nobody else refers to a page. Returns the ids to use now."""
        k, v = self.read(ids)
        layer, tier, shared = int(self.layer[ids[0]]), int(self.tier[ids[0]]), self.ref[ids] > 1
        out = ids.copy()
        if not shared.all():
            own, at = ids[~shared], torch.from_numpy(np.flatnonzero(~shared)).to(k.device)
            self._vacate(own)  # before placing: a demotion always fits in the room it leaves
            self._place(own, layer, fmt, tier)
            self._put(own, self._encode(k[at], v[at], fmt))
        if shared.any():
            old, at = ids[shared], torch.from_numpy(np.flatnonzero(shared)).to(k.device)
            out[shared] = self.write(layer, k[at], v[at], self.count[old], self.pos[old], fmt, tier)
            self.release(old)
        return out

    def move(self, ids: np.ndarray, tier: int) -> None:
        """Copy pages of one layer to `tier`, bytes unchanged (shared pages too: only where they live changes)."""
        for group in self.groups(ids[self.tier[ids] != tier]):
            raw = self.raw(group)
            layer, fmt, old = int(self.layer[group[0]]), BY_CODE[self.code[group[0]]], int(self.tier[group[0]])
            before = self.k_off[group], self.v_off[group]
            self._place(group, layer, fmt, tier)
            self._put(group, raw)
            for off, part in zip(before, raw, strict=True):
                self.arena(old).free(off, part.shape[1])
                self.moved_bytes += part.numel()

    def shorten(self, ids: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Keep only the first `count` slots of pages of one layer; shared pages are copied. Returns the ids to use."""
        out = ids.copy()
        for i, page in enumerate(ids):
            if self.ref[page] > 1:
                fmt, one = BY_CODE[self.code[page]], ids[i : i + 1]
                layer, tier = int(self.layer[page]), int(self.tier[page])
                out[i] = self.adopt(layer, self.raw(one), self.count[one], self.pos[one], fmt, tier)[0]
                self.release(one)
            self.count[out[i]] = count[i]
        return out

    def blocks(self, tier: int) -> list[tuple[int, int, np.ndarray, int]]:
        """Every block of pages on a tier: offset, bytes, the array that says where it is, page."""
        out: list[tuple[int, int, np.ndarray, int]] = []
        for page in np.flatnonzero(self.ref > 0).tolist():
            layer = int(self.layer[page])
            if self.tier[page] == tier:
                k_size, v_size = self._parts(layer, BY_CODE[self.code[page]])
                out += [
                    (int(self.k_off[page]), k_size, self.k_off, page),
                    (int(self.v_off[page]), v_size, self.v_off, page),
                ]
            if tier == DEVICE and self.b_off[page] >= 0:
                out.append((int(self.b_off[page]), bounds_bytes(self, layer), self.b_off, page))
        return sorted(out, key=lambda block: block[0])

    def check_integrity(self) -> None:
        """References equal counts, nothing leaked, bytes add up, no two blocks overlap."""
        refs = np.zeros_like(self.ref)
        for sequence in self.sequences:
            sequence.check_integrity()
            for ids in sequence.pages():
                np.add.at(refs, ids, 1)
        assert (refs == self.ref).all(), "reference counts differ from references"
        assert set(self.free_ids.tolist()) == set(np.flatnonzero(self.ref == 0).tolist()), "page ids leaked"
        for tier, arena in enumerate(self.arenas):
            if arena is None:
                continue
            arena.check_integrity()
            spans = [(off, size) for off, size, *_ in self.blocks(tier)]
            spans = sorted(spans + (list(self.regions.items()) if tier == DEVICE else []))
            assert all(a + n <= b for (a, n), (b, _) in pairwise(spans)), "blocks overlap"
            assert sum(n for _, n in spans) == arena.used, "bytes do not add up"


def too_small(what: str, need: int, have: int) -> BudgetError:
    return BudgetError(f"budget {have / 2**20:.2f} MiB is too small for {what}: at least {need / 2**20:.2f} MiB")
