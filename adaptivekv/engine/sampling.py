"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptivekv.errors import AdaptiveKVError


@dataclass
class Sampler:
    """Greedy at temperature 0, else temperature and nucleus (top-p) sampling from a seeded generator."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise AdaptiveKVError(f"temperature={self.temperature}: between 0 and 2")
        if not 0 < self.top_p <= 1:
            raise AdaptiveKVError(f"top_p={self.top_p}: above 0, at most 1")
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: Tensor) -> int:
        """logits [V] -> token id."""
        if self.temperature == 0:
            return int(logits.argmax())
        probs, order = (logits.float() / self.temperature).softmax(-1).cpu().sort(descending=True)
        probs[probs.cumsum(-1) - probs > self.top_p] = 0  # the token that crosses top_p stays
        return int(order[torch.multinomial(probs, 1, generator=self._generator)])
