"""Decode attention over a `PageTable` in Triton, and the plain-torch reference of the same signature.

One program takes one share of the work: items, each a run of pages of one KV head in one format, all query rows of the
head packed into one `tl.dot`. Packed levels are unpacked into slices of the head dimension, one product each; scales
and means never touch the elements: keys' are applied to the scores, values' to the probabilities. A second kernel
merges a row's parts and turns the log-sum-exp of its pages into the attention each received. Shapes alone decide the
grids and nothing synchronises, so the launches can be captured in a CUDA graph while the table's contents change
between replays.

Under TRITON_INTERPRET=1 (set before this module is imported) the kernels run on CPU tensors.
"""

import dataclasses
import functools
import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels.attend import PageBatch
from adaptivekv.kernels.codec import PAGE, UNIT
from adaptivekv.kernels.mergekv import merge_kernel, prepare_kernel
from adaptivekv.kernels.select import select_pages
from adaptivekv.kernels.splitkv import split_kernel
from adaptivekv.kernels.table import ROTATED, Launch, PageTable, Work, plan_work

__all__ = ["attend_pages_triton", "attend_table", "even_work", "occupancy", "overlaps", "processors", "select_pages"]

ROWS = 16
"""Most query rows per KV head; up to 8 are padded to 8 columns of a tensor-core product, more to 16."""

_REGISTERS = 16384  # 32-bit registers of a multiprocessor's quarter, from Volta to Blackwell; a warp stays in one
_MERGED = 32768  # elements of parts that a program of the merge holds in registers at once
_MEASURED = 64  # pages whose mass one program works out
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if _INTERPRETED:
    _TYPES[torch.bfloat16] = tl.float32  # the interpreter multiplies bfloat16 bit patterns as integers


def attend_table(
    q: Tensor,
    table: PageTable,
    scale: float,
    softcap: float | None = None,
    new: tuple[Tensor, Tensor] | None = None,
    mass: Tensor | None = None,
    page_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend every query row to every slot of the row's pages.

    q: [R, M, k_dim], M <= 16 query rows per KV head, not rotated; scale multiplies the scores; softcap: scores become
    softcap * tanh(scores / softcap). new: keys [R, k_dim] and values [R, v_dim] of the token itself, stored first in
    slot `tails - 1` of the row's open tail, which is column 0. A statistics step also fills page_lse, float32
    [R, C, M], the log-sum-exp of each page (a page without slots: left alone), and turns it into mass, float32 [R, C],
    the running average of the attention each page received (-1: none yet), in place.
    Returns out [R, M, v_dim] in q's dtype and lse [R, M] float32. Products run in the native dtype for native parts
    and in float16 for packed ones (float32 if the native dtype is). Raises AdaptiveKVError for more than 16 rows.
    """
    rows, m, _ = q.shape
    columns, v_dim, device, work, pdl = table.keys.shape[1], table.v_dim, q.device, table.work, overlaps(q.device)
    if page_lse is None and mass is not None:
        page_lse = torch.empty(rows, columns, m, device=device)
    part, part_lse, _ = _split(q, table, scale, softcap, new, page_lse)
    bv, block = triton.next_power_of_2(v_dim), v_dim & -v_dim
    out = torch.empty((rows, m, v_dim), dtype=q.dtype, device=device)
    lse = torch.empty((rows, m), device=device)
    # All parts of a row in one load: a second round waits for memory once more.
    usual = triton.next_power_of_2(min(columns, len(work.spans) // rows + len(table.pairs)))
    chunk = max(1, min(max(usual, 8), _MERGED // bv))
    measured = 0 if mass is None else triton.cdiv(columns, _MEASURED)
    merge_kernel[rows, m + measured](
        part, part_lse, work.turned, work.parts, out, lse, part_lse if page_lse is None else page_lse,
        table.keys, lse if mass is None else mass, columns,
        M=m, DV=v_dim, BV=bv, BM=ROWS, BLOCK=block, NORM=block**-0.5, ROTATE=table.rotated,
        MASS=mass is not None, PAGES=_MEASURED, CHUNK=chunk, PDL=pdl,
        num_warps=max(1, chunk * bv // 2048), launch_pdl=pdl,
    )  # fmt: skip
    return out, lse


def _split(
    q: Tensor,
    table: PageTable,
    scale: float,
    softcap: float | None = None,
    new: tuple[Tensor, Tensor] | None = None,
    page_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Any]:
    """The parts of `attend_table`, [I, M, v_dim] and [I, M] float32, not yet merged, and the compiled kernel."""
    rows, m, k_dim = q.shape
    if m > ROWS:
        raise AdaptiveKVError(f"the decode kernel takes at most {ROWS} query rows per KV head, got {m}")
    columns, v_dim, device, launch, work = table.keys.shape[1], table.v_dim, q.device, table.launch, table.work
    items, item, pdl = len(work.items), table.dtype.itemsize, overlaps(device)
    arena = table.arena[: table.arena.numel() // UNIT * UNIT]
    native = arena.view(table.dtype)
    empty = functools.partial(torch.empty, device=device, dtype=torch.float32)
    planes = q = q.contiguous()
    if table.rotated or new:
        bk, bv, block = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim), k_dim & -k_dim
        planes = empty((2, rows, m, k_dim))
        prepare_kernel[rows, m](
            q, *(new or (q, q)), planes, native, table.keys, table.values, table.tails, columns, table.heads,
            rows, M=m, DK=k_dim, DV=v_dim, BK=bk, BV=bv, BLOCK=block, NORM=block**-0.5,
            ITEM=item, ROTATE=table.rotated, APPEND=new is not None, PDL=pdl, num_warps=1, launch_pdl=pdl,
        )  # fmt: skip
    part, part_lse = empty((items, m, v_dim)), empty((items, m))
    tiles = {16: launch.native_tiles, 8: launch.int8_tiles}
    pdl &= not table.chosen
    compiled = split_kernel[(len(work.spans),)](
        planes, native, *(arena.view(t) for t in (torch.int16, torch.float16, torch.int32)), table.keys, table.values,
        table.keys.view(torch.int32), work.items, work.slots, work.spans, work.claims, table.tails, part, part_lse,
        part_lse if page_lse is None else page_lse, rows, columns, table.heads,
        scale if softcap is not None else scale * math.log2(math.e), softcap or 1.0, processors(device),
        M=m, DK=k_dim, DV=v_dim, PAIRS=tuple((k.bits, v.bits) for k, v in table.pairs), TYPE=_TYPES[table.dtype],
        BM=8 if m <= 8 else ROWS, PAGE=PAGE, SUBS=tuple(tiles.get(k.bits, 1) for k, _ in table.pairs), ITEM=item,
        CAP=softcap is not None, STATS=page_lse is not None, CLEAN=table.clean, STAGES=launch.stages,
        GROUPS=work.claims.shape[-1] - 2, PDL=pdl,
        INTERPRET=_INTERPRETED, num_warps=launch.warps, launch_pdl=pdl,
    )  # fmt: skip
    return part, part_lse, compiled


def occupancy(q: Tensor, table: PageTable) -> Launch:
    """The table's launch with `programs` set to how many run at once on a multiprocessor, by registers and memory."""
    *_, kernel = _split(q, table, 1.0)
    properties = torch.cuda.get_device_properties(q.device)
    warp_registers = -(-kernel.n_regs * 32 // 256) * 256  # registers are given out by 256 to a warp
    by_registers = 4 * (_REGISTERS // warp_registers) // table.launch.warps
    by_memory = properties.shared_memory_per_multiprocessor // (kernel.metadata.shared + 1024)
    return dataclasses.replace(table.launch, programs=max(1, min(by_registers, by_memory, 32)))


def attend_pages_triton(
    q: Tensor, batch: PageBatch, scale: float, softcap: float | None = None, stats: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`attend_pages` in Triton: same arguments, shapes and results, for at most 16 query rows per KV head.

    A page more than about 100 nats below the best key seen before it reports page_lse = -inf: its mass is 0 in float32.
    """
    heads, rows, k_dim = q.shape
    launch = Launch()
    work, tails = even_work(heads, batch.count.shape[1], ROTATED * batch.rotate, launch.programs, q.device)
    table = PageTable(
        batch.arena, batch.k_off + batch.count, batch.v_off.contiguous(), work, tails, 1,
        ((batch.k, batch.v),), batch.dtype, k_dim, batch.v_dim, batch.rotate, True, launch,
    )  # fmt: skip
    page_lse = torch.full((*batch.count.shape, rows), -torch.inf, device=q.device) if stats else None
    out, lse = attend_table(q.float(), table, scale, softcap, page_lse=page_lse)
    return out, lse, page_lse


@functools.lru_cache
def even_work(heads: int, pages: int, code: int, together: int, device: torch.device) -> tuple[Work, Tensor]:
    """Work and tails of a table whose rows all have `pages` pages of one format; `together` programs a processor."""
    time = torch.ones(256, dtype=torch.int64, device=device)
    codes = torch.full((1, heads, pages), code, dtype=torch.uint8, device=device)
    work = plan_work(codes, time, processors(device), together)
    return work.layer(0), torch.zeros(heads, dtype=torch.int32, device=device)


@functools.lru_cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it still runs (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
