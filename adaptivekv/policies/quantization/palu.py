"""Low-rank keys and values (Palu, arXiv 2407.21118), in bases of the request's own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.bases import Bases, bases_bytes, moments, ranks
from adaptivekv.memory.formats import BY_CODE, CODES, FORMATS, LATENTS, Format, low_rank
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.policies.base import choice
from adaptivekv.policies.quantization.base import Quantize, column


@dataclass(frozen=True)
class Palu(Quantize):
    """Settled pages keep `rank` of the head size: latents in the directions in which keys (values) are largest.

    `latent` says how latents are stored: native, int4 or k4v2. Attention reads them as pages of smaller heads; it turns
    the query before and the output after, and rebuilds no key and no value. Ranks go by layer: of the layers of one
    shape, the third that would lose most gets an eighth more, the third that would lose least an eighth less.

    The paper splits each projection into W L = A B by a singular value decomposition, L L^T being the covariance of the
    layer's inputs on calibration text, and stores B x. A's directions are those in which the projection's outputs are
    largest, so they can be read off the keys and values themselves: here those of this request, when its pages first
    settle. Later pages keep the bases. Heads are split one by one (the paper's M-LRD).

    Differs from the paper: bases are the request's, not the model's, and take device memory; the weights alone (its
    data-free variant) are not offered; a cache sees keys after the rotary embedding, where they are of higher rank than
    before; ranks by what a layer loses, not by Fisher information; no joint bases of several heads.
    """

    rank: float
    latent: str = "native"
    window: int = 64
    sinks: int = 4

    name: ClassVar[str] = "palu"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.21118"
    formula: ClassVar[str] = "rank x (bytes of latent), + 2 x rank x head size^2 native a head for its bases"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not 1 <= self.rank * 8 <= 7 or self.rank * 8 != int(self.rank * 8):
            raise AdaptiveKVError(f"rank={self.rank} must be a whole number of eighths from 0.125 to 0.875")
        choice("latent", self.latent, *LATENTS)
        super().__post_init__()

    @property
    def eighths(self) -> int:
        return int(self.rank * 8)

    @property
    def formats(self) -> tuple[Format, ...]:
        more = 2 <= self.eighths <= 6
        return tuple(self._format(self.eighths + n) for n in ((1, 0, -1) if more else (0,)))

    def _format(self, eighths: int) -> Format:
        return FORMATS[low_rank(eighths, self.latent)]

    def reaches(self, fmt: Format) -> bool:
        return fmt in self.formats or fmt == FORMATS["native"]

    def apply(self, sequence: Sequence) -> None:
        pool, native = sequence.pool, CODES["native"]
        pages = self.settled(sequence)
        select = [chosen & (pool.code[ids] == native) for chosen, ids in zip(pages, sequence.ids, strict=True)]
        if not any(chosen.any() for chosen in select):
            return
        if not any((_RANK[pool.code[ids]] > 0).any() for ids in sequence.pages()):
            sequence.leave_bases()  # of pages that are gone
        if sequence.bases is None:
            sequence.bases = self._measure(sequence, select)
        for rank in sorted(set(sequence.bases.ranks)):
            mine = [x & (own == rank) for x, own in zip(select, sequence.bases.ranks, strict=True)]
            sequence.convert(mine, self._format(rank))

    def _measure(self, sequence: Sequence, select: list[np.ndarray]) -> Bases:
        """Bases of the selected pages (bool [H, P] a layer), and how many directions of them each layer gets."""
        pool = sequence.pool
        axes, lost = [], np.zeros(len(select))
        for layer, (some, shape) in enumerate(zip(select, pool.layers, strict=True)):
            # a head none of whose pages has settled yet, as evictions leave some: by what it holds
            chosen = some | (~some.any(1, keepdims=True) & (sequence.ids[layer] >= 0))
            sums = moments(pool, sequence.ids[layer][chosen], np.nonzero(chosen)[0], shape)
            found = [torch.linalg.eigh(total) for total in sums]  # rising: [H, dim], [H, dim, dim]
            axes.append((found[0][1], found[1][1]))
            for (values, _), rank in zip(found, ranks(shape, self.eighths), strict=True):
                gone = values[:, : values.shape[1] - rank].sum(1) / values.sum(1).clamp(min=1e-30)
                lost[layer] += float(gone.mean())
        bases = Bases(pool, self._ranks(pool.layers, lost))
        for layer, vectors in enumerate(axes):
            bases.fill(layer, vectors)
        return bases

    def _ranks(self, shapes: list[LayerShape], lost: np.ndarray) -> list[int]:
        """Eighths of each layer, from the share of keys and values that each would lose at the mean rank."""
        out = np.full(len(shapes), self.eighths)
        for shape in set(shapes):
            alike = np.array([i for i, other in enumerate(shapes) if other == shape])
            order, third = alike[np.argsort(-lost[alike], kind="stable")], self._third(len(alike))
            out[order[:third]] += 1
            out[order[len(order) - third :]] -= 1
        return out.tolist()

    def _third(self, layers: int) -> int:
        """How many of so many layers get more than the mean, and how many less."""
        return layers // 3 if len(self.formats) > 1 else 0

    def _shares(self, layers: int) -> list[tuple[int, int]]:
        """How many of so many layers get how many eighths."""
        third = self._third(layers)
        counts = Counter({self.eighths: layers - 2 * third})
        if third:
            counts |= {self.eighths + 1: third, self.eighths - 1: third}
        return [(rank, count) for rank, count in counts.items() if count]

    def columns(self, shape: LayerShape, layers: int, dtype: torch.dtype, n: int) -> list[tuple[int, np.ndarray]]:
        return [(count, column(shape, self._format(rank), dtype, n)) for rank, count in self._shares(layers)]

    def beside(self, shape: LayerShape, layers: int, dtype: torch.dtype) -> int:
        return sum(count * bases_bytes(shape, rank, dtype) for rank, count in self._shares(layers))

    def features(self) -> dict[str, float]:
        latent = FORMATS[self.latent]
        return {"k_bits": latent.k.bits * self.rank, "v_bits": latent.v.bits * self.rank}


_RANK = np.array([fmt.rank for fmt in BY_CODE])
