"""Requests to collect trajectories from: what they ask, of which document, under which limits; drawn from a seed."""

from __future__ import annotations

import difflib
import json
import math
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import adaptivekv
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import tasks
from adaptivekv.trainer.trajectories import SPLITS

FOLDER = Path(adaptivekv.__file__).parents[1] / "experiments" / "scenarios"
REGIONS = 24  # documents that the book is cut into
TASKS = {"needle": "niah_single", "multikey": "niah_multikey", "words": "cwe"}  # kinds that tasks.py writes
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, spread evenly however many are taken


@dataclass(frozen=True)
class Request:
    """One request to replay, drawn but not yet written: `write` makes the same text of it everywhere."""

    id: str
    kind: str
    split: str
    document: str  # requests of one document are of one split
    seed: int
    tokens: int  # of the prompt, about
    quality: float  # SLO, nats per token
    budget: float  # share of the full cache, 1.0: no limit
    host: float  # free host bytes, in full caches
    pressure: float  # share of the device budget held by other requests


@dataclass(frozen=True)
class Prompt:
    """A written request: its token ids, and its text as features see it."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class Scenario:
    """A mix of requests; `load` reads one from YAML."""

    name: str
    kinds: dict[str, float]  # weights
    tokens: tuple[int, int]
    quality: list[float]
    budget: list[float]
    host: list[float]
    pressure: list[float]
    splits: dict[str, float]


# -- scenarios -------------------------------------------------------------------------------------------------------


def load(scenario: str | Path) -> Scenario:
    """A YAML file, or the name of one in experiments/scenarios. AdaptiveKVError names the field at fault."""
    import yaml

    path = Path(scenario)
    if not path.suffix and not path.is_file():
        path = FOLDER / f"{scenario}.yaml"
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml"))) or "none"
        raise AdaptiveKVError(f"scenario {path}: {error.strerror or error}; by name there are {names}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AdaptiveKVError(f"scenario {path}: not YAML ({' '.join(str(error).split())})") from None
    try:
        return parse(fields)
    except AdaptiveKVError as error:
        raise AdaptiveKVError(f"scenario {path}: {error}") from None


def parse(fields: Any) -> Scenario:
    """A scenario from its YAML mapping; the message of an AdaptiveKVError begins with the field's name."""
    if not isinstance(fields, Mapping):
        raise AdaptiveKVError("not a mapping of fields")
    known = list(Scenario.__dataclass_fields__)
    _names(fields, known, "a field")
    if missing := [name for name in known if name not in fields]:
        raise AdaptiveKVError(f"{missing[0]} is missing")
    if not isinstance(fields["name"], str) or not fields["name"]:
        raise AdaptiveKVError(f"name is {fields['name']!r}, not a word")
    tokens = fields["tokens"]
    if not isinstance(tokens, Mapping) or set(tokens) != {"min", "max"}:
        raise AdaptiveKVError(f"tokens is {tokens!r}, not {{min: ..., max: ...}}")
    least, most = (_number(tokens[k], f"tokens.{k}", 64, 1e7) for k in ("min", "max"))
    if least > most:
        raise AdaptiveKVError(f"tokens.min is {least:g}, above tokens.max {most:g}")
    return Scenario(
        fields["name"],
        _weights(fields["kinds"], "kinds", list(KINDS)),
        (int(least), int(most)),
        _numbers(fields["quality"], "quality", 1e-6, 100),
        _numbers(fields["budget"], "budget", 0.01, 1),
        _numbers(fields["host"], "host", 0, 1000),
        _numbers(fields["pressure"], "pressure", 0, 1),
        _weights(fields["splits"], "splits", list(SPLITS)),
    )


def _names(found: Mapping[Any, Any], known: list[str], what: str, prefix: str = "") -> None:
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise AdaptiveKVError(f"{prefix}{name} is not {what}; {hint}")


def _number(value: Any, where: str, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise AdaptiveKVError(f"{where} is {value!r}, not a number from {least:g} to {most:g}")
    return float(value)


def _numbers(values: Any, name: str, least: float, most: float) -> list[float]:
    if not isinstance(values, list) or not values:
        raise AdaptiveKVError(f"{name} is {values!r}, not a list of numbers")
    return [_number(value, f"{name}[{i}]", least, most) for i, value in enumerate(values)]


def _weights(values: Any, name: str, known: list[str]) -> dict[str, float]:
    if not isinstance(values, Mapping) or not values:
        raise AdaptiveKVError(f"{name} is {values!r}, not a mapping of names to weights")
    _names(values, known, f"one of {name}", f"{name}.")
    weights = {key: _number(value, f"{name}.{key}", 0, 1e6) for key, value in values.items()}
    if not sum(weights.values()):
        raise AdaptiveKVError(f"{name}: every weight is 0")
    return {key: weight for key, weight in weights.items() if weight}


# -- drawing ---------------------------------------------------------------------------------------------------------


def draw(
    scenario: Scenario, count: int, seed: int = 0, max_tokens: int | None = None, only: Collection[str] | None = None
) -> list[Request]:
    """The first `count` requests of a seed; more of them begin with the same ones.

    max_tokens: of a prompt. only: the splits wanted (None: all); the first request of a split is the same whatever is
    drawn beside it. AdaptiveKVError for a split the scenario has no share of.
    """
    if unknown := set(only or ()) - set(scenario.splits):
        raise AdaptiveKVError(f"split {min(unknown)!r}: scenario {scenario.name} has {', '.join(scenario.splits)}")
    least, most = scenario.tokens
    most = min(most, max_tokens or most)
    least = min(least, most)
    wanted = {split: share for split, share in scenario.splits.items() if only is None or split in only}
    splits = _rota(wanted, np.zeros(len(wanted)))
    kinds: dict[str, Iterator[str]] = {}
    numbers: Counter[str] = Counter()
    drawn: list[Request] = []
    for _ in range(count):
        split = next(splits)
        number, at = numbers[split], SPLITS.index(split)
        numbers[split] += 1
        rng = np.random.default_rng([seed, at, number])
        if split not in kinds:
            phase = np.random.default_rng([seed, SPLITS.index(split)])
            kinds[split] = _rota(scenario.kinds, phase.random(len(scenario.kinds)) * sum(scenario.kinds.values()))
        kind = next(kinds[split])
        key = f"{scenario.name}-{seed}-{split}-{number:05d}"
        choices = documents(kind, scenario.splits)[split] if kind in FROM_DOCUMENTS else [f"{kind}/{key}"]
        if not choices:
            raise AdaptiveKVError(f"scenario: splits.{split} is too small; no document of kind {kind} falls to it")
        document, text_seed = choices[int(rng.integers(len(choices)))], int(rng.integers(2**31))
        position = ((number + 1) * GOLDEN + (seed + at) * GOLDEN**2) % 1  # evenly spread, unlike draws of their own
        tokens = round(least * (most / least) ** position)
        limits = (float(rng.choice(getattr(scenario, name))) for name in ("quality", "budget", "host", "pressure"))
        drawn.append(Request(key, kind, split, document, text_seed, tokens, *limits))
    return drawn


def _rota(weights: Mapping[str, float], credit: np.ndarray) -> Iterator[str]:
    """Names for ever, each as often as its weight says at every point (smooth weighted round-robin)."""
    names, weight, credit = list(weights), np.array(list(weights.values())), credit.copy()
    while True:
        credit += weight
        at = int(credit.argmax())
        credit[at] -= weight.sum()
        yield names[at]


def documents(kind: str, splits: Mapping[str, float]) -> dict[str, list[str]]:
    """Documents of a kind by split; a document's place depends on its name alone, never on a seed."""
    if kind == "code":
        places = {f"python/{file.name}": zlib.crc32(file.name.encode()) / 2**32 for file in _sources()}
    else:
        places = {f"book/{i:02d}": (i + 0.5) * GOLDEN % 1 for i in range(REGIONS)}
    edges = np.cumsum(list(splits.values())) / sum(splits.values())
    at = {name: int(np.searchsorted(edges, place, "right").clip(0, len(edges) - 1)) for name, place in places.items()}
    return {split: [name for name in at if at[name] == i] for i, split in enumerate(splits)}


@lru_cache
def _sources() -> list[Path]:
    """Python's own modules of 30 kB or more."""
    return sorted(f for f in Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py") if f.stat().st_size >= 30_000)


@lru_cache
def region(document: str) -> str:
    """The text of a document: book/NN or python/NAME.py."""
    place, name = document.split("/")
    if place == "python":
        return next(file for file in _sources() if file.name == name).read_text(encoding="utf-8")
    paragraphs = tasks.haystack().split("\n\n")
    ends = np.cumsum([len(p) for p in paragraphs])
    part = (ends - 1) * REGIONS // int(ends[-1])
    return "\n\n".join(p for p, at in zip(paragraphs, part, strict=True) if at == int(name))


# -- writing ---------------------------------------------------------------------------------------------------------


def write(request: Request, tokenizer: Any) -> Prompt:
    """The request's text and tokens. Prose and code are continued as they are; the rest is asked in a chat."""
    rng = np.random.default_rng(request.seed)
    if request.kind in TASKS:
        task = tasks.make(TASKS[request.kind], request.tokens, tokenizer, request.seed, region(request.document))
        document, rest = task.ids(tokenizer)
        return Prompt(document + rest, f"{task.context}\n\n{task.question}")
    if request.kind in FROM_DOCUMENTS:
        text = _passage(region(request.document), request.tokens, tokenizer, rng)
        return Prompt(tokenizer(text, verbose=False).input_ids[: request.tokens], text)
    record, title = LINES[request.kind]
    lines, questions = _fill(record, request.tokens - 80, 6 if request.kind == "dialogue" else 1, tokenizer, rng)
    question = questions[int(rng.integers(len(questions)))]
    messages = [*lines, question] if request.kind == "dialogue" else ["\n".join([title, "", *lines, "", question])]
    if not tokenizer.chat_template:
        text = "\n".join(messages)
        return Prompt(tokenizer(text, verbose=False).input_ids, text)
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    return Prompt(list(ids), "".join(messages))


def _passage(text: str, tokens: int, tokenizer: Any, rng: np.random.Generator) -> str:
    """About `tokens` tokens of the text, from the start of a line."""
    starts = [0] + [i + 1 for i, c in enumerate(text) if c == "\n" and i + tokens * 5 < len(text)]
    at = starts[int(rng.integers(len(starts)))]
    offsets = tokenizer(text[at : at + tokens * 6], return_offsets_mapping=True, verbose=False).offset_mapping
    return text[at : at + offsets[min(tokens, len(offsets)) - 1][1]]


Lines = tuple[list[str], list[str]]  # and questions that they answer
Record = Callable[[np.random.Generator], tuple[list[str], str]]  # some lines, one question


def _fill(record: Record, tokens: int, turn: int, tokenizer: Any, rng: np.random.Generator) -> Lines:
    """Records until there are about `tokens` tokens, `turn` more for each line: all their lines and questions."""
    lines: list[str] = []
    questions: list[str] = []
    while True:
        made, question = record(rng)
        tokens -= sum(len(ids) + turn for ids in tokenizer(made, verbose=False).input_ids)
        if lines and tokens < 0:
            return lines, questions
        lines += made
        questions.append(question)


NAMES = ["Amara", "Bjorn", "Chen", "Dalia", "Emeka", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Kavya", "Lucia"]
PLACES = ["Lisbon", "Oslo", "Nairobi", "Kyoto", "Lima", "Austin", "Delhi", "Perth", "Quito", "Riga", "Sofia", "Tunis"]
GOODS = ["lamp", "kettle", "ladder", "violin", "anchor", "blanket", "compass", "drill", "easel", "funnel", "mirror"]


def _words(rng: np.random.Generator) -> tuple[str, str, str]:
    name, place, good = (words[int(rng.integers(len(words)))] for words in (NAMES, PLACES, GOODS))
    return name, place, good


def _table(rng: np.random.Generator) -> tuple[list[str], str]:
    _, place, good = _words(rng)
    code, price = f"{good}-{rng.integers(100, 1000)}", f"{rng.integers(100, 99999) / 100:.2f}"
    line = f"| {code} | {place} | {rng.integers(0, 500)} | {price} |"
    return [line], f"What is the price of {code}? Answer with the number only."


def _json(rng: np.random.Generator) -> tuple[list[str], str]:
    name, place, good = _words(rng)
    number = int(rng.integers(10000, 99999))
    order = {"order": number, "buyer": name, "item": good, "count": int(rng.integers(1, 40)), "ship_to": place}
    return [json.dumps(order)], f"Where is order {number} shipped to, and who bought it?"


def _sum(rng: np.random.Generator) -> tuple[list[str], str]:
    a, b = (int(x) for x in rng.integers(10, 10000, 2))
    return [f"{a} + {b} = {a + b}" if rng.integers(2) else f"{a} - {b} = {a - b}"], f"What is {a} and {b} in the list?"


def _talk(rng: np.random.Generator) -> tuple[list[str], str]:
    (name, place, good), hour, count = _words(rng), rng.integers(8, 20), rng.integers(2, 90)
    said, answered, question = TALK[int(rng.integers(len(TALK)))].format(**locals()).split("\n")
    return [said, answered], question


TALK = (
    """Please remind me: {name} arrives from {place} at {hour}:15 and brings {count} of the {good}s.
Noted. {name} comes from {place} at {hour}:15, with {count} {good}s. Shall I tell anyone else?
When does {name} arrive from {place}?""",
    """I told {name} that the {good} we ordered is stuck in {place}. What could I do next?
Call the carrier in {place}, ask for case {count}{hour}, and offer {name} a refund for the {good}.
Which case number did you give me for the {good} in {place}?""",
    """How would you describe {place} to {name}, who has never travelled further than the next village?
I would begin with the smell of the harbour, then the market where a {good} costs {count} coins, and say \
that the last tram leaves at {hour}:40, so that nobody has to walk home.
What does a {good} cost at the market in {place}?""",
)


LINES: dict[str, tuple[Record, str]] = {
    "table": (_table, "Stock of all shops.\n\n| item | city | stock | price |\n| --- | --- | --- | --- |"),
    "json": (_json, "These are the orders of the week, one JSON object a line."),
    "numbers": (_sum, "A list of sums and differences."),
    "dialogue": (_talk, ""),
}
FROM_DOCUMENTS = ("prose", "code", *TASKS)
KINDS = (*FROM_DOCUMENTS, *LINES)
