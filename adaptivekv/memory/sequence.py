"""One request's cache: per layer and KV head a list of sealed pages, and one open tail for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from adaptivekv.kernels import PageBatch
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory import change, pagelists, seal
from adaptivekv.memory.arena import ArenaFull
from adaptivekv.memory.bases import Bases, clean
from adaptivekv.memory.batches import Picker, page_batches
from adaptivekv.memory.bounds import bounds_bytes
from adaptivekv.memory.formats import Format
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.regions import Regions
from adaptivekv.memory.shapes import DEVICE

if TYPE_CHECKING:
    from adaptivekv.memory.sealed import Sealed
    from adaptivekv.memory.shapes import LayerShape


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
        self.prompt = 0  # tokens it will have when its prompt has been read, if that was said
        self.tail_len = 0
        self.tail_pos = np.zeros(PAGE, np.int32)
        self.ids = [np.full((s.heads, 0), -1, np.int32) for s in pool.layers]
        self.mass = [np.full((s.heads, 0), np.nan, np.float32) for s in pool.layers]
        self.protected: list[tuple[int, int]] = []  # spans of positions no eviction may take
        self.credits: dict[str, list[np.ndarray]] = {}  # a layer [H, position]: what a token is worth, by who says so
        self.scaling = 1.0  # of attention scores, as the model says at its first step
        self.bases: Bases | None = None  # of its low-rank pages
        self.retrieve: Picker | None = None  # which pages a decode step reads (None: all)
        self._batches: list[list[tuple[PageBatch, np.ndarray]] | None] = [None] * len(pool.layers)
        self.sealed: Sealed | None = None  # what an eviction last asked for (sealed.py)
        self._claimed: list[np.ndarray] = []  # pages [H, n] of the layers that have yet to append in this step
        self.version = 0  # rises whenever pages change or move
        self.ring: list[torch.Tensor] = []  # per layer [q_heads, window, k_dim]
        self.ring_fill = 0  # queries it holds
        self.tails = Regions(pool, [[(s.heads, PAGE, s.k_dim), (s.heads, PAGE, s.v_dim)] for s in pool.layers])
        self.tail_k, self.tail_v = [k for k, _ in self.tails.tensors], [v for _, v in self.tails.tensors]
        for part in self.tail_k + self.tail_v:
            part.zero_()  # a kernel may read past the last token: what it finds must be numbers
        self._ring = Regions(pool, [])
        if window:
            try:
                self.open_ring(window)
            except ArenaFull:
                self.tails.free()
                raise
        pool.sequences.append(self)

    def open_ring(self, window: int) -> None:
        """Start keeping the last `window` queries of each layer. Raises ArenaFull where there is no room."""
        ring = Regions(self.pool, [[(s.q_heads, window, s.k_dim)] for s in self.pool.layers])
        self._ring.free()
        self._ring = ring
        self.ring, self.window, self.ring_fill = [queries for (queries,) in self._ring.tensors], window, 0

    def drop_ring(self) -> None:
        """Give the observation ring's bytes back, once no stage needs it any more."""
        self._ring.free()
        self.ring, self.window = [], 0

    @staticmethod
    def fixed_bytes(layers: list[LayerShape], dtype: torch.dtype, window: int) -> int:
        """Device bytes of the tail and of a ring of `window` queries."""
        return sum((s.slot_elements * PAGE + s.q_heads * window * s.k_dim) * dtype.itemsize for s in layers)

    # -- a step ------------------------------------------------------------------------------------------------------

    def columns_needed(self, n: int) -> int:
        """Pages per head that appending `n` tokens will seal."""
        return (self.tail_len + n) // PAGE

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, pos: np.ndarray) -> None:
        """Add the step's tokens to one layer: k [H, n, k_dim], v [H, n, v_dim], original positions [n].

        Layers come in order. The first one takes the room of all pages the step will seal: ArenaFull changes nothing.
        """
        t, n = self.tail_len, k.shape[1]
        if t + n < PAGE:
            self.tail_k[layer][:, t : t + n] = k
            self.tail_v[layer][:, t : t + n] = v
            return
        full, rest = (t + n) // PAGE, (t + n) % PAGE
        if layer == 0:
            self._unclaim()
            self.pool.spare_ids(full * sum(s.heads for s in self.pool.layers))
            self._claimed = seal.claim(self.pool, full)
        k = torch.cat([self.tail_k[layer][:, :t], k.to(self.pool.dtype)], 1)
        v = torch.cat([self.tail_v[layer][:, :t], v.to(self.pool.dtype)], 1)
        ids = self._claimed.pop(0)
        seal.write(self.pool, ids, k, v, np.concatenate([self.tail_pos[:t], pos]))
        self._add_pages(layer, ids)
        self.tail_k[layer][:, :rest] = k[:, full * PAGE :]
        self.tail_v[layer][:, :rest] = v[:, full * PAGE :]

    def extend(self) -> None:
        """Count a token that an outside writer (a CUDA graph) has put into the tail of every layer."""
        self.tail_pos[self.tail_len] = self.length
        self.tail_len, self.length = self.tail_len + 1, self.length + 1

    def seal(self) -> None:
        """Turn a full tail, written from outside (a CUDA graph), into native pages of all layers and heads at once.

        Needs `tail_len` 64 and the positions in `tail_pos`; afterwards the tail is empty. ArenaFull changes nothing.
        """
        assert self.tail_len == PAGE
        columns = seal.claim(self.pool, 1)
        ids = np.concatenate(columns)[:, 0]
        self.pool.set_pos(ids, np.broadcast_to(self.tail_pos, (len(ids), PAGE)))
        seal.copy_tails(self.pool, ids, *self.tails.heads)
        for layer, column in enumerate(columns):
            self._add_pages(layer, column)
        self.tail_len = 0

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
        """Append page ids [H, n] behind each head's last page."""
        self.ids[layer], self.mass[layer] = pagelists.append(self.ids[layer], self.mass[layer], ids)
        self.touch(layer)

    def _unclaim(self) -> None:
        """Give back the pages of a step that something has stopped half way."""
        for ids in self._claimed:
            self.pool.release(ids.ravel())
        self._claimed = []

    def touch(self, layer: int | None = None) -> None:
        """Forget what attention prepared for a layer (all layers), because its pages changed or moved."""
        self.version, self.sealed = self.version + 1, None
        for i in range(len(self._batches)) if layer is None else (layer,):
            self._batches[i] = None

    # -- what attention reads ----------------------------------------------------------------------------------------

    def batches(self, layer: int, pick: np.ndarray | None = None) -> list[tuple[PageBatch, np.ndarray]]:
        """The pages of a layer, one batch a format and tier, each with its columns in `ids` ([H, P], -1 absent).

        pick: bool like `ids[layer]`, the pages to read (None: all, prepared once until the pages change).
        """
        if pick is not None:
            return page_batches(self, layer, pick)
        if (ready := self._batches[layer]) is None:
            ready = self._batches[layer] = page_batches(self, layer, self.ids[layer] >= 0)
        return ready

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

    def convert(self, select: list[np.ndarray], fmt: Format) -> None:
        """Re-encode the selected pages (a bool array like `ids[layer]` for each layer) in `fmt`.

        All but what ArenaFull prevents: copies of shared pages, for the others fit the room they leave.
        """
        table, cells = pagelists.chosen(self.ids, select)
        self.touch()
        if fmt.rank:
            assert self.bases
            heads = [np.repeat(np.arange(len(ids)), ids.shape[1]) for ids in self.ids]
            self.bases.name(table[cells], np.concatenate(heads)[cells])
        for at in self.pool.kinds(table[cells]):
            old = table[cells[at]]
            new = change.convert(self.pool, old, fmt)
            if new is not old:  # copied
                table[cells[at]] = new
                pagelists.fill(self.ids, table)

    def move(self, select: list[np.ndarray], tier: int, split: bool = False) -> None:
        """Bring the selected pages (a bool array like `ids[layer]` for each layer) to `tier`.

        split: to the host their values alone, and their keys to the device.
        All but the kinds of page for which ArenaFull is raised.
        """
        table, cells = pagelists.chosen(self.ids, select)
        for sequence in self.pool.sequences:  # the pages may be shared
            sequence.touch()
        change.move(self.pool, table[cells], tier, split)

    def drop(self, select: list[np.ndarray]) -> None:
        """Evict the selected pages whole (a bool array like `ids[layer]` for each layer)."""
        table, cells = pagelists.chosen(self.ids, select)
        if len(cells):
            gone = table[cells]
            table[cells] = -1
            row, _ = self.cells()
            live = table >= 0
            self.assign(row[live], table[live], np.concatenate([m.ravel() for m in self.mass])[live])
            self.pool.release(gone)

    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """The head and the page of every cell (pagelists.py)."""
        return pagelists.cells(self.ids)

    def assign(self, row: np.ndarray, ids: np.ndarray, mass: np.ndarray) -> None:
        """Make all tables anew: page ids and their masses, head by head through all layers (`row`, sorted)."""
        self.ids[:], self.mass[:] = pagelists.arrange([len(x) for x in self.ids], row, ids, mass)
        self.touch()

    def slots(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the sealed slots of a layer stand: used [H, P, 64] bool, original position [H, P, 64]."""
        ids = self.ids[layer]
        count = np.where(ids >= 0, self.pool.count[ids], 0)
        return np.arange(PAGE) < count[..., None], self.pool.pos[ids]

    def counts(self) -> list[np.ndarray]:
        """Sealed slots of each head, [H] a layer."""
        row, ids = self.cells()
        heads = np.array([len(x) for x in self.ids])
        held = np.bincount(row, np.where(ids >= 0, self.pool.count[ids], 0), heads.sum())
        return np.split(held.astype(np.int64), heads.cumsum()[:-1])

    def keys(self, layer: int, head: int) -> torch.Tensor:
        """Keys of a head's sealed slots in table order, float32 [P * 64, k_dim]; unused slots are 0."""
        ids = self.ids[layer][head]
        out = torch.zeros(len(ids), PAGE, self.pool.layers[layer].k_dim, device=self.pool.device)
        for group in self.pool.groups(ids[ids >= 0]):
            at = np.flatnonzero(np.isin(ids, group))
            out[torch.from_numpy(at).to(out.device)] = clean(self.pool, ids[at], self.pool.keys(ids[at]))
        return out.view(-1, out.shape[-1])

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on, sealed ones included; nothing is re-encoded.

        Raises ArenaFull, and changes nothing, where there is no room for copies of shared pages.
        """
        assert 0 <= length <= self.length
        self._unclaim()
        kept = int((self.tail_pos[: self.tail_len] < length).sum())
        if kept == 0:
            left, cuts = [], []
            for layer in range(len(self.ids)):
                used, pos = self.slots(layer)
                left.append((used & (pos < length)).sum(2))
                cuts.append((left[layer] < used.sum(2)) & (left[layer] > 0))
            table, cells = pagelists.chosen(self.ids, cuts)
            table[cells] = change.shorten(self.pool, table[cells], np.concatenate([n.ravel() for n in left])[cells])
            pagelists.fill(self.ids, table)
            self.drop([n == 0 for n in left])
            self.touch()
        self.tail_len, self.length, self.prompt = kept, length, min(self.prompt, length)
        self.credits = {name: [x[:, :length] for x in credit] for name, credit in self.credits.items() if length}

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
        other.length, other.prompt = self.length, self.prompt
        other.tail_len, other.tail_pos = self.tail_len, self.tail_pos.copy()
        other.ring_fill, other.credits = self.ring_fill, self.copied_credits()
        other.protected, other.scaling, other.retrieve = list(self.protected), self.scaling, self.retrieve
        if self.bases:
            other.bases, self.bases.users = self.bases, self.bases.users + 1
        return other

    def credit(self, name: str, length: int) -> list[np.ndarray]:
        """Credits by `name`, made [H, length] each: those of later positions are 0. Pinned beside a GPU, which reads
        them to choose."""
        old = self.credits.get(name) or [np.zeros((len(ids), 0), np.float32) for ids in self.ids]
        if (known := old[0].shape[1]) < length:
            pinned = self.pool.transfer is not None
            self.credits[name] = [torch.zeros(len(x), length, pin_memory=pinned).numpy() for x in old]
            for new, x in zip(self.credits[name], old, strict=True):
                new[:, :known] = x
        return self.credits[name]

    def copied_credits(self) -> dict[str, list[np.ndarray]]:
        return {name: [x.copy() for x in credit] for name, credit in self.credits.items()}

    def free(self) -> None:
        """Give everything back. The sequence is unusable afterwards."""
        self.pool.release(np.concatenate(list(self.pages()), dtype=np.int64))
        self.ids = [np.full((s.heads, 0), -1, np.int32) for s in self.pool.layers]
        self._unclaim()
        self.tails.free()
        self._ring.free()
        self.leave_bases()
        self.pool.sequences.remove(self)

    def leave_bases(self) -> None:
        """Give up the bases of low-rank pages, once it has none of these."""
        if self.bases:
            self.bases.leave()
            self.bases = None

    # -- facts -------------------------------------------------------------------------------------------------------

    def held(self) -> float:
        """Share of the tokens seen that is still held, averaged over layers and heads."""
        slots = sum(float(self.pool.count[ids].sum()) for ids in self.pages())
        heads = sum(s.heads for s in self.pool.layers)
        return (slots / heads + self.tail_len) / max(1, self.length)

    def bytes(self, tier: int = DEVICE) -> int:
        """Bytes of the sealed pages on `tier` (shared pages count whole); on the device also the rest."""
        pool, ids = self.pool, np.concatenate(list(self.pages()))
        total = int(pool.sizes_on(ids, tier).sum())
        if tier == DEVICE:
            bound = np.bincount(pool.layer[ids[pool.b_off[ids] >= 0]], minlength=len(pool.layers))
            total += sum(int(n) * bounds_bytes(pool, layer) for layer, n in enumerate(bound) if n)
            total += self.tails.bytes() + self._ring.bytes() + (self.bases.bytes() if self.bases else 0)
        return total
