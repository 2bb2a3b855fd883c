"""What the decode steps of a batch read: the pages of every layer, in device tensors whose addresses never change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from adaptivekv.kernels.codec import PAGE
from adaptivekv.kernels.table import ROTATED, TAIL, Launch, PageTable, page_time, share
from adaptivekv.memory.formats import BY_CODE
from adaptivekv.memory.pages import DEVICE, HOST
from adaptivekv.memory.sequence import Sequence

if TYPE_CHECKING:
    from adaptivekv.kernels.select import Selection

PAIRS = tuple(dict.fromkeys((fmt.k, fmt.v) for fmt in BY_CODE))
"""Codecs of keys and values that one launch may mix."""
_FORMAT = np.array([PAIRS.index((fmt.k, fmt.v)) + ROTATED * fmt.rotate for fmt in BY_CODE], np.uint8)
_ABSENT = 255  # sorts behind every format


class StepTables:
    """Page tables of all layers for the open sequences of one pool, which have equal layer shapes.

    `update` writes the pages as they are now; the tensors stay where they are, so what a CUDA graph has captured reads
    the new contents. Column 0 of a row is the open tail; the pages follow, sorted by format. A page on the host is
    read there: its offset leads out of the arena into pinned memory.

    columns: pages a row can hold, the tail included; programs: of the split kernel that run at once.
    """

    def __init__(self, sequences: list[Sequence], columns: int, programs: int, launch: Launch):
        self.sequences, self.pool = sequences, sequences[0].pool
        shape, device, layers = self.pool.layers[0], self.pool.device, len(self.pool.layers)
        assert all(s == shape for s in self.pool.layers), "layers of different shapes"
        self.columns, self.programs = columns, programs
        rows = len(sequences) * shape.heads
        items = max(programs, rows * (len(BY_CODE) + 1))

        def make(*size: int, dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
            """A device tensor and the host tensor, pinned for a GPU, that is copied into it."""
            host = torch.zeros(size, dtype=dtype, pin_memory=device.type == "cuda")
            return torch.zeros(size, dtype=dtype, device=device), host

        self.keys, self.values = make(layers, rows, columns), make(layers, rows, columns)
        self.items = make(layers, items, 4, dtype=torch.int32)
        self.parts = make(layers, rows, 2, dtype=torch.int32)
        self.tails = make(len(sequences), dtype=torch.int32)
        self.mass = make(layers, rows, columns, dtype=torch.float32)
        self.selections: list[Selection] = []  # of every layer, once a sequence retrieves
        self.order = np.zeros((layers, rows, columns - 1), np.int64)  # which page of the sequence a column is
        self.tables = [
            PageTable(
                self.pool.arena(DEVICE).data, self.keys[0][i], self.values[0][i], self.items[0][i], self.parts[0][i],
                self.tails[0], shape.heads, PAIRS, self.pool.dtype, shape.k_dim, shape.v_dim, launch=launch,
            )
            for i in range(layers)
        ]  # fmt: skip
        sizes = [fmt.bytes(shape.k_dim, shape.v_dim, self.pool.dtype) for fmt in BY_CODE]
        codes, first = np.unique(_FORMAT, return_index=True)
        self.codes, self.time = codes, np.array([page_time(sizes[i], shape.k_dim, shape.v_dim) for i in first])
        self.seen: list[tuple[int, int]] = []  # versions and tails of the sequences, as the device has them
        self.sent: torch.cuda.Event | None = None

    def fits(self) -> bool:
        """Whether every row has room for its pages."""
        return max(ids.shape[1] for s in self.sequences for ids in s.ids) < self.columns

    def stale(self) -> bool:
        """Whether a sequence has changed since `update` by anything but `advance`."""
        return [(s.version, s.tail_len) for s in self.sequences] != self.seen

    def advance(self) -> None:
        """A step has put one token into each tail, on the device too."""
        for sequence in self.sequences:
            sequence.extend()
        self.seen = [(version, tail + 1) for version, tail in self.seen]

    def update(self) -> None:
        """Write the tables anew from the sequences."""
        if self.sent is not None:
            self.sent.synchronize()  # the host tensors may still be on their way
        pool, heads = self.pool, self.pool.layers[0].heads
        layers, rows = len(pool.layers), len(self.sequences) * heads
        ids = np.full((layers, rows, self.columns - 1), -1, np.int32)
        mass = np.full(ids.shape, -1.0, np.float32)
        for i, sequence in enumerate(self.sequences):
            at = slice(i * heads, (i + 1) * heads)
            for layer in range(layers):
                width = sequence.ids[layer].shape[1]
                ids[layer, at, :width] = sequence.ids[layer]
                mass[layer, at, :width] = sequence.mass[layer]
        width = int((ids >= 0).sum(2).max())  # the rest of every row is empty
        ids, mass = ids[..., :width], mass[..., :width]
        live = ids >= 0
        code = np.where(live, _FORMAT[pool.code[ids]], _ABSENT)
        order = np.argsort(code, axis=2, kind="stable")
        ids, code, mass = (np.take_along_axis(x, order, 2) for x in (ids, code, mass))
        live = code != _ABSENT
        away = self._away() * (pool.tier[ids] == HOST)
        keys, values = self.keys[1].numpy(), self.values[1].numpy()
        keys[:, :, 1 : width + 1] = np.where(live, (pool.k_off[ids] + away) | pool.count[ids], 0)
        values[:, :, 1 : width + 1] = np.where(live, pool.v_off[ids] + away, 0)
        keys[:, :, width + 1 :] = 0
        for i, sequence in enumerate(self.sequences):
            at = slice(i * heads, (i + 1) * heads)
            keys[:, at, 0], values[:, at, 0] = sequence.tail_offsets()
            keys[:, at, 0] |= TAIL
        self.order[:, :, :width] = order
        self.mass[1].numpy()[:, :, 1 : width + 1] = np.nan_to_num(mass, nan=-1.0)
        self.mass[1].numpy()[:, :, 0] = -1.0
        self._share(code)
        if any(s.retrieve for s in self.sequences):
            self._select(ids, live, width)
        self.tails[1].copy_(torch.tensor([s.tail_len for s in self.sequences]))
        for device, host in (self.keys, self.values, self.mass, self.items, self.parts, self.tails):
            device.copy_(host, non_blocking=True)
        if self.pool.device.type == "cuda":
            self.sent = torch.cuda.Event()
            self.sent.record()
        self.seen = [(s.version, s.tail_len) for s in self.sequences]

    def measured(self) -> None:
        """Take the mass that statistics steps have measured into the sequences. Waits for the GPU."""
        assert not self.stale()
        mass, heads = self.mass[0][:, :, 1:].cpu().numpy(), self.pool.layers[0].heads
        for i, sequence in enumerate(self.sequences):
            at = slice(i * heads, (i + 1) * heads)
            for layer, held in enumerate(sequence.mass):
                width = held.shape[1]
                np.put_along_axis(held, self.order[layer, at, :width], mass[layer, at, :width], 1)
                held[(sequence.ids[layer] < 0) | (held < 0)] = np.nan

    def _share(self, code: np.ndarray) -> None:
        """Divide each layer's runs of pages among the programs; code: uint8 [L, R, P], sorted."""
        counts = np.stack([(code == c).sum(2) for c in self.codes], 2)  # [L, R, F]
        counts[:, :, 0] += 1  # the tail is native
        items, parts = self.items[1].numpy(), self.parts[1].numpy()
        items[...] = 0
        for layer in range(len(counts)):
            if layer and (counts[layer] == counts[layer - 1]).all():
                items[layer], parts[layer] = items[layer - 1], parts[layer - 1]
                continue
            some, parts[layer] = share(counts[layer], self.time, self.codes, self.programs)
            items[layer, : len(some)] = some

    def _select(self, ids: np.ndarray, live: np.ndarray, width: int) -> None:
        """Where the bounds of the pages lie, ids [L, R, P] as sorted, and how many pages each row reads."""
        from adaptivekv.kernels.select import with_picked  # imports Triton

        layers, rows, heads = len(ids), ids.shape[1], self.pool.layers[0].heads
        if not self.selections:
            device, self.bounds = self.pool.device, np.zeros((layers, rows, self.columns), np.int64)
            shared = [torch.zeros(layers, rows, n, dtype=torch.int64, device=device) for n in (self.columns, 1)]
            self.selections = [with_picked(t, shared[0][i], shared[1][i]) for i, t in enumerate(self.tables)]
        ends = np.repeat([s.length - s.tail_len - 1 for s in self.sequences], heads)
        always = (self.pool.first[ids] == 0) | (self.pool.last[ids] >= ends[:, None])  # as policies/retrieval does
        shares = np.array([s.retrieve.read if s.retrieve else 1.0 for s in self.sequences])
        self.bounds[...] = 0
        self.bounds[:, :, 1 : width + 1] = np.where(live & ~always, np.maximum(self.pool.b_off[ids], 0), 0)
        take = np.maximum(2, np.ceil(np.repeat(shares, heads) * live.sum(2)))  # [L, R], the tail beside them
        take = np.minimum(take, live.sum(2)).astype(np.int64)
        for i, selection in enumerate(self.selections):
            selection.bounds.copy_(torch.from_numpy(self.bounds[i]))
            selection.take.copy_(torch.from_numpy(take[i, :, None]))

    def _away(self) -> int:
        """From the device arena to the host arena, in bytes of one address space."""
        host = self.pool.arenas[HOST]
        return 0 if host is None else host.data.data_ptr() - self.pool.arena(DEVICE).data.data_ptr()


def columns_for(tokens: int) -> int:
    """Columns a row needs for `tokens` tokens, the tail included, rounded up so that few sizes are captured."""
    return -(-(tokens // PAGE + 2) // 64) * 64
