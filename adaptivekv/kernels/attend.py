"""Attention over pages in plain torch: the reference of every kernel, and the CPU path.

Every function returns (out, lse): `out` is normalised over the keys it saw, `lse` is the log-sum-exp of their scores in
nats. Softmax does not care about order, so results over disjoint sets of keys combine exactly (`merge`): a layer whose
pages have several formats, or live on several tiers, is several calls. No keys at all is lse = -inf and out = 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptivekv.kernels.codec import PAGE, UNIT, Codec
from adaptivekv.kernels.dense import flash, pays, softmax
from adaptivekv.kernels.hadamard import hadamard

_STAGING = 24 << 20  # bytes of decoded keys, values and scores held at once when the caller sets no block


@dataclass
class PageBatch:
    """Pages of one format, listed per KV head. H may be requests x heads, flattened.

    arena: uint8 [bytes], contiguous; k_off, v_off: int64 [H, P], byte offsets of the parts, multiples of 256;
    count: int32 [H, P], used slots of each page; 0 marks an absent page, whose offsets are 0;
    k, v: codecs; dtype: native storage dtype; k_dim, v_dim: head dimensions;
    rotate: keys and values are stored Hadamard-rotated; full: every count is 64, so nothing needs masking.
    bases: of keys [H, query size, k_dim] and of values [H, output size, v_dim], orthonormal columns: the pages hold
    latents in them, and `page_attention` turns queries and outputs. None: the pages hold keys and values.
    v_arena: where the values lie (None: in `arena`); the Triton kernels know one arena.
    """

    arena: Tensor
    k_off: Tensor
    v_off: Tensor
    count: Tensor
    k: Codec
    v: Codec
    dtype: torch.dtype
    k_dim: int
    v_dim: int
    rotate: bool = False
    full: bool = False
    bases: tuple[Tensor, Tensor] | None = None
    v_arena: Tensor | None = None

    @property
    def arenas(self) -> tuple[Tensor, Tensor]:
        """Where the keys lie, and the values."""
        return self.arena, self.arena if self.v_arena is None else self.v_arena

    def slice(self, start: int, stop: int) -> "PageBatch":
        """The same heads, pages start to stop."""
        s = slice(start, stop)
        return replace(self, k_off=self.k_off[:, s], v_off=self.v_off[:, s], count=self.count[:, s])


def attend_pages(
    q: Tensor,
    batch: PageBatch,
    scale: float,
    softcap: float | None = None,
    stats: bool = False,
    block_pages: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attend every query row to every used slot of the pages; the pages are the past, so there is no causal mask.

    q: [H, M, k_dim], not rotated, M = query heads per KV head x query tokens; scale multiplies the scores;
    softcap: scores become softcap * tanh(scores / softcap); stats: also return the log-sum-exp of each page;
    block_pages: at most this many pages per head are decoded at a time (default: as many as fit 24 MiB).
    Returns out [H, M, v_dim], lse [H, M] and page_lse [H, P, M] or None; all float32.
    """
    heads, rows, _ = q.shape
    pages = batch.count.shape[1]
    q = q.float()
    if batch.rotate:
        q = hadamard(q)
    done: tuple[Tensor, Tensor] | None = None
    page_lse: list[Tensor] = []
    block = block_pages or _block(heads, rows, batch)
    # An arena smaller than one part can only be behind absent pages.
    k_arena, v_arena = batch.arenas
    readable = k_arena.numel() >= _part_bytes(batch, True) and v_arena.numel() >= _part_bytes(batch, False)
    for start in range(0, pages if readable else 0, block):
        part = batch if block >= pages else batch.slice(start, min(start + block, pages))
        out, lse, per_page = _attend_block(q, part, scale, softcap, stats)
        done = (out, lse) if done is None else merge([done, (out, lse)])
        if per_page is not None:
            page_lse.append(per_page)
    if done is None:
        out, lse = q.new_zeros(heads, rows, batch.v_dim), q.new_full((heads, rows), -torch.inf)
        return out, lse, q.new_full((heads, pages, rows), -torch.inf) if stats else None
    out, lse = done
    if batch.rotate:
        out = hadamard(out)
    return out, lse, torch.cat(page_lse, 1) if stats else None


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend to keys and values that are plain tensors (a chunk's own tokens, the open tail).

    q: [H, M, dk]; k: [H, N, dk]; v: [H, N, dv]; mask: bool, broadcastable to [H, M, N], True where a row may attend.
    Masked values must be finite. Returns out [H, M, dv] and lse [H, M], float32.
    """
    q, k, v = q.float(), k.float(), v.float()
    if k.shape[1] == 0:
        return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full(q.shape[:2], -torch.inf)
    if mask is not None:
        mask = mask.reshape((1,) * (3 - mask.dim()) + tuple(mask.shape))
    if softcap is None and pays(q, k, v):
        return flash(q, k, v, scale, mask)
    scores = _cap(torch.bmm(q, k.transpose(1, 2)).mul_(scale), softcap)  # [H, M, N]
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    weights, total, lse = softmax(scores)
    return torch.bmm(weights, v).div_(total), lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys.

    parts: at least one (out [..., M, dv], lse [..., M]), float32. Returns the (out, lse) of their union, exact up to
    rounding.
    """
    if len(parts) == 1:
        return parts[0]
    weights, total, lse = softmax(torch.stack([lse for _, lse in parts], -1))  # [..., M, parts]
    out = parts[0][0] * weights[..., :1]
    for i, (other, _) in enumerate(parts[1:], 1):
        out.addcmul_(other, weights[..., i : i + 1])
    return out.div_(total), lse


def _attend_block(
    q: Tensor, batch: PageBatch, scale: float, softcap: float | None, stats: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """attend_pages for pages that are decoded at once; q float32, already rotated; out stays rotated."""
    heads, pages = batch.count.shape
    rows, slots = q.shape[1], pages * PAGE
    used = None if batch.full else _used(batch.count)  # [H, P, 64]
    k_arena, v_arena = batch.arenas
    k, k_packed = batch.k.unpack(_gather(k_arena, batch.k_off, _part_bytes(batch, True)), batch.k_dim, batch.dtype)
    v, v_packed = batch.v.unpack(_gather(v_arena, batch.v_off, _part_bytes(batch, False)), batch.v_dim, batch.dtype)
    # [H * P, 64, d]
    if softcap is None and not stats and pays(q, k, v):
        # Many rows: the scales are applied once per element, and a fused kernel does the rest.
        k, v = _clean(_apply(k, k_packed), batch.count, used), _clean(_apply(v, v_packed), batch.count, used)
        mask = None if used is None else used.view(heads, 1, slots)
        return *flash(q, k.view(heads, slots, -1), v.view(heads, slots, -1), scale, mask), None
    # Few rows: the scales are applied to scores and probabilities, dim times fewer elements.
    scores = torch.bmm(q, k.view(heads, slots, batch.k_dim).transpose(1, 2))  # [H, M, N]
    if k_packed is not None:
        step, mean = k_packed[0].view(heads, 1, slots), k_packed[1].view(heads, pages, -1)
        common = torch.bmm(q, mean.transpose(1, 2))[..., None]  # [H, M, P, 1]
        scores.mul_(step).view(heads, rows, pages, PAGE).add_(common)
    scores = _cap(scores.mul_(scale), softcap)
    if used is not None:
        scores.masked_fill_(~used.view(heads, 1, slots), -torch.inf)
    page_lse = torch.logsumexp(scores.view(heads, rows, pages, PAGE), -1).transpose(1, 2) if stats else None
    weights, total, lse = softmax(scores)
    if v_packed is None:
        out = torch.bmm(weights, _clean(v, batch.count, used).view(heads, slots, batch.v_dim))
    else:
        step, mean = v_packed[0].view(heads, 1, slots), v_packed[1].view(heads, pages, -1)
        if used is not None:  # an unused slot's scale and an absent page's mean can be NaN, and 0 * NaN is NaN
            step = step.masked_fill(~used.view(heads, 1, slots), 0.0)
            mean = mean.masked_fill((batch.count == 0)[..., None], 0.0)
        common = torch.bmm(weights.view(heads, rows, pages, PAGE).sum(-1), mean)
        out = torch.bmm(weights.mul_(step), v.view(heads, slots, batch.v_dim)).add_(common)
    return out.div_(total), lse, page_lse


def _part_bytes(batch: PageBatch, keys: bool) -> int:
    return batch.k.part_bytes(batch.k_dim, batch.dtype) if keys else batch.v.part_bytes(batch.v_dim, batch.dtype)


def _block(heads: int, rows: int, batch: PageBatch) -> int:
    """Pages per head whose decoded keys and values (float32) and scores fit the staging default."""
    page = heads * PAGE * 4 * (batch.k_dim + batch.v_dim + 2 * min(rows, 64))
    return max(1, _STAGING // page)


def _gather(arena: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Copy the parts at `offsets` [H, P] (bytes) out of the arena: uint8 [H * P, size]."""
    # Rows that overlap, one starting at every unit, make a part one row: one index and one copy each.
    rows = arena.as_strided(((arena.numel() - size) // UNIT + 1, size), (UNIT, 1))
    return rows.index_select(0, (offsets // UNIT).reshape(-1))


def _used(count: Tensor) -> Tensor:
    """bool [H, P, 64]: which slots hold a token."""
    return torch.arange(PAGE, device=count.device, dtype=count.dtype) < count[..., None]


def _apply(values: Tensor, packed: tuple[Tensor, Tensor] | None) -> Tensor:
    """Levels [n, 64, d] to values, in place."""
    return values if packed is None else values.mul_(packed[0][..., None]).add_(packed[1][:, None])


def _clean(values: Tensor, count: Tensor, used: Tensor | None) -> Tensor:
    """Zero the unused slots of values [H * P, 64, d] in place: what lies there is arbitrary, NaN included."""
    if used is None:
        return values
    unused = ~used.view(-1, PAGE, 1)
    short = None if values.is_cuda else (count.reshape(-1) < PAGE).nonzero().squeeze(1)  # would synchronise there
    if short is None or short.numel() * 8 > count.numel():
        return values.masked_fill_(unused, 0.0)
    values[short] = values[short].masked_fill_(unused[short], 0.0)
    return values


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)
