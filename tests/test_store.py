"""Saved sequences: what comes back is bit for bit what was saved, or nothing does."""

import numpy as np
import pytest
import torch
from sequences import SHAPES, content, feed, pool, same

from adaptivekv.errors import CacheFileError
from adaptivekv.memory import store
from adaptivekv.memory.arena import ArenaFull
from adaptivekv.memory.formats import FORMATS
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DISK, HOST


def test_save_and_load_bit_for_bit(tmp_path):
    p = pool()
    sequence = Sequence(p, window=8)
    feed(sequence, 300)
    first, second = (np.ones(ids.shape, bool) for ids in sequence.ids)
    sequence.convert([first, ~second], FORMATS["k4v2r"])
    sequence.move([~first, second & (np.arange(second.shape[1]) < 2)], HOST)
    sequence.move([first & (np.arange(first.shape[1]) == 1), ~second], DISK)
    sequence.move([first & (np.arange(first.shape[1]) == 2), ~second], HOST, split=True)
    sequence.protected, sequence.prompt = [(3, 9)], 310
    sequence.credits["recall"] = [np.random.default_rng(0).random((len(ids), 300), np.float32) for ids in sequence.ids]
    store.save(sequence, tmp_path / "cache")
    other = store.load(pool(), tmp_path / "cache")
    same(content(other), content(sequence))
    assert (other.length, other.prompt, other.tail_len, other.protected) == (300, 310, 300 % 64, [(3, 9)])
    assert all(np.array_equal(*pair) for pair in zip(other.credits["recall"], sequence.credits["recall"], strict=True))
    keys = sum(p.k_bytes[p.layer[ids], p.code[ids]][p.split[ids]].sum() for ids in sequence.pages())
    assert keys > 0 and other.bytes(HOST) == sequence.bytes(HOST) + keys  # a split page comes back whole
    assert other.bytes(DISK) == sequence.bytes(DISK) > 0
    assert torch.equal(other.observed(1), sequence.observed(1))
    other.pool.check_integrity()
    other = store.load(pool(disk_bytes=0), tmp_path / "cache")  # a pool without a disk takes its pages into memory
    same(content(other), content(sequence))
    assert other.bytes(DISK) == 0 and other.bytes(HOST) == sequence.bytes(HOST) + keys + sequence.bytes(DISK)
    fixed = Sequence.fixed_bytes(SHAPES, torch.float32, 8) + 2048
    for target in (pool(host_bytes=0), pool(host_bytes=30_000), pool(device_bytes=fixed)):  # or to the next lower tier
        other = store.load(target, tmp_path / "cache")
        same(content(other), content(sequence))
        target.check_integrity()
    with pytest.raises(ArenaFull):
        store.load(target := pool(fixed, 30_000, 10_000), tmp_path / "cache")
    target.check_integrity()
    assert target.device_used == target.host_used == target.disk_used == 0


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing", "other shape"])
def test_damaged_file_is_a_miss_never_a_wrong_token(tmp_path, damage):
    path = tmp_path / "cache"
    sequence = Sequence(pool())
    feed(sequence, 200)
    store.save(sequence, path)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[-5000] ^= 1
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    target = PagePool(SHAPES[:1], torch.float32, "cpu", 600_000) if damage == "other shape" else pool()
    with pytest.raises(CacheFileError, match="saved cache"):
        store.load(target, path)
    target.check_integrity()
    assert target.device_used == 0
