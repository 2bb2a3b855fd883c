"""Decode steps through page tables against the eager path: in the interpreter, and as captured graphs on a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import run_in_interpreter
from models import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from adaptivekv.attention import decode_step
from adaptivekv.bench.decode import filled
from adaptivekv.cache import AdaptiveCache
from adaptivekv.graph import GraphDecoder, refused
from adaptivekv.kernels.table import ABSENT, ROTATED, Launch, plan_work
from adaptivekv.memory.tables import StepTables, columns_for

PLANS = ("k4v2 | offload(0.4)", "snapkv(0.4) | int8", "int2 | retrieve(0.4)")


@settings(max_examples=60, deadline=None)
@given(
    pages=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=6),
    processors=st.integers(1, 5),
    together=st.integers(1, 4),
)
def test_work_covers_every_page_once(pages, processors, together):
    """Two layers, the second with its rows turned around; formats 0, 2 and 1 + ROTATED of different weight."""
    codes, time = (0, 2, ROTATED + 1), torch.zeros(256, dtype=torch.int64)
    time[list(codes)] = torch.tensor([7, 3, 2])
    counts = np.array([pages, pages[::-1]])
    code = torch.full((*counts.shape[:2], 27), ABSENT, dtype=torch.uint8)
    for (layer, row), _ in np.ndenumerate(counts[..., 0]):
        run = np.repeat(codes, counts[layer, row])
        code[layer, row, : len(run)] = torch.from_numpy(run.astype(np.uint8))
    work = plan_work(code, time, processors, together)
    for layer in range(2):
        one = work.layer(layer)
        covered, done, used = np.zeros(code.shape[1:], int), [], np.zeros(len(one.slots), int)
        for share, (more, n) in enumerate(one.spans.tolist()):
            for item in (share, *range(more, more + n)):
                row, fmt, start, stop = one.items[item].tolist()
                if one.slots[item] < 0:
                    assert start == stop and not n, "an empty share with items"
                    continue
                assert start < stop and (code[layer, row, start:stop] == fmt).all()
                covered[row, start:stop] += 1
                slot = int(one.slots[item])
                begin, many = one.parts[row].tolist()
                assert begin <= slot < begin + many, "a result outside its row's"
                assert one.turned[slot] == (fmt >= ROTATED)
                used[slot] += 1
                done.append(item)
        assert (covered == (code[layer] != ABSENT).numpy()).all(), "a page left out or read twice"
        assert len(set(done)) == len(done) == int((one.slots >= 0).sum()) and used.max(initial=0) <= 1
        assert int(one.parts[:, 1].sum()) == len(done)


def compare(plan, steps, decoder=None, device="cpu", generated=29):
    """Worst relative difference of logits, eager path against steps through tables; page mass is compared here."""
    torch.manual_seed(0)
    model = tiny("llama").to(device)
    ids = torch.randint(2, 150, (2, 253), device=device)
    eager, graph = (AdaptiveCache(model, plan=plan, max_tokens=600) for _ in range(2))
    worst = 0.0
    with torch.inference_mode():
        for cache in (eager, graph):
            for start in range(0, 253, 64):
                model(ids[:, start : start + 64], past_key_values=cache)
            cache.end_prefill()
            for request in cache.requests:
                request.generated = generated
        tables = None if device == "cuda" else StepTables(graph.sequences, columns_for(300), 2, Launch(programs=4))
        replays = GraphDecoder(model, graph) if device == "cuda" else None
        token = torch.tensor([[5], [7]], device=device)
        for _ in range(steps):  # the tail has 61 slots: the third step seals it
            want = model(token, past_key_values=eager).logits[:, -1]
            if replays:
                got = replays.step(token[:, 0])
            else:
                stats = graph.begin_graph_step()
                if tables.stale():
                    tables.update()
                with decode_step(tables, stats):
                    tables.tails.add_(1)
                    position = torch.full((2, 1), graph.seen)
                    got = model(token, position_ids=position, past_key_values=graph).logits[:, -1]
                tables.advance()
                if stats:
                    tables.measured()
                graph.end_graph_step()
            worst = max(worst, float((got - want).abs().max() / want.abs().max()))
            token = want.argmax(-1, keepdim=True)
        graph.pool.check_integrity()
        if "retrieve" not in plan:
            for mine, theirs in zip(graph.sequences, eager.sequences, strict=True):
                for a, b in zip(mine.mass, theirs.mass, strict=True):
                    np.testing.assert_allclose(a, b, atol=1e-5)
    return worst


def test_tables_equal_the_eager_path_in_the_interpreter():
    run_in_interpreter(__file__)


def test_tables_follow_the_end_of_retrieval():
    pytest.importorskip("triton")
    cache = AdaptiveCache(tiny("llama"), plan="retrieve(0.5)", max_tokens=600)
    with torch.inference_mode():
        cache.admit(1, [300])
        (sequence,) = cache.sequences
        for layer, shape in enumerate(cache.shapes):
            k, v = (torch.randn(shape.heads, 300, dim) for dim in (shape.k_dim, shape.v_dim))
            sequence.append(layer, k, v, np.arange(300))
        sequence.commit(np.arange(300))
        cache.end_prefill()
        tables = StepTables(cache.sequences, columns_for(400), 2, Launch(programs=2))
        tables.update()
        assert tables.selections and not tables.stale()
        sequence.retrieve = None  # no page changes with it
        assert tables.stale()
        tables.update()
        assert not tables.selections


def test_a_cpu_is_refused_with_the_reason():
    assert refused(AdaptiveCache(tiny("llama"))) == "the model is not on a GPU"


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["full", *PLANS])
def test_graphs_equal_the_eager_path(plan):
    assert compare(plan, 12, device="cuda") < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8])
def test_compiled_steps_equal_the_model(rows):
    """Through two sealed pages and five statistics steps: products of our own, kernels that overlap, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4,
        head_dim=128, vocab_size=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    decoders = []
    with torch.inference_mode():
        for compiled in (False, True):
            torch.manual_seed(1)
            cache = filled(model, rows, 1000, "int4")
            cache.end_prefill()
            decoders.append(GraphDecoder(model, cache, compiled))
        plain, compiled = decoders
        for token in torch.randint(8192, (150, rows), device="cuda"):
            want, got = plain.step(token).float(), compiled.step(token).float()
            assert (got - want).norm() < 4e-2 * want.norm()  # rounding: 2e-2; a stale tile of 128 outputs: 1e-1 or more
        for decoder in decoders:
            assert len(decoder.graphs) == 2
            decoder.cache.pool.check_integrity()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for text in PLANS:
        difference = compare(text, 4)
        assert difference < 1e-4, (text, difference)
