"""Random pages for the kernel benchmarks, and what they decode to."""

from __future__ import annotations

import numpy as np
import torch

from adaptivekv.kernels.codec import PAGE, Codec
from adaptivekv.kernels.decode import processors
from adaptivekv.kernels.hadamard import hadamard
from adaptivekv.kernels.table import ROTATED, Launch, PageTable, page_time, plan_work
from adaptivekv.memory.formats import FORMATS


def make_table(
    requests: int,
    heads: int,
    tokens: int,
    dim: int,
    mix: dict[str, float],
    pairs: tuple[tuple[Codec, Codec], ...] = (),
    launch: Launch | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    seed: int = 0,
    run: int = 1,
) -> tuple[PageTable, torch.Tensor, torch.Tensor]:
    """Normal random keys and values around a mean a page, in pages of the formats `mix` (name -> share), runs of
    `run` pages of a row placed at random.

    Returns the table and the decoded, un-rotated keys and values [R, tokens, dim] float16, in the table's page order.
    """
    gen = torch.Generator(device).manual_seed(seed)
    rows, pages = requests * heads, tokens // PAGE
    edges = np.round(np.cumsum([0.0, *mix.values()]) / sum(mix.values()) * pages).astype(int)
    formats = [FORMATS[name] for name in mix]
    sizes = [f.bytes(dim, dim, dtype) for f in formats]
    arena = torch.empty(rows * int(np.dot(np.diff(edges), sizes)), dtype=torch.uint8, device=device)
    k_off, v_off = (torch.empty(rows, pages, dtype=torch.int64, device=device) for _ in range(2))
    decoded = [torch.empty(rows, pages, PAGE, dim, dtype=torch.float16, device=device) for _ in range(2)]
    base = 0
    for fmt, size, start, stop in zip(formats, sizes, edges[:-1], edges[1:], strict=True):
        n = rows * (stop - start)
        first = torch.randperm(n // run, generator=gen, device=device)[:, None] * run
        place = (first + torch.arange(run, device=device)).view(rows, -1)
        k_part, v_part = (codec.part_bytes(dim, dtype) for codec in (fmt.k, fmt.v))
        k_off[:, start:stop], v_off[:, start:stop] = base + place * k_part, base + n * k_part + place * v_part
        for offsets, codec, out in ((k_off, fmt.k, decoded[0]), (v_off, fmt.v, decoded[1])):
            for row in range(rows):
                x = torch.randn(stop - start, PAGE, dim, generator=gen, device=device)
                x += 0.5 * torch.randn(stop - start, 1, dim, generator=gen, device=device)  # a mean for each page
                raw = codec.encode(hadamard(x) if fmt.rotate else x, dtype)
                back = codec.decode(raw, dim, dtype)
                out[row, start:stop] = (hadamard(back) if fmt.rotate else back).half()
                at = offsets[row, start:stop, None] // 256 + torch.arange(raw.shape[1] // 256, device=device)
                arena.view(-1, 256)[at.view(-1)] = raw.view(-1, 256)
        base += n * size
    pairs = pairs or tuple(dict.fromkeys((f.k, f.v) for f in formats))
    codes = np.array([pairs.index((f.k, f.v)) + ROTATED * f.rotate for f in formats])
    time = torch.zeros(256, dtype=torch.int64, device=device)
    time[codes] = torch.tensor([page_time(size, dim, dim) for size in sizes], device=device)
    code = torch.from_numpy(np.repeat(codes, np.diff(edges))).to(torch.uint8).to(device).expand(1, rows, pages)
    launch = launch or Launch()
    work = plan_work(code.contiguous(), time, processors(torch.device(device)), launch.programs).layer(0)
    table = PageTable(
        arena, k_off + PAGE, v_off,
        work,
        torch.zeros(requests, dtype=torch.int32, device=device), heads, pairs, dtype, dim, dim,
        any(f.rotate for f in formats), False, launch,
    )  # fmt: skip
    return table, decoded[0].flatten(1, 2), decoded[1].flatten(1, 2)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """float32 attention row by row: q [R, M, d], k and v [R, N, d] -> [R, M, d]."""
    return torch.stack(
        [torch.softmax(a.float() @ b.float().T * scale, -1) @ c.float() for a, b, c in zip(q, k, v, strict=True)]
    )
