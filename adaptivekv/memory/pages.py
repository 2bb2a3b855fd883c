"""The page pool: sealed, reference-counted pages in device, host and disk arenas, and what is known of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adaptivekv.kernels import hadamard, pageops
from adaptivekv.kernels.codec import PAGE, UNIT, Codec
from adaptivekv.memory import bases, checksums, integrity
from adaptivekv.memory.arena import Arena, ArenaFull
from adaptivekv.memory.bounds import bounds_bytes
from adaptivekv.memory.compact import compact
from adaptivekv.memory.formats import BY_CODE, CODES, Format
from adaptivekv.memory.shapes import DEVICE, DISK, HOST, TIERS, Kind, LayerShape
from adaptivekv.memory.transfer import Transfer
from adaptivekv.paths import cache_root

if TYPE_CHECKING:
    from adaptivekv.memory.sequence import Sequence


_ENTRIES = (
    "ref", "stamp", "k_off", "v_off", "b_off", "code", "tier", "count", "layer", "first", "last", "crc", "basis",
    "split",
)  # fmt: skip
"""Arrays of the pool with an entry a page."""


class PagePool:
    """Physical pages for any number of sequences of one model.

    A page holds `PAGE` slots of one KV head of one layer in one format on one tier. It is immutable once written;
    converting a shared page copies it. Where a slot stood in its request (`pos`) and how many slots are used
    (`count`) is host metadata: no attention kernel reads positions, since keys keep their rotary position.
    Wherever ids are taken they are distinct.

    device_bytes, host_bytes, disk_bytes: capacities of the arenas. The host arena is made on first use, pinned if the
    device is a GPU; the disk arena, at once, is a nameless file in the cache folder (BudgetError where that is full).
    staging_bytes bounds the temporary copies of `read` and of changes (change.py); callers count it beside the arena.
    """

    def __init__(
        self,
        layers: list[LayerShape],
        dtype: torch.dtype,
        device: torch.device | str,
        device_bytes: int,
        host_bytes: int = 0,
        staging_bytes: int = 4 << 20,
        disk_bytes: int = 0,
    ):
        self.layers, self.dtype, self.device = layers, dtype, torch.device(device)
        self.staging_bytes, self.host_capacity, self.disk_capacity = staging_bytes, host_bytes, disk_bytes
        self.arenas: list[Arena | None] = [Arena(device_bytes, self.device), None, None]
        if disk_bytes:
            self.arenas[DISK] = Arena(disk_bytes, folder=cache_root() / "disk")
        self.transfer = Transfer(self.device, staging_bytes) if self.device.type == "cuda" else None
        self.sequences: list[Sequence] = []
        self.regions: dict[int, int] = {}  # offset -> bytes: tails and rings, at fixed addresses
        # layers of equal sizes share kernels: the first layer of its sizes, for every layer
        sizes = [(s.k_dim, s.v_dim) for s in layers]
        self.model = np.array([sizes.index(size) for size in sizes], np.int32)
        # bytes of a page part by layer and format code
        self.k_bytes, self.v_bytes = (
            np.array([[_bytes(getattr(f, part), f.dims(*dims)[i], dtype) for f in BY_CODE] for dims in sizes])
            for i, part in enumerate("kv")
        )
        self.ref = np.zeros(0, np.int32)
        self.clock, self.stamp = 0, np.zeros(0, np.int64)  # changes so far, and the last one of each page
        # one entry a page: where its keys, values and bounds (-1: none) start, format code, tier (of the values alone
        # if split: then that is the host, and its keys are on the device), used slots, layer,
        # positions of its slots and, apart because every decision asks, of the first and the last of them, the checksum
        # of its bytes where they lie on disk, its bases and its head where it is of low rank (bases.py)
        self.k_off, self.v_off, self.b_off = (np.zeros(0, np.int64) for _ in range(3))
        self.code, self.tier, self.split = np.zeros(0, np.int8), np.zeros(0, np.int8), np.zeros(0, bool)
        self.count, self.layer = np.zeros(0, np.int32), np.zeros(0, np.int16)
        self.first, self.last = np.zeros(0, np.int32), np.zeros(0, np.int32)
        self.crc, self.basis = np.zeros(0, np.uint32), np.zeros(0, np.int64)
        self.bases: dict[int, bases.Bases] = {}
        self.pos = np.zeros((0, PAGE), np.int32)
        self.free_ids = np.zeros(0, np.int32)
        self.moved_bytes = 0  # between tiers, both directions
        self.reserved = 0  # device bytes kept free for the step under way
        self.surrogate: Any = None  # foretells what tokens are worth (policies/eviction/surrogate.py)

    # -- arenas and regions ------------------------------------------------------------------------------------------

    def arena(self, tier: int) -> Arena:
        if (arena := self.arenas[tier]) is None:
            pinned, capacity = self.device.type == "cuda" and tier == HOST, self.host_capacity if tier == HOST else 0
            arena = self.arenas[tier] = Arena(capacity, "cpu", pinned)
        return arena

    @property
    def device_used(self) -> int:
        return self.arena(DEVICE).used

    @property
    def host_used(self) -> int:
        host = self.arenas[HOST]
        return host.used if host else 0

    @property
    def disk_used(self) -> int:
        disk = self.arenas[DISK]
        return disk.used if disk else 0

    @property
    def host_free(self) -> int:
        return self.host_capacity - self.host_used

    def away_free(self, tier: int) -> int:
        """Free bytes of the host or the disk."""
        return self.host_free if tier == HOST else self.disk_capacity - self.disk_used

    def region(self, size: int) -> tuple[int, torch.Tensor]:
        """A fixed run of `size` device bytes (a tail, a ring). Returns its offset and a uint8 view."""
        size = -(-size // UNIT) * UNIT
        offset = int(self.alloc(DEVICE, 1, size)[0][0])
        self.regions[offset] = size
        return offset, self.arena(DEVICE).data[offset : offset + size]

    def free_region(self, offset: int) -> None:
        self.arena(DEVICE).free(np.array([offset]), self.regions.pop(offset))

    def alloc(self, tier: int, n: int, *sizes: int) -> list[np.ndarray]:
        """Room for `n` blocks of each of `sizes` bytes, compacting if need be: offsets. All of them, or ArenaFull."""
        self.fence()
        try:
            return _alloc(self.arena(tier), n, sizes)
        except ArenaFull:
            if self.arena(tier).free_bytes < n * sum(sizes):
                raise
        compact(self, tier)
        return _alloc(self.arena(tier), n, sizes)

    def room_for(self, kind: Kind, n: int, parts: tuple[int, ...] = (0, 1)) -> list[np.ndarray]:
        """Room for the keys (0) and values (1) of `n` pages: offsets of each. All of them, or ArenaFull."""
        if len({kind.tiers[i] for i in parts}) == 1:
            return self.alloc(kind.tiers[parts[0]], n, *(kind.sizes[i] for i in parts))
        (keys,) = self.alloc(kind.tiers[0], n, kind.sizes[0])
        try:  # another arena: what is not placed yet stays where it is
            return [keys, *self.alloc(kind.tiers[1], n, kind.sizes[1])]
        except ArenaFull:
            self.arena(kind.tiers[0]).free(keys, kind.sizes[0])
            raise

    def fence(self) -> None:
        """What comes next on the device sees, and does not disturb, the transfers under way."""
        if self.transfer:
            self.transfer.fence()

    def settle(self) -> None:
        """What comes next on the processor sees host pages and positions as they are now."""
        if self.transfer:
            self.transfer.settle()

    # -- facts about pages -------------------------------------------------------------------------------------------

    def page_bytes(self, layer: int, fmt: Format) -> int:
        shape = self.layers[layer]
        return fmt.bytes(shape.k_dim, shape.v_dim, self.dtype)

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        """Stored bytes of each page, int64 in the shape of `ids`."""
        at = self.layer[ids], self.code[ids]
        return self.k_bytes[at] + self.v_bytes[at]

    def sizes_on(self, ids: np.ndarray, tier: int) -> np.ndarray:
        """Bytes of each page that lie on `tier`, int64 in the shape of `ids`."""
        at, tiers = (self.layer[ids], self.code[ids]), self.tier[ids]
        keys = np.where(self.split[ids], DEVICE, tiers)
        return self.k_bytes[at] * (keys == tier) + self.v_bytes[at] * (tiers == tier)

    def column_bytes(self, fmt: Format) -> int:
        """One page for every head of every layer: what sealing a full tail takes."""
        return sum(s.heads * fmt.bytes(s.k_dim, s.v_dim, self.dtype) for s in self.layers)

    def kind(self, page: int) -> Kind:
        shape = self.layers[self.layer[page]]
        return Kind(
            shape.k_dim, shape.v_dim, self.dtype, BY_CODE[self.code[page]], int(self.tier[page]), bool(self.split[page])
        )

    def kinds(self, ids: np.ndarray) -> list[np.ndarray | slice]:
        """Which of `ids` are of one kind: an index for each kind, in order (a slice, which copies nothing, if all)."""
        key = (self.code[ids] * np.int16(len(TIERS)) + self.tier[ids]) * np.int16(2) + self.split[ids]
        if self.model.any():
            key = key + self.model[self.layer[ids]] * (len(BY_CODE) * len(TIERS) * 2)
        if len(ids) and (key == key[0]).all():
            return [slice(None)]
        return [np.flatnonzero(key == value) for value in np.unique(key)]

    def groups(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Split ids by kind, in runs whose decoded copy fits the staging allowance."""
        for at in self.kinds(ids):
            group, kind = ids[at], self.kind(ids[at][0])
            step = max(1, self.staging_bytes // (PAGE * (kind.k_dim + kind.v_dim) * 4))
            for i in range(0, len(group), step):
                yield group[i : i + step]

    # -- pages -------------------------------------------------------------------------------------------------------

    def _take_ids(self, n: int) -> np.ndarray:
        if len(self.free_ids) < n:
            self._more_ids(n)
        ids, self.free_ids = self.free_ids[:n], self.free_ids[n:]
        return ids.astype(np.int64)  # numpy indexes with it twice as fast

    def spare_ids(self, n: int) -> None:
        """Have ids for `n` pages and as many to spare as there are pages: a change of plan pins no memory then."""
        live = len(self.ref) - len(self.free_ids)
        if len(self.free_ids) - n < live:
            self._more_ids(n + live)

    def _more_ids(self, n: int) -> None:
        """Make at least `n` more page ids."""
        old, grow = len(self.ref), max(n, 256, len(self.ref))
        for name in _ENTRIES:
            entries = getattr(self, name)
            empty = np.full(grow, -1 if name == "b_off" else 0, entries.dtype)
            setattr(self, name, np.concatenate([entries, empty]))
        self.settle()  # positions may be on their way
        # pinned beside a GPU: `evict` lets the kernel that packs slots pack their positions as well
        pos = torch.empty(old + grow, PAGE, dtype=torch.int32, pin_memory=self.transfer is not None).numpy()
        pos[:old] = self.pos
        self.pos = pos
        self.free_ids = np.concatenate([self.free_ids, np.arange(old, old + grow, dtype=np.int32)])

    def claim(self, layer: np.ndarray | int, kind: Kind, count: np.ndarray) -> np.ndarray:
        """New pages with room but no content or positions yet; nothing happens if it raises ArenaFull. Ids [n]."""
        off = self.room_for(kind, len(count))
        ids = self._take_ids(len(count))
        self.place(ids, kind, off)
        self.layer[ids], self.count[ids], self.ref[ids] = layer, count, 1
        return ids

    def set_pos(self, ids: np.ndarray, pos: np.ndarray | None = None) -> None:
        """Positions [n, 64] of the slots of pages whose counts are known (None: they are in `pos` already)."""
        if pos is not None:
            self.pos[ids] = pos
        self.first[ids], self.last[ids] = self.pos[ids, 0], self.pos[ids, self.count[ids] - 1]
        self.mark(ids)

    def place(self, ids: np.ndarray, kind: Kind, off: list[np.ndarray]) -> None:
        """Say that pages lie at `off` from now on (keys, values), as pages of `kind`."""
        self.k_off[ids], self.v_off[ids] = off
        self.code[ids], self.tier[ids], self.split[ids] = CODES[kind.fmt.name], kind.tier, kind.split
        self.mark(ids)

    def mark(self, ids: np.ndarray) -> None:
        """Note a change of what is known of pages, for whoever keeps a copy of it (tables.py)."""
        self.clock += 1
        self.stamp[ids] = self.clock

    def vacate(self, ids: np.ndarray) -> None:
        """Free the bytes of pages of one kind."""
        kind = self.kind(ids[0])
        for off, tier, size in zip((self.k_off, self.v_off), kind.tiers, kind.sizes, strict=True):
            self.arena(tier).free(off[ids], size)
        self.tier[ids], self.split[ids] = -1, False  # nowhere, until placed again

    def adopt(
        self,
        layer: np.ndarray | int,
        raw: tuple[torch.Tensor, torch.Tensor],
        count: np.ndarray,
        pos: np.ndarray,
        fmt: Format,
        tier: int,
    ) -> np.ndarray:
        """New pages from stored bytes (uint8 [n, k_bytes], [n, v_bytes]), as `raw` gives them.

        layer: of all of them, or [n] layers of one size.
        """
        shape = self.layers[int(np.ravel(layer)[0])]
        self.spare_ids(len(count))
        ids = self.claim(layer, Kind(shape.k_dim, shape.v_dim, self.dtype, fmt, tier), count)
        self.fill(ids, raw, pos)
        return ids

    def fill(self, ids: np.ndarray, raw: tuple[torch.Tensor, torch.Tensor], pos: np.ndarray) -> None:
        """Give claimed pages of one kind their stored bytes, as `raw` gives them, and positions [n, 64]."""
        if not len(ids):
            return
        self.set_pos(ids, pos)
        tier = int(self.tier[ids[0]])
        if tier != DEVICE:
            self.settle()
        for off, part in zip((self.k_off, self.v_off), raw, strict=True):
            pageops.store(self.arena(tier).data, torch.from_numpy(off[ids]), part)
        checksums.sign(self, ids)

    def raw(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored bytes of pages of one kind: uint8 [n, k_bytes], [n, v_bytes], on their tier."""
        return self._raw(ids, 0), self._raw(ids, 1)

    def _raw(self, ids: np.ndarray, part: int) -> torch.Tensor:
        kind, off = self.kind(ids[0]), (self.k_off, self.v_off)[part]
        if kind.tiers[part] != DEVICE:
            self.settle()
            checksums.verify(self, ids)
        return pageops.fetch(self.arena(kind.tiers[part]).data, torch.from_numpy(off[ids]), kind.sizes[part])

    def read(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages of one kind, decoded and un-rotated: float32 [n, 64, k_dim], [n, 64, v_dim]."""
        return self._decode(ids, 0), self._decode(ids, 1)

    def keys(self, ids: np.ndarray) -> torch.Tensor:
        """The keys alone, as `read` gives them: float32 [n, 64, k_dim]."""
        return self._decode(ids, 0)

    def _decode(self, ids: np.ndarray, part: int) -> torch.Tensor:
        kind = self.kind(ids[0])
        codec, dim = kind.parts[part]
        x = codec.decode(self._raw(ids, part).to(self.device), dim, self.dtype)
        if kind.fmt.rank:
            return bases.project(self, ids, part, x, back=True)
        return hadamard(x) if kind.fmt.rotate else x

    def retain(self, ids: np.ndarray) -> None:
        self.ref[ids] += 1

    def release(self, ids: np.ndarray) -> None:
        """Drop one reference each; pages nobody refers to any more give their bytes back."""
        left = self.ref[ids] - 1
        assert (left >= 0).all(), "page released twice"
        self.ref[ids] = left
        dead = ids[left == 0] if left.any() else ids
        bound = dead[self.b_off[dead] >= 0]
        for at in self.kinds(dead):
            self.vacate(dead[at])
        for model in np.unique(self.model[self.layer[bound]]):
            some = bound[self.model[self.layer[bound]] == model]
            self.arena(DEVICE).free(self.b_off[some], bounds_bytes(self, model))
            self.b_off[some] = -1
        self.free_ids = np.concatenate([dead.astype(np.int32), self.free_ids])

    def check_integrity(self) -> None:
        """Assert the invariants (integrity.py)."""
        integrity.check_pool(self)


def _bytes(codec: Codec, dim: int, dtype: torch.dtype) -> int:
    """Bytes of a part; 0 where the codec does not take the head size, which no page can then have."""
    return codec.part_bytes(dim, dtype) if codec.native or dim * codec.bits % 8 == 0 else 0


def _alloc(arena: Arena, n: int, sizes: tuple[int, ...]) -> list[np.ndarray]:
    out: list[np.ndarray] = []
    try:
        for size in sizes:
            out.append(arena.alloc(size, n))
    except ArenaFull:
        for off, size in zip(out, sizes, strict=False):
            arena.free(off, size)
        raise
    return out
