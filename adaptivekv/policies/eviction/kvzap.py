"""KVzap (arXiv 2601.07891): KVzip without the second reading, whose outcome is foretold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.sequence import Sequence
from adaptivekv.policies.base import NEEDS
from adaptivekv.policies.eviction.base import Eviction
from adaptivekv.policies.eviction.kvzip import KVzip
from adaptivekv.policies.eviction.surrogate import NAME, foretell


@dataclass(frozen=True)
class KVzap(KVzip):
    """A slot is worth the attention that `kvzip` is expected to find, by a linear map fitted once for the model.

    It knows no question, costs one product a token, and may act while a prompt is still being read.

    Differs from the paper: keys, values, their norms and the token's place go in instead of the hidden state, which a
    cache never sees; a share of the slots is kept instead of those above a threshold; what is generated is kept.
    """

    name: ClassVar[str] = "kvzap"
    paper: ClassVar[str] = "https://arxiv.org/abs/2601.07891"
    needs: ClassVar[frozenset[str]] = frozenset({"surrogate"})
    by_credit: ClassVar[str] = NAME

    def apply(self, sequence: Sequence) -> None:
        Eviction.apply(self, sequence)

    def score(self, sequence: Sequence, layer: int) -> Tensor:
        if not sequence.pool.surrogate:
            raise AdaptiveKVError(f"plan {self}: needs {NEEDS['surrogate']}")
        foretell(sequence, sequence.pool.surrogate)
        return super().score(sequence, layer)
