"""One request's cache: per layer and KV head a list of sealed pages, and one open tail for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from adaptivekv.kernels import PageBatch
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.arena import ArenaFull
from adaptivekv.memory.bounds import bounds_bytes
from adaptivekv.memory.formats import BY_CODE, FORMATS, Format
from adaptivekv.memory.pages import DEVICE, PagePool

if TYPE_CHECKING:
    from adaptivekv.memory.pages import LayerShape


class Picker(Protocol):
    """Chooses the pages of a decode step."""

    def pick(self, sequence: Sequence, layer: int, q: torch.Tensor) -> np.ndarray:
        """q [H, G, k_dim] -> bool like `sequence.ids[layer]`."""


NATIVE = FORMATS["native"]


class Sequence:
    """The cache of one request in a pool that others may share.

    Tokens enter layer by layer through `append` and count once `commit` closes the step. The tail is aligned: it holds
    the same slots in all layers and heads. `ids[layer]` is [heads, columns], -1 where a head has fewer pages;
    `mass[layer]` beside it is each page's moving average of the attention it received (a share, summing to the
    attention that went to pages), NaN until measured. `window` queries of each layer are kept in the observation ring
    (0: none).
    """

    def __init__(self, pool: PagePool, window: int = 0):
        self.pool, self.window = pool, window
        self.length = 0  # tokens seen, whether still held or not
        self.tail_len = 0
        self.tail_pos = np.zeros(PAGE, np.int32)
        self.ids = [np.full((s.heads, 0), -1, np.int32) for s in pool.layers]
        self.mass = [np.full((s.heads, 0), np.nan, np.float32) for s in pool.layers]
        self.protected: list[tuple[int, int]] = []  # spans of positions no eviction may take
        self.scaling = 1.0  # of attention scores, as the model says at its first step
        self.retrieve: Picker | None = None  # which pages a decode step reads (None: all)
        self._batches: list[list[tuple[PageBatch, np.ndarray]] | None] = [None] * len(pool.layers)
        self._regions: list[int] = []
        self.ring: list[torch.Tensor] = []  # per layer [q_heads, window, k_dim]
        self.ring_fill = 0  # queries it holds
        item = pool.dtype.itemsize
        try:
            views = [
                self._region_views([(s.heads, PAGE, s.k_dim), (s.heads, PAGE, s.v_dim)], item) for s in pool.layers
            ]
            self.tail_k, self.tail_v = [v[0] for v in views], [v[1] for v in views]
            if window:
                self.open_ring(window)
        except ArenaFull:
            self._free_regions()
            raise
        pool.sequences.append(self)

    def _region_views(self, shapes: list[tuple[int, ...]], item: int) -> list[torch.Tensor]:
        sizes = [int(np.prod(shape)) * item for shape in shapes]
        offset, data = self.pool.region(sum(sizes))
        self._regions.append(offset)
        parts = torch.split(data[: sum(sizes)], sizes)
        return [p.view(self.pool.dtype).view(shape) for p, shape in zip(parts, shapes, strict=True)]

    def open_ring(self, window: int) -> None:
        """Start keeping the last `window` queries of each layer. Raises ArenaFull where there is no room."""
        at, item = len(self._regions), self.pool.dtype.itemsize
        try:
            ring = [self._region_views([(s.q_heads, window, s.k_dim)], item)[0] for s in self.pool.layers]
        except ArenaFull:
            self._free_regions(at)
            raise
        self.ring_at, self.ring, self.window, self.ring_fill = at, ring, window, 0

    def drop_ring(self) -> None:
        """Give the observation ring's bytes back, once no stage needs it any more."""
        if self.ring:
            self._free_regions(self.ring_at)
            self.ring, self.window = [], 0

    def _free_regions(self, start: int = 0) -> None:
        for offset in self._regions[start:]:
            self.pool.free_region(offset)
        del self._regions[start:]

    @staticmethod
    def fixed_bytes(layers: list[LayerShape], dtype: torch.dtype, window: int) -> int:
        """Device bytes of the tail and of a ring of `window` queries."""
        return sum((s.slot_elements * PAGE + s.q_heads * window * s.k_dim) * dtype.itemsize for s in layers)

    # -- a step ------------------------------------------------------------------------------------------------------

    def columns_needed(self, n: int) -> int:
        """Pages per head that appending `n` tokens will seal."""
        return (self.tail_len + n) // PAGE

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, pos: np.ndarray) -> None:
        """Add the step's tokens to one layer: k [H, n, k_dim], v [H, n, v_dim], original positions [n]."""
        t, n = self.tail_len, k.shape[1]
        if t + n < PAGE:
            self.tail_k[layer][:, t : t + n] = k
            self.tail_v[layer][:, t : t + n] = v
            return
        full = (t + n) // PAGE
        heads, rest = len(k), (t + n) % PAGE
        k = torch.cat([self.tail_k[layer][:, :t], k.to(self.pool.dtype)], 1)
        v = torch.cat([self.tail_v[layer][:, :t], v.to(self.pool.dtype)], 1)
        page_pos = np.concatenate([self.tail_pos[:t], pos])[: full * PAGE].reshape(full, PAGE)
        ids = self.pool.write(
            layer,
            k[:, : full * PAGE].reshape(heads * full, PAGE, -1),
            v[:, : full * PAGE].reshape(heads * full, PAGE, -1),
            np.full(heads * full, PAGE),
            np.tile(page_pos, (heads, 1)),
            NATIVE,
        )
        self._add_pages(layer, ids.reshape(heads, full))
        self.tail_k[layer][:, :rest] = k[:, full * PAGE :]
        self.tail_v[layer][:, :rest] = v[:, full * PAGE :]

    def commit(self, pos: np.ndarray) -> None:
        """Close the step: every layer has appended the tokens at `pos` [n]."""
        held = np.concatenate([self.tail_pos[: self.tail_len], pos])
        self.tail_len = len(held) % PAGE
        self.tail_pos[: self.tail_len] = held[len(held) - self.tail_len :]
        self.length += len(pos)
        self.ring_fill = min(self.window, self.ring_fill + len(pos))

    def observe(self, layer: int, q: torch.Tensor) -> None:
        """Keep the last `window` queries: q [q_heads, n, k_dim], rotary applied. Call before `commit`."""
        ring, n = self.ring[layer], min(q.shape[1], self.window)
        if n < self.window:
            ring[:, :-n] = ring[:, n:].clone()
        ring[:, -n:] = q[:, -n:]

    def observed(self, layer: int) -> torch.Tensor:
        """The queries in the ring, oldest first: [q_heads, ring_fill, k_dim]."""
        return self.ring[layer][:, self.window - self.ring_fill :]

    def _add_pages(self, layer: int, ids: np.ndarray) -> None:
        """Append a rectangle of page ids [H, n] behind each head's last page."""
        heads, n = ids.shape
        ends = (self.ids[layer] >= 0).sum(1)
        grow = max(0, int(ends.max(initial=0)) + n - self.ids[layer].shape[1])
        self.ids[layer] = np.pad(self.ids[layer], ((0, 0), (0, grow)), constant_values=-1)
        self.mass[layer] = np.pad(self.mass[layer], ((0, 0), (0, grow)), constant_values=np.nan)
        cols = ends[:, None] + np.arange(n)
        self.ids[layer][np.arange(heads)[:, None], cols] = ids
        self.touch(layer)

    def touch(self, layer: int | None = None) -> None:
        """Forget what attention prepared for a layer (all layers), because its pages changed or moved."""
        for i in range(len(self._batches)) if layer is None else (layer,):
            self._batches[i] = None

    # -- what attention reads ----------------------------------------------------------------------------------------

    def batches(self, layer: int, pick: np.ndarray | None = None) -> list[tuple[PageBatch, np.ndarray]]:
        """The pages of a layer, one batch a format and tier, each with its columns in `ids` ([H, P], -1 absent).

        pick: bool like `ids[layer]`, the pages to read (None: all, prepared once until the pages change).
        """
        if pick is None and (ready := self._batches[layer]) is not None:
            return ready
        pool, ids, shape = self.pool, self.ids[layer], self.pool.layers[layer]
        live = ids >= 0 if pick is None else (ids >= 0) & pick
        key = np.where(live, pool.code[ids].astype(np.int16) * 2 + pool.tier[ids], -1)
        out = []
        for value in np.unique(key[live]):
            mask = key == value
            width = int(mask.sum(1).max())
            cols = np.argsort(~mask, axis=1, kind="stable")[:, :width]
            here = np.take_along_axis(mask, cols, 1)
            cols = np.where(here, cols, -1)
            page = np.where(here, np.take_along_axis(ids, np.maximum(cols, 0), 1), 0)
            fmt, tier = BY_CODE[value // 2], int(value % 2)
            arena = pool.arena(tier).data
            count = np.where(here, pool.count[page], 0).astype(np.int32)
            k_off, v_off = (np.where(here, off[page], 0) for off in (pool.k_off, pool.v_off))
            at = [torch.from_numpy(np.ascontiguousarray(x)).to(arena.device) for x in (k_off, v_off, count)]
            dims, full = (pool.dtype, shape.k_dim, shape.v_dim), bool((count == PAGE).all())
            batch = PageBatch(arena, at[0], at[1], at[2], fmt.k, fmt.v, *dims, fmt.rotate, full)
            out.append((batch, cols))
        if pick is None:
            self._batches[layer] = out
        return out

    def measure(self, layer: int, columns: np.ndarray, mass: np.ndarray) -> None:
        """Take in the attention that pages received in one step: columns [H, P] (-1 absent), mass [H, P] (shares)."""
        h, i = np.nonzero(columns >= 0)
        old, new = self.mass[layer][h, columns[h, i]], mass[h, i]
        self.mass[layer][h, columns[h, i]] = np.where(np.isnan(old), new, (old + new) / 2)  # halves the past

    def tail(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The open slots: [H, tail_len, k_dim], [H, tail_len, v_dim]."""
        return self.tail_k[layer][:, : self.tail_len], self.tail_v[layer][:, : self.tail_len]

    # -- changes -----------------------------------------------------------------------------------------------------

    def pages(self) -> Iterator[np.ndarray]:
        """Ids of the sealed pages, layer by layer."""
        for ids in self.ids:
            yield ids[ids >= 0]

    def convert(self, layer: int, select: np.ndarray, fmt: Format) -> None:
        """Re-encode the selected pages (bool like `ids[layer]`) in `fmt`; all but what ArenaFull prevents."""
        table = self.ids[layer]
        cells = np.flatnonzero((table >= 0) & select)
        where = dict(zip(table.flat[cells].tolist(), cells.tolist(), strict=True))
        self.touch(layer)
        for group in self.pool.groups(table.flat[cells]):
            table.flat[[where[page] for page in group.tolist()]] = self.pool.convert(group, fmt)

    def move(self, layer: int, select: np.ndarray, tier: int) -> None:
        """Bring the selected pages (bool like `ids[layer]`) to `tier`; all but what ArenaFull prevents."""
        chosen = (self.ids[layer] >= 0) & select
        for sequence in self.pool.sequences:  # the pages may be shared
            sequence.touch(layer)
        self.pool.move(self.ids[layer][chosen], tier)

    def drop(self, layer: int, select: np.ndarray) -> None:
        """Evict whole pages (bool like `ids[layer]`)."""
        chosen = (self.ids[layer] >= 0) & select
        if chosen.any():
            gone = self.ids[layer][chosen]
            self.ids[layer][chosen] = -1
            self.close_gaps(layer)
            self.pool.release(gone)

    def close_gaps(self, layer: int) -> None:
        """Pack each head's pages to the left, in order."""
        order = np.argsort(self.ids[layer] < 0, axis=1, kind="stable")
        self.ids[layer] = np.take_along_axis(self.ids[layer], order, 1)
        self.mass[layer] = np.take_along_axis(self.mass[layer], order, 1)
        width = int((self.ids[layer] >= 0).sum(1).max(initial=0))
        self.ids[layer], self.mass[layer] = self.ids[layer][:, :width].copy(), self.mass[layer][:, :width].copy()
        self.touch(layer)

    def slots(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the sealed slots of a layer stand: used [H, P, 64] bool, original position [H, P, 64]."""
        ids = self.ids[layer]
        count = np.where(ids >= 0, self.pool.count[ids], 0)
        return np.arange(PAGE) < count[..., None], self.pool.pos[ids]

    def keys(self, layer: int, head: int) -> torch.Tensor:
        """Keys of a head's sealed slots in table order, float32 [P * 64, k_dim]; unused slots are 0."""
        ids = self.ids[layer][head]
        out = torch.zeros(len(ids), PAGE, self.pool.layers[layer].k_dim, device=self.pool.device)
        for group in self.pool.groups(ids[ids >= 0]):
            at = torch.from_numpy(np.flatnonzero(np.isin(ids, group))).to(out.device)
            out[at] = self.pool.keys(ids[at.cpu().numpy()])
        used = torch.from_numpy(np.arange(PAGE) < np.where(ids >= 0, self.pool.count[ids], 0)[:, None])
        return (out * used[..., None].to(out.device)).view(-1, out.shape[-1])

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on, sealed ones included; nothing is re-encoded."""
        assert 0 <= length <= self.length
        kept = int((self.tail_pos[: self.tail_len] < length).sum())
        if kept == 0:
            for layer, ids in enumerate(self.ids):
                used, pos = self.slots(layer)
                left = (used & (pos < length)).sum(2)
                cut = (ids >= 0) & (left < used.sum(2)) & (left > 0)
                if cut.any():
                    ids[cut] = self.pool.shorten(ids[cut], left[cut])
                self.drop(layer, (ids >= 0) & (left == 0))
                self.touch(layer)
        self.tail_len, self.length = kept, length

    def fork(self) -> Sequence:
        """A second sequence over the same sealed pages; the tail and the ring are copied."""
        other = Sequence(self.pool, self.window)
        for mine, theirs in zip(
            self.tail_k + self.tail_v + self.ring, other.tail_k + other.tail_v + other.ring, strict=True
        ):
            theirs.copy_(mine)
        other.ids, other.mass = [x.copy() for x in self.ids], [x.copy() for x in self.mass]
        for ids in other.pages():
            self.pool.retain(ids)
        other.length, other.tail_len, other.tail_pos = self.length, self.tail_len, self.tail_pos.copy()
        other.ring_fill = self.ring_fill
        other.protected, other.scaling, other.retrieve = list(self.protected), self.scaling, self.retrieve
        return other

    def free(self) -> None:
        """Give everything back. The sequence is unusable afterwards."""
        for ids in self.pages():
            self.pool.release(ids)
        self.ids = [np.full((s.heads, 0), -1, np.int32) for s in self.pool.layers]
        self._free_regions()
        self.pool.sequences.remove(self)

    # -- facts -------------------------------------------------------------------------------------------------------

    def held(self) -> float:
        """Share of the tokens seen that is still held, averaged over layers and heads."""
        slots = sum(float(self.pool.count[ids].sum()) for ids in self.pages())
        heads = sum(s.heads for s in self.pool.layers)
        return (slots / heads + self.tail_len) / max(1, self.length)

    def bytes(self, tier: int = DEVICE) -> int:
        """Bytes of the sealed pages on `tier` (shared pages count whole); on the device also bounds, tail and ring."""
        total = 0
        for layer, ids in enumerate(self.pages()):
            codes, n = np.unique(self.pool.code[ids[self.pool.tier[ids] == tier]], return_counts=True)
            total += sum(int(c) * self.pool.page_bytes(layer, BY_CODE[code]) for code, c in zip(codes, n, strict=True))
            if tier == DEVICE:
                total += int((self.pool.b_off[ids] >= 0).sum()) * bounds_bytes(self.pool, layer)
        return total + (sum(self.pool.regions[r] for r in self._regions) if tier == DEVICE else 0)

    def check_integrity(self) -> None:
        for layer, ids in enumerate(self.ids):
            live = ids >= 0
            assert (np.diff(live.astype(int), axis=1) <= 0).all(), "a gap in a page list"
            pages = ids[live]
            assert (self.pool.ref[pages] > 0).all() and (self.pool.layer[pages] == layer).all()
            assert ((self.pool.count[pages] > 0) & (self.pool.count[pages] <= PAGE)).all()
            for h in range(len(ids)):
                used, pos = self.slots(layer)
                seen = np.concatenate([pos[h][used[h]], self.tail_pos[: self.tail_len]])
                assert len(np.unique(seen)) == len(seen), "a position is held twice"
                assert not len(seen) or seen.max() < self.length
        assert 0 <= self.tail_len < PAGE
