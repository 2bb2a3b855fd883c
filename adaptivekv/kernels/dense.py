"""Softmax with its log-sum-exp, and torch's fused attention where that is faster than two matrix products."""

import torch
from torch import Tensor

_MANY = 64  # query rows from which the fused CPU kernel wins (measured: 16 rows 4x slower, 96 even, 768 3x faster)


def softmax(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the last dimension, not yet divided; overwrites `scores`.

    scores: float32 [..., N], -inf where masked. Returns weights [..., N], their sum [..., 1] (1 for a row that is
    masked throughout, so that dividing gives 0 and not NaN), and lse [...].
    """
    # A finite floor keeps -inf - -inf out of rows without keys: exp(-inf - floor) is 0.
    top = scores.amax(-1, keepdim=True).clamp_(min=-1e38)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1)
    return weights, total.masked_fill_(total == 0, 1.0), lse


def pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `flash` is worth calling for q [H, M, dk] float32 against these keys and values."""
    return (
        q.device.type == "cpu"
        and q.shape[1] >= _MANY
        and k.shape[-1] == v.shape[-1] == q.shape[-1]
        and _fused is not None
    )


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fused CPU attention. q: [H, M, d]; k, v: [H, N, d], finite; mask: bool [1|H, 1|M, N], True where attended.

    Returns out [H, M, d] and lse [H, M].
    """
    assert _fused is not None
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)[None]
    out, lse = _fused(q[None], k[None], v[None], 0.0, False, attn_mask=bias, scale=scale)
    out, lse = out[0], lse[0]
    if mask is not None:  # the fused kernel reports lse = 0 for a row without keys
        empty = ~mask.any(-1).expand(lse.shape)
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out, lse


_fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
