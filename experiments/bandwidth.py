"""How fast can pages be read at all? Plain reads on a GPU, without arithmetic: the ceiling of decode attention.

    python -m experiments.bandwidth --out experiments/results/bandwidth.json

537 MB, what 131,072 tokens of 8 KV heads of 128 take in bfloat16, in blocks of three sizes; *own*: a program reads a
stretch of its own, *inter*: programs take neighbouring blocks, *random*: blocks lie in random order, as pages do. TB/s,
the median of 10 replays of a CUDA graph; the digit is the depth of the load pipeline.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

BYTES = 131072 * 8 * 128 * 2 * 2
ORDERS = ("own", "inter", "random")


@triton.jit
def read(data, ids, out, blocks, ORDER: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Each program adds up its blocks of BLOCK words; the sums are stored so that no load is dropped."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    total = tl.zeros([BLOCK], tl.int32)
    share = tl.cdiv(blocks, programs)
    first = program * share
    n = tl.maximum(tl.minimum(blocks, first + share) - first, 0)
    if ORDER == 1:
        n = tl.cdiv(blocks - program, programs)
    for i in tl.range(0, n, num_stages=STAGES):
        if ORDER == 1:
            at = (program + i * programs).to(tl.int64)
        elif ORDER == 2:
            at = tl.load(ids + first + i).to(tl.int64)
        else:
            at = (first + i).to(tl.int64)
        total += tl.load(data + at * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(out + program * BLOCK + tl.arange(0, BLOCK), total)


def replayed_ms(launch: Any, times: int = 10) -> float:
    """Median milliseconds of a captured launch."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        launch()
        with torch.cuda.graph(graph):
            launch()
    samples = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return sorted(samples)[times // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bandwidth: no CUDA GPU here")
    data = torch.randint(0, 100, (BYTES // 4,), dtype=torch.int32, device="cuda")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    rows = []
    for words in (1024, 2048, 4096):
        blocks = BYTES // 4 // words
        ids = torch.randperm(blocks, device="cuda", dtype=torch.int32)
        for warps in (1, 4, 8):
            for programs in (4 * processors, 8 * processors, 16 * processors):
                out = torch.empty(programs * words, dtype=torch.int32, device="cuda")
                row: dict[str, Any] = {"block_bytes": 4 * words, "warps": warps, "programs": programs}
                for order, name in enumerate(ORDERS):
                    for stages in (1, 4):
                        settings = {"ORDER": order, "BLOCK": words, "STAGES": stages, "num_warps": warps}
                        ms = replayed_ms(partial(read[(programs,)], data, ids, out, blocks, **settings))
                        row[f"{name}{stages}"] = round(BYTES / ms / 1e9, 3)
                rows.append(row)
                print(row, flush=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    facts = {"device": torch.cuda.get_device_name(), "versions": versions, "unit": "TB/s"}
    facts["command"] = f"python -m experiments.bandwidth --out {args.out}"
    lines = ",\n  ".join(map(json.dumps, rows))
    args.out.write_text(json.dumps(facts, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
