"""The second pass over a prompt: which keys would the model need to say it again? (KVzip, arXiv 2505.23416)

The model reads the prompt once more, chunk by chunk, on top of the cache that holds it, and nothing is stored. Whatever
key no repeating token looks at is not needed to know the text, whatever question will come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from adaptivekv.cache import AdaptiveCache

CHUNK = 512  # tokens repeated at a time
AGAIN = 8  # of the tokens before a chunk, put in front of it: where the repetition goes on


@torch.inference_mode()
def recall(model: Any, cache: AdaptiveCache, ids: Tensor, mask: Tensor | None = None, start: int = 0) -> None:
    """Credit every key that `cache` holds with the attention that the tokens of `ids[:, start:]`, repeated, pay it: the
    sum of its squares.

    ids: int [B, n], the tokens seen, padding included; mask: which of them are real, [B, n] (None: all). Credits go to
    `Sequence.credits`; those of an earlier turn are added to. Costs about as much as reading the prompt did; stores
    nothing. Sliding windows show a chunk those repeated before it, though at its own positions: two ways without that
    flaw lose more on the one model there is (docs/methods.md).
    """
    for sequence in cache.sequences:
        sequence.credit("recall", sequence.length)
    real = torch.ones_like(ids) if mask is None else mask.to(ids)
    seen = torch.tensor([sequence.length for sequence in cache.sequences], device=ids.device)[:, None]
    cache.recalling = True
    try:
        with cache.frozen_step():
            for at in range(start, ids.shape[1], CHUNK):
                cut = slice(max(0, at - AGAIN), at + CHUNK)
                tokens, valid = ids[:, cut], real[:, cut]
                first = seen if not cache.positions else seen.clamp(max=cache.positions - tokens.shape[1])
                model(
                    input_ids=tokens, position_ids=first + (valid.cumsum(1) - 1).clamp(min=0),
                    attention_mask=torch.cat([real, valid], 1), past_key_values=cache, logits_to_keep=1,
                )  # fmt: skip
    finally:
        cache.recalling = False


class Recalling:
    """Stands in for a model in transformers' sampling loop and recalls the prompt before the first new token."""

    def __init__(self, model: Any, cache: AdaptiveCache, ids: Tensor, mask: Tensor | None):
        self.model, self.cache, self.ids, self.mask, self.done = model, cache, ids, mask, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.done and self.cache.seen == self.ids.shape[1]:
            self.done = True
            recall(self.model, self.cache, self.ids, self.mask)
        return self.model(*args, **kwargs)
