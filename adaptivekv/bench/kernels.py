"""`adaptivekv bench kernels`: decode attention over pages against torch's fused attention, on one GPU, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptivekv.bench.pages import make_table, reference
from adaptivekv.bench.timing import L2, copy_gbps, replay_ms, warm_up
from adaptivekv.kernels.codec import PAGE
from adaptivekv.kernels.decode import attend_table
from adaptivekv.kernels.table import PageTable
from adaptivekv.kernels.tune import launch_for
from adaptivekv.memory.tables import PAIRS

HEADS, GROUP, DIM = 8, 4, 128  # 32 query heads, 8 KV heads
LARGE = ((1, 131072), (8, 32768), (32, 8192))
SMALL = ((1, 2048), (1, 8192))
MIX = {"native": 0.1, "int8": 0.2, "int4r": 0.4, "k4v2r": 0.2, "int2r": 0.1}
PURE = tuple(MIX)
RUNS = {"native": 1, "native in runs": 4}  # pages side by side: at random, and as a prompt's chunks of 256 leave them
SCALE = DIM**-0.5


def run(shapes: tuple[tuple[int, int], ...] = LARGE + SMALL) -> Iterator[dict[str, Any]]:
    """One row a shape and format: milliseconds, ratio to the best peer, GB/s, relative error to float32.

    Every row is measured with the one kernel that knows all formats, as a captured decode step uses it.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    warm_up()
    copy = copy_gbps()
    launch = launch_for(torch.device("cuda", 0), DIM, DIM, GROUP, torch.bfloat16, PAIRS)
    for requests, tokens in shapes:
        copies = max(1, L2 // (requests * tokens * HEADS * DIM * 4))
        peers = _peers(requests, tokens, copies)
        best = min(peers.values())
        times: dict[str, float] = {}
        for name in (*RUNS, *PURE[1:], "mixture") if copies == 1 else (*RUNS, "int4r"):
            mix = MIX if name == "mixture" else {name.split()[0]: 1.0}
            row: dict[str, Any] = {"requests": requests, "tokens": tokens, "format": name}
            row |= _measure(requests, tokens, mix, copies, launch, RUNS.get(name, 1))
            times[name] = row["ms"]
            row |= {"peers_ms": peers, "ratio": best / row["ms"], "of_copy": row["gbps"] / copy, "copy_gbps": copy}
            if name == "mixture":
                row["over_parts"] = row["ms"] / sum(share * times[part] for part, share in MIX.items())
            yield row


def _measure(
    requests: int, tokens: int, mix: dict[str, float], copies: int, launch: Any, run: int = 1
) -> dict[str, Any]:
    """Time and error of one mix of formats; `copies` tables take turns so that no cache holds the pages."""
    q = torch.randn(requests * HEADS, GROUP, DIM, device="cuda", dtype=torch.bfloat16)
    tables: list[PageTable] = []
    for seed in range(copies):
        table, k, v = make_table(requests, HEADS, tokens, DIM, mix, PAIRS, launch, seed=seed, run=run)
        if seed == 0:
            want = reference(q, k, v, SCALE)
            out = attend_table(q.float(), table, SCALE)[0]
            error = float((out - want).norm() / want.norm())
        del k, v
        tables.append(table)
    ms = replay_ms([lambda t=t: attend_table(q, t, SCALE) for t in tables])  # type: ignore[misc]
    masses = [torch.full(t.keys.shape, -1.0, device="cuda") for t in tables]
    stats = replay_ms([lambda t=t, m=m: attend_table(q, t, SCALE, mass=m) for t, m in zip(tables, masses, strict=True)])  # type: ignore[misc]
    return {
        "ms": ms, "stats_over_plain": stats / ms, "gbps": tables[0].arena.numel() / ms / 1e6, "error": error,
        "launch": vars(launch), "bytes_per_token": tables[0].arena.numel() / (requests * tokens * HEADS),
    }  # fmt: skip


def _peers(requests: int, tokens: int, copies: int) -> dict[str, float]:
    """Milliseconds of torch's fused attention in bfloat16 over contiguous keys and values, by backend."""
    q = torch.randn(requests, HEADS * GROUP, 1, DIM, device="cuda", dtype=torch.bfloat16)
    kv = [torch.randn(2, requests, HEADS, tokens, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    out = {}
    attend: Callable[..., torch.Tensor] = torch.nn.functional.scaled_dot_product_attention
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with suppress(RuntimeError), sdpa_kernel(backend):
            out[name] = replay_ms([lambda x=x: attend(q, x[0], x[1], enable_gqa=True) for x in kv])  # type: ignore[misc]
    with suppress(ImportError):
        out["flashinfer"] = _flashinfer(q, kv)
    if not out:
        raise RuntimeError("no fused attention of torch runs here: there is nothing to compare with")
    return out


def _flashinfer(q: torch.Tensor, kv: list[torch.Tensor]) -> float:
    """FlashInfer's paged decode over the same tokens in pages of 64, where it is installed."""
    import flashinfer

    requests, tokens = q.shape[0], kv[0].shape[3]
    pages = tokens // PAGE
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    ends = torch.arange(requests + 1, dtype=torch.int32, device="cuda") * pages
    index = torch.randperm(requests * pages, device="cuda").int()
    last = torch.full((requests,), PAGE, dtype=torch.int32, device="cuda")
    wrapper.plan(ends, index, last, HEADS * GROUP, HEADS, DIM, PAGE, q_data_type=q.dtype, kv_data_type=q.dtype)
    paged = [
        x.view(2, requests, HEADS, pages, PAGE, DIM).permute(1, 3, 0, 2, 4, 5).reshape(-1, 2, HEADS, PAGE, DIM)
        for x in kv
    ]
    return replay_ms([lambda x=x: wrapper.run(q[:, :, 0], x) for x in paged])  # type: ignore[misc]
