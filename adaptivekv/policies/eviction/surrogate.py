"""What a second reading of a prompt would find, foretold from its keys and values (KVzap, arXiv 2601.07891).

One linear map a layer, fitted once for a model by `adaptivekv calibrate`: from what all heads hold of a token and where
it stands in its prompt to the logarithm of the squared attention that the repeating tokens would pay it in each head.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.paths import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 2
SHIPPED = Path(__file__).parents[2] / "champion"
NAME = "surrogate"  # of its credits in `Sequence.credits`
PARTS = ("mean", "weight", "bias")
PLACE = 3  # inputs that say where a token stands
log = logging.getLogger("adaptivekv")


@dataclass(eq=False)
class Surrogate:
    """mean: a layer [D], what an absent key or value counts as; weight: [D, H], bias: [H]; D: see `inputs`."""

    mean: list[np.ndarray]
    weight: list[np.ndarray]
    bias: list[np.ndarray]
    mark: np.ndarray  # of the model it was fitted for (`mark_of`)
    _there: dict[torch.device, list[list[Tensor]]] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> list[list[Tensor]]:
        """Mean, weight and bias, layer by layer; they go to a device once."""
        if device not in self._there:
            self._there[device] = [[torch.from_numpy(x).to(device) for x in getattr(self, name)] for name in PARTS]
        return self._there[device]

    def predict(self, sequence: Sequence, layer: int, start: int, end: int) -> Tensor:
        """Log credit of the sealed tokens at positions from `start` to before `end`: float32 [H, end - start]."""
        mean, weight, bias = (part[layer] for part in self.on(sequence.pool.device))
        parts = [(inputs(sequence, layer, a, b, mean) - mean) @ weight + bias for a, b in blocks(sequence, start, end)]
        return torch.cat(parts).T

    def save(self, path: Path) -> None:
        """All of it or nothing. OSError where there is no room or no right to write."""
        arrays = {f"{name}.{layer}": part for name in PARTS for layer, part in enumerate(getattr(self, name))}
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, version=VERSION, mark=self.mark, **arrays)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Surrogate:
        """Errors: AdaptiveKVError, one line that names the file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if (version := int(file["version"])) != VERSION:
                    raise ValueError(f"version {version}, this program reads {VERSION}")
                layers = range(sum(name.startswith("bias.") for name in file.files))
                mean, weight, bias = ([file[f"{name}.{i}"].astype(np.float32) for i in layers] for name in PARTS)
                mark = file["mark"].astype(np.float32)
            if not all(np.isfinite(part).all() for part in [*mean, *weight, *bias, mark]):
                raise ValueError("it holds NaN")
            if any(w.shape != (len(m), len(b)) for m, w, b in zip(mean, weight, bias, strict=True)):
                raise ValueError("its parts do not fit each other")
        except Exception as error:  # of damaged zip files and arrays nearly any can come
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise AdaptiveKVError(f"surrogate {path}: cannot be read ({why}); delete it and calibrate again") from None
        return cls(mean, weight, bias, mark)

    def suits(self, mark: np.ndarray, shapes: list[LayerShape]) -> bool:
        """Whether it was fitted for a model with this mark and these layers, whatever their precision."""
        wanted = [(width(s), s.heads) for s in shapes]
        same = [part.shape for part in self.weight] == wanted and self.mark.shape == mark.shape
        return same and np.allclose(self.mark, mark, rtol=0.05, atol=1e-3)


def find(model: PreTrainedModel, shapes: list[LayerShape]) -> Surrogate | None:
    """The surrogate of this model: the newest that `adaptivekv calibrate` wrote, else one that ships; None: there is
    none. A damaged file is one warning."""
    if model.get_input_embeddings().weight.is_meta:  # weights that are loaded step by step: nothing to know it by
        return None
    own = sorted(folder_of_own().glob("kvzap-*.npz"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    mark = mark_of(model)
    for path in [*own, *sorted(SHIPPED.glob("kvzap-*.npz"))]:
        made = _loaded(path, path.stat().st_mtime_ns)
        if made and made.suits(mark, shapes):
            return made
    return None


@lru_cache(maxsize=16)
def _loaded(path: Path, changed: int) -> Surrogate | None:
    """The file as it was `changed` (nanoseconds); every cache asks."""
    try:
        return Surrogate.load(path)
    except AdaptiveKVError as error:
        log.warning(str(error))
        return None


def folder_of_own() -> Path:
    """Where `adaptivekv calibrate` writes."""
    return cache_root() / "surrogates"


def mark_of(model: PreTrainedModel) -> np.ndarray:
    """What tells models apart whatever their precision: some of the embedding, float32 [256]."""
    weight = model.get_input_embeddings().weight
    return weight[:: max(1, len(weight) // 16)][:16, :16].detach().float().cpu().numpy().ravel()


def foretell(sequence: Sequence, surrogate: Surrogate) -> None:
    """Give a credit to the sealed tokens that have none yet (`Sequence.credits`)."""
    old, end = sequence.credits.get(NAME), sequence.length - sequence.tail_len
    if (known := old[0].shape[1] if old else 0) < end:
        new = [surrogate.predict(sequence, layer, known, end) for layer in range(len(sequence.ids))]
        for credit, found in zip(sequence.credit(NAME, end), new, strict=True):
            torch.from_numpy(credit)[:, known:].copy_(found)


def blocks(sequence: Sequence, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Positions in ranges of whole pages: one range decoded takes about the staging allowance."""
    most = max(s.slot_elements for s in sequence.pool.layers)
    step = max(1, sequence.pool.staging_bytes // (8 * most * PAGE)) * PAGE
    for a in range(start, end, step):
        yield a, min(a + step, end)


def inputs(sequence: Sequence, layer: int, start: int, end: int, absent: Tensor) -> Tensor:
    """Of the positions from `start` to before `end` the keys and values of all heads and their norms, and the
    logarithms of how many tokens stand up to there, from there on and in all of the prompt: float32 [n, D].

    absent: what stands for what a head no longer holds, [D].
    """
    at, tokens = torch.arange(start, end, device=absent.device), max(sequence.length, sequence.prompt)
    place = torch.stack([at + 1, tokens - at, torch.full_like(at, tokens)], 1).log()
    return torch.cat([held(sequence, layer, start, end, absent[:-PLACE]), place], 1)


def width(shape: LayerShape) -> int:
    """D of `inputs`."""
    return shape.heads * (shape.k_dim + shape.v_dim + 2) + PLACE


def held(sequence: Sequence, layer: int, start: int, end: int, absent: Tensor) -> Tensor:
    """Keys, values and norms, as `inputs` gives them."""
    ids, pool = sequence.ids[layer], sequence.pool
    head, column = np.nonzero((ids >= 0) & (pool.first[ids] < end) & (pool.last[ids] >= start))
    pages = ids[head, column]
    out = absent.repeat(end - start, 1).view(end - start, len(ids), -1)
    for at in pool.kinds(pages):
        some, pos = pages[at], pool.pos[pages[at]] - start  # [n], [n, 64]
        here = (np.arange(PAGE) < pool.count[some][:, None]) & (pos >= 0) & (pos < end - start)
        rows = torch.from_numpy(np.flatnonzero(here)).to(pool.device)
        cells = torch.from_numpy(pos[here] * len(ids) + np.repeat(head[at], here.sum(1))).to(pool.device)
        k, v = pool.read(some)
        known = torch.cat([k, v, k.norm(dim=-1, keepdim=True), v.norm(dim=-1, keepdim=True)], -1)
        out.view(-1, out.shape[-1])[cells] = known.flatten(0, 1)[rows]
    return out.flatten(1)
