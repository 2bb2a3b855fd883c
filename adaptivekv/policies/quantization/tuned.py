"""More bits for the layers that need them (KVTuner, arXiv 2502.04420), measured on the request itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptivekv.kernels import hadamard
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.formats import CODES, Format
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.policies.base import share, whole
from adaptivekv.policies.eviction.observed import logits
from adaptivekv.policies.quantization.base import Mixed, demotable


@dataclass(frozen=True)
class Tuned(Mixed):
    """The share `layers` of the layers, those that suffer most from `low`, in `high`; the others in `low`.

    When a request's pages first settle, at the end of its prompt, each layer's attention output for the last `window`
    queries is worked out with its pages as they are and as `low` would leave them; the relative error ranks the layers.
    Later pages follow their layer. Without queries (a prompt too short to leave settled pages), the error of the keys
    and values themselves ranks. Layers of one shape compete with each other, so the bytes are known beforehand.

    Differs from the paper: it searches formats per layer offline, on calibration data and by the model's accuracy, with
    keys and values apart; this is its sensitivity measure alone, for this request, between two formats.
    """

    layers: float
    high: str = "int4"
    low: str = "k4v2"
    window: int = 64
    sinks: int = 4

    name: ClassVar[str] = "tuned"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.04420"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    formula: ClassVar[str] = "layers x high + (1 - layers) x low"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", share("layers", self.layers))
        super().__post_init__()
        whole("window", self.window, 1)  # its queries are needed

    def apply(self, sequence: Sequence) -> None:
        (high, low), select = self.formats, self.settled(sequence)
        if not any(x.any() for x in select):
            return
        wide = self._wide(sequence, select)
        for fmt, mine in ((low, ~wide), (high, wide)):
            chosen = [x & here for x, here in zip(select, mine, strict=True)]
            sequence.convert(demotable(sequence, chosen, fmt), fmt)

    def _wide(self, sequence: Sequence, select: list[np.ndarray]) -> np.ndarray:
        """Which layers get the high format, bool [layers]."""
        high, low = (CODES[fmt.name] for fmt in self.formats)
        codes = [sequence.pool.code[pages] for pages in sequence.pages()]
        if any((code == low).any() for code in codes):  # ranked before: the pages say how
            return np.array([bool((code == high).any()) for code in codes])
        shapes, wide = sequence.pool.layers, np.zeros(len(codes), bool)
        error = np.array([self.error(sequence, layer, pages) for layer, pages in enumerate(select)])
        for shape in set(shapes):
            alike = np.array([i for i, s in enumerate(shapes) if s == shape])
            best = np.argsort(-error[alike], kind="stable")
            wide[alike[best[: round(self.layers * len(alike))]]] = True
        return wide

    def error(self, sequence: Sequence, layer: int, select: np.ndarray) -> float:
        """How much the selected pages (bool [H, P]) in `low` change attention: squared error / squared output."""
        queries, low = None, self.formats[-1]
        if sequence.ring and sequence.ring_fill:
            heads = len(sequence.ids[layer])
            queries = sequence.observed(layer)[:, -self.window :].float().unflatten(0, (heads, -1))  # [H, G, W, d]
        scores: Iterator[Tensor] = logits(sequence, layer, self.window) if queries is not None else iter(())
        tail = sequence.tail(layer)[1].float()
        wrong = total = 0.0
        for head, chosen in enumerate(select):
            k, v = _head(sequence, layer, head)
            k_low, v_low = _narrowed(sequence, layer, head, chosen, low, k, v)
            if queries is None:
                pairs = [(k, k_low), (v, v_low)]
            else:
                seen = next(scores)  # [G, W, P * 64 + T]
                blurred = seen.clone()
                blurred[..., : len(k)] += queries[head] @ (k_low - k).T * sequence.scaling
                out, out_low = (
                    weights.softmax(-1) @ torch.cat([value, tail[head]])
                    for weights, value in ((seen, v), (blurred, v_low))
                )
                pairs = [(out, out_low)]
            for right, other in pairs:
                wrong += float((other - right).square().sum())
                total += float(right.square().sum())
        return wrong / max(total, 1e-30)

    def columns(self, shape: LayerShape, layers: int, dtype: torch.dtype, n: int) -> list[tuple[int, list[int]]]:
        wide = round(self.layers * layers)
        return [
            (some, [shape.heads * fmt.bytes(shape.k_dim, shape.v_dim, dtype)] * n)
            for some, fmt in zip((wide, layers - wide), self.formats, strict=True)
            if some
        ]

    def features(self) -> dict[str, float]:
        return self.mixture(self.layers)


def _head(sequence: Sequence, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a head's sealed slots in table order, float32 [P * 64, d] each; unused slots are 0."""
    ids, pool, shape = sequence.ids[layer][head], sequence.pool, sequence.pool.layers[layer]
    k, v = (torch.zeros(len(ids), PAGE, dim, device=pool.device) for dim in (shape.k_dim, shape.v_dim))
    for group in pool.groups(ids[ids >= 0]):
        at = np.flatnonzero(np.isin(ids, group))
        where = torch.from_numpy(at).to(k.device)
        k[where], v[where] = pool.read(ids[at])
    used = _used(sequence, ids).to(k.device)
    return tuple(x.masked_fill_(~used, 0.0).flatten(0, 1) for x in (k, v))  # type: ignore[return-value]


def _used(sequence: Sequence, ids: np.ndarray) -> Tensor:
    """bool [P, 64, 1]: which slots of a head's pages hold a token."""
    count = np.where(ids >= 0, sequence.pool.count[ids], 0)
    return torch.from_numpy(np.arange(PAGE) < count[:, None])[..., None]


def _narrowed(
    sequence: Sequence, layer: int, head: int, chosen: np.ndarray, fmt: Format, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """A head's keys and values as they would be with the chosen pages in another format."""
    ids = sequence.ids[layer][head]
    at = torch.from_numpy(np.flatnonzero(chosen)).to(k.device)
    used = _used(sequence, ids[chosen]).to(k.device)
    out = []
    for x, codec in ((k, fmt.k), (v, fmt.v)):
        pages, dim = x.view(len(ids), PAGE, -1).clone(), x.shape[1]
        part = hadamard(pages[at]) if fmt.rotate else pages[at]
        raw = codec.encode(part, sequence.pool.dtype, used.flatten(1).sum(1))
        part = codec.decode(raw, dim, sequence.pool.dtype)
        pages[at] = (hadamard(part) if fmt.rotate else part).masked_fill_(~used, 0.0)
        out.append(pages.flatten(0, 1))
    return out[0], out[1]
