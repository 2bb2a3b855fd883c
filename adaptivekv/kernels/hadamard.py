"""The Walsh-Hadamard rotation of a head dimension.

Rotating keys and queries alike leaves their products unchanged but spreads outlier channels over all channels, which is
what makes 4 and 2 bits per element bearable (QuaRot, arXiv 2404.00456). Values are rotated too and the attention output
is rotated back. Difference from the paper: the rotation is applied to the cached tensors as they are stored, not fused
into the model's weights, so the model stays untouched and a rotated page can sit beside one that is not.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension; the rotation is orthonormal and its own inverse.

    x: [..., dim], any float dtype; the result has its shape and dtype. A dim that is not a power of two is rotated in
    blocks of its largest power-of-two divisor (96 is 3 blocks of 32).
    """
    dim = x.shape[-1]
    block = dim & -dim
    if block < 2:
        return x
    # 16-bit types go through float32: 1/sqrt(block) is not exact in them, and the rotation would not be orthonormal.
    work = x.dtype if x.dtype == torch.float64 else torch.float32
    matrix = _matrix(block, x.device, work)  # [block, block], symmetric
    return (x.to(work).reshape(*x.shape[:-1], dim // block, block) @ matrix).reshape(x.shape).to(x.dtype)


@lru_cache(maxsize=64)
def _matrix(dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Orthonormal Sylvester-Hadamard matrix [dim, dim]; dim is a power of two."""
    with torch.inference_mode(False), torch.no_grad():
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < dim:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return (matrix / math.sqrt(dim)).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def signs(dim: int, device: torch.device) -> tuple[Tensor, float]:
    """The rotation of `hadamard` as signs int8 [dim, dim], symmetric and block-diagonal, and their common factor."""
    norm = 1.0 / math.sqrt(dim & -dim)
    return (hadamard(torch.eye(dim)) / norm).round().to(torch.int8).to(device), norm
