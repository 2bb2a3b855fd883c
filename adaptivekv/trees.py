"""Binary trees for numpy: all nodes of all trees at once, no walk, no branches (QuickScorer, Lucchese et al. 2015).

The leaves of a tree are numbered from the left and start as set bits. A node whose test fails sends its row to the
right, so it clears the bits of its left subtree; the lowest bit still set is the leaf.
"""

from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """T trees of at most L leaves. A place without a node tests feature 0 against infinity and clears nothing."""

    node: np.ndarray  # [L - 1, T] which node stands there; 0 where none does
    empty: np.ndarray  # [L - 1, T] bool
    clears: np.ndarray  # [L - 1, T] bits that a node clears when its test fails, complemented
    leaf: np.ndarray  # [T, L] node of each leaf, from the left; 0 beyond the last


def lay_out(left: np.ndarray, right: np.ndarray, roots: np.ndarray, leaves: int, dtype: type) -> Layout:
    """left, right: children, -1 at leaves; roots [T]; dtype: unsigned, with at least `leaves` bits."""
    trees, every = len(roots), int(np.iinfo(dtype).max)
    node, leaf = np.zeros((leaves - 1, trees), np.intp), np.zeros((trees, leaves), np.intp)
    empty = np.ones((leaves - 1, trees), bool)
    clears: np.ndarray = np.full((leaves - 1, trees), every, dtype)

    def place(tree: int, at: int, first: int, used: list[int]) -> int:
        """Numbers the leaves below node `at` from `first` on; returns how many there are."""
        if left[at] < 0:
            leaf[tree, first] = at
            return 1
        row = len(used)
        used.append(at)
        below = place(tree, left[at], first, used)
        node[row, tree], empty[row, tree] = at, False
        clears[row, tree] = every & ~(((1 << below) - 1) << first)
        return below + place(tree, right[at], first + below, used)

    for tree, root in enumerate(roots):
        place(tree, int(root), 0, [])
    return Layout(node, empty, clears, leaf)


def fault(left: np.ndarray, right: np.ndarray, roots: np.ndarray, leaves: int) -> str | None:
    """What makes these no trees of at most `leaves` leaves, or None; `lay_out` would recurse for ever, or elsewhere."""
    nodes, roots = len(left), roots.astype(np.int64)  # differences must not wrap
    if len(right) != nodes:
        return "node arrays differ in length"
    if len(roots) == 0 or roots[0] != 0 or (np.diff(roots) <= 0).any() or roots[-1] >= nodes:
        return "roots do not rise from 0 within the nodes"
    ends = np.append(roots[1:], nodes)
    tree_of = np.repeat(np.arange(len(roots)), ends - roots)
    inner = np.flatnonzero(left != -1)
    for side, children in (("left", left[inner]), ("right", right[inner])):
        if (children <= inner).any() or (children >= ends[tree_of[inner]]).any():
            return f"a {side} child lies outside its tree or before its parent"
    children = np.concatenate([left[inner], right[inner], roots])
    if (right[left == -1] != -1).any() or (np.bincount(children, minlength=nodes) != 1).any():
        return "a node has one child, two parents or none"
    if (np.bincount(tree_of[left == -1]) > leaves).any():
        return f"a tree has more than {leaves} leaves"
    return None
