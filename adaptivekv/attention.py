"""The attention and mask functions registered with transformers under the name `adaptivekv`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels import PageBatch, attend_dense, causal_attention, merge, page_attention, triton_module
from adaptivekv.kernels.codec import PAGE, UNIT
from adaptivekv.memory.sequence import Sequence

if TYPE_CHECKING:
    from adaptivekv.cache import AdaptiveCache
    from adaptivekv.memory.tables import StepTables

NAME = "adaptivekv"


@dataclass
class Staged:
    """What `AdaptiveCache.update` hands to the attention function in place of keys and values."""

    cache: AdaptiveCache
    layer: int  # among the layers the cache owns
    key: Tensor  # [B, H, q, k_dim]
    value: Tensor  # [B, H, q, v_dim]


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Staged,
    value: Tensor | Staged,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, Hq, q, d]; keys and values staged by an AdaptiveCache, or tensors of a layer transformers keeps.

    attention_mask: 2-D padding mask [B, q] of full-attention layers, 4-D bool of all others, or None.
    Returns ([B, q, Hq, v_dim], None).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Staged) and attention_mask is not None and attention_mask.dim() != 2:
        raise AdaptiveKVError(
            "a 4-D mask on a full-attention layer (blocks of an image, packed sequences, a mask of your own): "
            "AdaptiveCache only knows causal attention with padding; use DynamicCache"
        )
    if isinstance(key, Staged) and _step is not None:
        out = _attend_step(query, key, scaling, softcap, s_aux)
    elif isinstance(key, Staged):
        out = key.cache.attend(key, query, attention_mask, scaling, softcap, s_aux)
    else:
        assert isinstance(value, Tensor)
        out = _attend_tensors(query, key, value, attention_mask, scaling, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


_step: tuple[StepTables, bool] | None = None  # the tables of a decode step being captured, and whether it measures mass


@contextmanager
def decode_step(tables: StepTables, stats: bool) -> Iterator[None]:
    """Within it, each layer's one new token a row is stored and attended through `tables`, without the host."""
    global _step
    _step = tables, stats
    try:
        yield
    finally:
        _step = None


@torch.library.custom_op("adaptivekv::decode", mutates_args=())
def _decode(q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Opaque to torch.compile. q [R, G, k_dim], k [R, k_dim], v [R, v_dim] -> out [R, G, v_dim], lse [R, G]."""
    assert _step is not None
    tables, stats = _step
    table, decode = tables.tables[layer], triton_module("decode")
    if stats or not tables.selections:  # a step that measures every page reads every page
        mass = tables.mass[layer] if stats else None
        return decode.attend_table(q, table, scale, softcap or None, (k, v), mass)
    picked = decode.select_pages(q, table, tables.selections[layer])
    return decode.attend_table(q, picked, scale, softcap or None, (k, v))


@_decode.register_fake
def _decode_shape(q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=torch.float32)


def _attend_step(query: Tensor, staged: Staged, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """query [B, Hq, 1, k_dim] -> [B, Hq, 1, v_dim]."""
    batch, q_heads = query.shape[:2]
    heads, v_dim = staged.value.shape[1], staged.value.shape[3]
    rows = batch * heads
    out, lse = _decode(
        query.reshape(rows, q_heads // heads, -1), staged.key.reshape(rows, -1), staged.value.reshape(rows, -1),
        staged.layer, scale, softcap or 0.0,
    )  # fmt: skip
    out = out.view(batch, q_heads, 1, v_dim)
    return out if sinks is None else _with_sinks(out, lse.view(batch, q_heads, 1), sinks).to(out.dtype)


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """Full attention: which of the new tokens are real, bool [B, q] (None: all). Every other pattern: a 4-D mask.

    A cache that has evicted tokens cannot be described by a mask over what it holds, and needs none: pads are never
    stored and everything stored lies in the past.
    """
    if mask_function is not causal_mask_function:
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, **kwargs,
        )  # fmt: skip
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask


def _attend_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Layers whose cache transformers keeps (sliding windows, say) and models run without a cache."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if mask is None or mask.dim() == 2:
        causal = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - q_len)
        mask = causal if mask is None else causal & mask[:, None, None, -kv_len:]
    if softcap is None and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    batch, heads = key.shape[:2]
    group = query.shape[1] // heads
    mask = mask.expand(batch, 1, q_len, kv_len).repeat(1, heads, group, 1).flatten(0, 1)
    out, lse = attend_dense(
        query.reshape(batch * heads, group * q_len, -1), key.flatten(0, 1), value.flatten(0, 1), scale, mask, softcap
    )
    out = out.view(*query.shape[:3], -1)
    return _with_sinks(out, lse.view(query.shape[:3]), sinks).to(query.dtype)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Learned attention sinks take their share of the softmax: out [..., Hq, q, d], lse [..., Hq, q], sinks [Hq]."""
    return out if sinks is None else out * torch.sigmoid(lse - sinks.float()[:, None])[..., None]


def attend_sequence(
    sequence: Sequence, layer: int, q: Tensor, k: Tensor, v: Tensor,
    scale: float, softcap: float | None = None, sinks: Tensor | None = None, stats: bool = False, recall: bool = False,
) -> Tensor:  # fmt: skip
    """One request, one layer: the new tokens attend to everything held and, causally, to each other.

    q [Hq, n, k_dim], k [H, n, k_dim], v [H, n, v_dim], rotary applied, pads removed. Stores nothing. With `stats`, the
    attention each page received goes into `sequence.mass`; with `recall`, the squares of what the new tokens paid each
    sealed slot into `sequence.credits`. Returns [Hq, n, v_dim] float32.
    """
    heads, (q_heads, n, _) = len(k), q.shape
    group = q_heads // heads
    rows = q.reshape(heads, group * n, -1)  # query heads of a KV head together: [H, G * n, k_dim]
    pick = (
        sequence.retrieve.pick(sequence, layer, rows)
        if sequence.retrieve and n == 1 and not stats and sequence.ids[layer].size
        else None
    )
    parts, measured = [], []
    for batch, columns in sequence.batches(layer, pick):
        for block, at in _on_device(batch, columns, q.device, sequence.pool.staging_bytes):
            step = max(1, sequence.pool.staging_bytes // (heads * PAGE * (k.shape[2] + v.shape[2]) * 4))
            out, lse, page_lse = page_attention(rows, block, scale, softcap, stats, step)
            parts.append((out, lse))
            measured.append((page_lse, at))
    tail_k, tail_v = sequence.tail(layer)
    dense = causal_attention(
        rows, torch.cat([tail_k.to(k.dtype), k], 1), torch.cat([tail_v.to(v.dtype), v], 1), scale, n, softcap
    )
    out, lse = merge([*parts, dense]) if parts else dense
    for page_lse, at in measured:
        if page_lse is not None:
            mass = (page_lse - lse[:, None]).exp_().mean(-1)  # [H, P]
            sequence.measure(layer, at, mass.cpu().numpy())
    if recall:
        _credit(sequence, layer, rows, lse, scale, softcap)
    return _with_sinks(out.view(q_heads, n, -1), lse.view(q_heads, n), sinks)


def _credit(sequence: Sequence, layer: int, rows: Tensor, lse: Tensor, scale: float, softcap: float | None) -> None:
    """Credit each sealed slot with the squares of the attention weights of all rows: rows [H, M, k_dim], lse [H, M]."""
    used, pos = sequence.slots(layer)
    paid = []
    for h, (queries, total) in enumerate(zip(rows.float(), lse, strict=True)):
        keys = sequence.keys(layer, h)
        step = max(1, sequence.pool.staging_bytes // (4 * max(1, len(keys))))  # scores are a temporary copy too
        squares = keys.new_zeros(len(keys))
        for some, norm in zip(queries.split(step), total.split(step), strict=True):
            scores = (some @ keys.T).mul_(scale)
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            squares += scores.sub_(norm[:, None]).mul_(2).exp_().sum(0)
        paid.append(squares)
    found = torch.stack(paid).cpu().numpy()  # one wait a layer
    for credit, new, here, at in zip(sequence.credits["recall"][layer], found, used, pos, strict=True):
        credit[at[here]] += new[here.ravel()]


def _on_device(batch: PageBatch, columns: np.ndarray, device: torch.device, staging: int):
    """Pages with a part on a lower tier, copied to the GPU in blocks within the staging allowance; others as is."""
    if all(arena.device.type == device.type for arena in batch.arenas):
        yield batch, columns
        return
    k_size, v_size = batch.k.part_bytes(batch.k_dim, batch.dtype), batch.v.part_bytes(batch.v_dim, batch.dtype)
    heads, width = batch.count.shape
    step = max(1, staging // (heads * (k_size + v_size)))
    for start in range(0, width, step):
        cut = slice(start, start + step)
        n = batch.count[:, cut].numel()
        arenas = []
        for arena, off, size in zip(batch.arenas, (batch.k_off, batch.v_off), (k_size, v_size), strict=True):
            index = (off[:, cut].reshape(-1, 1) // UNIT + torch.arange(size // UNIT, device=off.device)).view(-1)
            arenas.append(arena.view(-1, UNIT).index_select(0, index).view(-1).to(device, non_blocking=True))
        at = torch.arange(n, device=device).view(heads, -1)
        yield PageBatch(
            torch.cat(arenas), at * k_size, n * k_size + at * v_size, batch.count[:, cut].to(device),
            batch.k, batch.v, batch.dtype, batch.k_dim, batch.v_dim, batch.rotate, batch.full,
            batch.bases,
        ), columns[:, cut]  # fmt: skip


def register() -> None:
    """Make `adaptivekv` known to transformers as an attention implementation with its own mask function."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
