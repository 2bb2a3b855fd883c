"""H2O (arXiv 2306.14048): keep the heavy hitters, the tokens that received most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import worth
from adaptivekv.policies.eviction.base import Eviction, page_scores


@dataclass(frozen=True)
class H2O(Eviction):
    """A slot is worth the attention mass of its page.

    Differs from the paper: mass is known per page of 64 slots, not per token, and is a moving average rather than a
    sum (a plain sum favours old tokens, which had more queries to collect from). Both are by-products of the
    attention kernel, so decode keeps no scores per token.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.14048"
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    growing: ClassVar[bool] = True

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        return page_scores(worth(sequence, layer), sequence)
