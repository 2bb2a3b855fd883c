"""`adaptivekv bench decode`: whole decode steps with random weights, against transformers' own loop in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from adaptivekv.bench.timing import copy_gbps, warm_up
from adaptivekv.cache import AdaptiveCache
from adaptivekv.engine.process import freeze
from adaptivekv.graph import GraphDecoder
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.shapes import HOST
from adaptivekv.plan import Plan

SHAPES = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    "embedded": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    },
}  # fmt: skip
CASES = (
    ("embedded", 1, 4096, "full"), ("8b", 1, 1024, "full"), ("8b", 1, 32768, "full"), ("8b", 1, 32768, "int4"),
    ("8b", 8, 1024, "full"), ("8b", 8, 32768, "int4"), ("8b", 8, 32768, "k4v2"),
)  # fmt: skip
STEPS = 128  # two sealed pages


def run(
    cases: Sequence[tuple[str, int, int, str]] = CASES, compiled: bool = False, peers: bool = True
) -> Iterator[dict[str, Any]]:
    """One row a case: ms a step (median, and mean with all that happens between steps), the plan change, the peer."""
    warm_up()
    copy, model, name = copy_gbps(), None, None
    for shape, rows, tokens, plan in cases:
        if shape != name:
            del model
            torch.cuda.empty_cache()
            model, name = random_model(shape), shape
        assert model is not None
        row: dict[str, Any] = {"shape": shape, "requests": rows, "tokens": tokens, "plan": plan, "compiled": compiled}
        row |= ours(model, rows, tokens, plan, compiled)
        if peers and plan == "full":
            torch.cuda.empty_cache()
            row["transformers_ms"] = eager_ms(model, rows, tokens)
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.lm_head.weight.numel() * 2
        row |= {"floor_ms": (weights + row["kv_bytes"]) / copy / 1e6, "copy_gbps": copy}
        torch.cuda.empty_cache()
        yield row


def random_model(shape: str) -> LlamaForCausalLM:
    """A Llama of a known shape in bfloat16 on the GPU; the time of a step does not depend on its weights' values."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1 << 18, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1.0)
    rotary = type(model.model.rotary_emb)(config).to("cuda")
    model.model.rotary_emb = rotary  # its buffers are computed, not stored
    return model


@torch.inference_mode()
def ours(model: Any, rows: int, tokens: int, plan: str, compiled: bool) -> dict[str, Any]:
    """Fill a cache with random keys and values, apply the plan, replay decode steps."""
    cache = filled(model, rows, tokens, plan)
    change = []
    for request in cache.requests:
        torch.cuda.synchronize()
        start = time.perf_counter()
        cache.controller.end_prefill(request)
        torch.cuda.synchronize()
        change.append(1e3 * (time.perf_counter() - start))
    decoder = GraphDecoder(model, cache, compiled)
    start = time.perf_counter()
    token = decoder.step(torch.zeros(rows, dtype=torch.int64, device="cuda")).argmax(-1)
    token.tolist()
    capture = time.perf_counter() - start
    for _ in range(72):  # past the first sealed page and the first statistics step: kernels compiled, graphs captured
        token = decoder.step(token).argmax(-1)
    freeze()  # as a serving process does
    samples = []
    for _ in range(STEPS):
        start = time.perf_counter()
        token = decoder.step(token).argmax(-1)
        token.tolist()  # what any sampler that looks for an end of text does
        samples.append(1e3 * (time.perf_counter() - start))
    assert decoder.tables is not None
    held = sum(sequence.bytes() for sequence in cache.sequences)
    out = {
        "ms": statistics.median(samples), "mean_ms": statistics.mean(samples), "worst_ms": max(samples),
        "plan_change_ms": min(change), "plan_change_first_ms": change[0], "capture_s": capture, "kv_bytes": held,
        "host_bytes": sum(sequence.bytes(HOST) for sequence in cache.sequences),
        "capture_peak_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip
    cache.clear()
    return out


def filled(model: Any, rows: int, tokens: int, plan: str) -> AdaptiveCache:
    """A cache as `rows` prompts of `tokens` tokens leave it, the plan not yet applied; keys and values are random."""
    # Room for the converted pages beside the native ones, as where memory is not yet short.
    host = None if Plan.parse(plan).stage("offload") else 0
    cache = AdaptiveCache(model, plan=plan, host=host, max_tokens=int(1.35 * tokens) + 2 * STEPS)
    cache.expect(tokens, 2 * STEPS)
    cache.admit(rows, [tokens] * rows)
    for request in cache.requests:
        fill(request.sequence, tokens)
    cache.seen = tokens
    return cache


def fill(sequence: Any, tokens: int) -> None:
    """Random keys and values for `tokens` tokens, as a prompt would have left them."""
    pool, step = sequence.pool, 128 * PAGE
    for start in range(0, tokens, step):
        n = min(step, tokens - start)
        pos = sequence.length + torch.arange(n).numpy()
        for layer, shape in enumerate(pool.layers):
            k, v = (torch.randn(shape.heads, n, d, device=pool.device) for d in (shape.k_dim, shape.v_dim))
            sequence.append(layer, k.to(pool.dtype), v.to(pool.dtype), pos)
        sequence.commit(pos)


def eager_ms(model: Any, rows: int, tokens: int) -> float:
    """Milliseconds a step of transformers' own loop, once this host has warmed up: the first half minute is slow."""
    last, end = float("inf"), time.perf_counter() + 10
    while (ms := _eager_ms(model, rows, tokens)) < 0.95 * last and time.perf_counter() < end:
        last = ms
    return min(ms, last)


@torch.inference_mode()
def _eager_ms(model: Any, rows: int, tokens: int, steps: int = 40) -> float:
    """Median of some steps: DynamicCache, sdpa, no graph."""
    model.set_attn_implementation("sdpa")
    config, cache = model.config, DynamicCache(config=model.config)
    shape = (rows, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cache.update(k, v, layer)
    token, samples = torch.zeros(rows, 1, dtype=torch.int64, device="cuda"), []
    for i in range(steps):
        start = time.perf_counter()
        position = torch.full((rows, 1), tokens + i, device="cuda")
        logits = model(token, position_ids=position, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        token.tolist()
        samples.append(1e3 * (time.perf_counter() - start))
    return statistics.median(samples[8:])
