"""Which slots of a head an eviction keeps: the best by score, one bit a slot.

The function of this file runs on the CPU and is the reference; `topkernel` holds its Triton twin.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from adaptivekv.kernels.dispatch import has_twin


@has_twin("topkernel")
def top_slots(
    score: Tensor,
    pos: Tensor,
    count: Tensor,
    head: Tensor,
    heads: int,
    edges: Tensor,
    keep: Tensor,
    sure: Tensor,
    out: Tensor,
) -> None:
    """Mark the best slots of each run of pages.

    score: float32 [n, 64], no NaN; pos: int32 [n, 64], positions; count, head: int32 [n], used slots of each page and
    which of at most `heads` heads it is of (position x heads must fit 31 bits). edges: int64 [R + 1]: run r is the
    pages from edges[r] to before edges[r + 1]; keep: int64 [R].
    sure: int64 [n], bit s says that slot s stays whatever it scores, as one that scores inf does.
    out: int64 [n] gets a bit a slot: the `keep` best of a run, those that are sure first, then by score, of equal ones
    the newer, of equally old ones that of the later head; more than `keep` where more are sure.
    """
    at = np.arange(score.shape[1])
    runs = zip(pairwise(edges.tolist()), keep.tolist(), strict=True)
    for (start, end), n in runs:
        value, live = score[start:end].numpy(), at < count[start:end, None].numpy()
        if (bits := sure[start:end].numpy()).any():
            stay = np.unpackbits(bits[:, None].view(np.uint8), axis=1, bitorder="little").view(bool)
            value = np.where(stay, np.float32(np.inf), value)
        n = max(n, np.count_nonzero(live & (value == np.inf)))
        order = pos[start:end].numpy() * np.int32(heads) + head[start:end, None].numpy()
        best = top(value, order, live, n)
        out[start:end].numpy()[:] = np.packbits(best, axis=1, bitorder="little").view(np.int64)[:, 0]


def nth(x: Tensor, n: int) -> Tensor:
    """The n-th largest of x, float32 [N], where more than n are above -inf. No sorting: a prompt has millions."""
    if not x.is_cuda:
        some = x.numpy()[x.numpy() > -np.inf]  # np.partition is slow where many are equal
        return torch.from_numpy(np.partition(some, -n)[-n : len(some) - n + 1])
    return sampled_nth(x, n)


def sampled_nth(x: Tensor, n: int) -> Tensor:
    """`nth`, which sorts a sample and then only what lies about as high as the n-th of it."""
    sample = x[:: len(x) >> 16 | 1].sort(descending=True).values
    at, margin = n * len(sample) // len(x), 4 * int(len(sample) ** 0.5)  # eight standard deviations of its rank
    high, low = sample[max(0, at - margin)], sample[min(len(sample) - 1, at + margin)]
    within, above = x[(x >= low) & (x <= high)], int(torch.count_nonzero(x > high))
    if not above < n <= above + len(within):  # the sample was not like the rest
        within, above = x, 0
    return within.sort(descending=True).values[n - above - 1]


def top(score: np.ndarray, order: np.ndarray, live: np.ndarray, n: int) -> np.ndarray:
    """The `n` live elements with the highest score, then order; all if there are no more. Bool, shaped like them."""
    dead = live.size - np.count_nonzero(live)
    if n >= live.size - dead:
        return live
    if not n:
        return np.zeros_like(live)
    # A float32 read as an integer, the negative ones turned round, sorts like itself. The order behind it makes all
    # keys differ, as those of dead slots do: among equals `np.partition` takes 70 times as long.
    bits = (score + np.float32(0)).view(np.int32)  # -0 becomes 0
    bits ^= bits >> 31 & 0x7FFFFFFF
    key = bits.astype(np.int64)
    key <<= 32
    key += order
    if dead:
        key[~live] = np.iinfo(np.int64).min + np.arange(dead)
    return key >= np.partition(key, -n, axis=None)[-n]
