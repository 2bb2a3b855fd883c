"""What every verb of the command line shares: options, progress, tables, JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from adaptivekv.errors import AdaptiveKVError

err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout, nothing else")]
Model = Annotated[str | None, typer.Option(help="Hugging Face id or folder, smollm2 or gemma3-270m")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Budget = Annotated[str | None, typer.Option(help="device KV bytes: 64MiB, or a share of the full cache: 0.25")]
Quality = Annotated[float, typer.Option(help="largest acceptable loss, nats per token")]
PlanText = Annotated[str | None, typer.Option(help="a fixed plan such as 'snapkv(0.5) | k4v2'; none: it is chosen")]
SelectorName = Annotated[str | None, typer.Option(help="champion, rules, or a folder with policy.npz")]
Compile = Annotated[
    bool, typer.Option("--compile", help="decode steps through torch.compile: a minute or more once, then faster (GPU)")
]
Seed = Annotated[int, typer.Option()]
Tracking = Annotated[str | None, typer.Option(help="MLflow tracking URI; default sqlite:///mlflow.db")]
Haystack = Annotated[Path | None, typer.Option(help="a UTF-8 text to build contexts from; default Moby-Dick")]


def out(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=None, default=float) + "\n")


def read_text(path: Path) -> str:
    """A UTF-8 text file, or one line that says what is wrong with it."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdaptiveKVError(f"file {path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise AdaptiveKVError(f"file {path}: {(error.strerror or str(error)).lower()}") from None


def mib(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f} MiB"


def bar(quiet: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, disable=quiet, transient=True)


def show_facts(title: str, value: dict[str, Any]) -> None:
    table = Table("", "", title=title, show_header=False)
    for key, entry in value.items():
        table.add_row(key, entry if isinstance(entry, str) else json.dumps(entry, default=str))
    Console().print(table)
