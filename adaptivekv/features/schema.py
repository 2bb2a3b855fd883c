"""The numbers a decision sees, in one order, with one version. A change of a name or its meaning raises `VERSION`."""

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from adaptivekv.errors import AdaptiveKVError

VERSION = 7

REQUEST = (
    "log2_prompt",  # tokens of the prompt
    "log2_new",  # max_new_tokens
    "log2_generated",  # log2(1 + tokens generated so far)
    "turn",  # of the conversation, from 0
    "session",  # 1: more turns may follow, 0: none will
    "budget_ratio",  # budget bytes / full 16-bit bytes; 1.0 without a budget
    "log10_quality",  # SLO in nats per token, clipped to [-5, 1]
    "digit_share",  # of the prompt's characters
    "punct_share",
    "upper_share",
    "distinct_share",  # unique tokens / tokens
    "log2_question",  # tokens after the document; NaN if unknown
)
GROUPS = ("early", "mid", "late")  # thirds of the layers
# of the page mass of the prompt's last queries
ATTENTION = tuple(f"{what}_{group}" for what in ("sink", "recent", "entropy", "top") for group in GROUPS)
KEYS = tuple(f"{what}_{group}" for what in ("spread", "norms") for group in GROUPS)
LOGITS = ("logit_entropy", "logit_margin")
SYSTEM = (
    "pressure",  # device bytes used / budget
    "host_room",  # host bytes that it may use, what it holds there included / full bytes
    "log10_link",  # GB/s between host and device
)
NAMES: tuple[str, ...] = REQUEST + ATTENTION + KEYS + LOGITS + SYSTEM

PLAN_NAMES: tuple[str, ...] = (
    "keep",  # share of tokens kept
    "k_bits",  # 16 or more: the model's own dtype
    "v_bits",
    "device_share",  # share of the bytes on the device
    "read_share",  # share of the pages read per step
    "by_recency",  # how an eviction chooses: by none of these, by the keys alone
    "by_window",  # by what the last queries look at
    "by_mass",
    "by_recall",  # by what a second reading looks at, or is expected to
    "log2_pool",  # neighbours whose scores are pooled
    "log2_recent",  # log2(1 + recent tokens that keep all bits, or 8 (`guard=int8`))
)

LINK_TIME = "log10_link_time"
"""What a tree sees beside the two rows; made from them, so trajectories do not hold it."""


def link_time(state: np.ndarray, plans: np.ndarray) -> np.ndarray:
    """state [F] or [n, F] and plans [n, PF] to [n]: log10(1 + x) of the time x that a step takes to read over the link
    what the plan leaves on the host, no more than finds room there: in tokens of the full cache at 1 GB/s."""
    keep, k_bits, v_bits, device, read = plans.T[:5]
    prompt, room, link = (state[..., at] for at in _LINK)
    leaves = keep * np.minimum(k_bits + v_bits, 32) / 32 * (1 - device)  # of the full cache
    return np.log10(1 + 2.0**prompt * read * np.fmin(leaves, room) / 10.0**link)  # an unknown room is large enough


_LINK = tuple(NAMES.index(name) for name in ("log2_prompt", "host_room", "log10_link"))


def row(values: Mapping[str, float], names: Sequence[str] = NAMES) -> np.ndarray:
    """float64 [len(names)], NaN where `values` has no entry. An unknown name is an AdaptiveKVError."""
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.0)
            raise AdaptiveKVError(f"feature {name!r}: not in schema {VERSION}; did you mean {near[0]!r}?")
    return np.array([values.get(name, np.nan) for name in names], dtype=np.float64)
