"""Decode steps as replays of captured CUDA graphs: the unmodified model, our cache and attention.

A graph is captured once per batch and kind of step (plain, or with statistics). What it reads of the cache are tables
at fixed addresses (`memory/tables.py`), so pages are sealed, converted, moved and evicted between replays.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from adaptivekv.attention import decode_step
from adaptivekv.kernels import triton_module, triton_works
from adaptivekv.layers import AdaptiveLayer
from adaptivekv.memory.formats import WITH_KERNEL
from adaptivekv.memory.shapes import DISK
from adaptivekv.memory.tables import PAIRS, StepTables, columns_for

if TYPE_CHECKING:
    from adaptivekv.cache import AdaptiveCache

EAGER = 8  # decode steps of a request before its graph is captured: a short answer does not pay for one
WARM = 3  # steps before a capture: compilation, handles and workspaces


def refused(cache: AdaptiveCache) -> str | None:
    """Why decode steps of this cache cannot be captured, or None."""
    shape = cache.shapes[0]
    if cache.device.type != "cuda":
        return "the model is not on a GPU"
    if not triton_works():
        return "Triton is missing"
    if not all(isinstance(layer, AdaptiveLayer) for layer in cache.layers):
        return "some layers keep transformers' own cache, whose tensors move"
    if any(s != shape for s in cache.shapes):
        return "layers of different shapes"
    if shape.q_heads // shape.heads > 16:
        return "more than 16 query heads per KV head"
    for plan in cache.controller.possible:
        quantize = plan.stage("quantize")
        if quantize and not all(fmt.kernel for fmt in quantize.formats):
            return f"{quantize.name}: its pages have no Triton kernel"
        offload, retrieve = plan.stage("offload"), plan.stage("retrieve")
        if offload and (offload.disk or offload.by == "values"):
            return f"{offload}: no kernel reads pages on disk, or their keys and values from two tiers"
        if retrieve and retrieve.by != "bounds":
            return f"{retrieve}: kernels choose pages by their bounds"
    return None


class GraphDecoder:
    """Decode steps of every row of a cache, replayed. Called like the model, it stands in for it in `generate`.

    model: any model the cache serves; compiled: run it through `torch.compile` first (slow once, faster steps).
    """

    def __init__(self, model: Any, cache: AdaptiveCache, compiled: bool = False):
        self.model, self.cache = model, cache
        self.run = model.forward
        if compiled:
            options = triton_module("skinnypass").compile_options(model)
            self.run = torch.compile(model.forward, dynamic=False, options=options)
        self.tables: StepTables | None = None
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.tokens = self.positions = torch.zeros(0, 1, dtype=torch.int64, device=cache.device)
        self.length: list[int] = []  # of each row, as `positions` has it
        # a pool (weakly: it may be cleared away), its clock, and whether the kernel knew its pages then
        self.checked: tuple[Any, int, bool] = (lambda: None), 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        asked = kwargs.get("output_attentions") or kwargs.get("output_hidden_states")
        if self.tables and self.tables.pool is not self.cache.pool:  # the cache was cleared: let its memory go
            self.tables = None
            self.graphs.clear()
        if input_ids is None or input_ids.shape[1] > 1 or asked or not self.ready:
            return self.model(input_ids=input_ids, **kwargs)
        return CausalLMOutputWithPast(logits=self.step(input_ids[:, 0])[:, None], past_key_values=self.cache)

    @property
    def ready(self) -> bool:
        """Whether the next decode step can be a replay: requests past their first, no queries to keep."""
        requests = self.cache.requests
        return (
            bool(requests)
            and not self.cache.frozen
            and self._known()
            and all(r.generated >= EAGER and not r.prefilling and not r.sequence.ring for r in requests)
        )

    def _known(self) -> bool:
        """Whether the kernel can read all pages, by format and tier: a saved cache may bring others than the plan's."""
        pool = self.cache.pool
        assert pool is not None
        if (self.checked[0](), self.checked[1]) != (pool, pool.clock):
            held = pool.ref > 0
            known = (pool.code[held] < len(WITH_KERNEL)) & (pool.tier[held] != DISK) & ~pool.split[held]
            self.checked = weakref.ref(pool), pool.clock, bool(known.all())
        return self.checked[2]

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token a row, int64 [B]; returns the logits [B, V], overwritten by the next step."""
        cache = self.cache
        stats = cache.begin_graph_step()
        self._prepare()
        assert self.tables is not None
        self.tokens.copy_(tokens.view(-1, 1))
        if stats not in self.graphs:
            self.graphs[stats] = self._capture(stats)
        graph, logits = self.graphs[stats]
        graph.replay()
        self.tables.advance()
        self.length = [n + 1 for n in self.length]
        if stats:
            self.tables.measured()
        cache.end_graph_step()
        return logits

    def _prepare(self) -> None:
        """Have tables that fit and say what the sequences are now."""
        cache, sequences = self.cache, self.cache.sequences
        tables = self.tables
        if (
            tables is None
            or tables.sequences != sequences
            or tables.pool is not cache.pool
            or (tables.stale() and not tables.fits())
        ):
            self.graphs.clear()
            longest = max(max(s.length + r.new for s, r in zip(sequences, cache.requests, strict=True)), 1)
            shape, processors = cache.shapes[0], triton_module("decode").processors(cache.device)
            group = shape.q_heads // shape.heads
            launch = triton_module("tune").launch_for(cache.device, shape.k_dim, shape.v_dim, group, cache.dtype, PAIRS)
            self.tables = tables = StepTables(sequences, columns_for(longest), processors, launch)
            self.tokens = torch.zeros(len(sequences), 1, dtype=torch.int64, device=cache.device)
            self.positions = torch.zeros_like(self.tokens)
        if tables.stale():
            retrieving = bool(tables.selections)
            tables.update()
            if retrieving != bool(tables.selections):
                self.graphs.clear()  # choosing pages is part of what is captured
        if self.length != (now := [s.length for s in sequences]):
            self.positions.copy_(torch.tensor(now)[:, None])
            self.length = now

    def _capture(self, stats: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        assert self.tables is not None
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        mass = self.tables.mass.clone()
        with decode_step(self.tables, stats):
            with torch.cuda.stream(stream):
                for _ in range(WARM):  # each writes the slot that the step itself will write again
                    self.tables.tails.add_(1)
                    self._forward()
                    self.tables.tails.sub_(1)
                self.tables.mass.copy_(mass)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self.tables.tails.add_(1)
                logits = self._forward()
                self.positions.add_(1)
        return graph, logits

    def _forward(self) -> Tensor:
        out = self.run(
            input_ids=self.tokens, position_ids=self.positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return out.logits[:, -1]
