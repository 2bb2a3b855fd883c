"""The numbers a decision sees, in one order, with one version. A change of a name or its meaning raises `VERSION`."""

import difflib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from adaptivekv.errors import AdaptiveKVError

VERSION = 6

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
KEPT = (0.25, 0.5, 0.75)  # shares of the slots whose loss is probed
NARROWED = ("int4", "k4v2", "int2")  # and formats
PROBE = tuple(
    f"{what}_{group}"
    for what in (
        *(f"lost_{100 * kept:.0f}" for kept in KEPT),
        *(f"foretold_{100 * kept:.0f}" for kept in KEPT),
        *(f"error_{name}" for name in NARROWED),
    )
    for group in GROUPS
)
KEYS = tuple(f"{what}_{group}" for what in ("spread", "norms") for group in GROUPS)
LOGITS = ("logit_entropy", "logit_margin")
SYSTEM = (
    "pressure",  # device bytes used / budget
    "host_room",  # host bytes that it may use, what it holds there included / full bytes
    "log10_link",  # GB/s between host and device
)
NAMES: tuple[str, ...] = REQUEST + ATTENTION + PROBE + KEYS + LOGITS + SYSTEM

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
    "log2_recent",  # log2(1 + recent tokens that lose no bits)
)

JOINT: tuple[str, ...] = ("lost", "lost_worst", "error", "error_worst", "log10_link_time")
"""What the probe says of a plan: attention its eviction would lose, squared error its bits would make; mean over the
groups of layers, and the worst of them. And log10(1 + x) of the time x that a step takes to read over the link what
the plan leaves on the host, no more than finds room there: in tokens of the full cache at 1 GB/s. Made from the two
rows, so trajectories do not hold them."""


def joint(state: np.ndarray, plans: np.ndarray) -> np.ndarray:
    """state [F] or [n, F] and plans [n, PF] to [n, JOINT], NaN where the state was not probed.

    Between the probed shares and formats it is interpolated. For an eviction by a second reading the probe keeps what
    that is expected to find, else what the last queries look at: the least that any other eviction could lose.
    """
    probed = state[..., _PROBE].reshape(*state.shape[:-1], 2 * len(KEPT) + len(NARROWED), len(GROUPS))
    seen, foretold, errors = np.split(probed, (len(KEPT), 2 * len(KEPT)), axis=-2)
    weights, all_lost, recalls = _weights(plans.tobytes(), plans.shape[1])
    kept = np.where(recalls[:, None, None], foretold, seen)
    lost = all_lost[:, None] + (weights[:, None, : len(KEPT)] @ kept)[:, 0]  # [n, groups]
    error = (weights[:, None, len(KEPT) :] @ errors)[:, 0]
    return np.stack([lost.mean(1), lost.max(1), error.mean(1), error.max(1), link_time(state, plans)], 1)


def link_time(state: np.ndarray, plans: np.ndarray) -> np.ndarray:
    """The last of `JOINT`, [n]."""
    keep, k_bits, v_bits, device, read = plans.T[:5]
    prompt, room, link = (state[..., at] for at in _LINK)
    leaves = keep * np.minimum(k_bits + v_bits, 32) / 32 * (1 - device)  # of the full cache
    return np.log10(1 + 2.0**prompt * read * np.fmin(leaves, room) / 10.0**link)  # an unknown room is large enough


_LINK = tuple(NAMES.index(name) for name in ("log2_prompt", "host_room", "log10_link"))
_BY_RECALL = PLAN_NAMES.index("by_recall")
_PROBE = slice(NAMES.index(PROBE[0]), NAMES.index(PROBE[-1]) + 1)


@lru_cache(maxsize=64)
def _weights(plans: bytes, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each probed value weighs in a plan's, [n, KEPT + NARROWED], the share that is lost for certain, [n], and
    whether it evicts by a second reading, bool [n]."""
    columns = np.frombuffer(plans).reshape(-1, width).T
    keep, k_bits, v_bits = columns[:3]
    shares = np.eye(len(KEPT) + 2)  # kept nothing, the probed shares, everything
    hats = np.stack([np.interp(keep, (0.0, *KEPT, 1.0), hat) for hat in shares], 1)
    # a bit more halves a step, so the squared error falls fourfold; native values make none
    int4 = np.interp(v_bits, (2, 4, 8, 16), (0, 1, 4.0**-4, 0))
    narrow = np.interp(k_bits, (2, 4), (1, 0))  # of the keys, as int2 has them
    k4v2 = np.interp(v_bits, (2, 4), (1, 0)) - narrow
    return np.column_stack([hats[:, 1:-1], int4, k4v2, narrow]), hats[:, 0], columns[_BY_RECALL] > 0


def row(values: Mapping[str, float], names: Sequence[str] = NAMES) -> np.ndarray:
    """float64 [len(names)], NaN where `values` has no entry. An unknown name is an AdaptiveKVError."""
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.0)
            raise AdaptiveKVError(f"feature {name!r}: not in schema {VERSION}; did you mean {near[0]!r}?")
    return np.array([values.get(name, np.nan) for name in names], dtype=np.float64)
