"""`adaptivekv demo`: questions about a book, answered from the full cache, a fixed plan and the adaptive controller."""

from __future__ import annotations

import math
import random
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from adaptivekv.engine.process import ProcessMemory
from adaptivekv.engine.session import Message, Options, Session
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.formats import parse_bytes
from adaptivekv.memory.pages import DEVICE, HOST
from adaptivekv.model import LoadedModel, load
from adaptivekv.plan import Plan
from adaptivekv.selector import Selector
from adaptivekv.trainer.registry import find_champion
from adaptivekv.trainer.tasks import haystack

KEYS = ["harbour", "lantern", "compass", "orchard", "chapel", "granary", "foundry", "lighthouse", "vineyard", "armoury"]
DEPTHS = (0.15, 0.45, 0.85)
QUALITY = 0.03  # nats per token
ANSWER = 24  # tokens at most
INTRO = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n\n"
)
FALLBACK = "k4v2 | offload(0.6)"  # the fixed plan where the champion's best one does not fit the budget


@dataclass
class Fact:
    key: str
    number: str
    depth: float

    @property
    def sentence(self) -> str:
        return f" One of the special magic numbers for {self.key} is: {self.number}."

    @property
    def question(self) -> str:
        return f"What is the special magic number for {self.key} mentioned in the text?"


@dataclass
class Way:
    """One way to keep the cache, and what came of it."""

    name: str
    options: Options
    status: str = "waiting"
    plan: str = "-"
    answers: list[tuple[str, bool]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    os_bytes: int = 0
    seconds: float = 0.0


def run(
    file: Path | None,
    tokens: int,
    budget: str,
    seed: int | None,
    model: str | None,
    device: str,
    console: Console | None,
) -> dict[str, Any]:
    """The whole demo; shown live on `console` (None: silent). Returns what was seen, as plain data."""
    text = haystack(file)
    parse_bytes(budget)
    seed = secrets.randbelow(10**6) if seed is None else seed
    loaded, champion = load(model, device), find_champion(None)
    facts = draw(seed)
    document = plant(text, facts, tokens, loaded, seed)
    ways = [
        Way("full cache", Options(plan="full")),
        Way("fixed plan", Options(budget, QUALITY, best_fixed(loaded, champion, tokens, budget))),
        Way("adaptive", Options(budget, QUALITY, None, champion)),
    ]
    if console:
        console.print(
            f"seed {seed}: {len(facts)} facts drawn at random, planted in {tokens} tokens of "
            f"{file.name if file else 'Moby-Dick'}; budget {budget} of the full cache; {loaded.name} on {loaded.device}"
        )
    control = ask(Way("no document", Options(plan="full")), loaded, None, facts, None, lambda: None)
    with Live(console=console, refresh_per_second=4, transient=True) if console else _Silent() as live:
        reference: list[tuple[list[int], torch.Tensor, str]] | None = None
        for way in ways:
            seen = ask(way, loaded, document, facts, reference, lambda: live.update(picture(ways, facts)))
            reference = reference or seen  # the first way is the full cache
    if console:
        console.print(picture(ways, facts))
        verdict(console, ways, facts, control_right(control, facts))
    return {
        "seed": seed, "tokens": tokens, "budget": budget, "facts": [vars(f) for f in facts],
        "control_right": control_right(control, facts),
        "ways": [
            {
                "name": w.name, "plan": w.plan,
                "right": [ok for _, ok in w.answers], "answers": [a for a, _ in w.answers],
                "loss": w.losses, "os_peak_bytes": w.os_bytes, "seconds": round(w.seconds, 1), **w.result,
            }
            for w in ways
        ],
    }  # fmt: skip


def draw(seed: int) -> list[Fact]:
    rng = random.Random(seed)
    return [
        Fact(key, str(rng.randrange(10**6, 10**7)), d)
        for key, d in zip(rng.sample(KEYS, len(DEPTHS)), DEPTHS, strict=True)
    ]


def plant(text: str, facts: list[Fact], tokens: int, loaded: LoadedModel, seed: int) -> str:
    """A stretch of the text, `tokens` long, with each fact's sentence at its depth, between sentences."""
    encode = loaded.tokenizer
    start = random.Random(seed).randrange(max(1, len(text) - 8 * tokens)) if len(text) > 8 * tokens else 0
    start = text.find(". ", start) + 2 if start else 0
    stretch = text[start : start + 8 * tokens]
    ids = encode(stretch, verbose=False).input_ids[: tokens - 40 * len(facts)]
    if len(ids) < tokens // 2:
        raise AdaptiveKVError(f"text: only {len(ids)} tokens; the demo needs {tokens} (or a smaller --tokens)")
    stretch = encode.decode(ids)
    for fact in sorted(facts, key=lambda f: -f.depth):
        at = stretch.find(". ", int(fact.depth * len(stretch)))
        at = len(stretch) if at < 0 else at + 1
        stretch = stretch[:at] + fact.sentence + stretch[at:]
    return stretch


def best_fixed(loaded: LoadedModel, champion: Selector, tokens: int, budget: str) -> str:
    """The plan that was cheapest for all training requests at this quality, if it fits; else one that does."""
    session = Session(loaded, Options(plan="full"))
    best = getattr(champion, "manifest", {}).get("best_static", {})
    plan = best.get(str(QUALITY), FALLBACK)
    size = Plan.parse(plan).estimate(session.cache.shapes, session.cache.dtype, tokens)
    cap = parse_bytes(budget)
    fits = size["device"] <= (cap * size["full"] if isinstance(cap, float) else cap) * 0.9  # staging and the next tail
    return plan if fits else FALLBACK


def ask(
    way: Way, loaded: LoadedModel, document: str | None, facts: list[Fact],
    reference: list[tuple[list[int], torch.Tensor, str]] | None, show: Any,
) -> list[tuple[list[int], torch.Tensor, str]]:  # fmt: skip
    """A multi-turn session, one fact a turn; every way continues the conversation the full cache had.

    The loss is KL(full || way) in nats per token, teacher-forced on the full cache's answer.
    Returns per turn: answer tokens, the log-probabilities [n, V] behind them, text.
    """
    start, memory = time.perf_counter(), ProcessMemory(loaded.device)
    session, messages, seen = Session(loaded, way.options), [], []
    for turn, fact in enumerate(facts):
        content = fact.question if turn or document is None else f"{INTRO}{document}\n\n{fact.question}"
        messages.append({"role": "user", "content": content})
        way.status = f"turn {turn + 1}: reading" if document else "no document"
        show()
        logits, tokens, text = _turn(session, messages, reference[turn] if reference else None)
        if session.cache.requests:
            way.plan = str(session.cache.requests[0].plan)
        if reference:
            truth = reference[turn][1]
            loss = (truth.exp() * (truth - logits)).sum(-1).clamp_min(0).mean()
            way.losses.append(float(loss) if math.isfinite(float(loss)) else math.inf)
        else:
            way.losses.append(0.0)
        seen.append((tokens, logits, text))
        way.answers.append((text.strip(), fact.number in text))
        history = reference[turn][2] if reference else text
        messages.append({"role": "assistant", "content": history})
        way.os_bytes = max(way.os_bytes, memory.peak())
        way.result = _facts(session)
        show()
    way.status, way.seconds = "done", time.perf_counter() - start
    session.close()
    show()
    return seen


def _turn(
    session: Session, messages: list[Message], reference: tuple[list[int], torch.Tensor, str] | None
) -> tuple[torch.Tensor, list[int], str]:
    """Read the prompt, measure on the reference's tokens without storing them, answer freely."""
    if reference:
        logits = session.score(messages, reference[0], ANSWER)
        text = "".join(session.answer(messages, ANSWER))
    else:
        text = "".join(session.answer(messages, ANSWER))
        tokens = session.last.tokens if session.last else []
        logits = session.score(messages, tokens, ANSWER)
    assert session.last is not None
    return logits, session.last.tokens, text


def _facts(session: Session) -> dict[str, Any]:
    (request,), report = session.cache.requests, session.cache.report()
    return {
        "budget": request.budget, "device_peak": report["device_peak"], "device_bytes": request.sequence.bytes(DEVICE),
        "host_bytes": request.sequence.bytes(HOST), "decisions": report["requests"][0]["decisions"],
        "decode_ms": report["decode_ms_per_step"], "prefill_s": report["prefill_s"],
        "controller_us_per_step": report["controller_us_per_step"],
    }  # fmt: skip


def control_right(control: list[tuple[list[int], torch.Tensor, str]], facts: list[Fact]) -> int:
    return sum(fact.number in text for (_, _, text), fact in zip(control, facts, strict=True))


def picture(ways: list[Way], facts: list[Fact]) -> Group:
    table = Table("", *(w.name for w in ways), title="three ways to keep the same conversation's cache")

    def size(way: Way, key: str) -> str:
        value = way.result.get(key)
        return "-" if value is None else f"{value / 2**20:.1f} MiB"

    table.add_row("status", *(f"{w.status} ({w.seconds:.0f} s)" if w.seconds else w.status for w in ways))
    table.add_row("plan", *(w.plan for w in ways))
    for key, label in (
        ("budget", "device budget"),
        ("device_peak", "device peak"),
        ("device_bytes", "device now"),
        ("host_bytes", "host now"),
    ):
        table.add_row(label, *(size(w, key) for w in ways))
    table.add_row("process peak (OS)", *(f"+{w.os_bytes / 2**20:.0f} MiB" if w.os_bytes else "-" for w in ways))
    for i, fact in enumerate(facts):
        cells = []
        for way in ways:
            if i < len(way.answers):
                text, ok = way.answers[i]
                cells.append(Text(f"{'right' if ok else 'WRONG'}: {text[:40]}", "green" if ok else "red"))
            else:
                cells.append(Text("..."))
        table.add_row(f"turn {i + 1}: {fact.key} = {fact.number}\n(depth {fact.depth:.0%})", *cells)
    table.add_row("loss, nats/token", *(", ".join(f"{x:.4f}" for x in w.losses) or "-" for w in ways))
    reasons = Table("way", "step", "when", "plan", "why", title="decisions")
    for way in ways[1:]:
        for d in way.result.get("decisions", []):
            reasons.add_row(way.name, str(d["step"]), d["moment"], d["plan"], d["reason"])
    return Group(table, reasons)


def verdict(console: Console, ways: list[Way], facts: list[Fact], control: int) -> None:
    console.print(f"control, the same questions without the document: {control} of {len(facts)} right (must be 0)")
    for way in ways:
        wrong = [f.key for f, (_, ok) in zip(facts, way.answers, strict=True) if not ok]
        tail = f"wrong about {', '.join(wrong)}" if wrong else "all answers right"
        console.print(f"{way.name}: {tail}; mean loss {sum(way.losses) / len(way.losses):.4f} nats per token")
    console.print(
        "Turns 2 and 3 ask about facts that the first question gave no reason to keep: a plan that evicts by the first "
        "question loses them. On a CPU host, offloaded pages stay in the same RAM: the process falls less than the "
        "device bytes.",
        style="dim",
    )


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def update(self, _: object) -> None: ...
