"""A few rows times large matrices: the linear layers of a decode step of several requests, limited by reading weights.

The weights are the 16-row operand of the tensor-core product and the rows of x its 8 columns, so 8 rows pad nothing.
Small tiles and a split of the inner dimension give every multiprocessor several programs, which keep enough loads in
flight. The sum over the splits is left to the caller: torch.compile fuses it with the norm, activation or rotation that
follows. Under TRITON_INTERPRET=1 (set before this module is imported) the kernel runs on CPU tensors.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels.decode import overlaps

ROWS = 16
"""Most rows of x; up to 8 are padded to 8 columns of a tensor-core product, more to 16."""
WEIGHTS = 3
"""Most weights of one x in a launch: queries, keys and values, say."""
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Config(NamedTuple):
    """Rows of a weight and inner elements a tile, tiles loaded ahead plus one, warps, parts of the inner dimension."""

    block_n: int
    block_k: int
    stages: int
    warps: int
    split: int


def fits(config: Config, rows: int, outs: Sequence[int], inner: int) -> bool:
    """Whether the kernel, so configured, multiplies `rows` rows by weights [outs[i], inner]: it masks no tile."""
    return (
        0 < rows <= ROWS
        and 0 < len(outs) <= WEIGHTS
        and all(out % config.block_n == 0 for out in outs)
        and inner % (config.block_k * config.split) == 0
    )


def skinny_products(x: Tensor, weights: Sequence[Tensor], config: Config, pdl: bool = True) -> Tensor:
    """Partial sums of `F.linear(x, w)` of each weight, side by side: the sum over their first dimension is the product.

    x: [M, K], M <= 16; weights: up to three [N_i, K], contiguous, of x's dtype (float16, bfloat16). pdl: let the
    launch overlap the end of the kernel before it, where the GPU can.
    Returns [S, M, sum of N_i]: float32, or x's dtype where S = `config.split` is 1 and nothing is left to sum. Raises
    AdaptiveKVError for shapes that do not fit (`fits`).
    """
    (m, inner), outs = x.shape, [len(w) for w in weights]
    if not fits(config, m, outs, inner):
        raise AdaptiveKVError(f"{config} does not fit {m} rows and weights of {outs} x {inner}")
    if not (x.is_cuda or _INTERPRETED):
        return reference_products(x, weights, config.split)
    total, split = sum(outs), config.split
    out = torch.empty((split, m, total), dtype=torch.float32 if split > 1 else x.dtype, device=x.device)
    first, second = outs[0], sum(outs[:2])
    pdl = pdl and overlaps(x.device)
    skinny_kernel[total // config.block_n, split](
        x.contiguous(), *weights, *[weights[0]] * (WEIGHTS - len(weights)), out, m, first, second, total, inner,
        inner // split, BM=8 if m <= 8 else ROWS, BN=config.block_n, BK=config.block_k, STAGES=config.stages, PDL=pdl,
        num_warps=config.warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def reference_products(x: Tensor, weights: Sequence[Tensor], split: int) -> Tensor:
    """`skinny_products` in plain torch, for any shape with K a multiple of `split`."""
    pieces = zip(x.chunk(split, 1), torch.cat(list(weights)).chunk(split, 1), strict=True)
    parts = torch.stack([a.float() @ b.float().T for a, b in pieces])
    return parts if split > 1 else parts.to(x.dtype)


@torch.library.custom_op("adaptivekv::skinny_linear", mutates_args=())
def skinny_linear(
    x: Tensor, weights: Sequence[Tensor], block_n: int, block_k: int, stages: int, warps: int, split: int
) -> Tensor:
    """`skinny_products`, opaque to torch.compile."""
    return skinny_products(x, weights, Config(block_n, block_k, stages, warps, split))


@skinny_linear.register_fake
def _shape(
    x: Tensor, weights: Sequence[Tensor], block_n: int, block_k: int, stages: int, warps: int, split: int
) -> Tensor:
    return x.new_empty(
        (split, x.shape[0], sum(w.shape[0] for w in weights)), dtype=torch.float32 if split > 1 else x.dtype
    )


@triton.jit
def skinny_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, out_ptr, m, first, second, total, inner, span,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN outputs of all rows over one part, `span`, of the inner dimension. Weights end at first, second and total."""
    start = tl.program_id(0) * BN
    part = tl.program_id(1)
    w_ptr = tl.where(start < first, w0_ptr, tl.where(start < second, w1_ptr, w2_ptr))
    begin = tl.where(start < first, 0, tl.where(start < second, first, second))
    n = start + tl.arange(0, BN)
    row = tl.arange(0, BM)
    k = part * span + tl.arange(0, BK)
    weights = w_ptr + (n - begin).to(tl.int64)[:, None] * inner + k[None, :]
    rows = x_ptr + tl.minimum(row, m - 1)[None, :] * inner + k[:, None]  # columns past m repeat the last, unstored
    acc = tl.zeros([BN, BM], tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # after the wait: who starts now may trust all that came before this kernel
    for i in tl.range(0, span, BK, num_stages=STAGES):
        acc = tl.dot(tl.load(weights + i), tl.load(rows + i), acc)
    out = out_ptr + (part * m + row)[None, :] * total + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row[None, :] < m)
