"""The second reading of a prompt (KVzip): credits against plain attention, and every way that leads to them."""

import pytest
import torch
from models import tiny

from adaptivekv import AdaptiveCache, AdaptiveKVError
from adaptivekv.engine.session import Options, Session
from adaptivekv.recall import AGAIN, recall
from adaptivekv.trainer.replay import reference, replay

PLAN = "kvzip(0.4)"


def read(model, ids, mask=None, plan=PLAN):
    """A cache that has read ids [B, n], and done nothing else."""
    cache = AdaptiveCache(model, plan=plan)
    real = torch.ones_like(ids) if mask is None else mask
    pos = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=pos, past_key_values=cache)
    return cache


def prompt(rows=1, n=200, seed=0):
    return torch.randint(2, 160, (rows, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("staging", [4 << 20, 20_000])
def test_credit_is_the_squared_attention_of_the_repeated_tokens(staging):
    """Against transformers' own attention weights over prompt and repetition."""
    model, ids = tiny(), prompt()
    cache = read(model, ids)
    cache.pool.staging_bytes = staging  # the second is room for 26 rows of scores
    recall(model, cache, ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(torch.cat([ids, ids], 1), output_attentions=True).attentions
    (sequence,) = cache.sequences
    for layer, credit in enumerate(sequence.credits["recall"]):
        heads = len(credit)
        paid = weights[layer][0, :, 200:, :192].square().sum(1).view(heads, -1, 192).sum(1)  # the last 8 are the tail
        assert torch.allclose(torch.from_numpy(credit[:, :192]), paid, rtol=1e-4, atol=1e-6)
        assert not credit[:, 192:].any()
    sequence.pool.check_integrity()
    assert sequence.length == 200 and cache.seen == 200


def test_rows_and_pads_and_turns():
    """A padded row is credited as if it were alone; a second turn adds to the first one's credits."""
    model, ids = tiny(), prompt(2)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    both = read(model, ids, mask)
    recall(model, both, ids, mask)
    alone = read(model, ids[1:, 50:])
    recall(model, alone, ids[1:, 50:])
    for a, b in zip(both.sequences[1].credits["recall"], alone.sequences[0].credits["recall"], strict=True):
        assert a.shape == b.shape and torch.allclose(torch.from_numpy(a), torch.from_numpy(b), atol=1e-5)
    before = [credit.copy() for credit in alone.sequences[0].credits["recall"]]
    recall(model, alone, ids[1:, 50:], start=150 - AGAIN)
    assert all((a >= b).all() for a, b in zip(alone.sequences[0].credits["recall"], before, strict=True))


def test_credits_follow_a_cut_and_a_fork():
    """An edited conversation goes back and on; two branches do not share what they learn."""
    model, ids = tiny(), prompt()
    cache = read(model, ids)
    recall(model, cache, ids)
    cache.truncate(130)
    (sequence,) = cache.sequences
    assert all(credit.shape[1] == 130 for credit in sequence.credits["recall"])
    with torch.no_grad():
        model(ids[:, 130:], position_ids=torch.arange(130, 200)[None], past_key_values=cache)
    recall(model, cache, ids, start=130)
    assert all(credit.shape[1] == 200 for credit in sequence.credits["recall"])
    other = sequence.fork()
    other.credits["recall"][0][:] = 7.0
    assert sequence.credits["recall"][0].max() <= 1.0
    other.free()


def test_without_the_second_reading_one_clear_line():
    model, ids = tiny(), prompt()
    cache = read(model, ids)
    with pytest.raises(AdaptiveKVError, match="read a second time"):
        cache.end_prefill()


def test_generate_and_session_and_replay_read_twice(smol):
    """The three ways in; the share holds for the prompt in each."""
    text = "The quick brown fox jumps over the lazy dog. " * 25
    inputs = smol.tokenizer(text, return_tensors="pt")
    cache = AdaptiveCache(smol.model, plan=PLAN)
    smol.model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False, **cache.generate_kwargs)
    tokens = inputs.input_ids.shape[1]
    assert 0.4 * tokens <= cache.sequences[0].held() * cache.sequences[0].length <= 0.4 * tokens + 68
    session = Session(smol, Options(plan=PLAN))
    session.read([{"role": "user", "content": text}])
    document = len(session.tokens)
    assert session.cache.sequences[0].held() == pytest.approx(0.4, abs=0.02)
    list(session.answer([{"role": "user", "content": text + "What jumps?"}], 4))
    assert session.cache.sequences[0].credits["recall"][0].shape[1] > document
    full = reference(smol, inputs.input_ids[0].tolist(), 4, plans=(PLAN,))
    out = replay(full, PLAN)
    assert out.kl_mean < 0.2 and out.device_bytes < 0.7 * full.full_bytes
    full.free()
