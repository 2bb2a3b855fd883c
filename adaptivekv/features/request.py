"""Features of a request that cost one look at its prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def text_features(text: str, tokens: Sequence[int], question_tokens: int | None = None) -> dict[str, float]:
    """What kind of text a prompt is: shares of its characters, variety of its tokens, length of its question."""
    n = max(1, len(text))
    out = {
        "digit_share": sum(c.isdigit() for c in text) / n,
        "punct_share": sum(not c.isalnum() and not c.isspace() for c in text) / n,
        "upper_share": sum(c.isupper() for c in text) / n,
        "distinct_share": len(set(tokens)) / max(1, len(tokens)),
    }
    if question_tokens is not None:
        out["log2_question"] = math.log2(1 + question_tokens)
    return out


def logit_features(logits: torch.Tensor) -> dict[str, float]:
    """How sure the model was of its last token: entropy in nats, and the margin of the best two, of logits [V]."""
    logs = logits.float().log_softmax(-1)
    top = logs.topk(2).values.exp()
    entropy = -(logs.exp() * logs.clamp_min(-1e4)).sum()
    entropy, margin = torch.stack([entropy, top[0] - top[1]]).tolist()  # one wait for both
    return {"logit_entropy": entropy, "logit_margin": margin}


def request_features(
    prompt: int, new: int, generated: int, turn: int, budget_ratio: float, quality: float
) -> dict[str, float]:
    """Lengths in tokens; the quality SLO in nats per token."""
    return {
        "log2_prompt": math.log2(max(1, prompt)),
        "log2_new": math.log2(max(1, new)),
        "log2_generated": math.log2(1 + generated),
        "turn": float(turn),
        "budget_ratio": budget_ratio,
        "log10_quality": min(1.0, max(-5.0, math.log10(max(quality, 1e-9)))),
    }
