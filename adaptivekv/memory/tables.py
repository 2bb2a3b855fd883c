"""What the decode steps of a batch read: the pages of every layer, in device tensors whose addresses never change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from adaptivekv.kernels.codec import PAGE
from adaptivekv.kernels.table import ABSENT, FORMATS, ROTATED, TAIL, Launch, PageTable, page_time, plan_work
from adaptivekv.memory.batches import Picker
from adaptivekv.memory.formats import WITH_KERNEL
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, HOST

if TYPE_CHECKING:
    from adaptivekv.kernels.select import Selection

PAIRS = tuple(dict.fromkeys((fmt.k, fmt.v) for fmt in WITH_KERNEL))
"""Codecs of keys and values that one launch may mix."""
_FORMAT = np.array([PAIRS.index((fmt.k, fmt.v)) + ROTATED * fmt.rotate for fmt in WITH_KERNEL], np.uint8)


class StepTables:
    """Page tables of all layers for the open sequences of one pool, which have equal layer shapes.

    `update` writes the pages as they are now; the tensors stay where they are, so what a CUDA graph has captured reads
    the new contents. The host sends page ids and what has changed of pages; sorting by format and dividing the work
    happen on the device. Column 0 of a row is the open tail. A page on the host is read there: its offset leads out of
    the arena into pinned memory.

    columns: pages a row can hold, the tail included; processors: of the GPU, each running `launch.programs` at once.
    """

    def __init__(self, sequences: list[Sequence], columns: int, processors: int, launch: Launch):
        self.sequences, self.pool = sequences, sequences[0].pool
        shape, device, layers = self.pool.layers[0], self.pool.device, len(self.pool.layers)
        assert all(s == shape for s in self.pool.layers), "layers of different shapes"
        assert len(WITH_KERNEL) < FORMATS
        self.columns, self.heads = columns, shape.heads
        self.processors, self.together = processors, launch.programs
        rows = len(sequences) * shape.heads
        pinned = device.type == "cuda"
        self.ids_host = torch.full((layers, rows, columns - 1), -1, dtype=torch.int32, pin_memory=pinned)
        self.mass_host = torch.zeros(layers, rows, columns - 1, pin_memory=pinned)
        self.tail_host = torch.zeros(2, layers, rows, dtype=torch.int64, pin_memory=pinned)
        self.tails_host = torch.zeros(len(sequences), dtype=torch.int32, pin_memory=pinned)

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.tails = zeros(len(sequences), dtype=torch.int32)
        self.keys, self.values = zeros(layers, rows, columns), zeros(layers, rows, columns)
        self.order = zeros(layers, rows, 0)
        self.mass = zeros(layers, rows, columns, dtype=torch.float32)
        self.pages = zeros(0, 4)  # by page id: key entry, value offset, bounds offset, format + flags
        sizes = [fmt.bytes(shape.k_dim, shape.v_dim, self.pool.dtype) for fmt in WITH_KERNEL]
        time = torch.zeros(256, dtype=torch.int64)
        time[_FORMAT.astype(np.int64)] = torch.tensor([page_time(size, shape.k_dim, shape.v_dim) for size in sizes])
        self.time = time.to(device)
        empty = torch.full((layers, rows, columns), ABSENT, dtype=torch.uint8, device=device)
        self.work = plan_work(empty, self.time, processors, launch.programs)
        self.tables = [
            PageTable(
                self.pool.arena(DEVICE).data, self.keys[i], self.values[i], self.work.layer(i), self.tails,
                shape.heads, PAIRS, self.pool.dtype, shape.k_dim, shape.v_dim, launch=launch,
            )
            for i in range(layers)
        ]  # fmt: skip
        self.selections: list[Selection] = []  # of every layer, once a sequence retrieves
        self.seen: list[tuple[int, int, Picker | None]] = []  # of the sequences, as the device has them
        self.clock = 0  # the pool's changes, as the device has them
        self.sent: torch.cuda.Event | None = None

    def fits(self) -> bool:
        """Whether every row has room for its pages."""
        return max(ids.shape[1] for s in self.sequences for ids in s.ids) < self.columns

    def stale(self) -> bool:
        """Whether a sequence has changed since `update` by anything but `advance`."""
        return [(s.version, s.tail_len, s.retrieve) for s in self.sequences] != self.seen

    def advance(self) -> None:
        """A step has put one token into each tail, on the device too."""
        for sequence in self.sequences:
            sequence.extend()
        self.seen = [(version, tail + 1, retrieve) for version, tail, retrieve in self.seen]

    def update(self) -> None:
        """Write the tables anew from the sequences."""
        if self.sent is not None:
            self.sent.synchronize()  # the host tensors may still be on their way
        self.pool.fence()  # steps read host pages where they lie: not before they have arrived
        self._send_pages()
        ids_host, mass_host, width = self.ids_host.numpy(), self.mass_host.numpy(), 0
        for i, sequence in enumerate(self.sequences):
            at = slice(i * self.heads, (i + 1) * self.heads)
            for layer, held in enumerate(sequence.ids):
                ids_host[layer, at, : held.shape[1]] = held
                ids_host[layer, at, held.shape[1] :] = -1
                mass_host[layer, at, : held.shape[1]] = np.nan_to_num(sequence.mass[layer], nan=-1.0)
                width = max(width, held.shape[1])
            for part, offsets in enumerate(sequence.tails.heads):
                self.tail_host.numpy()[part, :, at] = offsets.reshape(-1, self.heads)
            self.tails_host[i] = sequence.tail_len
        device = self.pool.device
        # Whole tensors: a part of one would be gathered into memory that is not pinned first.
        ids = self.ids_host.to(device, non_blocking=True)[..., :width].long()
        mass = self.mass_host.to(device, non_blocking=True)[..., :width]
        tail = self.tail_host.to(device, non_blocking=True)
        self.tails.copy_(self.tails_host, non_blocking=True)
        if device.type == "cuda":
            self.sent = torch.cuda.Event()
            self.sent.record()
        self._build(ids, mass, tail)
        self.seen = [(s.version, s.tail_len, s.retrieve) for s in self.sequences]

    def measured(self) -> None:
        """Take the mass that a statistics step has measured into the sequences. Waits for the GPU."""
        assert not self.stale()
        width = self.order.shape[2]
        mine = torch.empty(self.order.shape, device=self.mass.device)
        mass = mine.scatter_(2, self.order, self.mass[..., 1 : width + 1]).cpu().numpy()
        for i, sequence in enumerate(self.sequences):
            at = slice(i * self.heads, (i + 1) * self.heads)
            for layer, held in enumerate(sequence.mass):
                held[...] = mass[layer, at, : held.shape[1]]
                held[held < 0] = np.nan

    def _send_pages(self) -> None:
        """What has changed of the pool's pages since the last time."""
        pool = self.pool
        if len(self.pages) < len(pool.stamp):
            grown = torch.zeros(len(pool.stamp), 4, dtype=torch.int64, device=pool.device)
            grown[: len(self.pages)] = self.pages
            self.pages = grown
        changed = np.flatnonzero((pool.stamp > self.clock) & (pool.ref > 0))  # freed ones may be of no kernel's format
        away = self._away() * (pool.tier[changed] == HOST)
        entry = np.empty((len(changed), 4), np.int64)
        entry[:, 0] = (pool.k_off[changed] + away) | pool.count[changed]
        entry[:, 1] = pool.v_off[changed] + away
        # Bounds of the first page are not sent: it is always read. 0 is no offset of bounds: a tail lies there.
        entry[:, 2] = np.where(pool.first[changed] == 0, 0, np.maximum(pool.b_off[changed], 0))
        entry[:, 3] = _FORMAT[pool.code[changed]] + (pool.last[changed].astype(np.int64) << 8)
        at = torch.from_numpy(changed).to(pool.device)
        self.pages[at] = torch.from_numpy(entry).to(pool.device)
        self.clock = pool.clock

    def _build(self, ids: Tensor, mass: Tensor, tail: Tensor) -> None:
        """Tables from page ids int64 [L, R, P], -1 absent, their mass, and the tails' offsets [2, L, R]."""
        live = ids >= 0
        entry = self.pages[ids.clamp(min=0)]  # [L, R, P, 4]
        code = torch.where(live, entry[..., 3] & 255, ABSENT)
        code, order = code.to(torch.uint8).sort(dim=2, stable=True)
        ids, entry = ids.gather(2, order), entry.gather(2, order[..., None].expand(-1, -1, -1, 4))
        live, end = ids >= 0, 1 + ids.shape[2]
        for table, column in ((self.keys, 0), (self.values, 1)):
            table[..., 0] = tail[column]
            table[..., 1:end] = torch.where(live, entry[..., column], 0)
            table[..., end:] = 0
        self.keys[..., 0] |= TAIL
        self.order = order  # where each page stands in its sequence
        self.mass.fill_(-1.0)
        self.mass[..., 1:end] = torch.where(live, mass.gather(2, order), -1.0)
        full = torch.full_like(self.keys, ABSENT, dtype=torch.uint8)
        full[..., 0], full[..., 1:end] = int(_FORMAT[0]), code  # the tail is native
        self.work.copy_(plan_work(full, self.time, self.processors, self.together))
        if any(s.retrieve for s in self.sequences):
            self._select(entry, live)
        else:
            self.selections = []

    def _select(self, entry: Tensor, live: Tensor) -> None:
        """Where the bounds of the pages lie and how many pages each row reads, as policies/retrieval chooses them."""
        from adaptivekv.kernels.select import with_picked  # imports Triton

        layers, rows, width = live.shape
        device = live.device
        if not self.selections:
            bounds = torch.zeros(layers, rows, self.columns, dtype=torch.int64, device=device)
            take = torch.zeros(layers, rows, 1, dtype=torch.int64, device=device)
            self.selections = [with_picked(t, bounds[i], take[i]) for i, t in enumerate(self.tables)]
            self.bounds, self.take = bounds, take
        ends = torch.tensor([s.length - s.tail_len - 1 for s in self.sequences]).repeat_interleave(self.heads)
        last = (entry[..., 3] >> 8) >= ends.to(device)[:, None]  # the newest page is always read
        self.bounds.zero_()
        self.bounds[..., 1 : width + 1] = torch.where(live & ~last, entry[..., 2], 0)
        share = torch.tensor([s.retrieve.read if s.retrieve else 1.0 for s in self.sequences]).repeat_interleave(
            self.heads
        )
        held = live.sum(2)
        take = (held * share.to(device)).ceil().long().clamp(min=2)
        self.take.copy_(torch.minimum(take, held)[..., None])  # the tail comes on top

    def _away(self) -> int:
        """From the device arena to the host arena, in bytes of one address space."""
        host = self.pool.arenas[HOST]
        return 0 if host is None else host.data.data_ptr() - self.pool.arena(DEVICE).data.data_ptr()


def columns_for(tokens: int) -> int:
    """Columns a row needs for `tokens` tokens, the tail included, rounded up so that few sizes are captured."""
    return -(-(tokens // PAGE + 2) // 64) * 64
