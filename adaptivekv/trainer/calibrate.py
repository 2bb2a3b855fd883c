"""Fits the map that foretells a second reading (policies/eviction/surrogate.py), once for a model.

Each prompt is read twice, as `kvzip` does, and the logarithm of what every token was paid is regressed on its keys,
values, their norms and its place: ridge regression, from sums, so that any number of tokens fits in memory.

Where a model normalises what attention returns, an error counts beside the output it is in: each layer's map is raised
by how much larger its values are than its outputs, so that layers compare.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptivekv import model as models
from adaptivekv.attention import Staged
from adaptivekv.cache import AdaptiveCache
from adaptivekv.console import read_text
from adaptivekv.controller import Controller
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels.codec import PAGE
from adaptivekv.model import LoadedModel
from adaptivekv.plan import Plan
from adaptivekv.policies.eviction.surrogate import Surrogate, blocks, folder_of_own, inputs, mark_of, width
from adaptivekv.recall import recall
from adaptivekv.trainer import workload
from adaptivekv.trainer.branch import feed

FLOOR = 1e-8  # of squared attention; below, a token is worth nothing
RIDGE = 1e-3  # of each input's variance
NORMALISED = ("post_feedforward_layernorm", "post_mlp_layernorm")  # Gemma, OLMo 2; GLM-4: outputs of both branches
HELD_OUT = 5  # every fifth prompt tells how good the map is; the map that is saved has seen it too


@dataclass
class Sums:
    """What a linear regression needs of its data: of inputs [D + 1], the last of them 1, and targets [H]."""

    xx: torch.Tensor  # [D + 1, D + 1]
    xy: torch.Tensor  # [D + 1, H]
    yy: torch.Tensor  # [H]

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor) -> Sums:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
        y = y.double()
        return cls(x.T @ x, x.T @ y, (y * y).sum(0))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

    @property
    def count(self) -> torch.Tensor:
        return self.xx[-1, -1]

    def fit(self) -> torch.Tensor:
        """[D + 1, H]: least squares, with a penalty in proportion to each input's variance."""
        mean = self.xx[-1] / self.count
        penalty = RIDGE * (self.xx.diagonal() - self.count * mean**2)
        penalty[:-1] = penalty[:-1].clamp_min(1e-9 * self.count)  # an input that never changes
        return torch.linalg.solve(self.xx + penalty.diag(), self.xy)

    def explained(self, weight: torch.Tensor) -> float:
        """R squared of a map on these data, all heads together."""
        error = self.yy - 2 * (weight * self.xy).sum(0) + (weight * (self.xx @ weight)).sum(0)
        spread = self.yy - self.xy[-1] ** 2 / self.count
        return float(1 - error.sum() / spread.sum())


def calibrate(
    model: str | None = None,
    file: Path | None = None,
    requests: int = 100,
    max_tokens: int = 4096,
    seed: int = 0,
    out: Path | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the surrogate of a model to `out` (default: where `AdaptiveCache` finds it).

    file: a text to read pieces of, `max_tokens` long (default: prompts of the mixed scenario's split train). In memory:
    two matrices a layer of (D + 1)^2 float64, D = heads x (k_dim + v_dim + 2) + 3.
    Returns file, prompts, tokens, r2 (of prompts that were held out), r2_worst (of any layer), r2_layers.
    """
    if max_tokens <= PAGE:
        raise AdaptiveKVError(f"max_tokens={max_tokens}: more than a page of {PAGE}")
    loaded = models.load(model, device)
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", 0) or max_tokens
    if positions < max_tokens:
        raise AdaptiveKVError(f"max_tokens={max_tokens}: the model has {positions} positions")
    path = _writable(out or folder_of_own() / f"kvzap-{loaded.name.strip('/.').replace('/', '--') or 'model'}.npz")
    prompts = list(_pieces(loaded, file, max_tokens, requests) if file else _drawn(loaded, requests, max_tokens, seed))
    if len(prompts) < HELD_OUT:
        raise AdaptiveKVError(
            f"{len(prompts)} prompts: at least {HELD_OUT}; more requests, a longer file or shorter pieces"
        )
    seen: dict[tuple[int, bool], Sums] = {}
    excess: dict[int, list[float]] = defaultdict(list)
    for i, ids in enumerate(prompts):
        for layer, (x, y, more) in enumerate(credited(loaded, ids)):
            key = layer, i % HELD_OUT == HELD_OUT - 1
            seen[key] = seen[key] + Sums.of(x, y) if key in seen else Sums.of(x, y)
            excess[layer].append(more)
        if progress:
            progress(i + 1, len(prompts))
    layers = range(len(seen) // 2)
    r2 = [seen[layer, True].explained(seen[layer, False].fit()) for layer in layers]
    made = surrogate(loaded, (seen[layer, False] + seen[layer, True] for layer in layers))
    if any(name.endswith(NORMALISED) for name, _ in loaded.model.named_modules()):
        made.bias = [bias + np.float32(np.mean(excess[layer])) for layer, bias in enumerate(made.bias)]
    made.save(path)
    return {
        "file": str(path), "prompts": len(prompts), "tokens": sum(map(len, prompts)), "r2": float(np.mean(r2)),
        "r2_worst": min(r2), "r2_layers": [round(x, 3) for x in r2],
    }  # fmt: skip


def _writable(path: Path) -> Path:
    """The same path, if a file can be written there: reading the prompts takes too long to find out afterwards."""
    if path.suffix != ".npz" or path.is_dir():
        raise AdaptiveKVError(f"out {path}: a file that ends in .npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise AdaptiveKVError(f"out {path}: {(error.strerror or str(error)).lower()}") from None


def surrogate(loaded: LoadedModel, layers: Iterable[Sums]) -> Surrogate:
    mean, weight, bias = [], [], []
    for sums in layers:
        fitted = sums.fit()
        centre = (sums.xx[-1] / sums.count)[:-1]
        mean.append(centre.float().cpu().numpy())
        weight.append(fitted[:-1].float().cpu().numpy())
        bias.append((fitted[-1] + centre @ fitted[:-1]).float().cpu().numpy())
    return Surrogate(mean, weight, bias, mark_of(loaded.model))


class Measuring(AdaptiveCache):
    """A cache that notes how large values are, and the outputs that attention makes of them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sizes: dict[int, list[torch.Tensor]] = {}  # a layer, by chunk: squared, mean of the heads, [2, n]

    def attend(self, staged: Staged, query: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = super().attend(staged, query, *rest)
        if not self.frozen:
            sizes = [x[0].float().square().sum(-1).mean(0) for x in (staged.value, out)]
            self.sizes.setdefault(staged.layer, []).append(torch.stack(sizes))
        return out

    def excess(self, layer: int) -> float:
        """From log squared attention to log squared error beside the output: log of values over outputs, medians."""
        values, outputs = torch.cat(self.sizes[layer], 1).median(1).values.clamp_min(FLOOR).log().tolist()
        return values - outputs


@torch.inference_mode()
def credited(loaded: LoadedModel, ids: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Layer by layer `inputs` of each sealed token, [n, D], the log of what it is paid, [n, H], and `excess`."""
    watch = Controller(Plan.parse("kvzip(1)"), watch=True, candidates=("full",))
    cache = Measuring(loaded.model, controller=watch, max_tokens=len(ids) + PAGE, host=0)
    cache.expect(len(ids), 1)
    feed(loaded, cache, ids, 0)
    recall(loaded.model, cache, torch.tensor([ids], device=loaded.device))
    (sequence,) = cache.sequences
    end = sequence.length - sequence.tail_len
    for layer, credit in enumerate(sequence.credits["recall"]):
        paid = torch.from_numpy(credit[:, :end].T).to(loaded.device).clamp_min(FLOOR).log()
        absent = paid.new_zeros(width(cache.shapes[layer]))
        parts = [inputs(sequence, layer, a, b, absent) for a, b in blocks(sequence, 0, end)]
        yield torch.cat(parts), paid, cache.excess(layer)
    cache.clear()


def _drawn(loaded: LoadedModel, count: int, max_tokens: int, seed: int) -> Iterable[list[int]]:
    try:
        requests = workload.draw(workload.load("mixed"), count, seed, max_tokens, only=("train",))
    except AdaptiveKVError as error:
        raise AdaptiveKVError(f"{error}; or give a text with --file") from None
    return (workload.write(request, loaded.tokenizer).ids for request in requests)


def _pieces(loaded: LoadedModel, file: Path, size: int, count: int) -> Iterable[list[int]]:
    ids = loaded.tokenizer(read_text(file), verbose=False).input_ids
    return [ids[at : at + size] for at in range(0, len(ids) - PAGE, size)][:count]
