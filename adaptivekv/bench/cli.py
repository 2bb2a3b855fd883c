"""`adaptivekv bench`: the numbers of the README, made again on this machine's GPU."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from adaptivekv.console import Json, err
from adaptivekv.errors import AdaptiveKVError

app = typer.Typer(no_args_is_help=True, help=__doc__)

Out = Annotated[Path | None, typer.Option(help="write the rows, device, versions and command to this JSON file")]
KERNELS = {
    "requests": "requests", "tokens": "tokens", "format": "format", "ms": "ms", "ratio": "x best peer",
    "gbps": "GB/s", "of_copy": "of copy", "stats_over_plain": "statistics", "error": "error",
    "over_parts": "mixture / parts",
}  # fmt: skip
DECODE = {
    "shape": "model", "requests": "requests", "tokens": "tokens", "plan": "plan", "ms": "ms a step",
    "mean_ms": "mean", "transformers_ms": "transformers", "floor_ms": "floor", "plan_change_ms": "plan change ms",
}  # fmt: skip


@app.command()
def kernels(
    small: Annotated[bool, typer.Option("--small", help="only the short contexts")] = False,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Decode attention over pages of every format and a mixture, against torch's fused attention in the same run."""
    _need_gpu(out)
    from adaptivekv.bench.kernels import SMALL, run

    _report("kernels", run(SMALL) if small else run(), KERNELS, out, json_)


@app.command()
def decode(
    case: Annotated[
        list[str] | None, typer.Option(help="shape, requests, tokens and plan: '8b 1 1024 full'; default: all of them")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="the model through torch.compile first")] = False,
    peers: Annotated[bool, typer.Option(help="time transformers' own loop as well")] = True,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Whole decode steps of known model shapes with random weights, as captured CUDA graphs."""
    from adaptivekv.bench.decode import CASES, run

    cases = tuple(map(_case, case or ())) or CASES
    _need_gpu(out)
    _report("decode", run(cases, compiled, peers), DECODE, out, json_)


def _case(text: str) -> tuple[str, int, int, str]:
    """`8b 1 1024 int4 | offload(0.5)` in its parts."""
    from adaptivekv.bench.decode import SHAPES
    from adaptivekv.plan import Plan

    parts = text.split(maxsplit=3)
    if len(parts) != 4 or parts[0] not in SHAPES or not all(n.isdigit() and int(n) for n in parts[1:3]):
        raise AdaptiveKVError(f"case {text!r}: write it as '8b 1 1024 full'; shapes are {', '.join(SHAPES)}")
    return parts[0], int(parts[1]), int(parts[2]), str(Plan.parse(parts[3]))


def _need_gpu(out: Path | None) -> None:
    """Refuse what cannot work before minutes are spent on it."""
    import torch

    from adaptivekv.kernels import triton_works

    if not torch.cuda.is_available():
        raise AdaptiveKVError("bench: no CUDA GPU here; these numbers mean nothing on a CPU")
    if not triton_works():
        raise AdaptiveKVError("bench: Triton is missing; pip install triton")
    if out:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            new = not out.exists()
            out.open("a").close()
            if new:  # an empty file would look like a result
                out.unlink()
        except OSError as error:
            raise AdaptiveKVError(f"out {out}: cannot be written ({error.strerror}); name another file") from None


def _report(name: str, rows: Iterable[dict[str, Any]], columns: dict[str, str], out: Path | None, json_: bool) -> None:
    """All rows, each shown and written as it comes: a run that is cut short keeps those it has."""
    import torch
    import triton

    done: list[dict[str, Any]] = []
    result = {
        "bench": name,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "command": shlex.join(["adaptivekv", *sys.argv[1:]]),
        "rows": done,
    }
    for row in rows:
        done.append(row)
        if not json_:
            err.print(" · ".join(f"{title} {_text(row[key])}" for key, title in columns.items() if key in row))
        if out:
            out.write_text(json.dumps(result, indent=1) + "\n")
    if out:
        from adaptivekv.bench.plots import plot

        plot(name, done, out.with_suffix(".png"))
    if json_:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    table = Table(*columns.values(), title=f"{name} · {result['device']}")
    for row in done:
        table.add_row(*(_text(row.get(key, "")) for key in columns))
    Console().print(table)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
