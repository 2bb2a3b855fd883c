"""The kernels around the split of decode attention: one prepares the query and stores the token, one merges."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adaptivekv.kernels.language import butterflies


@triton.jit
def prepare_kernel(
    q_ptr, k_ptr, v_ptr, plane_ptr, native_ptr, key_ptr, value_ptr, tail_ptr, columns, heads, all_rows,
    M: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, ITEM: tl.constexpr, ROTATE: tl.constexpr, APPEND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Both planes of the query, as it is and rotated; with APPEND the new key and value go into the open tail.

    The tail is the page in column 0 of each row; `tail_ptr` counts its slots per request, the new one included.
    """
    row = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1)
    dim = tl.arange(0, BK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = row * M + m
    q = tl.load(q_ptr + at * DK + dim, mask=dim < DK, other=0.0).to(tl.float32)
    tl.store(plane_ptr + at * DK + dim, q, mask=dim < DK)
    if ROTATE:
        tl.store(plane_ptr + (all_rows * M + at) * DK + dim, butterflies(q, BLOCK) * NORM, mask=dim < DK)
    if APPEND:  # noqa: SIM102 - known when compiled, so the other half is not even compiled
        if m == 0:
            slot = tl.load(tail_ptr + row // heads) - 1
            k = tl.load(k_ptr + row * DK + dim, mask=dim < DK)
            k_off = (tl.load(key_ptr + row * columns) & -256) // ITEM + slot * DK
            tl.store(native_ptr + k_off + dim, k, mask=dim < DK)
            v_dim = tl.arange(0, BV)
            v = tl.load(v_ptr + row * DV + v_dim, mask=v_dim < DV)
            v_off = tl.load(value_ptr + row * columns) // ITEM + slot * DV
            tl.store(native_ptr + v_off + v_dim, v, mask=v_dim < DV)


@triton.jit
def _merge(
    part_ptr, part_lse_ptr, turned_ptr, first, n, out_ptr, lse_ptr, m,
    M: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
    ROTATE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One query row: the parts first to first + n, those of rotated pages rotated back."""
    dim = tl.arange(0, BV)
    top = -1e38
    total = 0.0
    plain = tl.zeros([BV], tl.float32)
    turned = tl.zeros([BV], tl.float32)
    rotated_parts = 0
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        here = i < n
        at = ((first + i) * M + m).to(tl.int64)
        mask = here[:, None] & (dim[None, :] < DV)
        part = tl.load(part_ptr + at[:, None] * DV + dim[None, :], mask=mask, other=0.0)
        lse = tl.load(part_lse_ptr + at, mask=here, other=-float("inf"))
        if ROTATE:
            rotated = tl.load(turned_ptr + first + i, mask=here, other=0) != 0
            rotated_parts += tl.sum(rotated.to(tl.int32), 0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        weight = tl.exp(lse - new_top)
        fade = tl.exp(top - new_top)
        top = new_top
        total = total * fade + tl.sum(weight, 0)
        if ROTATE:
            turned = turned * fade + tl.sum(part * tl.where(rotated, weight, 0.0)[:, None], 0)
            plain = plain * fade + tl.sum(part * tl.where(rotated, 0.0, weight)[:, None], 0)
        else:
            plain = plain * fade + tl.sum(part * weight[:, None], 0)
    if rotated_parts > 0:
        plain += butterflies(turned, BLOCK) * NORM
    tl.store(lse_ptr + m, top + tl.log(total))
    tl.store(out_ptr + m * DV + dim, plain / tl.where(total > 0, total, 1.0), mask=dim < DV)


@triton.jit
def _mass(
    part_lse_ptr, first, n, page_lse_ptr, key_ptr, mass_ptr, start, stop,
    M: tl.constexpr, BM: tl.constexpr, PAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Attention that the pages from `start` received, averaged over the query rows, into its running average."""
    rows = tl.arange(0, BM)
    page = start + tl.arange(0, PAGES)
    held = (tl.load(key_ptr + page, mask=page < stop, other=0) & 255) != 0
    mask = held[:, None] & (rows[None, :] < M)
    # Loaded before the parts are summed, which they need not wait for.
    page_lse = tl.load(page_lse_ptr + page[:, None] * M + rows[None, :], mask=mask, other=-float("inf"))
    old = tl.load(mass_ptr + page, mask=held, other=0.0)
    top = tl.full([BM], -1e38, tl.float32)
    total = tl.zeros([BM], tl.float32)
    for part in range(0, n, CHUNK):
        i = part + tl.arange(0, CHUNK)
        here = (rows[:, None] < M) & (i[None, :] < n)
        lse = tl.load(part_lse_ptr + (first + i)[None, :] * M + rows[:, None], mask=here, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(lse, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(lse - new_top[:, None]), 1)
        top = new_top
    lse = top + tl.log(total)
    mass = tl.sum(tl.where(mask, tl.exp(page_lse - lse[None, :]), 0.0), 1) / M
    tl.store(mass_ptr + page, tl.where(old < 0, mass, (old + mass) / 2), mask=held)  # halves the past


@triton.jit
def merge_kernel(
    part_ptr, part_lse_ptr, turned_ptr, parts_ptr, out_ptr, lse_ptr, page_lse_ptr, key_ptr, mass_ptr, columns,
    M: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
    ROTATE: tl.constexpr, MASS: tl.constexpr, PAGES: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs 0 to M - 1 of a row merge its parts, one query row each; with MASS the rest turn page lse into mass."""
    row = tl.program_id(0).to(tl.int64)
    job = tl.program_id(1)
    first = tl.load(parts_ptr + row * 2)
    n = tl.load(parts_ptr + row * 2 + 1)
    if PDL:
        gdc_wait()
    if job < M:
        _merge(
            part_ptr, part_lse_ptr, turned_ptr, first, n, out_ptr + row * M * DV, lse_ptr + row * M,
            job, M, DV, BV, BLOCK, NORM, ROTATE, CHUNK,
        )  # fmt: skip
    if MASS:  # noqa: SIM102
        if job >= M:
            _mass(
                part_lse_ptr, first, n, page_lse_ptr + row * columns * M, key_ptr + row * columns,
                mass_ptr + row * columns, (job - M) * PAGES, columns, M, BM, PAGES, CHUNK,
            )  # fmt: skip
