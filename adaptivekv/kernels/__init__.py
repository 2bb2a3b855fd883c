"""Attention over mixed-format pages: codecs, the plain-torch reference (also the CPU path) and the Triton kernel."""

from dataclasses import replace

import torch
from torch import Tensor

from adaptivekv.kernels.attend import PageBatch, attend_dense, attend_pages, merge
from adaptivekv.kernels.codec import CODECS, PAGE, UNIT, Codec
from adaptivekv.kernels.decoded import DECODED
from adaptivekv.kernels.dispatch import has_kernel, triton_module, triton_works
from adaptivekv.kernels.hadamard import hadamard

__all__ = [
    "CODECS",
    "DECODED",
    "PAGE",
    "UNIT",
    "Codec",
    "PageBatch",
    "attend_dense",
    "attend_pages",
    "causal_attention",
    "hadamard",
    "merge",
    "page_attention",
    "triton_module",
    "triton_works",
]


def page_attention(
    q: Tensor,
    batch: PageBatch,
    scale: float,
    softcap: float | None = None,
    stats: bool = False,
    block_pages: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`attend_pages` by the fastest means at hand: Triton on a GPU where it knows the codecs, else torch.

    Arguments and results are those of `attend_pages`. Setting the environment variable ADAPTIVEKV_TRITON=0 before the
    first call keeps to torch, and so does a missing Triton. Of low-rank pages (`batch.bases`) the latents are attended.
    """
    if batch.bases is not None:
        k, v = (basis.to(q.dtype) for basis in batch.bases)
        latent = replace(batch, bases=None)
        out, lse, page_lse = page_attention(torch.bmm(q, k), latent, scale, softcap, stats, block_pages)
        return torch.bmm(out, v.transpose(1, 2).to(out.dtype)), lse, page_lse
    fast = has_kernel((batch.k, batch.k_dim), (batch.v, batch.v_dim))
    if q.is_cuda and batch.count.numel() and fast and triton_works():
        if q.shape[1] <= 16:
            return triton_module("decode").attend_pages_triton(q, batch, scale, softcap, stats)
        return triton_module("prefill").prefill_pages_triton(q, batch, scale, softcap, stats)
    return attend_pages(q, batch, scale, softcap, stats, block_pages)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, n: int, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The last n tokens attend to those before them and, causally, to each other.

    q: [H, G * n, k_dim], the n tokens of each query head together; k: [H, t + n, k_dim]; v: [H, t + n, v_dim].
    Returns out [H, G * n, v_dim] and lse [H, G * n], float32.
    """
    if n > 1 and q.is_cuda and triton_works():
        return triton_module("prefill").prefill_causal(q, k, v, scale, n, softcap)
    mask = None
    if n > 1:
        mask = torch.ones(n, k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - n)
        mask = mask.repeat(q.shape[1] // n, 1)
    return attend_dense(q, k, v, scale, mask, softcap)
