"""Plans: ordered pipelines of stages, written `snapkv(0.5) | k4v2 | offload(0.25)`; the empty plan is `full`."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels.codec import PAGE, UNIT
from adaptivekv.memory.formats import FORMATS
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.policies import KINDS, STAGES, Stage
from adaptivekv.policies.named import NAMED
from adaptivekv.policies.quantization.base import column

_STAGE = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\(([^()]*)\))?\s*\Z")


@dataclass(frozen=True)
class Plan:
    """Stages in the order evict, quantize, offload, retrieve; at most one of each kind.

    `Plan.parse(str(plan)) == plan` for every plan.
    """

    stages: tuple[Stage, ...] = ()

    @classmethod
    def parse(cls, text: str | Plan) -> Plan:
        """Read a plan, or the name of one (`policies/named.py`).

        Raises AdaptiveKVError naming the position (counted from 1) and the nearest valid name.
        """
        if isinstance(text, Plan):
            return text
        if text.strip() in NAMED:
            text = NAMED[text.strip()].plan
        if text.strip() == "full":
            return cls()
        stages, at = [], 0
        for part in text.split("|"):
            where = f"plan {text!r}, position {at + len(part) - len(part.lstrip()) + 1}"
            stages.append(_stage(part, where))
            at += len(part) + 1
        for before, after in pairwise(stages):
            if KINDS.index(before.kind) >= KINDS.index(after.kind):
                raise AdaptiveKVError(
                    f"plan {text!r}: {after.name} ({after.kind}) cannot follow {before.name} ({before.kind}); "
                    f"the order is {', '.join(KINDS)}, at most one of each"
                )
        return cls(tuple(stages))

    def __str__(self) -> str:
        return " | ".join(map(str, self.stages)) or "full"

    def stage(self, kind: str) -> Any:
        """The stage of a kind, or None."""
        return next((stage for stage in self.stages if stage.kind == kind), None)

    def without(self, kind: str) -> Plan:
        """The other stages."""
        return Plan(tuple(stage for stage in self.stages if stage.kind != kind))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(stage.needs for stage in self.stages))

    @property
    def lossy(self) -> bool:
        return any(stage.lossy for stage in self.stages)

    @property
    def window(self) -> int:
        """Queries the observation ring must hold for this plan (0: no ring)."""
        return max((stage.queries for stage in self.stages), default=0)

    def features(self) -> dict[str, float]:
        """Plan features as the selector sees them (features/schema.py)."""
        out = {"keep": 1.0, "k_bits": 16.0, "v_bits": 16.0, "device_share": 1.0, "read_share": 1.0}
        out |= dict.fromkeys(("by_recency", "by_window", "by_mass", "by_recall", "log2_pool", "log2_recent"), 0.0)
        for stage in self.stages:
            out |= stage.features()
        return out

    def apply(self, sequence: Sequence) -> None:
        """Bring a request whose prompt has ended into this plan's state."""
        sequence.retrieve = None
        for stage in self.stages:
            stage.apply(sequence)

    def maintain(self, sequence: Sequence) -> None:
        """Restore the plan's state after pages were sealed: what grew old is quantized, offloaded, evicted."""
        for stage in self.stages:
            if stage.kind != "evict" or getattr(stage, "growing", False):
                stage.apply(sequence)

    def beside(self, layers: list[LayerShape], dtype: torch.dtype) -> int:
        """Device bytes that its pages need beside them, however many they are: bases."""
        quantize = self.stage("quantize")
        return sum(quantize.beside(s, n, dtype) for s, n in Counter(layers).items()) if quantize else 0

    def estimate(self, layers: list[LayerShape], dtype: torch.dtype, tokens: int) -> dict[str, int]:
        """Bytes of a request of `tokens` prompt tokens right after its prefill.

        Returns {"full": all tokens native, "device": ..., "host": ..., "disk": ...}; the device part counts pages, the
        open tail, page bounds and bases, not the observation ring, which is given back when the prompt has ended.
        """
        evict, quantize, offload, retrieve = (self.stage(kind) for kind in KINDS)
        native, tail = FORMATS["native"], tokens % PAGE
        sealed = tokens - tail
        if evict:
            sealed = min(sealed, max(0, round(evict.keep * tokens) - tail))
        pages = -(-sealed // PAGE)
        ragged = bool(evict) and (evict.heads, evict.layers) != ("uniform", "uniform")
        if ragged:  # every head ends in a page of its own
            pages = min(pages + 1, (tokens - tail) // PAGE)
        # pages of the newest and the first tokens are guarded; after eviction the newest ones are still contiguous
        apart = 0
        if quantize:
            recent = -(-max(0, quantize.window - tail) // PAGE) + ragged if sealed else 0
            apart = min(pages, recent + (1 if quantize.sinks else 0))
        held: list[tuple[int, np.ndarray]] = []  # how many layers, and bytes of keys and values of one's columns
        beside = self.beside(layers, dtype) if pages > apart else 0
        for shape, alike in Counter(layers).items():
            settled, kept = pages - apart, column(shape, quantize.guarded if quantize else native, dtype, apart)
            packed = [(alike, column(shape, native, dtype, settled))]
            if quantize:
                packed = quantize.columns(shape, alike, dtype, settled)
            held += [(count, np.concatenate([kept, columns])) for count, columns in packed]
            if retrieve and retrieve.by == "bounds":
                beside += -(-2 * shape.k_dim * dtype.itemsize // UNIT) * UNIT * pages * shape.heads * alike
        total = sum(count * int(columns.sum()) for count, columns in held)
        stays, host, disk = offload.placed(held) if offload else (total, 0, 0)
        return {
            "full": sum(s.slot_elements for s in layers) * dtype.itemsize * tokens,
            "device": stays + beside + Sequence.fixed_bytes(layers, dtype, 0),
            "host": host,
            "disk": disk,
        }


def _stage(part: str, where: str) -> Stage:
    match = _STAGE.match(part)
    if not match:
        raise AdaptiveKVError(f"{where}: {part.strip()!r} is not a stage; write name or name(share, option=value)")
    name, args = match.groups()
    if name not in STAGES:
        raise AdaptiveKVError(f"{where}: unknown stage {name!r}{_nearest(name, [*STAGES, 'full', *NAMED])}")
    kind = STAGES[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for i, arg in enumerate(args.split(",") if args and args.strip() else []):
        key, given, value = arg.rpartition("=")
        key = key.strip() if given else next(iter(fields)) if i == 0 else ""
        if key not in fields:
            raise AdaptiveKVError(
                f"{where}: {name} has no parameter {key or arg.strip()!r}{_nearest(key, list(fields))}"
            )
        if key in values:
            raise AdaptiveKVError(f"{where}: {name} is given {key} twice")
        text = isinstance(fields[key].default, str)  # a word, which the stage checks
        values[key] = value.strip() if text else _value(value.strip(), f"{where}: {name}({key})")
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise AdaptiveKVError(f"{where}: {name} needs {missing[0]}, as in {name}(0.5)")
    try:
        return kind(**values)
    except AdaptiveKVError as error:
        raise AdaptiveKVError(f"{where}: {name}: {error}") from None


def _value(text: str, where: str) -> float | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        raise AdaptiveKVError(f"{where}: {text!r} is not a number") from None


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, 1, 0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"
