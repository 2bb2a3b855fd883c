"""AdaptiveCache: the transformers cache whose full-attention layers live in pages under a controller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from adaptivekv import attention as attention_room
from adaptivekv.attention import Staged, attend_sequence
from adaptivekv.controller import DEFAULT_QUALITY, Controller
from adaptivekv.decisions import Request, report
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.graph import GraphDecoder, refused
from adaptivekv.kept import copied, crop, make_layers
from adaptivekv.kernels.codec import PAGE
from adaptivekv.layers import AdaptiveLayer, layer_shapes, model_mark
from adaptivekv.memory.formats import FORMATS, parse_bytes
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.plan import Plan
from adaptivekv.policies.base import NEEDS
from adaptivekv.policies.eviction.surrogate import find
from adaptivekv.recall import Recalling
from adaptivekv.selector import Selector
from adaptivekv.sizing import budget_bytes, capacity, full_bytes, make_pool


class AdaptiveCache(Cache):
    """A KV cache that keeps a byte budget and a quality, for unmodified transformers models.

    model: any decoder whose full-attention layers go through transformers' AttentionInterface; constructing the cache
    sets the model's attention implementation to `adaptivekv`. Layers of other kinds keep transformers' own cache.
    budget: hard cap on device KV bytes: bytes, "64MiB", or a share of the full 16-bit cache of prompt and
    `max_new_tokens`, resolved when the first tokens arrive. None: no cap beyond `max_tokens` native tokens a row.
    plan: a fixed plan; None lets `selector` choose one that loses at most `quality` nats per token.
    kv_dtype: what native pages store (default: the model's dtype; 16-bit halves them under a 32-bit model).
    host: host bytes for offloading (default: enough for what the plan may leave there; 0: none).
    disk: bytes of a file in the cache folder for offloading (default: enough for what a plan sends there; 0: none).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        budget: str | float | int | None = None,
        quality: float = DEFAULT_QUALITY,
        plan: str | Plan | None = None,
        selector: Selector | None = None,
        kv_dtype: torch.dtype | None = None,
        host: str | int | None = None,
        disk: str | int | None = None,
        max_new_tokens: int = 256,
        max_tokens: int | None = None,
        controller: Controller | None = None,
        pool: PagePool | None = None,
    ):
        if not 0 <= quality < float("inf"):
            raise AdaptiveKVError(f"quality={quality}: nats per token, 0 or more")
        fixed = None if plan is None else Plan.parse(plan)
        self.controller, self.mark = controller or Controller(fixed, selector, quality), model_mark(model)
        self.controller.meet(self.mark)
        self.budget = None if budget is None else parse_bytes(budget)
        self.host, self.disk = capacity(host), capacity(disk)
        if fixed and (offload := fixed.stage("offload")):
            if offload.host and self.host == 0:
                raise AdaptiveKVError(f"plan {fixed} offloads to the host, but host=0; give it host bytes")
            if offload.disk and self.disk == 0:
                raise AdaptiveKVError(f"plan {fixed} offloads to disk, but disk=0; give it disk bytes")
        self.max_new_tokens, self.max_tokens = max_new_tokens, max_tokens
        self.shapes = layer_shapes(model)
        foretold = any("surrogate" in plan.needs for plan in self.controller.possible)
        self.surrogate = find(model, self.shapes) if foretold else None
        if (mine := self.controller.fixed) and "surrogate" in mine.needs and not self.surrogate:
            raise AdaptiveKVError(f"plan {mine}: needs {NEEDS['surrogate']}, and there is none")
        self.dtype, self.device = kv_dtype or model.dtype, model.device
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():  # where Triton launches
            raise AdaptiveKVError(
                f"the model is on {self.device}: call torch.cuda.set_device({str(self.device)!r}) first"
            )
        self.positions = getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0
        self.pool, self.shared = pool, pool is not None
        self.requests: list[Request] = []
        self.seen = 0  # tokens seen a row, pads included
        self.frozen = False
        self.recalling = False  # the frozen step under way is a second reading (`adaptivekv.recall`)
        self.reading: bool | None = None  # whether what comes is prompt; None: several tokens at once are
        self._expected: tuple[int, int] | None = None  # prompt and new tokens, when the caller has said
        self._valid: list[Tensor | slice] = []  # of the step under way: which tokens of a row are real
        self._new: list[int] = []  # and how many
        self._started = 0.0
        self._facts: dict[str, float] = {}
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self._config = model.config.get_text_config(decoder=True)
        super().__init__(layers=make_layers(self, self._config))
        attention_room.register()
        model.set_attn_implementation(attention_room.NAME)
        if self._config._attn_implementation != attention_room.NAME:  # transformers only warns
            raise AdaptiveKVError(
                f"model type {self._config.model_type}: its attention function cannot be exchanged; use DynamicCache"
            )

    @property
    def kept(self) -> list[CacheLayerMixin]:
        """The layers transformers keeps: sliding windows, linear attention. A DummyLayer holds nothing."""
        return [x for x in self.layers if not isinstance(x, AdaptiveLayer) and type(x).__name__ != "DummyLayer"]

    # -- what callers use --------------------------------------------------------------------------------------------

    @property
    def sequences(self) -> list[Sequence]:
        return [request.sequence for request in self.requests]

    @property
    def generate_kwargs(self) -> dict[str, Any]:
        """Pass to `model.generate(...)`: prefill in chunks that respect the budget, lengths known at admission."""
        return {"prefill_chunk_size": self.chunk, "custom_generate": self._generate}

    @property
    def chunk(self) -> int:
        """Prompt tokens per forward: a whole number of pages, at most a fifth of the budget in native tokens."""
        token = sum(s.slot_elements for s in self.shapes) * self.dtype.itemsize
        budget = budget_bytes(self.budget, self.shapes, sum(self._expected or ()))
        return int(np.clip(budget // 5 // token // PAGE * PAGE, PAGE, 512)) if budget else 256

    def expect(self, prompt: int, new: int, facts: dict[str, float] | None = None) -> None:
        """Say before the first tokens how long prompt and answer will be, so that the budget can be resolved."""
        self._expected, self._facts = (prompt, new), facts or {}

    def observe_logits(self, logits: Tensor) -> None:
        """Keep the last logits [B, V]: the next decision, if one is due, takes their entropy and margin."""
        for request, row in zip(self.requests, logits, strict=True):
            request.logits = row

    def report(self) -> dict[str, Any]:
        """Plans and reasons, bytes per tier, peaks and time (docs/architecture.md)."""
        out = report(self.controller, self.requests, self.pool)
        out["budget"] = self.requests[0].budget if self.requests else self.budget
        steps = max(1, max((r.generated for r in self.requests), default=0))
        out["prefill_s"] = round(self.seconds["prefill"], 3)
        out["decode_ms_per_step"] = round(1e3 * self.seconds["decode"] / steps, 2)
        return out

    @staticmethod
    def estimate(
        model: PreTrainedModel, tokens: int, plan: str | Plan, kv_dtype: torch.dtype | None = None
    ) -> dict[str, int]:
        """Bytes of `tokens` prompt tokens under `plan`: {"full", "device", "host", "disk"}, before running."""
        return Plan.parse(plan).estimate(layer_shapes(model), kv_dtype or model.dtype, tokens)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on (of unpadded rows: batch rows with pads are refused)."""
        if not 0 <= length <= self.seen:
            raise AdaptiveKVError(f"length={length}: between 0 and the {self.seen} tokens seen")
        for sequence in self.sequences:
            if sequence.length != self.seen:
                raise AdaptiveKVError("truncate: rows with pads cannot be cut at one length")
        if length < self.seen:
            crop(self.kept, self.seen, length)
        for sequence in self.sequences:
            sequence.truncate(length)
        self.seen = length

    def crop(self, tokens_to_remove: int) -> None:
        self.truncate(self.seen - abs(tokens_to_remove))

    def end_prefill(self) -> None:
        """The prompt has ended: decide and apply the plan now instead of at the first decode step."""
        for request in self.requests:
            if request.prefilling:
                self.controller.end_prefill(request)

    def adopt(self, load: Callable[[PagePool], Sequence], length: int, new: int) -> None:
        """Take up a saved sequence of `length` tokens as this cache's only row; `load` reads it into the pool."""
        if self.kept:
            raise AdaptiveKVError(
                f"model type {self._config.model_type}: what its {type(self.kept[0]).__name__}s hold is not saved; "
                "read the prompt again"
            )
        self.clear()
        budget = budget_bytes(self.budget, self.shapes, length + new)
        if self.pool is None:
            self.pool = make_pool(self, 1, length + new, budget)
        self.pool.surrogate = self.pool.surrogate or self.surrogate
        full = full_bytes(self.shapes, length + new)
        self.requests = [Request(load(self.pool), length, new, budget, full)]
        self.seen = length
        self.controller.admit(self.requests[0])

    def clear(self) -> None:
        """Free everything; the cache can be used again as new."""
        for sequence in self.sequences:
            sequence.free()
        self.requests, self.seen, self._expected = [], 0, None
        self.pool = self.pool if self.shared else None
        if self.kept:
            self.layers = make_layers(self, self._config)

    @contextmanager
    def frozen_step(self) -> Iterator[None]:
        """`with cache.frozen_step(): model(...)`: new tokens attend to the cache and each other, nothing is stored."""
        layers = self.layers
        try:
            self.frozen, self.layers = True, copied(layers)
            yield
        finally:
            self.frozen, self.layers = False, layers

    # -- a step, driven by the attention function --------------------------------------------------------------------

    def attend(
        self,
        staged: Staged,
        query: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """query [B, Hq, q, d], mask [B, >= q] bool or None. Attends, then stores. Returns [B, Hq, q, v_dim]."""
        q_len = query.shape[2]
        if staged.layer == 0:
            self._started = time.perf_counter()
            self._begin(query.shape[0], q_len, None if mask is None else mask[:, -q_len:])
        out = query.new_zeros(*query.shape[:3], staged.value.shape[3])
        for b, request in enumerate(self.requests):
            sequence, valid = request.sequence, self._valid[b]
            if not self._new[b]:
                continue
            sequence.scaling = scale
            q, k, v = query[b][:, valid], staged.key[b][:, valid], staged.value[b][:, valid]
            stats = not self.recalling and self.controller.wants_mass(request)
            out[b][:, valid] = attend_sequence(
                sequence, staged.layer, q, k, v, scale, softcap, sinks, stats, self.recalling
            ).to(out.dtype)
            if not self.frozen:
                sequence.append(staged.layer, k, v, sequence.length + np.arange(self._new[b]))
                if sequence.window:
                    sequence.observe(staged.layer, q)
        if staged.layer == len(self.shapes) - 1:
            self._end(q_len)
        return out

    def begin_graph_step(self) -> bool:
        """What a captured decode step needs of the host first. Returns whether it should measure page mass."""
        self._started = time.perf_counter()
        self._begin(len(self.requests), 1, None)
        return any(self.controller.wants_mass(request) for request in self.requests)

    def end_graph_step(self) -> None:
        """The step's tokens lie in the tails and are counted: seal the full ones."""
        for sequence in self.sequences:
            if sequence.tail_len == PAGE:
                sequence.seal()
        self.seen += 1
        self.seconds["decode"] += time.perf_counter() - self._started

    def _begin(self, rows: int, q_len: int, mask: Tensor | None) -> None:
        """First layer of a step: admit, decide, and make room for the pages this step will seal."""
        if mask is None:
            self._valid, self._new = [slice(None)] * rows, [q_len] * rows
        else:
            self._valid = [slice(None) if bool(row.all()) else row.nonzero()[:, 0] for row in mask]
            self._new = mask.sum(1).tolist()
        if not self.requests:
            self.admit(rows, self._new)
        if len(self.requests) != rows:
            raise AdaptiveKVError(
                f"batch of {rows} rows: this cache holds {len(self.requests)}; use one cache per batch"
            )
        if self.frozen:
            return
        prompt = self.reading if self.reading is not None else q_len > 1 or self.seen == 0
        for request, new in zip(self.requests, self._new, strict=True):
            if prompt and not request.prefilling:
                self.controller.begin_turn(request)
            elif not prompt:
                if request.prefilling:
                    self.controller.end_prefill(request)
                self.controller.step(request, new)
        columns = sum(r.sequence.columns_needed(n) for r, n in zip(self.requests, self._new, strict=True))
        if columns:
            self.controller.reserve(
                self.requests, columns * self.requests[0].sequence.pool.column_bytes(FORMATS["native"])
            )

    def _end(self, q_len: int) -> None:
        """Last layer of a step: the tokens count."""
        if not self.frozen:
            for request, n in zip(self.requests, self._new, strict=True):
                request.sequence.commit(request.sequence.length + np.arange(n))
            self.seen += q_len
        kind = "prefill" if q_len > 1 else "decode"
        self.seconds[kind] += time.perf_counter() - self._started

    def admit(self, rows: int, new: list[int]) -> None:
        """Resolve the budget, make the pool, open a sequence a row, take the provisional decision."""
        prompt, answer = self._expected or (max(new), self.max_new_tokens)
        if self.positions and prompt > self.positions:
            raise AdaptiveKVError(f"prompt of {prompt} tokens: the model has {self.positions} positions; shorten it")
        budget = budget_bytes(self.budget, self.shapes, prompt + answer)
        if self.pool is None:
            self.pool = make_pool(self, rows, prompt + answer, budget * rows if budget else None)
        self.pool.surrogate = self.pool.surrogate or self.surrogate
        for n in new:
            sequence = Sequence(self.pool, self.controller.window)
            sequence.prompt = n if self._expected is None else prompt
            request = Request(sequence, sequence.prompt, answer, budget, full_bytes(self.shapes, prompt + answer))
            request.facts = dict(self._facts)
            self.requests.append(request)
            self.controller.admit(request)

    def _generate(self, model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Any:
        """transformers' own sampling loop, once the lengths are known; see `generate_kwargs`."""
        config = kwargs["generation_config"]
        if config.num_beams > 1 or config.num_return_sequences > 1:
            raise AdaptiveKVError("AdaptiveCache does not support beams; use num_beams=1 and num_return_sequences=1")
        if not self.requests:
            prompt = input_ids.shape[1]
            facts = {"distinct_share": len(set(input_ids[0].tolist())) / max(1, prompt)}
            self.expect(prompt, max(1, config.max_length - prompt), facts | self._facts)
        config.prefill_chunk_size = self.chunk
        runner: Any = model if refused(self) else GraphDecoder(model, self)
        if self.controller.recalls:
            runner = Recalling(runner, self, input_ids, kwargs.get("attention_mask"))
        return type(model)._sample(runner, input_ids, **kwargs)
