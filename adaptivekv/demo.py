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
from adaptivekv.memory.shapes import DEVICE, HOST
from adaptivekv.model import LoadedModel, load
from adaptivekv.plan import Plan
from adaptivekv.selector import Selector, foreign
from adaptivekv.trainer.registry import find_champion
from adaptivekv.trainer.tasks import haystack

OPENING = "In one sentence, what is this text about?"
KEYS = ["harbour", "lantern", "compass", "orchard", "chapel", "granary", "foundry", "lighthouse", "vineyard", "armoury"]
DEPTHS = (0.15, 0.45, 0.85)
QUALITY = 0.03  # nats per token
ANSWER = 24  # tokens at most, about the fact
SUMMARY = 12  # and about the text
INTRO = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n\n"
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
class Turn:
    """An answer: its tokens, the log-probabilities [n, V] behind them, its text."""

    tokens: list[int]
    logits: torch.Tensor
    text: str


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
    part = tokens // len(facts)
    documents = [plant(text, fact, part, loaded, seed + i) for i, fact in enumerate(facts)]
    ways = [
        Way("full cache", Options(plan="full")),
        Way("fixed plan", Options(budget, QUALITY, best_fixed(loaded, champion, part, budget))),
        Way("adaptive", Options(budget, QUALITY, None, champion)),
    ]
    if console:
        console.print(
            f"seed {seed}: {len(facts)} facts drawn at random, one in each of {len(facts)} parts of {part} tokens of "
            f"{file.name if file else 'Moby-Dick'}; budget {budget} of the full cache; {loaded.name} on {loaded.device}"
        )
    control = [fact.number in alone(loaded, fact) for fact in facts]
    with Live(console=console, refresh_per_second=4, transient=True) if console else _Silent() as live:
        reference: list[Turn] | None = None
        for way in ways:
            seen = ask(way, loaded, documents, facts, reference, lambda: live.update(picture(ways, facts)))
            reference = reference or seen  # the first way is the full cache
    if console:
        console.print(picture(ways, facts))
        verdict(console, ways, facts, sum(control))
    return {
        "seed": seed, "tokens": tokens, "budget": budget, "facts": [vars(f) for f in facts],
        "control_right": sum(control),
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


def plant(text: str, fact: Fact, tokens: int, loaded: LoadedModel, seed: int) -> str:
    """A stretch of the text, `tokens` long with everything asked about it, the fact's sentence at its depth."""
    encode = loaded.tokenizer
    start = random.Random(seed).randrange(len(text) - 8 * tokens) if len(text) > 8 * tokens else 0
    start = text.find(". ", start) + 2 if start else 0
    room = tokens - len(encode(INTRO + fact.sentence + OPENING + fact.question, verbose=False).input_ids) - 60
    ids = encode(text[start : start + 8 * tokens], verbose=False).input_ids[:room]
    if len(ids) < room // 2:
        raise AdaptiveKVError(f"text: {len(ids)} tokens; the demo needs {room} a part (or a smaller --tokens)")
    stretch = encode.decode(ids)
    at = stretch.find(". ", int(fact.depth * len(stretch))) + 1 or len(stretch)
    return stretch[:at] + fact.sentence + stretch[at:]


def best_fixed(loaded: LoadedModel, champion: Selector, tokens: int, budget: str) -> str:
    """The plan that was cheapest for all training requests at this quality, if it fits; else one that does."""
    session = Session(loaded, Options(plan="full"))
    known = not foreign(champion, session.cache.mark)
    best = getattr(champion, "manifest", {}).get("best_static", {}) if known else {}
    plan = best.get(str(QUALITY), FALLBACK)
    size = Plan.parse(plan).estimate(session.cache.shapes, session.cache.dtype, tokens)
    cap = parse_bytes(budget)
    fits = size["device"] <= (cap * size["full"] if isinstance(cap, float) else cap) * 0.9  # staging and the next tail
    return plan if fits else FALLBACK


def alone(loaded: LoadedModel, fact: Fact) -> str:
    """The control: the same question without the document."""
    session = Session(loaded, Options(plan="full"))
    text = "".join(session.answer([{"role": "user", "content": fact.question}], ANSWER))
    session.close()
    return text


def ask(
    way: Way, loaded: LoadedModel, documents: list[str], facts: list[Fact], reference: list[Turn] | None, show: Any
) -> list[Turn]:
    """A conversation of two turns about each part: what it is about, then its fact.

    Every way continues the conversation the full cache had. The loss is KL(full || way) in nats per token,
    teacher-forced on the full cache's answer. Returns the turns in order.
    """
    start, memory = time.perf_counter(), ProcessMemory(loaded.device)
    seen: list[Turn] = []
    for part, (document, fact) in enumerate(zip(documents, facts, strict=True)):
        session, messages = Session(loaded, way.options), []
        for content in (f"{INTRO}{document}\n\n{OPENING}", fact.question):
            messages.append({"role": "user", "content": content})
            way.status = f"part {part + 1}, turn {1 + len(messages) // 2}"
            show()
            target = reference[len(seen)] if reference else None
            turn = _turn(session, messages, target, ANSWER if len(messages) > 1 else SUMMARY)
            seen.append(turn)
            truth = (target or turn).logits
            loss = float((truth.exp() * (truth - turn.logits)).sum(-1).clamp_min(0).mean())
            way.losses.append(loss if math.isfinite(loss) else math.inf)
            messages.append({"role": "assistant", "content": (target or turn).text})
            way.plan, way.os_bytes = str(session.cache.requests[0].plan), max(way.os_bytes, memory.peak())
            _take(way, session, part)
            show()
        way.answers.append((turn.text.strip(), fact.number in turn.text))
        session.close()
    way.status, way.seconds = "done", time.perf_counter() - start
    show()
    return seen


def _turn(session: Session, messages: list[Message], target: Turn | None, limit: int) -> Turn:
    """Read the prompt, measure on the target's tokens without storing them, answer freely."""
    if target:
        logits = session.score(messages, target.tokens, limit)
        text = "".join(session.answer(messages, limit))
        assert session.last is not None
        return Turn(session.last.tokens, logits, text)
    text = "".join(session.answer(messages, limit))
    assert session.last is not None
    tokens = session.last.tokens
    return Turn(tokens, session.score(messages, tokens, limit), text)


def _take(way: Way, session: Session, part: int) -> None:
    """Keep the largest bytes of all parts and every decision that changed something."""
    (request,), report = session.cache.requests, session.cache.report()
    now = {
        "budget": request.budget or 0, "device_peak": report["device_peak"],
        "device_bytes": request.sequence.bytes(DEVICE), "host_bytes": request.sequence.bytes(HOST),
        "decode_ms": report["decode_ms_per_step"], "controller_us_per_step": report["controller_us_per_step"],
    }  # fmt: skip
    decisions = way.result.get("decisions", [])
    for d in report["requests"][0]["decisions"]:
        entry = {"part": part + 1, **d}
        same = [e for e in decisions if e["part"] == part + 1 and (e["moment"], e["plan"]) == (d["moment"], d["plan"])]
        if not same:
            decisions.append(entry)
    way.result = {key: max(value, way.result.get(key, 0)) for key, value in now.items()} | {"decisions": decisions}


def picture(ways: list[Way], facts: list[Fact]) -> Group:
    table = Table("", *(w.name for w in ways), title="three ways to keep the same conversation's cache")

    def size(way: Way, key: str) -> str:
        value = way.result.get(key)
        return "-" if not value else f"{value / 2**20:.1f} MiB"

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
        table.add_row(f"part {i + 1}: {fact.key} = {fact.number}\n(depth {fact.depth:.0%})", *cells)
    table.add_row("loss, nats/token", *(", ".join(f"{x:.4f}" for x in w.losses) or "-" for w in ways))
    reasons = Table("way", "part", "step", "when", "plan", "why", title="decisions")
    for way in ways[1:]:
        for d in way.result.get("decisions", []):
            reasons.add_row(way.name, str(d["part"]), str(d["step"]), d["moment"], d["plan"], d["reason"])
    return Group(table, reasons)


def verdict(console: Console, ways: list[Way], facts: list[Fact], control: int) -> None:
    console.print(f"control, the same questions without the document: {control} of {len(facts)} right (must be 0)")
    for way in ways:
        wrong = [f.key for f, (_, ok) in zip(facts, way.answers, strict=True) if not ok]
        tail = f"wrong about {', '.join(wrong)}" if wrong else "all answers right"
        console.print(f"{way.name}: {tail}; mean loss {sum(way.losses) / len(way.losses):.4f} nats per token")
    console.print(
        "The fact is asked for in the second turn; the first gave no reason to keep it, so a plan that evicts by the "
        "first question loses it. What the full cache gets wrong too is the small model's own mistake: it often stops "
        "within a number. On a CPU host, offloaded pages stay in the same RAM: the process falls less than the device "
        "bytes.",
        style="dim",
    )


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def update(self, _: object) -> None: ...
