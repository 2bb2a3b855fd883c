"""The pass that puts the skinny product into a step compiled by torch.compile, where it is faster than the library.

It rewrites inductor's graph, not the model: products of one x with up to three weights become one launch, and the sums
over its parts are nodes that inductor fuses with what follows. What the model computes outside of that compiled step,
and the model itself, stay as they are.
"""

from __future__ import annotations

import os
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from adaptivekv.kernels import skinny, skinnytune
from adaptivekv.kernels.skinny import ROWS, WEIGHTS, Config

aten, prims = torch.ops.aten, torch.ops.prims

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
Choose = Callable[[torch.nn.Module, int, tuple[int, ...], int, torch.dtype, torch.device], Config | None]


def compile_options(model: torch.nn.Module) -> dict[str, Any]:
    """Options of torch.compile under which a step of up to 16 rows of this model takes the fastest products.

    Inductor's own kernels then overlap, too, and independent ones share a launch: between products that no longer wait
    for each other they are what is left (docs/kernels.md).
    """
    return {"post_grad_custom_pre_pass": SkinnyPass(model), "combo_kernels": True, "triton.enable_pdl": True}


class SkinnyPass(CustomGraphPass):
    """Rewrites `x @ w.T` of at most 16 rows, w an input of the graph, where `choose` names a configuration.

    Passes of one model are equal, so that torch.compile takes up what it compiled for another decoder of that model.
    """

    def __init__(self, model: torch.nn.Module, choose: Choose = skinnytune.choose):
        self.model, self.choose = weakref.ref(model), choose  # weakly: torch.compile copies its options, and keeps them

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SkinnyPass) and (self.model, self.choose) == (other.model, other.choose)

    def __hash__(self) -> int:
        return hash((self.model, self.choose))

    def __call__(self, graph: Graph) -> None:
        products: dict[tuple[Node, int, torch.dtype], list[tuple[Node, Node]]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            x, (rows, inner) = node.args[0], node.args[0].meta["val"].shape
            weight = _weight(node.args[1])
            if weight is not None and isinstance(rows, int) and rows <= ROWS:
                products[_source(x), inner, x.meta["val"].dtype].append((node, weight))
        for group in products.values():
            for start in range(0, len(group), WEIGHTS):
                self._rewrite(graph, group[start : start + WEIGHTS])

    def uuid(self) -> bytes:
        """Of the code: what was measured on a device stays with what inductor's cache keeps for that device."""
        files = __file__, str(skinny.__file__), str(skinnytune.__file__)
        return get_hash_for_files(files, os.environ.get("ADAPTIVEKV_TUNE", ""))

    def _rewrite(self, graph: Graph, group: list[tuple[Node, Node]]) -> None:
        (first, _), weights, model = group[0], [weight for _, weight in group], self.model()
        x = first.args[0]
        assert isinstance(x, Node)
        val = x.meta["val"]
        rows, inner = val.shape
        outs = tuple(w.meta["val"].shape[0] for w in weights)
        config = None if model is None else self.choose(model, rows, outs, inner, val.dtype, val.device)
        if config is None:
            return
        with graph.inserting_before(first):
            parts = _add(graph, torch.ops.adaptivekv.skinny_linear.default, x, weights, *config)
            start = 0
            for (node, _), out in zip(group, outs, strict=True):
                mine = _add(graph, aten.slice.Tensor, parts, 2, start, start + out) if len(group) > 1 else parts
                if config.split > 1:
                    total = _add(graph, aten.sum.dim_IntList, mine, [0])
                    whole = _add(graph, prims.convert_element_type.default, total, val.dtype)
                else:
                    whole = _add(graph, aten.select.int, mine, 0, 0)
                node.replace_all_uses_with(whole)
                start += out
        for node, _ in group:
            graph.erase_node(node)


def _add(graph: Graph, target: Any, *args: Any) -> Node:
    """A new node with the fake tensor that inductor expects of each."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
    return node


def _weight(node: Any) -> Node | None:
    """The contiguous matrix [N, K], an input of the graph, whose transpose a node is."""
    turned = node.target is aten.permute.default and list(node.args[1]) == [1, 0]
    if turned or node.target is aten.t.default:
        weight = node.args[0]
        if weight.op == "placeholder" and weight.meta["val"].is_contiguous():
            return weight
    return None


def _source(node: Node) -> Node:
    """What a node is a view of: every linear layer makes its own view of one x."""
    while node.target in _VIEWS:
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    return node
