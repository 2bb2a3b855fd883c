"""Decode attention over pages in Triton: the GPU twin of `attend_pages` for up to 16 query rows per KV head.

One program takes one KV head and every S-th of its pages, all query rows of the head packed into one `tl.dot`; a second
kernel merges the S partial results. Packed levels are unpacked into 2 or 4 slices of the head dimension, one dot each.
Scales and zeros never touch the elements: keys' are applied to the scores, values' to the probabilities.
Shapes alone decide the grid, nothing synchronises, so a launch can be captured in a CUDA graph.

Under TRITON_INTERPRET=1 (set before this module is imported) the kernels run on CPU tensors.
"""

import functools
import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels.attend import PageBatch
from adaptivekv.kernels.codec import PAGE, UNIT, Codec
from adaptivekv.kernels.hadamard import hadamard
from adaptivekv.kernels.splitkv import merge_kernel, split_kernel

ROWS = 16
"""Most query rows per KV head; fewer are padded to it, the smallest tile of a tensor-core product."""

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if _INTERPRETED:
    _TYPES[torch.bfloat16] = tl.float32  # the interpreter multiplies bfloat16 bit patterns as integers


def attend_pages_triton(
    q: Tensor, batch: PageBatch, scale: float, softcap: float | None = None, stats: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`attend_pages` in Triton: same arguments, shapes and results, for at most 16 query rows per KV head.

    A page more than about 100 nats below the best key seen before it reports page_lse = -inf: its mass is 0 in float32.
    Products run in the native dtype for native parts and in float16 for packed ones (float32 if the native dtype is).
    Raises AdaptiveKVError for more than 16 rows.
    """
    heads, rows, k_dim = q.shape
    pages, v_dim = batch.count.shape[1], batch.v_dim
    if rows > ROWS:
        raise AdaptiveKVError(f"the decode kernel takes at most {ROWS} query rows per KV head, got {rows}")
    q = hadamard(q.float()) if batch.rotate else q
    q = q.contiguous()
    k_word, v_word = _word(batch.k, k_dim, batch.dtype), _word(batch.v, v_dim, batch.dtype)
    warps, stages, programs = _launch(batch, min(k_word, v_word))
    splits = _splits(heads, pages, programs, q.device)
    new = functools.partial(torch.empty, device=q.device, dtype=torch.float32)
    out, lse = new((heads, splits, rows, v_dim)), new((heads, splits, rows))
    page_lse = new((heads, pages, rows)) if stats else None
    arena = batch.arena[: batch.arena.numel() // UNIT * UNIT]
    tables = [t if t.stride(1) == 1 else t.contiguous() for t in (batch.k_off, batch.v_off, batch.count)]
    packed = tl.float32 if batch.dtype == torch.float32 else tl.float16
    split_kernel[heads, splits](
        q, _words(arena, batch.k, k_word, batch.dtype), _words(arena, batch.v, v_word, batch.dtype),
        arena.view(torch.float16), *tables, *(t.stride(0) for t in tables),
        out, lse, lse if page_lse is None else page_lse, pages,
        scale if softcap is not None else scale * math.log2(math.e), softcap or 1.0,
        M=rows, DK=k_dim, DV=v_dim, K_BITS=batch.k.bits, V_BITS=batch.v.bits,
        K_TYPE=_TYPES[batch.dtype] if batch.k.native else packed,
        V_TYPE=_TYPES[batch.dtype] if batch.v.native else packed,
        K_WORD=k_word, V_WORD=v_word, BK=_tile(k_dim, batch.k, k_word), BV=_tile(v_dim, batch.v, v_word),
        FULL=batch.full, CAP=softcap is not None, STATS=stats, BM=ROWS, PAGE=PAGE,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits == 1:
        out, lse = out[:, 0], lse[:, 0]
    else:
        parts, out, lse = (out, lse), new((heads, rows, v_dim)), new((heads, rows))
        merge_kernel[heads, rows](
            *parts,
            out,
            lse,
            splits,
            M=rows,
            DV=v_dim,
            BV=triton.next_power_of_2(v_dim),
            BS=triton.next_power_of_2(splits),
        )
    return hadamard(out) if batch.rotate else out, lse, page_lse


def _word(codec: Codec, dim: int, dtype: torch.dtype) -> int:
    """Bytes loaded as one word: two where that is at most 4 slices, for Triton pipelines words but not bytes.

    Eight slices of int2 are slower than bytes (H100, k4v2: 0.150 against 0.113 ms).
    """
    if codec.native:
        return dtype.itemsize
    return 2 if codec.bits >= 4 and dim * codec.bits // 8 % 2 == 0 else 1


def _words(arena: Tensor, codec: Codec, word: int, dtype: torch.dtype) -> Tensor:
    """The arena as elements of one part: the native dtype, bytes, or 16-bit words."""
    return arena.view(dtype if codec.native else torch.uint8 if word == 1 else torch.int16)


def _tile(dim: int, codec: Codec, word: int) -> int:
    """Padded width of one slice; 16 is the least that a tensor-core product takes."""
    return max(16, triton.next_power_of_2(dim if codec.native else dim * codec.bits // 8 // word))


def _launch(batch: PageBatch, word: int) -> tuple[int, int, int]:
    """Warps, pipeline stages and programs per multiprocessor: the least regret over 1 x 128k and 8 x 32k on an H100.

    word: bytes of the narrowest loads; Triton 3.6 fails to compile a third stage of single-byte loads.
    """
    wide = max(batch.k_dim, batch.v_dim) > 128
    if batch.dtype == torch.float32:  # tiles twice the size must still fit in shared memory
        return 4, 1 if wide else 2, 4
    if word == 1:
        return 4, 2, 8
    if batch.k.native and batch.v.native:
        return 4, 2 if wide else 3, 2
    return 4, 3 if batch.k.bits == batch.v.bits == 4 else 2, 4


def _splits(heads: int, pages: int, programs: int, device: torch.device) -> int:
    """Programs per head: `programs` for each multiprocessor in all, never more than pages."""
    target = programs * _multiprocessors(device) if device.type == "cuda" else 3 * heads
    return max(1, min(pages, 128, -(-target // max(1, heads))))


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
