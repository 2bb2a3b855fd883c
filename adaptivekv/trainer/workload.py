"""Scenarios, read from YAML, and the requests drawn from them by a seed.

Documents are in sources.py; writing.py makes a request's text.
"""

from __future__ import annotations

import difflib
import math
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import adaptivekv
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import sources
from adaptivekv.trainer.sources import GOLDEN
from adaptivekv.trainer.trajectories import SPLITS
from adaptivekv.trainer.writing import FROM_DOCUMENTS, KINDS, Prompt, write

__all__ = ["SPLITS", "Prompt", "Request", "Scenario", "draw", "load", "parse", "write"]

FOLDER = Path(adaptivekv.__file__).parents[1] / "experiments" / "scenarios"
SILVER = math.sqrt(2) - 1  # like GOLDEN: few documents come twice before all have come once
CHARACTERS = 5  # of a document for each token wanted of it; more than nearly all text has


@dataclass(frozen=True)
class Request:
    """One request to replay, drawn but not yet written: `write` makes the same text of it everywhere."""

    id: str
    scenario: str
    kind: str
    split: str
    document: str  # requests of one document are of one split
    seed: int
    tokens: int  # of the first turn's prompt, about
    new: int  # tokens of each answer
    turns: int
    quality: float  # SLO, nats per token
    budget: float  # share of the full cache, 1.0: no limit
    host: float  # free host bytes, in full caches
    link: float  # GB/s between host and device memory
    pressure: float  # share of the device budget held by other requests


@dataclass(frozen=True)
class Scenario:
    """A mix of requests; `load` reads one from YAML. Units are those of `Request`."""

    name: str
    kinds: dict[str, float]  # weights
    tokens: tuple[int, int]  # least and most
    new: tuple[int, int]
    turns: tuple[int, int]
    quality: list[float]
    budget: list[float]
    host: list[float]
    link: list[float]
    pressure: list[float]
    splits: dict[str, float]
    about: str = ""


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
    if missing := [name for name in known if name not in fields and name != "about"]:
        raise AdaptiveKVError(f"{missing[0]} is missing; mixed.yaml shows all fields")
    about = fields.get("about", "")
    if not isinstance(fields["name"], str) or not fields["name"]:
        raise AdaptiveKVError(f"name is {fields['name']!r}, not a word")
    if not isinstance(about, str):
        raise AdaptiveKVError(f"about is {about!r}, not a line of text")
    return Scenario(
        fields["name"],
        _weights(fields["kinds"], "kinds", list(KINDS)),
        _range(fields["tokens"], "tokens", 64, 10**7),
        _range(fields["new"], "new", 2, 256),
        _range(fields["turns"], "turns", 1, 8),
        _numbers(fields["quality"], "quality", 1e-6, 100),
        _numbers(fields["budget"], "budget", 0.01, 1),
        _numbers(fields["host"], "host", 0, 1000),
        _numbers(fields["link"], "link", 0.001, 10_000),
        _numbers(fields["pressure"], "pressure", 0, 1),
        _weights(fields["splits"], "splits", list(SPLITS)),
        about,
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


def _range(value: Any, name: str, least: int, most: int) -> tuple[int, int]:
    if not isinstance(value, Mapping) or set(value) != {"min", "max"}:
        raise AdaptiveKVError(f"{name} is {value!r}, not {{min: ..., max: ...}}")
    low, high = (_number(value[end], f"{name}.{end}", least, most) for end in ("min", "max"))
    for end, number in (("min", low), ("max", high)):
        if number != int(number):
            raise AdaptiveKVError(f"{name}.{end} is {number:g}, not a whole number")
    if low > high:
        raise AdaptiveKVError(f"{name}.min is {low:g}, above {name}.max {high:g}")
    return int(low), int(high)


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
    drawn beside it. AdaptiveKVError for a split the scenario has no share of, and where there are no documents.
    """
    if unknown := set(only or ()) - set(scenario.splits):
        raise AdaptiveKVError(f"split {min(unknown)!r}: scenario {scenario.name} has {', '.join(scenario.splits)}")
    wanted = {split: share for split, share in scenario.splits.items() if only is None or split in only}
    splits = _rota(wanted, np.zeros(len(wanted)))
    documents = {
        kind: sources.by_split(FROM_DOCUMENTS[kind], scenario.splits)
        for kind in scenario.kinds
        if kind in FROM_DOCUMENTS
    }
    name = zlib.crc32(scenario.name.encode())  # no text of one scenario comes in another
    kinds: dict[str, Iterator[str]] = {}
    start: dict[str, float] = {}  # in the documents of a split
    numbers: Counter[str] = Counter()
    used: Counter[tuple[str, str]] = Counter()
    drawn: list[Request] = []
    for _ in range(count):
        split = next(splits)
        number, at = numbers[split], SPLITS.index(split)
        numbers[split] += 1
        if split not in kinds:
            phase = np.random.default_rng([seed, at, name])
            kinds[split] = _rota(scenario.kinds, phase.random(len(scenario.kinds)) * sum(scenario.kinds.values()))
            start[split] = phase.random()
        kind = next(kinds[split])
        key = f"{scenario.name}-{seed}-{split}-{number:05d}"
        rng = np.random.default_rng([seed, at, number, name])
        position = ((number + 1) * GOLDEN + (seed + at) * GOLDEN**2) % 1  # evenly spread, unlike draws of their own
        tokens = _between(scenario.tokens, position, max_tokens)
        document: str | None = f"{kind}/{key}"
        if kind in documents:
            document = _document(documents[kind][split], tokens, (start[split] + used[split, kind] * SILVER) % 1)
            used[split, kind] += 1
        if not document:
            raise AdaptiveKVError(f"scenario: splits.{split} is too small; no document of kind {kind} falls to it")
        text_seed, new = int(rng.integers(2**31)), _between(scenario.new, rng.random())
        turns = int(rng.integers(scenario.turns[0], scenario.turns[1] + 1))
        limits = {limit: float(rng.choice(getattr(scenario, limit))) for limit in LIMITS}
        drawn.append(
            Request(key, scenario.name, kind, split, document, text_seed, tokens, new=new, turns=turns, **limits)
        )
    return drawn


LIMITS = ("quality", "budget", "host", "link", "pressure")


def _between(ends: tuple[int, int], position: float, cap: int | None = None) -> int:
    """A whole number at `position`, 0 to 1, on a log scale; `cap` lowers both ends."""
    least, most = (min(end, cap or end) for end in ends)
    return round(least * (most / least) ** position)


def _document(sizes: Mapping[str, int], tokens: int, position: float) -> str | None:
    """The one at `position`, 0 to 1, among those with text enough. None: there are no documents.

    Where none has enough it is the longest, whose prompt is then shorter.
    """
    enough = [name for name, size in sizes.items() if size >= CHARACTERS * tokens]
    return enough[int(position * len(enough))] if enough else max(sizes, key=lambda name: sizes[name], default=None)


def _rota(weights: Mapping[str, float], credit: np.ndarray) -> Iterator[str]:
    """Names for ever, each as often as its weight says at every point (smooth weighted round-robin)."""
    names, weight, credit = list(weights), np.array(list(weights.values())), credit.copy()
    while True:
        credit += weight
        at = int(credit.argmax())
        credit[at] -= weight.sum()
        yield names[at]
