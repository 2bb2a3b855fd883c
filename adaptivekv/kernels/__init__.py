"""Attention over mixed-format pages: codecs, the plain-torch reference (also the CPU path) and the Triton kernel."""

import importlib
import os
from collections.abc import Callable
from functools import lru_cache

from torch import Tensor

from adaptivekv.kernels.attend import PageBatch, attend_dense, attend_pages, merge
from adaptivekv.kernels.codec import CODECS, PAGE, UNIT, Codec
from adaptivekv.kernels.hadamard import hadamard

__all__ = [
    "CODECS",
    "PAGE",
    "UNIT",
    "Codec",
    "PageBatch",
    "attend_dense",
    "attend_pages",
    "hadamard",
    "merge",
    "page_attention",
]


def page_attention(
    q: Tensor,
    batch: PageBatch,
    scale: float,
    softcap: float | None = None,
    stats: bool = False,
    block_pages: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`attend_pages` by the fastest means at hand: Triton for up to 16 query rows on a GPU, else torch.

    Arguments and results are those of `attend_pages`. Setting the environment variable ADAPTIVEKV_TRITON=0 before the
    first call keeps to torch, and so does a missing Triton.
    """
    kernel = _triton() if q.is_cuda and q.shape[1] <= 16 else None
    if kernel is not None and batch.count.numel():
        return kernel(q, batch, scale, softcap, stats)
    return attend_pages(q, batch, scale, softcap, stats, block_pages)


@lru_cache
def _triton() -> Callable[..., tuple[Tensor, Tensor, Tensor | None]] | None:
    """The Triton kernel, imported at first use: importing it fixes whether Triton interprets or compiles."""
    if os.environ.get("ADAPTIVEKV_TRITON") == "0":
        return None
    try:
        return importlib.import_module("adaptivekv.kernels.decode").attend_pages_triton
    except ImportError:
        return None
