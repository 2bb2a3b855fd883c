"""Attention of many new tokens: to cached pages in Triton (`prefill_pages_triton`), and to themselves
(`prefill_causal`).

Pages are the past, so they need no causal mask: a FlashAttention-2 loop walks them through their table, decodes each in
registers into one float16 tile in shared memory and reuses it for a block of query rows; nothing is decoded into global
memory. Where blocks are too few for the GPU, the pages are split too and the partial results merged. Shapes alone
decide the grid and nothing synchronises.

Under TRITON_INTERPRET=1 (set before this module is imported) the kernels run on CPU tensors.
"""

import functools
import math
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptivekv.kernels.attend import PageBatch, attend_dense, attend_pages, merge
from adaptivekv.kernels.codec import PAGE, UNIT, Codec
from adaptivekv.kernels.flashpages import merge_kernel, prefill_kernel
from adaptivekv.kernels.hadamard import hadamard

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if _INTERPRETED:
    _TYPES[torch.bfloat16] = tl.float32  # the interpreter multiplies bfloat16 bit patterns as integers


@dataclass(frozen=True)
class Launch:
    """How the kernel is compiled and its grid filled.

    rows: query rows of a block, at least 16; span: pages a step; warps; stages: depth of the software pipeline;
    registers: at most so many a thread (None: the compiler's choice); programs: blocks a multiprocessor holds at once.
    """

    rows: int
    warps: int
    stages: int
    span: int = 1
    registers: int | None = None
    programs: int = 2


def prefill_pages_triton(
    q: Tensor,
    batch: PageBatch,
    scale: float,
    softcap: float | None = None,
    stats: bool = False,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`attend_pages` for any number of query rows, on a GPU of compute capability 8.0 or higher.

    q: [H, M, k_dim], not rotated; scale: positive; softcap: scores become softcap * tanh(scores / softcap);
    stats: also return the log-sum-exp of each page; launch: how to do it, None: the default. Returns out [H, M, v_dim],
    lse [H, M] and page_lse [H, P, M] or None; all float32. A page 87 nats below the best key up to it is -inf.
    Products run in the native dtype for native parts and in float16 for packed ones, which are rounded to it when
    decoded: queries and decoded values must lie in its range, +-65504. Storage in float32, packed head dimensions whose
    slots are not whole 16-bit words and dimensions too large for the device's shared memory go to `attend_pages`.
    """
    heads, rows, k_dim = q.shape
    pages, v_dim = batch.count.shape[1], batch.v_dim
    launch = (launch or _launch(rows, batch, q.device)) if _takes(batch) else None
    if launch is None:
        return attend_pages(q, batch, scale, softcap, stats)
    new = functools.partial(torch.empty, device=q.device, dtype=torch.float32)
    page_lse = new((heads, pages, rows)) if stats else None
    if not heads * rows * pages:
        return new((heads, rows, v_dim)).zero_(), new((heads, rows)).fill_(-torch.inf), page_lse
    blocks = triton.cdiv(rows, launch.rows)
    splits = _splits(blocks * heads, pages, launch.programs * _device(q.device).multiprocessors)
    q = hadamard(q.float()) if batch.rotate else q
    q = _by_field(q.to(batch.dtype if batch.k.native else torch.float16), batch.k).contiguous()
    arena = batch.arena[: batch.arena.numel() // UNIT * UNIT]
    tables = [t if t.stride(1) == 1 else t.contiguous() for t in (batch.k_off, batch.v_off, batch.count)]
    out, lse = new((splits, heads, rows, v_dim)), new((splits, heads, rows))
    prefill_kernel[blocks, heads, splits](
        q, arena.view(batch.dtype), arena.view(torch.int16), arena.view(torch.int32),
        *tables, *(t.stride(0) for t in tables), out, lse, page_lse, rows, pages,
        scale if softcap is not None else scale * math.log2(math.e), softcap or 1.0,
        DK=k_dim, DV=v_dim, K_BITS=batch.k.bits, V_BITS=batch.v.bits,
        K_TYPE=_TYPES[batch.dtype] if batch.k.native else tl.float16,
        V_TYPE=_TYPES[batch.dtype] if batch.v.native else tl.float16,
        BK=_width(k_dim, batch.k), BV=_width(v_dim, batch.v), BM=launch.rows, SPAN=launch.span, PAGE=PAGE,
        FULL=batch.full, CAP=softcap is not None, STATS=stats, INTERPRET=_INTERPRETED,
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip
    if splits > 1:
        parts, out, lse = (out, lse), new((1, heads, rows, v_dim)), new((1, heads, rows))
        merge_kernel[(heads * rows,)](
            *parts, out, lse, heads * rows, splits, DV=v_dim, BV=triton.next_power_of_2(v_dim)
        )
    return hadamard(out[0]) if batch.rotate else out[0], lse[0], page_lse


def prefill_causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, n: int, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The n new tokens of a chunk attend to the open tail before them, and causally to each other.

    q: [H, G * n, dk], row g * n + i is token i of the g-th query head of the KV head; k: [H, t + n, dk] and
    v: [H, t + n, dv], tail first; row g * n + i attends to keys 0 to t + i. Returns out [H, G * n, dv] and
    lse [H, G * n], float32. 16-bit tensors on a GPU with dk = dv take torch's FlashAttention kernel, others
    `attend_dense`, which holds all scores at once.
    """
    heads, rows, _ = q.shape
    t = k.shape[1] - n
    if softcap is not None or not _fused(q, k, v):
        past = None
        if n > 1:
            past = torch.ones(n, t + n, dtype=torch.bool, device=q.device).tril(t).repeat(rows // n, 1)
        return attend_dense(q, k, v, scale, past, softcap)
    # The kernel aligns a causal mask with the first key, not the last, so the tail, which every row sees, is a piece
    # of its own. In the other piece each query head is a head.
    chunk, chunk_lse = _flash(q.reshape(heads * rows // n, n, -1), k[:, t:], v[:, t:], scale, True)
    parts = [(chunk.reshape(heads, rows, -1), chunk_lse.reshape(heads, rows))]
    if t:
        parts.append(_flash(q, k[:, :t], v[:, :t], scale, False))
    return merge(parts)


def _takes(batch: PageBatch) -> bool:
    """Whether the kernel reads this storage: 16-bit elements, or packed slots that are whole 16-bit words."""
    parts = ((batch.k, batch.k_dim), (batch.v, batch.v_dim))
    return batch.dtype in _TYPES and all(dim * codec.bits % 16 == 0 for codec, dim in parts)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's FlashAttention kernel takes q [H, M, dk], k [H, N, dk] and v [H, N, dv]."""
    dim = q.shape[-1]
    return (
        q.is_cuda
        and q.dtype == k.dtype == v.dtype
        and q.dtype in _TYPES
        and dim == v.shape[-1] <= 256
        and dim % 8 == 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """q: [Hq, M, d]; k, v: [H, N, d], Hq a multiple of H. Returns out [Hq, M, d] and lse [Hq, M], float32."""
    # Repeated for the group: copies of a chunk cost little, and not every release of torch groups heads here.
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q[None], k[None], v[None], 0.0, causal, scale=scale
    )
    return out[0].float(), lse[0]


def _launch(rows: int, batch: PageBatch, device: torch.device) -> Launch | None:
    """How to attend `rows` query rows per KV head; None where no tile fits the device's shared memory.

    Pages pass through two loads, offset and data: packed ones need five stages for two steps in flight; native ones
    need three, for the asynchronous product gives them a second buffer. On Hopper a block of 128 rows needs a little
    over 128 registers a thread: held to that, a multiprocessor runs two, one computing softmax while the other
    multiplies. Elsewhere products take more registers and would spill.
    """
    gpu = _device(device)
    stages = 3 if batch.k.native or batch.v.native else 5
    wide = max(batch.k_dim, batch.v_dim) > 128
    choices = []
    if rows > 64 and gpu.hopper and not wide:
        choices.append(Launch(128, 8, stages, registers=128))
    elif rows > 64 and (gpu.hopper or not wide):
        choices.append(Launch(128, 8, stages, programs=1))
    if gpu.hopper or not wide:
        choices.append(Launch(64, 4, stages))
    choices += [Launch(32, 4, stages), Launch(32, 4, 2)]
    return next((c for c in choices if _shared_bytes(c, batch) <= gpu.shared), None)


def _shared_bytes(launch: Launch, batch: PageBatch) -> int:
    """An upper bound of the shared memory of a block: query, tiles, their buffers and scratch (metadata of 3.6)."""
    total = launch.rows * _width(batch.k_dim, batch.k) * 32 // batch.k.bits + (16 << 10)
    for codec, dim in ((batch.k, batch.k_dim), (batch.v, batch.v_dim)):
        words = launch.span * PAGE * _width(dim, codec) * 2
        tile, buffers = words * 16 // codec.bits, words if codec.native else 2 * words
        total += tile + (buffers if launch.stages > 2 else 0)
    return total


@dataclass(frozen=True)
class _Device:
    """multiprocessors; shared: bytes of shared memory a block can have; hopper: whether products are Hopper's."""

    multiprocessors: int = 3
    shared: int = 1 << 30
    hopper: bool = False


@functools.lru_cache
def _device(device: torch.device) -> _Device:
    """The device; for a CPU, which interprets, numbers that exercise splits."""
    if device.type == "cpu":
        return _Device()
    p = torch.cuda.get_device_properties(device)
    shared = getattr(p, "shared_memory_per_block_optin", p.shared_memory_per_block)  # missing in torch's annotations
    return _Device(p.multi_processor_count, shared, p.major == 9)


def _splits(blocks: int, pages: int, slots: int) -> int:
    """Into how many parts to split the pages of each of `blocks` blocks, of which `slots` run at once.

    The least time: rounds, each as long as the pages of a part and two more for its start and end. A tie takes the
    fewest parts.
    """
    most = max(1, min(pages // 4, -(-2 * slots // blocks)))
    return min(range(1, most + 1), key=lambda s: (-(-blocks * s // slots) * (pages / s + 2), s))


def _by_field(q: Tensor, codec: Codec) -> Tensor:
    """Head dimensions [..., D] in the order in which the kernel unpacks keys: (byte of the word, group, word).

    See `codec.py`: a byte holds one level of each of 8 / bits groups of dims, and the kernel reads words of two bytes.
    """
    if codec.native:
        return q
    return q.unflatten(-1, (8 // codec.bits, -1, 2)).movedim(-1, -3).flatten(-3)


def _width(dim: int, codec: Codec) -> int:
    """Padded elements or words of a slot; tiles of a tensor-core product are at least 16 wide."""
    return max(codec.bits, triton.next_power_of_2(dim * codec.bits // 16))
