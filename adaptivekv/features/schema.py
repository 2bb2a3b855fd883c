"""The numbers a decision sees, in one order, with one version. A change of a name or its meaning raises `VERSION`."""

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from adaptivekv.errors import AdaptiveKVError

VERSION = 1

REQUEST = (
    "log2_prompt",  # tokens of the prompt
    "log2_new",  # max_new_tokens
    "log2_generated",  # log2(1 + tokens generated so far)
    "turn",  # of the conversation, from 0
    "budget_ratio",  # budget bytes / full 16-bit bytes; 1.0 without a budget
    "log10_quality",  # SLO in nats per token, clipped to [-5, 1]
    "digit_share",  # of the prompt's characters
    "punct_share",
    "upper_share",
    "distinct_share",  # unique tokens / tokens
    "log2_question",  # tokens after the document; NaN if unknown
)
GROUPS = ("early", "mid", "late")  # thirds of the layers
ATTENTION = tuple(f"{what}_{group}" for what in ("sink", "recent", "entropy", "top") for group in GROUPS)
LOGITS = ("logit_entropy", "logit_margin")
SYSTEM = (
    "pressure",  # device bytes used / budget
    "host_room",  # host bytes free / full bytes
    "log10_link",  # GB/s between host and device
)
NAMES: tuple[str, ...] = REQUEST + ATTENTION + LOGITS + SYSTEM

PLAN_NAMES: tuple[str, ...] = (
    "keep",  # share of tokens kept
    "k_bits",  # 16 or more: the model's own dtype
    "v_bits",
    "device_share",  # share of the bytes on the device
    "read_share",  # share of the pages read per step
    "is_streaming",
    "is_snapkv",
    "is_h2o",
)


def row(values: Mapping[str, float], names: Sequence[str] = NAMES) -> np.ndarray:
    """float64 [len(names)], NaN where `values` has no entry. An unknown name is an AdaptiveKVError."""
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.0)
            raise AdaptiveKVError(f"feature {name!r}: not in schema {VERSION}; did you mean {near[0]!r}?")
    return np.array([values.get(name, np.nan) for name in names], dtype=np.float64)
