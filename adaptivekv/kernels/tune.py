"""How the split kernel is compiled on this device: measured once per kind of model and kept.

Key: device, Triton, head sizes, query rows, storage dtype, codecs, the kernel's source. ADAPTIVEKV_TUNE=0: the default,
unmeasured.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
import triton
import triton.testing

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels import splitkv
from adaptivekv.kernels.codec import PAGE, Codec
from adaptivekv.kernels.decode import attend_table, even_work, occupancy
from adaptivekv.kernels.table import Launch, PageTable
from adaptivekv.paths import cache_root

CANDIDATES = (Launch(1, 3, 2, 1), Launch(1, 5, 2, 2), Launch(2, 3, 2, 1), Launch(4, 3, 1, 1))
"""One warp a program first: no barriers, and the most programs at once."""
_BYTES = 192 << 20  # of pages to measure on: more than any L2 holds
_SOURCE = (
    f"{crc32(Path(splitkv.__file__).read_bytes()):08x}"  # a launch is good for the kernel that it was measured with
)


@lru_cache
def launch_for(
    device: torch.device, k_dim: int, v_dim: int, rows: int, dtype: torch.dtype, pairs: tuple[tuple[Codec, Codec], ...]
) -> Launch:
    """The fastest of `CANDIDATES` for `rows` query rows per KV head, measured at the first call and read back later."""
    if os.environ.get("ADAPTIVEKV_TUNE") == "0":
        return Launch()
    names = "+".join(f"{k.name}/{v.name}" for k, v in pairs)
    name = torch.cuda.get_device_name(device)
    key = f"{name}, triton {triton.__version__}, {k_dim}x{v_dim}, {rows} rows, {dtype}, {names}, {_SOURCE}"
    file = cache_root() / "launches.json"
    if launch := _known(file).get(key):
        return launch
    print(f"adaptivekv: measuring kernels on {name}, this once (a minute or more) ...", file=sys.stderr, flush=True)
    launch = measure(device, k_dim, v_dim, rows, dtype, pairs)
    with contextlib.suppress(OSError):  # where it cannot be written it is measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({k: asdict(v) for k, v in (_known(file) | {key: launch}).items()}, indent=1))
        os.replace(partial, file)
    return launch


def _known(file: Path) -> dict[str, Launch]:
    """Launches measured before; a file that is damaged, or an entry that is, counts as none."""
    try:
        entries = json.loads(file.read_text()).items()
    except (OSError, ValueError, AttributeError):
        return {}
    names = set(asdict(Launch()))
    whole = {k: v for k, v in entries if isinstance(v, dict) and set(v) == names}
    return {k: Launch(**v) for k, v in whole.items() if all(type(n) is int and 0 < n <= 64 for n in v.values())}


def measure(
    device: torch.device, k_dim: int, v_dim: int, rows: int, dtype: torch.dtype, pairs: tuple[tuple[Codec, Codec], ...]
) -> Launch:
    """Time every candidate on one row of random pages of each format in turn; the least geometric mean wins."""
    best: tuple[float, Launch] | None = None
    for launch in CANDIDATES:
        try:
            times = [_time(device, k_dim, v_dim, rows, dtype, pairs, i, launch) for i in range(len(pairs))]
        except Exception as error:  # a candidate that this device cannot run (shared memory, registers) is no candidate
            failure = error
            continue
        score = float(np.exp(np.mean(np.log([t for t, _ in times]))))
        if best is None or score < best[0]:
            best = score, times[0][1]
    if best is None:  # nothing to keep: the device has no room, or something broke it
        raise AdaptiveKVError(
            f"{device}: no launch of the decode kernel runs ({failure}); ADAPTIVEKV_TUNE=0 takes one unmeasured"
        ) from failure
    return best[1]


def _time(
    device: torch.device, k_dim: int, v_dim: int, rows: int, dtype: torch.dtype,
    pairs: tuple[tuple[Codec, Codec], ...], index: int, launch: Launch,
) -> tuple[float, Launch]:  # fmt: skip
    """Milliseconds for pages of pair `index` in a kernel that knows all pairs, and the launch with its occupancy."""
    k_size, v_size = (c.part_bytes(d, dtype) for c, d in zip(pairs[index], (k_dim, v_dim), strict=True))
    heads = 8
    pages = max(8, _BYTES // (heads * (k_size + v_size)))
    arena = torch.randint(0, 60, (heads * pages * (k_size + v_size),), dtype=torch.uint8, device=device)
    keys = torch.arange(heads * pages, device=device).view(heads, pages) * (k_size + v_size)
    q = torch.randn(heads, rows, k_dim, device=device, dtype=dtype)

    def table(launch: Launch) -> PageTable:
        work, tails = even_work(heads, pages, index, launch.programs, device)
        return PageTable(arena, keys + PAGE, keys + k_size, work, tails, 1, pairs, dtype, k_dim, v_dim, launch=launch)

    launch = occupancy(q, table(launch))
    ready = table(launch)
    torch.cuda.synchronize(device)  # the benchmark's stream does not wait for what others, this one too, have yet to do
    return float(triton.testing.do_bench_cudagraph(lambda: attend_table(q, ready, k_dim**-0.5), rep=10)), launch
