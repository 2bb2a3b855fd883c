"""The command line. Every verb takes --json; a bad request is one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other where cores are shared

import typer
from rich.console import Console
from rich.table import Table

from adaptivekv.bench.cli import app as bench
from adaptivekv.console import (
    Budget,
    Compile,
    Device,
    Dtype,
    Haystack,
    Json,
    Model,
    PlanText,
    Quality,
    Seed,
    SelectorName,
    bar,
    err,
    mib,
    out,
    read_text,
    show_facts,
)
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.paths import cache_root
from adaptivekv.trainer.cli import app as learn

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(bench, name="bench")
app.add_typer(learn)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option(help="the prompt, or the document if --question is given")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="read it from a UTF-8 file")] = None,
    question: Annotated[
        str | None, typer.Option(help="asked after the document, which is compressed before it")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    plan: PlanText = None,
    budget: Budget = None,
    quality: Quality = 0.03,
    session: Annotated[str | None, typer.Option(help="name of a conversation to go on with, kept on disk")] = None,
    temperature: float = 0.0,
    seed: Seed = 0,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    selector: SelectorName = None,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template")] = False,
    compile_: Compile = False,
    json_: Json = False,
) -> None:
    """Answer a prompt or a question about a document within a device KV budget."""
    if (prompt is None) == (prompt_file is None):
        raise AdaptiveKVError("prompt: give exactly one of --prompt and --prompt-file")
    text = prompt if prompt is not None else read_text(prompt_file or Path())
    if not text.strip():
        raise AdaptiveKVError("prompt: empty; give some text")
    from adaptivekv.engine.sampling import Sampler
    from adaptivekv.engine.session import Options, Session
    from adaptivekv.memory.formats import parse_bytes
    from adaptivekv.plan import Plan

    if plan is not None:
        Plan.parse(plan)
    if budget is not None:
        parse_bytes(budget)
    sampler = Sampler(temperature, 1.0, seed)
    folder = _session_folder(session)
    from adaptivekv.model import load
    from adaptivekv.selector import RuleTable
    from adaptivekv.trainer.registry import find_champion

    chooser = RuleTable() if plan is not None else find_champion(selector)
    loaded = load(model, device, dtype)
    options = Options(budget, quality, plan, chooser, seed=seed, goes_on=bool(session), compiled=compile_)
    talk = Session(loaded, options)
    before = (talk.restore(folder, max_new_tokens) if folder else None) or []
    if question:
        if not before:
            talk.read([{"role": "user", "content": text}], max_new_tokens, raw)
        text = f"{text}\n\n{question}"
    messages = [*before, {"role": "user", "content": text}]
    for piece in talk.answer(messages, max_new_tokens, sampler, raw):
        if not json_:
            sys.stdout.write(piece)
            sys.stdout.flush()
    result = talk.result()
    if folder:
        talk.save(folder, [*messages, {"role": "assistant", "content": result["text"]}])
        result["kv_bytes"]["disk_end"] += (folder / "cache.safetensors").stat().st_size
    if json_:
        out(result)
    else:
        sys.stdout.write("\n")
        _summary(result)


def _session_folder(name: str | None) -> Path | None:
    if name is None:
        return None
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise AdaptiveKVError(f"session {name!r}: use letters, digits, '-', '_' and '.'")
    return cache_root() / "sessions" / name


def _summary(result: dict[str, Any]) -> None:
    size, timing = result["kv_bytes"], result["timing"]
    table = Table("step", "plan", "selector", "reason", title=f"plan: {result['plan']}")
    for d in result["decisions"]:
        table.add_row(str(d["step"]), d["plan"], d["selector"], d["reason"])
    err.print(table)
    err.print(
        f"{result['prompt_tokens']} + {result['new_tokens']} tokens · device {mib(size['device_end'])}, "
        f"peak {mib(size['device_peak'])} of {mib(size['budget'])} · host {mib(size['host_end'])} · "
        f"full cache {mib(size['full'])} · prefill {timing['prefill_s']} s, {timing['decode_ms_per_token']} ms a token"
    )


@app.command()
def evaluate(
    plans: Annotated[list[str] | None, typer.Option(help="plans to compare; 'adaptive' is the controller")] = None,
    more: Annotated[list[str] | None, typer.Argument(help="further plans after --plans", metavar="[PLAN]...")] = None,
    tasks: Annotated[str, typer.Option(help="comma-separated task names")] = "niah_single,niah_multikey",
    lengths: Annotated[str, typer.Option(help="comma-separated prompt lengths in tokens")] = "1024",
    samples: Annotated[int, typer.Option()] = 4,
    seed: Seed = 0,
    haystack: Haystack = None,
    question_aware: Annotated[bool, typer.Option("--question-aware/--question-agnostic")] = True,
    budget: Budget = None,
    quality: Quality = 0.03,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    selector: SelectorName = None,
    json_: Json = False,
) -> None:
    """Plans x tasks x lengths: score, loss against the full cache, bytes, time."""
    from adaptivekv.model import load
    from adaptivekv.trainer import evaluate as room
    from adaptivekv.trainer import tasks as task_room
    from adaptivekv.trainer.registry import find_champion

    chosen = [*(plans or []), *(more or [])] or ["full", "int4", "k4v2", "adaptive"]
    try:
        sizes = [int(n) for n in lengths.split(",")]
    except ValueError:
        raise AdaptiveKVError(f"lengths {lengths!r}: whole numbers separated by commas") from None
    text = task_room.haystack(haystack)
    chooser = find_champion(selector) if "adaptive" in chosen else None
    with bar(json_) as progress:
        job = progress.add_task("evaluate", total=None)
        rows = room.evaluate(
            load(model, device, dtype), chosen, [t.strip() for t in tasks.split(",")], sizes, samples, seed, text,
            question_aware=question_aware, quality=quality, selector=chooser, budget=budget,
            progress=lambda done, total: progress.update(job, completed=done, total=total),
        )  # fmt: skip
    if json_:
        out(rows)
        return
    table = Table(*rows[0].keys()) if rows else Table("no rows")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


@app.command()
def serve(
    host: str = "127.0.0.1",
    port: int = 8000,
    model: Model = None,
    replicas: Annotated[int, typer.Option(min=1)] = 1,
    budget: Budget = None,
    quality: Quality = 0.03,
    selector: SelectorName = None,
    api_key: Annotated[str | None, typer.Option(envvar="ADAPTIVEKV_API_KEY")] = None,
    trajectories: Annotated[
        Path | None, typer.Option(help="folder for what each decision saw, chose and cost; `ope` and `train` read it")
    ] = None,
    epsilon: Annotated[
        float,
        typer.Option(
            help="chance that a decision explores among up to 8 cheap plans within the quality; `ope` needs it"
        ),
    ] = 0.0,
    sample: Annotated[
        float,
        typer.Option(help="chance that a request is kept for `label`, its prompt included, in TRAJECTORIES/samples"),
    ] = 0.0,
    shadow: Annotated[
        str | None, typer.Option(help="champion, rules or a policy's folder: its choices are logged, never obeyed")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    compile_: Compile = False,
    json_: Json = False,
) -> None:
    """Serve the OpenAI API on Ray Serve until Ctrl-C."""
    from adaptivekv.cluster.app import serve as run

    more = {"trajectories": trajectories, "epsilon": epsilon, "sample": sample, "shadow": shadow}
    more["compile"] = compile_ or None
    build_args: dict[str, Any] = {key: value for key, value in more.items() if value is not None}

    if json_:
        out({"url": f"http://{host}:{port}/v1", "model": model or "smollm2", "replicas": replicas})
        sys.stdout.flush()
    raise typer.Exit(run(host, port, model, replicas, budget, quality, selector, api_key, device, dtype, **build_args))


@app.command()
def plans(json_: Json = False) -> None:
    """The stages and the named plans made of them, with their papers and properties."""
    from adaptivekv.plan import Plan
    from adaptivekv.policies import STAGES
    from adaptivekv.policies.base import parameters
    from adaptivekv.policies.named import NAMED

    rows: list[dict[str, Any]] = [
        {
            "name": s.name, "direction": s.kind, "paper": s.paper, "needs": sorted(s.needs), "lossy": s.lossy,
            "undoable": s.undoable, "bytes": s.formula, "parameters": parameters(s),
        }
        for s in STAGES.values()
    ] + [
        {
            "name": name, "direction": "combination", "paper": named.paper, "needs": sorted(plan.needs),
            "lossy": plan.lossy, "undoable": all(s.undoable for s in plan.stages), "bytes": f"of {named.plan}",
            "parameters": {},
        }
        for name, named in NAMED.items() for plan in [Plan.parse(name)]
    ]  # fmt: skip
    if json_:
        out(rows)
        return
    table = Table("stage or plan", "paper", "needs", "lossy", "undoable", "bytes", box=None, pad_edge=False)
    for row in rows:
        given = ", ".join(k if v is None else f"{k}={v}" for k, v in row["parameters"].items())
        name = f"[bold]{row['name']}[/] {row['direction']}" + (f"\n[dim]{given}[/]" if given else "")
        paper = row["paper"].removeprefix("https://arxiv.org/abs/").removeprefix("https://")
        marks = ["yes" if row[key] else "no" for key in ("lossy", "undoable")]
        table.add_row(name, paper, ", ".join(row["needs"]), *marks, row["bytes"])
    Console().print(table)


@app.command()
def doctor(json_: Json = False) -> None:
    """What this machine has, and what is missing."""
    from adaptivekv.doctor import doctor as run

    facts = run()
    out(facts) if json_ else show_facts("doctor", facts)
    raise typer.Exit(1 if facts["problems"] else 0)


@app.command()
def demo(
    file: Annotated[Path | None, typer.Option(help="a UTF-8 text of your own; default Moby-Dick")] = None,
    tokens: Annotated[int, typer.Option(min=1000, help="tokens of the text to read")] = 3600,
    budget: Annotated[str, typer.Option()] = "0.25",
    seed: Annotated[int | None, typer.Option(help="draws the facts; default: a new one each run")] = None,
    model: Model = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """A model answers questions about a book within a quarter of its cache: full, fixed plan, adaptive side by side."""
    from adaptivekv.demo import run

    result = run(file, tokens, budget, seed, model, device, None if json_ else err)
    if json_:
        out(result)


def main() -> None:
    """Console entry: errors a user can cause are one line each, never a traceback."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except AdaptiveKVError as error:
        message, status = str(error), 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's own; Typer may carry a copy of click, so no type to name
            sys.stderr.write(f"adaptivekv: {error.format_message()}; see --help\n")
            sys.exit(2)
        if os.environ.get("ADAPTIVEKV_DEBUG"):
            raise
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        message, status = f"{type(error).__name__}: {text} (ADAPTIVEKV_DEBUG=1 shows where)", 1
    sys.stderr.write(f"adaptivekv: {' '.join(message.split())}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
