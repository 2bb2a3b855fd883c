"""Models of which transformers keeps some layers (sliding windows, linear attention), and models that are refused."""

import pytest
import torch
from models import MIXED, tiny, twins
from test_cache import left_padded, run
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from adaptivekv import AdaptiveCache, AdaptiveKVError
from adaptivekv.layers import AdaptiveLayer


def state(layer):
    """What a layer of transformers holds, of the last row: the others have pads, whose keys nobody reads."""
    if isinstance(layer, LinearAttentionLayer):
        held = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    else:
        held = [layer.keys, layer.values]
    return [x[-1] for x in held if x is not None]


@pytest.mark.parametrize("name", MIXED)
@torch.no_grad()
def test_full_plan_equals_dynamic_cache(name):
    """A ragged batch, prompts in chunks, two turns: logits and what the kept layers hold."""
    ours, theirs = twins(name)
    turns = [left_padded(2, 150, [37, 0]), left_padded(2, 70, [0, 0], seed=1)]
    answers = [left_padded(2, 9, [], seed=s)[0] for s in (2, 3)]
    cache, reference = AdaptiveCache(ours, plan="full"), DynamicCache(config=theirs.config)
    got = run(ours, cache, turns, answers, chunk=64)
    want = run(theirs, reference, turns, answers, chunk=64)
    assert (got - want).abs().max() <= 1e-4
    assert cache.get_seq_length() == reference.get_seq_length() == 238
    for mine, other in zip(cache.layers, reference.layers, strict=True):
        assert type(mine) is (AdaptiveLayer if type(other) is DynamicLayer else type(other))
        if mine in cache.kept:
            for a, b in zip(state(mine), state(other), strict=True):
                assert a.shape == b.shape and (a - b).abs().max() <= 1e-4
    cache.pool.check_integrity()


@pytest.mark.parametrize("name", MIXED)
@torch.no_grad()
def test_a_plan_changes_full_layers_only(name):
    ours, theirs = twins(name)
    prompt, answer = left_padded(2, 300, [40, 0]), left_padded(2, 5, [])[0]
    cache, reference = AdaptiveCache(ours, plan="int4"), DynamicCache(config=theirs.config)
    got = run(ours, cache, [prompt], [answer], chunk=128)
    want = run(theirs, reference, [prompt], [answer], chunk=128)
    assert 1e-5 < (got - want)[-1].abs().max() < 1
    first = cache.layers[0]  # nothing lossy lies below it
    assert first in cache.kept and all(map(torch.equal, state(first), state(reference.layers[0])))
    full = [layer for layer in reference.layers if type(layer) is DynamicLayer]
    for row, n in enumerate((260, 300)):
        elements = sum(x[0, :, 0].numel() for layer in full for x in (layer.keys, layer.values))
        assert AdaptiveCache.estimate(ours, n, "int4", torch.float16)["full"] == 2 * n * elements
        assert cache.sequences[row].bytes() == AdaptiveCache.estimate(ours, n, "int4", cache.dtype)["device"]


@pytest.mark.parametrize("name", ["qwen3-next", "ministral"])
@torch.no_grad()
def test_generate(name):
    ours, theirs = twins(name)
    ids, mask = left_padded(2, 130, [17, 0])
    kwargs = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    cache = AdaptiveCache(ours, plan="full")
    got = ours.generate(ids, past_key_values=cache, **kwargs, **cache.generate_kwargs)
    assert torch.equal(got, theirs.generate(ids, **kwargs))


@torch.no_grad()
def test_sinks_reach_full_layers():
    """Guards the comparison above: in full layers alone, sinks change the logits by far more than its tolerance."""
    model = tiny("gpt-oss")
    prompt, none = left_padded(1, 100, []), torch.zeros(1, 0, dtype=torch.long)
    logits = []
    for sink in (None, -1e4):
        for layer in model.model.layers[1::2] if sink else ():
            layer.self_attn.sinks.fill_(sink)
        logits.append(run(model, AdaptiveCache(model, plan="full"), [prompt], [none], chunk=64))
    assert (logits[0] - logits[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qwen3-next", "ministral"])
@torch.no_grad()
def test_kept_layers_follow_frozen_steps_and_clear(name):
    model = tiny(name)
    prompt, probe = left_padded(1, 100, []), left_padded(1, 20, [], seed=3)[0]
    cache, none = AdaptiveCache(model, plan="full"), probe[:, :0]
    before = run(model, cache, [prompt], [none], chunk=64)
    pos = 100 + torch.arange(20)[None]
    with cache.frozen_step():
        first = model(probe, position_ids=pos, past_key_values=cache).logits
    second = model(probe, position_ids=pos, past_key_values=cache).logits
    assert (first - second).abs().max() < 1e-5
    with pytest.raises(AdaptiveKVError, match=r"cannot return to 100 tokens; clear\(\)"):
        cache.truncate(100)
    assert cache.get_seq_length() == 120
    with pytest.raises(AdaptiveKVError, match="is not saved"):
        cache.adopt(lambda pool: None, 100, 10)
    cache.reset()  # and clear()
    two = (prompt[0].repeat(2, 1), prompt[1].repeat(2, 1))
    after = run(model, cache, [two], [none.repeat(2, 1)], chunk=64)
    assert (after[-1] - before[-1]).abs().max() < 1e-5


@torch.no_grad()
def test_truncate_within_the_window():
    model = tiny("ministral")
    prompt, probe = left_padded(1, 30, []), left_padded(1, 10, [], seed=3)[0]
    cache, pos = AdaptiveCache(model, plan="full"), 30 + torch.arange(10)[None]
    run(model, cache, [prompt], [probe[:, :0]])
    first = model(probe, position_ids=pos, past_key_values=cache).logits
    cache.crop(-10)
    assert [layer.get_seq_length() for layer in cache.layers] == [30] * 4
    assert (model(probe, position_ids=pos, past_key_values=cache).logits - first).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma3n", "gemma3n_text: layers that share one KV cache are not supported"),
        ("deepseek-v3", r"deepseek_v3: latent attention \(MLA\) keeps transformers' own cache"),
        ("kimi-linear", r"kimi_linear: latent attention \(MLA\) keeps transformers' own cache"),
        ("mistral-all-sliding", "mistral: it has no full-attention layer"),
        ("gpt-neo", "gpt_neo: its attention function cannot be exchanged"),
    ],
)
def test_refused(name, why):
    with pytest.raises(AdaptiveKVError, match=why):
        AdaptiveCache(tiny(name))


@torch.no_grad()
def test_masks_that_are_not_causal_are_refused():
    """A mask of one's own, and the tokens of an image, which see each other."""
    for name, kwargs in (
        ("llama", {"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}),
        ("gemma3-image", {"token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]])}),
    ):
        model = tiny(name)
        with pytest.raises(AdaptiveKVError, match="4-D mask"):
            model(torch.randint(2, 160, (1, 8)), past_key_values=AdaptiveCache(model), **kwargs)
