"""Where the GPU time of a captured decode step goes: its kernels, summed by name, and the step's median beside them.

    python -m experiments.step_profile 1 1024 full --compiled --out experiments/results/step-profile.json

The 8B shape with random weights, as `adaptivekv bench decode` builds it. Cases are added to the file. A kernel launched
ahead of its turn counts its waiting too, so the sum can exceed what it keeps the GPU busy. Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from adaptivekv.bench.decode import filled, random_model
from adaptivekv.bench.timing import warm_up
from adaptivekv.graph import GraphDecoder

KERNELS = 12  # named in the record; the others are summed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("plan")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("step_profile: needs a CUDA GPU")
    warm_up(5.0)
    found = measured(random_model("8b"), args.requests, args.tokens, args.plan, args.compiled)
    record = json.loads(args.out.read_text()) if args.out.exists() else {"cases": []}
    record |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    record["cases"].append({"command": "python -m experiments.step_profile " + " ".join(sys.argv[1:])} | found)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))


@torch.inference_mode()
def measured(model: Any, requests: int, tokens: int, plan: str, compiled: bool) -> dict[str, Any]:
    """Median ms of 64 steps, and microseconds of each kernel in a step, mean of three."""
    cache = filled(model, requests, tokens, plan)
    for request in cache.requests:
        cache.controller.end_prefill(request)
    decoder = GraphDecoder(model, cache, compiled)
    token, samples = torch.zeros(requests, dtype=torch.int64, device="cuda"), []
    for _ in range(104):
        start = time.perf_counter()
        token = decoder.step(token).argmax(-1)
        token.tolist()
        samples.append(1e3 * (time.perf_counter() - start))
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            token = decoder.step(token).argmax(-1)
        token.tolist()
    took: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            took[event.name] += event.device_time / 3
            count[event.name] += 1
    most = {name: {"us": round(us, 1), "launches": count[name] / 3} for name, us in took.most_common(KERNELS)}
    return {
        "requests": requests, "tokens": tokens, "plan": plan, "compiled": compiled,
        "step_ms": round(statistics.median(samples[40:]), 3), "kernels_ms": round(sum(took.values()) / 1e3, 3),
        "launches": sum(count.values()) / 3, "kernels": most,
    }  # fmt: skip


if __name__ == "__main__":
    main()
