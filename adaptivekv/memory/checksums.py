"""Checksums of pages that lie on disk: a file can be damaged in ways that memory is not."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from adaptivekv.errors import CacheFileError
from adaptivekv.memory.shapes import DISK

if TYPE_CHECKING:
    from adaptivekv.memory.pages import PagePool


def sign(pool: PagePool, ids: np.ndarray) -> None:
    """Note the checksums of those pages that lie on disk, now that they are written."""
    if pool.disk_capacity:
        stored = ids[pool.tier[ids] == DISK]
        pool.crc[stored] = _checksums(pool, stored)


def verify(pool: PagePool, ids: np.ndarray) -> None:
    """Raise CacheFileError unless those pages that lie on disk are as they were written."""
    if not pool.disk_capacity:
        return
    stored = ids[pool.tier[ids] == DISK]
    if (pool.crc[stored] != _checksums(pool, stored)).any():
        raise CacheFileError("disk tier: a page is damaged; clear the cache and read the prompt again")


def _checksums(pool: PagePool, ids: np.ndarray) -> list[int]:
    if not len(ids):
        return []
    pool.settle()
    data, at = pool.arena(DISK).data.numpy().data, (pool.layer[ids], pool.code[ids])
    columns = pool.k_off[ids], pool.v_off[ids], pool.k_bytes[at], pool.v_bytes[at]
    blocks = zip(*(column.tolist() for column in columns), strict=True)
    return [zlib.crc32(data[v : v + m], zlib.crc32(data[k : k + n])) for k, v, n, m in blocks]
