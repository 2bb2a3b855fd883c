"""Page lists: of each layer the page ids of its heads, [H, P], -1 behind a head's last page.

What concerns all layers works on their *cells*: the lists laid end to end, head by head through all layers.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

Lists = list[np.ndarray]


def cells(lists: Lists) -> tuple[np.ndarray, np.ndarray]:
    """The head of each cell, numbered through all layers, and its page, int64: numpy indexes with it twice as fast."""
    widths = np.repeat([ids.shape[1] for ids in lists], [len(ids) for ids in lists])
    return np.repeat(np.arange(len(widths)), widths), np.concatenate([ids.ravel() for ids in lists], dtype=np.int64)


def chosen(lists: Lists, select: Lists) -> tuple[np.ndarray, np.ndarray]:
    """The page of each cell (int64), and which cells have a page and are selected: bool [H, P] a layer."""
    pages = np.concatenate([ids.ravel() for ids in lists], dtype=np.int64)
    return pages, np.flatnonzero(np.concatenate([s.ravel() for s in select]) & (pages >= 0))


def fill(lists: Lists, pages: np.ndarray) -> None:
    """Write the page of each cell back; no shape changes."""
    ends = np.cumsum([ids.size for ids in lists])
    for ids, part in zip(lists, np.split(pages, ends[:-1]), strict=True):
        ids[:] = part.reshape(ids.shape)


def arrange(heads: list[int], row: np.ndarray, ids: np.ndarray, mass: np.ndarray) -> tuple[Lists, Lists]:
    """Lists made anew, and masses [H, P] like them (NaN where there is no page), for layers of so many heads.

    row, ids, mass: [n] of the pages: the head, numbered through all layers and sorted, the id, the mass.
    """
    edges = np.cumsum([0, *heads])
    count = np.bincount(row, minlength=edges[-1])
    column = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    width = int(count.max(initial=0))
    all_ids, all_mass = np.full((edges[-1], width), -1, np.int32), np.full((edges[-1], width), np.nan, np.float32)
    at = row * width + column
    all_ids.reshape(-1)[at], all_mass.reshape(-1)[at] = ids, mass
    spans = [(slice(a, b), int(count[a:b].max(initial=0))) for a, b in pairwise(edges.tolist())]
    return [all_ids[at, :n].copy() for at, n in spans], [all_mass[at, :n].copy() for at, n in spans]


def append(ids: np.ndarray, mass: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One layer's list and its masses with the pages `new` [H, n] behind each head's last page, their mass NaN."""
    heads, n = new.shape
    ends = (ids >= 0).sum(1)
    if grow := max(0, int(ends.max(initial=0)) + n - ids.shape[1]):
        ids = np.concatenate([ids, np.full((heads, grow), -1, np.int32)], 1)
        mass = np.concatenate([mass, np.full((heads, grow), np.nan, np.float32)], 1)
    ids[np.arange(heads)[:, None], ends[:, None] + np.arange(n)] = new
    return ids, mass
