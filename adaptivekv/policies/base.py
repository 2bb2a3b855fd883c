"""What a stage is: one transformation of a request's cache, declared so that plans, docs and tests can read it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.sequence import Sequence

Positions = TypeVar("Positions", np.ndarray, torch.Tensor)
KINDS = ("evict", "quantize", "offload", "retrieve")
"""In the order in which a plan applies them."""

NEEDS = {
    "queries": "the prompt's last queries (the observation ring)",
    "mass": "the attention that pages receive",
    "recall": "the prompt read a second time (`adaptivekv.recall`)",
    "surrogate": "a map fitted once for the model (`adaptivekv calibrate`)",
}
"""What a stage may need beside the cache itself, as refusals say it."""


def share(name: str, value: object) -> float:
    """A share above 0 and at most 1, or an error naming the parameter."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise AdaptiveKVError(f"{name}={value} must be a share above 0 and at most 1")
    return float(value)


def whole(name: str, value: object, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < least:
        raise AdaptiveKVError(f"{name}={value} must be a whole number of at least {least}")
    return int(value)


def choice(name: str, value: object, *options: str) -> None:
    if value not in options:
        raise AdaptiveKVError(f"{name}={value!r} must be {' or '.join(options)}")


@dataclass(frozen=True)
class Stage:
    """Base of all stages; subclasses are frozen dataclasses whose fields are the stage's parameters.

    The first field, if it has no default, is written without its name: `snapkv(0.5, window=64)`.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()  # of NEEDS
    lossy: ClassVar[bool] = True
    undoable: ClassVar[bool] = False
    formula: ClassVar[str] = ""  # bytes, in words

    def apply(self, sequence: Sequence) -> None:
        """Bring the sealed pages into the state this stage asks for; safe to repeat as the request grows."""

    @property
    def queries(self) -> int:
        """How many of a prompt's last queries it wants to see."""
        return getattr(self, "window", 0) if "queries" in self.needs else 0

    def features(self) -> dict[str, float]:
        """What a selector sees of this stage (features/schema.py PLAN_NAMES)."""
        return {}

    def __str__(self) -> str:
        args = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            text = f"{value:g}" if isinstance(value, float) else str(value).lower()
            if field.default is dataclasses.MISSING:
                args.append(text)
            elif value != field.default:
                args.append(f"{field.name}={text}")
        return self.name + (f"({', '.join(args)})" if args else "")


def parameters(stage: type[Stage]) -> dict[str, Any]:
    """A stage's parameters with their defaults (None: must be given)."""
    return {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(stage)}


def page_span(sequence: Sequence, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last position of each page, [H, P] each (absent pages: 0)."""
    ids, pool = sequence.ids[layer], sequence.pool
    return pool.first[ids], np.where(ids >= 0, pool.last[ids], 0)


def settled(sequence: Sequence, layer: int, window: int, sinks: int) -> np.ndarray:
    """Pages a lossy stage may touch: none of the first `sinks` tokens, none of the last `window`. Bool [H, P]."""
    first, last = page_span(sequence, layer)
    return (sequence.ids[layer] >= 0) & (first >= sinks) & (last < sequence.length - window)


def worth(sequence: Sequence, layer: int) -> np.ndarray:
    """What a page is worth to attention, [H, P]: its mass where measured, else newer is better (below any mass)."""
    _, last = page_span(sequence, layer)
    return np.where(np.isnan(sequence.mass[layer]), last / max(1, sequence.length) - 1.0, sequence.mass[layer])


def protected(sequence: Sequence, pos: Positions, sinks: int, window: int) -> Positions:
    """Which positions no eviction may take, bool: sinks, the recent window and the request's protected spans."""
    out = (pos < sinks) | (pos >= sequence.length - window)
    for start, end in sequence.protected:
        out |= (pos >= start) & (pos < end)
    return out
