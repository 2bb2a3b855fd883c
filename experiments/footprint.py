"""What each plan really takes: bytes, the process's own memory, and the loss, on the embedded model and a real book.

    python -m experiments.footprint --tokens 6000 --out experiments/results/footprint.json [--device cuda]

Every plan runs in a process of its own, reads the prompt under a budget that just holds the plan, and is compared with
a process that does the same forwards with next to no KV. A plan that loses something has no host memory there
(`host=0`), so its stages act early, while the prompt is read: that run's loss is `kl_bounded`. `kl` is the loss where
overflow waits in host memory and the plan acts once, at the end of the prompt (adaptivekv/trainer/replay.py).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads that spin starve their neighbours

import argparse
import ctypes
import datetime
import gc
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure

from adaptivekv import AdaptiveCache
from adaptivekv.controller import Controller
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.formats import FORMATS
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, HOST
from adaptivekv.model import LoadedModel, load
from adaptivekv.plan import Plan
from adaptivekv.trainer.replay import Reference, reference, replay
from adaptivekv.trainer.tasks import haystack, make

PLANS = (
    "full",
    "int8",
    "int4",
    "k4v2",
    "int2",
    "snapkv(0.25)",
    "snapkv(0.5) | k4v2",
    "kvzap(0.5, layers=uniform) | int4(window=0)",
    "offload(0.25)",
)
NO_KV = "no kv"
CHUNK = 2 * PAGE  # prompt tokens a forward, the same for all plans
TASKS = ("niah_multiquery", "niah_multikey", "niah_single")  # by sample
ENVIRONMENT = {  # one heap that gives freed memory back, so that the peak is what was in use
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def prompt(loaded: LoadedModel, tokens: int, sample: int) -> list[int]:
    """`tokens` token ids at most: a stretch of the book with facts in it, and a question about them."""
    document, question = make(TASKS[sample % len(TASKS)], tokens, loaded.tokenizer, sample, haystack()).ids(
        loaded.tokenizer
    )
    return document + question


def budget(cache: AdaptiveCache, plan: Plan, prompt: int, new: int) -> int:
    """Device bytes that just hold the plan at its largest: its estimate, the ring, and native room for a chunk."""
    native = sum(s.heads * FORMATS["native"].bytes(s.k_dim, s.v_dim, cache.dtype) for s in cache.shapes)
    ring = Sequence.fixed_bytes(cache.shapes, cache.dtype, plan.window) - Sequence.fixed_bytes(
        cache.shapes, cache.dtype, 0
    )
    pages = plan.estimate(cache.shapes, cache.dtype, prompt + new)["device"]
    # the chunk's own page, and the page before it that is still too new for a lossy stage
    need = pages + ring + (CHUNK // PAGE + 1) * native
    return max(need * 16 // 15, need + (1 << 20)) + (1 << 16)  # staging takes a sixteenth of a budget


# -- a process of its own ----------------------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> dict[str, Any]:
    """Read the prompt and force the tokens under one plan; what the process needed for it."""
    work = np.load(args.work)
    ids, tokens = work["ids"].tolist(), work["tokens"].tolist()
    logits = torch.from_numpy(work["logits"])
    loaded = load(device=args.device)
    plan = Plan.parse("full" if args.child == NO_KV else args.child)
    dtype = torch.float16 if loaded.model.dtype == torch.float32 else loaded.model.dtype
    out: dict[str, Any] = {"plan": args.child}
    peak = Peak(loaded.device)
    with torch.inference_mode():
        if args.child == NO_KV:
            steps = [ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)] + [[t] for t in tokens[:-1]]
            at = 0
            for part in steps:
                fresh = AdaptiveCache(loaded.model, plan="full", kv_dtype=dtype, max_tokens=CHUNK, max_new_tokens=1)
                _forward(loaded, fresh, part, at).float().log_softmax(-1)
                at += len(part)
                fresh.clear()
            return out | {"process_peak": peak.read()}
        probe = AdaptiveCache(loaded.model, plan=plan, kv_dtype=dtype)
        limit = budget(probe, plan, len(ids), len(tokens))
        host = None if plan.stage("offload") else 0
        cache = AdaptiveCache(loaded.model, limit, plan=plan, kv_dtype=dtype, host=host, controller=Controller(plan))
        cache.expect(len(ids), len(tokens))
        for at in range(0, len(ids), CHUNK):
            last = _forward(loaded, cache, ids[at : at + CHUNK], at)
        cache.end_prefill()
        losses, flips = [], 0
        for i, token in enumerate(tokens):
            full, ours = logits[i], last.float().log_softmax(-1).cpu()
            losses.append(max(0.0, float((full.exp() * (full - ours)).sum())))
            flips += int(ours.argmax()) != token
            if i + 1 < len(tokens):
                last = _forward(loaded, cache, [token], len(ids) + i)
    request, report = cache.requests[0], cache.report()
    assert cache.pool is not None
    cache.pool.check_integrity()
    return out | {
        "process_peak": peak.read(), "budget": limit, "host": host is None, "device_peak": report["device_peak"],
        "device_end": request.sequence.bytes(DEVICE), "host_end": request.sequence.bytes(HOST),
        "kl_bounded": float(np.mean(losses)), "kl_bounded_worst": max(losses), "flips_bounded": flips / len(tokens),
        "pressure": [d.reason for d in request.decisions if d.pressure],
        "prefill_s": report["prefill_s"],
    }  # fmt: skip


def _forward(loaded: LoadedModel, cache: AdaptiveCache, ids: list[int], at: int) -> torch.Tensor:
    where = torch.arange(at, at + len(ids), device=loaded.device)[None]
    part = torch.tensor([ids], device=loaded.device)
    return loaded.model(part, past_key_values=cache, position_ids=where, logits_to_keep=1).logits[0, -1]


class Peak:
    """Bytes the process has needed since this object was made, above what it held then.

    CUDA: what PyTorch's allocator gave out. CPU: resident memory; the kernel's own high-water mark, started anew.
    """

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.start = self._status("VmRSS")

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

    def read(self) -> int:
        cuda = self.device.type == "cuda"
        return (torch.cuda.max_memory_allocated(self.device) if cuda else self._status("VmHWM")) - self.start


# -- the whole table ---------------------------------------------------------------------------------------------------


def losses(loaded: LoadedModel, args: argparse.Namespace) -> tuple[dict[str, list[Any]], list[Reference]]:
    """Every plan replayed on `samples` prompts. The references come back freed, with tokens and logits."""
    out: dict[str, list[Any]] = {plan: [] for plan in PLANS}
    references = []
    for sample in range(args.first, args.first + args.samples):
        full = reference(loaded, prompt(loaded, args.tokens, sample), args.new, stop=True)
        print(f"sample {sample}: {len(full.ids)} tokens read in {full.seconds:.0f} s: {full.text!r}", file=sys.stderr)
        for plan in PLANS:
            run = replay(full, plan)
            out[plan].append(run)
            print(f"  {plan:20} kl {run.kl_mean:.5f}  flips {run.flip_rate:.3f}  {run.seconds:.0f} s", file=sys.stderr)
        full.free()
        references.append(full)
    return out, references


def amend(result: dict[str, Any], runs: dict[str, list[Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Take the losses of further prompts into an earlier result; its bytes stay."""
    before = result["samples"]
    for row in result["rows"]:
        more = runs[row["plan"]]
        row["kl_samples"] += [r.kl_mean for r in more]
        row["kl"], row["kl_worst"] = (
            float(np.mean(row["kl_samples"])),
            max([row["kl_worst"], *(r.kl_worst for r in more)]),
        )
        row["flip_rate"] = (row["flip_rate"] * before + sum(r.flip_rate for r in more)) / (before + len(more))
    return result | {"samples": before + args.samples, "command": f"{result['command']} && {command()}"}


def command() -> str:
    return "python -m experiments.footprint " + shlex.join(sys.argv[1:])


def spawn(plan: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    line = [sys.executable, "-m", "experiments.footprint", "--child", plan, "--work", str(work)]
    line += ["--device", args.device, "--threads", str(args.threads)]
    done = subprocess.run(line, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    got = json.loads(done.stdout)
    print(f"process {plan}: {got}", file=sys.stderr)
    return got


def measure(args: argparse.Namespace) -> dict[str, Any]:
    loaded = load(device=args.device)
    runs, references = losses(loaded, args)
    if args.first:
        return amend(json.loads(args.out.read_text()), runs, args)
    first = references[0]
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work.npz"
        np.savez(work, ids=first.ids, tokens=first.tokens, logits=first.logits.cpu().numpy())
        children = {plan: spawn(plan, work, args) for plan in (NO_KV, *PLANS)}
    full_bytes, none = first.full_bytes, children.pop(NO_KV)["process_peak"]
    rows = []
    for plan, got in children.items():
        mine, kept = runs[plan], {key: value for key, value in got.items() if key not in ("process_peak", "host")}
        loss = {
            "kl": float(np.mean([r.kl_mean for r in mine])), "kl_worst": max(r.kl_worst for r in mine),
            "flip_rate": float(np.mean([r.flip_rate for r in mine])), "kl_samples": [r.kl_mean for r in mine],
        }  # fmt: skip
        rows.append(
            kept | loss | {"kv_ratio": got["device_end"] / full_bytes, "process_kv": got["process_peak"] - none}
        )
    whole = rows[0]
    for row in rows:
        row["promised_fall"] = whole["device_peak"] - row["device_peak"]
        row["process_fall"] = whole["process_kv"] - row["process_kv"]
        row["off"] = (row["process_fall"] - row["promised_fall"]) / full_bytes
        if row["plan"].startswith("offload") and loaded.device.type == "cpu":
            row["note"] = "on a CPU host offloading only moves bytes within the same RAM, so the process's peak stays"
    cuda = loaded.device.type == "cuda"
    return {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "command": command(),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores, {args.threads} threads",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__
        },
        "load_before_and_after": [load_before, os.getloadavg()],
        "model": loaded.name, "model_dtype": str(loaded.model.dtype),
        "tokens": len(first.ids), "new": len(first.tokens), "samples": args.samples, "chunk": CHUNK,
        "full_bytes": full_bytes, "process_without_kv": none, "rows": rows,
    }  # fmt: skip


def plot(result: dict[str, Any], path: Path) -> None:
    """Device bytes after the prompt against loss: acting once at its end, and acting early for want of room."""
    made = Figure(figsize=(7, 4.5), layout="constrained")
    axes = made.add_subplot()
    axes.set(title=f"{result['tokens']} tokens, {result['model']}", xlabel="device bytes / full 16-bit cache")
    axes.set(ylabel="KL to the full cache, nats per token (+1e-6)", yscale="log")
    series = (
        (f"plan applied at the end, {result['samples']} prompts", "C0o", lambda row: row["kl"]),
        ("the first of them", "C7.", lambda row: row["kl_samples"][0]),
        ("the first, plan applied early for want of room", "C3x", lambda row: row["kl_bounded"]),
    )
    for label, style, loss in series:
        points = [(row["kv_ratio"], loss(row) + 1e-6) for row in result["rows"]]
        axes.plot(*zip(*points, strict=True), style, label=label)
    for i, row in enumerate(result["rows"]):
        at, below = (row["kv_ratio"], row["kl"] + 1e-6), i % 2
        axes.annotate(row["plan"], at, fontsize=7, xytext=(5, -11 if below else 4), textcoords="offset points")
    axes.legend()
    made.savefig(path, dpi=110)


def table(result: dict[str, Any], stem: str) -> str:
    """The Markdown section of RESULTS.md."""
    head = (
        f"{result['tokens']} tokens of *Moby-Dick* and an answer of {result['new']} tokens on {result['model']} "
        f"({result['model_dtype']}, pages in 16 bits), {result['device']}, {result['date']}. `full` by formula: "
        f"{result['full_bytes'] / 1e6:.1f} MB. Peak: most device bytes at once, prompt included, as the pool counts "
        "them (tail, ring and staging included). Process: the process's own peak less that of a run without KV. Off: "
        "fall of the process's peak less the fall promised, in shares of the full cache. KL in nats per token over "
        f"{result['samples']} prompts, the plan applied at the end of the prompt; bounded: applied early, on the first "
        "prompt, within the peak shown and without host memory."
    )
    lines = [
        "| plan | MB at end | MB at peak | process MB | off | KL | worst | flips "
        "| bounded: KL (same prompt, not bounded) | flips |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in result["rows"]:
        mb = " | ".join(f"{r[key] / 1e6:.1f}" for key in ("device_end", "device_peak", "process_kv"))
        name = r["plan"].replace("|", "\\|")
        lines.append(
            f"| `{name}` | {mb} | {r['off']:+.1%} | {r['kl']:.5f} | {r['kl_worst']:.3f} "
            f"| {r['flip_rate']:.1%} | {r['kl_bounded']:.5f} ({r['kl_samples'][0]:.5f}) "
            f"| {r['flips_bounded']:.1%} |"
        )
    notes = [f"`{r['plan']}`: {r['note']}." for r in result["rows"] if "note" in r]
    rest = [f"![bytes against loss](results/{stem}.png)", f"`{result['command']}` → `results/{stem}.json`"]
    return "\n\n".join(["## Footprint", head, "\n".join(lines), *notes, *rest])


def write_section(path: Path, name: str, text: str) -> None:
    """Replace a section of RESULTS.md, or add it; the rest of the file stays."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = path.read_text() if path.exists() else "# Results\n"
    before, _, rest = old.partition(start)
    after = rest.partition(end)[2].lstrip("\n")
    path.write_text("\n\n".join(filter(None, [before.rstrip(), f"{start}\n{text}\n{end}", after.rstrip()])) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=6000, help="of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of its answer at most")
    parser.add_argument("--samples", type=int, default=2, help="prompts for the loss; memory is measured on the first")
    parser.add_argument("--first", type=int, default=0, help="above 0: add the loss of prompts from this one to --out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "footprint.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(child(args)))
        return
    result = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.out.with_suffix(".png"))
    text = table(result, args.out.stem)
    print(text)
    write_section(args.out.parent.parent / "RESULTS.md", args.out.stem, text)


if __name__ == "__main__":
    main()
