"""Small pools, sequences of random tokens, and what a sequence holds."""

from __future__ import annotations

import numpy as np
import torch

from adaptivekv.memory.formats import BY_CODE
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape

SHAPES = [LayerShape(2, 4, 16, 16), LayerShape(1, 4, 24, 16)]


def pool(device_bytes=600_000, host_bytes=400_000, disk_bytes=200_000) -> PagePool:
    return PagePool(SHAPES, torch.float32, "cpu", device_bytes, host_bytes, 30_000, disk_bytes)


def feed(sequence: Sequence, n: int, seed: int = 0) -> None:
    """n random tokens more."""
    generator = torch.Generator().manual_seed(seed)
    pos = sequence.length + np.arange(n)
    for layer, s in enumerate(SHAPES):
        k = torch.randn(s.heads, n, s.k_dim, generator=generator)
        v = torch.randn(s.heads, n, s.v_dim, generator=generator)
        sequence.append(layer, k, v, pos)
        if sequence.window:
            sequence.observe(layer, torch.randn(s.q_heads, n, s.k_dim, generator=generator))
    sequence.commit(pos)


def as_bits(keep: list[np.ndarray]) -> np.ndarray:
    """Which slots stay, bool [H, P, 64] a layer, as `evict` takes it."""
    joined = np.concatenate([mask.reshape(-1, 64) for mask in keep])
    return np.packbits(joined, axis=1, bitorder="little").view(np.uint64)[:, 0]


def content(sequence: Sequence) -> dict[tuple[int, int, int], torch.Tensor]:
    """(layer, head, position) -> key and value as attention sees them."""
    out = {}
    for layer, table in enumerate(sequence.ids):
        used, pos = sequence.slots(layer)
        for head, column in np.argwhere(table >= 0):
            k, v = sequence.pool.read(table[head, column : column + 1])
            for slot in np.flatnonzero(used[head, column]):
                out[layer, int(head), int(pos[head, column, slot])] = torch.cat([k[0, slot], v[0, slot]])
        k, v = sequence.tail(layer)
        for slot in range(sequence.tail_len):
            for head in range(len(k)):
                out[layer, head, int(sequence.tail_pos[slot])] = torch.cat([k[head, slot], v[head, slot]])
    return out


def standing_alone(sequence: Sequence) -> set[tuple[int, int, int]]:
    """Keys of `content` whose slots share neither scales nor a mean with others, so that they move as they are."""
    pool, out = sequence.pool, set()
    for layer, table in enumerate(sequence.ids):
        used, pos = sequence.slots(layer)
        for head, column in np.argwhere(table >= 0):
            fmt = BY_CODE[pool.code[table[head, column]]]
            if fmt.k.fields(8, pool.dtype) and fmt.v.fields(8, pool.dtype):
                out |= {(layer, int(head), int(p)) for p in pos[head, column][used[head, column]]}
    tail = sequence.tail_pos[: sequence.tail_len]
    return out | {(layer, h, int(p)) for layer, ids in enumerate(sequence.ids) for h in range(len(ids)) for p in tail}


def same(a: dict, b: dict, tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] - b[key]).abs().max() <= tolerance, key
