"""The disk tier: a file without a name, whose damage is seen before a page is used."""

import numpy as np
import pytest
import torch
from sequences import SHAPES, feed, pool

from adaptivekv.errors import BudgetError, CacheFileError
from adaptivekv.memory import store
from adaptivekv.memory.bounds import bounds
from adaptivekv.memory.evict import evict
from adaptivekv.memory.formats import FORMATS
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DISK, HOST


def on_disk() -> tuple[Sequence, np.ndarray]:
    """A sequence all of whose sealed pages lie on disk, and their ids."""
    sequence = Sequence(pool())
    feed(sequence, 200)
    sequence.move([ids >= 0 for ids in sequence.ids], DISK)
    ids = np.concatenate(list(sequence.pages()))
    assert (sequence.pool.tier[ids] == DISK).all()
    return sequence, ids


def test_the_disk_tier_is_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVEKV_CACHE", str(tmp_path))
    sequence, ids = on_disk()
    p = sequence.pool
    assert p.disk_used == sequence.bytes(DISK) == p.sizes(ids).sum() and p.host_used == 0
    assert p.device_used == Sequence.fixed_bytes(SHAPES, torch.float32, 0)
    assert list((tmp_path / "disk").iterdir()) == []  # it cannot be left behind
    address = p.arena(DISK).data.data_ptr()
    with open("/proc/self/maps") as maps:
        spans = [line.split(maxsplit=5) for line in maps]
    (where,) = [x for x in spans if int(x[0].split("-")[0], 16) <= address < int(x[0].split("-")[1], 16)]
    assert where[1] == "rw-s" and where[5].startswith(str(tmp_path / "disk")) and where[5].endswith("(deleted)\n")


def test_a_full_disk_is_an_error_when_the_pool_is_made(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(BudgetError, match=r"disk tier: no .* MiB in .*No space left.*ADAPTIVEKV_CACHE"):
        pool()
    p = pool(disk_bytes=0)  # and none is made where none was asked for
    assert p.away_free(DISK) == p.arena(DISK).free_bytes == 0
    p.check_integrity()


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("reader", ["attention", "move", "convert", "evict", "save", "bounds"])
def test_a_damaged_page_on_disk_is_an_error_never_a_wrong_token(part, reader, tmp_path):
    sequence, _ = on_disk()
    p, every = sequence.pool, [x >= 0 for x in sequence.ids]
    page = sequence.ids[0][1, 2]
    where = int((p.k_off if part == "keys" else p.v_off)[page]) + 77
    actions = {
        "attention": lambda: sequence.batches(0), "move": lambda: sequence.move(every, HOST),
        "convert": lambda: sequence.convert(every, FORMATS["int4r"]),
        "save": lambda: store.save(sequence, tmp_path / "x"),
        "evict": lambda: evict(sequence, np.full(len(sequence.cells()[1]), 0x5555555555555555, np.uint64)),
        "bounds": lambda: bounds(p, sequence.ids[0][1]),
    }  # fmt: skip
    sequence.batches(0)  # whole, it is read
    sequence.touch()
    p.arena(DISK).data[where] ^= 1
    with pytest.raises(CacheFileError, match="disk tier: a page is damaged"):
        actions[reader]()
    p.arena(DISK).data[where] ^= 1
    p.check_integrity()
    actions[reader]()
