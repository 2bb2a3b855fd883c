"""What a second reading of a prompt would find, foretold from its keys and values (KVzap, arXiv 2601.07891).

One linear map a layer, fitted once for a model by `adaptivekv calibrate`: from what all heads hold of a token to the
logarithm of the attention that its most eager repeating token would pay it in each head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.paths import cache_root

VERSION = 1
SHIPPED = Path(__file__).parents[2] / "champion"
NAME = "surrogate"  # of its credits in `Sequence.credits`


@dataclass(frozen=True)
class Surrogate:
    """mean: a layer [D], what an absent key or value counts as; weight: [D, H], bias: [H]; D = H * (k_dim + v_dim)."""

    mean: list[np.ndarray]
    weight: list[np.ndarray]
    bias: list[np.ndarray]
    mark: np.ndarray  # of the model it was fitted for (`mark_of`)

    def predict(self, sequence: Sequence, layer: int, start: int, end: int) -> Tensor:
        """Log credit of the sealed tokens at positions from `start` to before `end`: float32 [H, end - start]."""
        mean, weight, bias = (
            torch.from_numpy(part[layer]).to(sequence.pool.device) for part in (self.mean, self.weight, self.bias)
        )
        parts = [(held(sequence, layer, a, b, mean) - mean) @ weight + bias for a, b in blocks(sequence, start, end)]
        return torch.cat(parts).T if parts else weight.new_zeros(len(bias), 0)

    def save(self, path: str | Path) -> None:
        arrays = {
            f"{name}.{layer}": part
            for name in ("mean", "weight", "bias")
            for layer, part in enumerate(getattr(self, name))
        }
        np.savez(path, version=VERSION, mark=self.mark, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Surrogate:
        """Errors: AdaptiveKVError, one line that names the file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["version"]) != VERSION:
                    raise AdaptiveKVError(f"surrogate {path}: version {file['version']}, this program reads {VERSION}")
                layers = range(sum(name.startswith("bias.") for name in file.files))
                mean, weight, bias = ([file[f"{name}.{i}"] for i in layers] for name in ("mean", "weight", "bias"))
                made = cls(mean, weight, bias, file["mark"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            why = str(error).splitlines()[0]
            raise AdaptiveKVError(f"surrogate {path}: cannot be read ({why}); run `adaptivekv calibrate`") from None
        if not all(np.isfinite(part).all() for part in [*mean, *weight, *bias, made.mark]):
            raise AdaptiveKVError(f"surrogate {path}: holds NaN; run `adaptivekv calibrate` again")
        return made

    def suits(self, mark: np.ndarray, shapes: list[LayerShape]) -> bool:
        """Whether it was fitted for a model with this mark and these layers, whatever their precision."""
        wanted = [(s.heads * (s.k_dim + s.v_dim), s.heads) for s in shapes]
        return [part.shape for part in self.weight] == wanted and np.allclose(self.mark, mark, rtol=0.05, atol=1e-3)


def find(model: PreTrainedModel, shapes: list[LayerShape]) -> Surrogate | None:
    """The surrogate of this model: one that `adaptivekv calibrate` wrote, else one that ships; None: there is none."""
    mark = mark_of(model)
    for folder in (folder_of_own(), SHIPPED):
        for path in sorted(folder.glob("kvzap-*.npz")):
            made = Surrogate.load(path)
            if made.suits(mark, shapes):
                return made
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
    old = sequence.credits.get(NAME) or [np.zeros((len(ids), 0), np.float32) for ids in sequence.ids]
    end = sequence.length - sequence.tail_len
    if (known := old[0].shape[1]) < end:
        new = [surrogate.predict(sequence, layer, known, end) for layer in range(len(old))]
        found = np.split(torch.cat(new).cpu().numpy(), np.cumsum([len(x) for x in new])[:-1])  # one wait
        sequence.credits[NAME] = [np.concatenate(pair, 1) for pair in zip(old, found, strict=True)]


def blocks(sequence: Sequence, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Positions in ranges whose decoded copy fits the staging allowance."""
    most = max(s.slot_elements for s in sequence.pool.layers)
    step = max(1, sequence.pool.staging_bytes // (8 * most * PAGE)) * PAGE
    for a in range(start, end, step):
        yield a, min(a + step, end)


def held(sequence: Sequence, layer: int, start: int, end: int, absent: Tensor) -> Tensor:
    """Keys and values of all heads at the positions from `start` to before `end`, float32 [n, H * (k_dim + v_dim)].

    absent: what stands for those that a head no longer holds, [D].
    """
    ids, pool = sequence.ids[layer], sequence.pool
    head, column = np.nonzero((ids >= 0) & (pool.first[ids] < end) & (pool.last[ids] >= start))
    pages = ids[head, column]
    out = absent.repeat(end - start, 1).view(end - start, len(ids), -1)
    for at in pool.kinds(pages):
        some, pos = pages[at], pool.pos[pages[at]] - start  # [n], [n, 64]
        here = (np.arange(PAGE) < pool.count[some][:, None]) & (pos >= 0) & (pos < end - start)
        both = torch.cat(pool.read(some), -1)[torch.from_numpy(here).to(pool.device)]
        cells = pos[here] * len(ids) + np.repeat(head[at], here.sum(1))
        out.view(-1, out.shape[-1])[torch.from_numpy(cells).to(pool.device)] = both
    return out.flatten(1)
