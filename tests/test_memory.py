"""The page pool under every order of operations: nothing leaks, nothing overlaps, nothing changes that must not."""

from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sequences import SHAPES, as_bits, content, feed, pool, same, standing_alone

from adaptivekv.memory.arena import Arena, ArenaFull
from adaptivekv.memory.bounds import bounds
from adaptivekv.memory.evict import evict
from adaptivekv.memory.formats import FORMATS, LATENTS
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, DISK, HOST
from adaptivekv.policies.quantization.palu import Palu


class Memory(RuleBasedStateMachine):
    """Random lives of up to four sequences in one small pool; a full arena is a legal outcome, damage is not."""

    def __init__(self):
        super().__init__()
        self.pool, self.rng = pool(), np.random.default_rng(0)
        self.lossless: dict[int, dict] = {}  # content of sequences that nothing lossy has touched

    @precondition(lambda self: len(self.pool.sequences) < 4)
    @rule(window=st.sampled_from([0, 8]))
    def admit(self, window):
        try:
            sequence = Sequence(self.pool, window)
        except ArenaFull:
            return
        self.lossless[id(sequence)] = {}

    @precondition(lambda self: self.pool.sequences)
    @rule(data=st.data(), n=st.integers(1, 200))
    def append(self, data, n):
        sequence = data.draw(st.sampled_from(self.pool.sequences))
        need = sequence.columns_needed(n) * self.pool.column_bytes(FORMATS["native"])
        if need <= self.pool.arena(DEVICE).free_bytes:
            before = [ids.copy() for ids in sequence.ids]
            try:
                feed(sequence, n, int(self.rng.integers(1 << 30)))
            except ArenaFull:  # tails never move: so many can lie between the free bytes that no page fits
                assert all(map(np.array_equal, before, sequence.ids))
                return
            if id(sequence) in self.lossless:
                self.lossless[id(sequence)] = content(sequence)

    @precondition(lambda self: any(s.length for s in self.pool.sequences))
    @rule(data=st.data(), name=st.sampled_from(["int8", "fp8", "int4r", "k4v2r", "int2"]), share=st.floats(0, 1))
    def convert(self, data, name, share):
        sequence = data.draw(st.sampled_from(self.pool.sequences))
        self.lossless.pop(id(sequence), None)
        lower = np.array([f.demotes(FORMATS[name]) for f in FORMATS.values()])
        chosen = [lower[self.pool.code[ids]] & (self.rng.random(ids.shape) < share) for ids in sequence.ids]
        shared = any((self.pool.ref[ids] > 1).any() for ids in sequence.pages())
        try:
            sequence.convert(chosen, FORMATS[name])
        except ArenaFull:
            assert shared, "only a shared page may need new room"

    @precondition(lambda self: any(s.length for s in self.pool.sequences))
    @rule(data=st.data(), latent=st.sampled_from(LATENTS))
    def lower_rank(self, data, latent):
        sequence = data.draw(st.sampled_from(self.pool.sequences))
        self.lossless.pop(id(sequence), None)
        with suppress(ArenaFull):  # for the bases, or for copies of shared pages
            Palu(0.5, latent, window=0, sinks=0).apply(sequence)

    @precondition(lambda self: any(s.length for s in self.pool.sequences))
    @rule(data=st.data(), tier=st.sampled_from([DEVICE, HOST, DISK]), share=st.floats(0, 1), split=st.booleans())
    def move(self, data, tier, share, split):
        sequence = data.draw(st.sampled_from(self.pool.sequences))
        with suppress(ArenaFull):
            sequence.move([self.rng.random(ids.shape) < share for ids in sequence.ids], tier, split)

    @precondition(lambda self: any(s.length for s in self.pool.sequences))
    @rule(data=st.data(), share=st.floats(0, 1))
    def evict(self, data, share):
        sequence = data.draw(st.sampled_from(self.pool.sequences))
        before, alone = content(sequence), standing_alone(sequence)
        keep = [self.rng.random((*ids.shape, 64)) < share for ids in sequence.ids]
        if data.draw(st.booleans()):  # whole pages stay
            keep = [k | (self.rng.random(k.shape[:2]) < 0.5)[..., None] for k in keep]
        expected = {key for key in before if key[2] in sequence.tail_pos[: sequence.tail_len]}
        for layer, k in enumerate(keep):
            used, pos = sequence.slots(layer)
            expected |= {(layer, h, int(p)) for h in range(len(used)) for p in pos[h][used[h] & k[h]]}
        try:
            evict(sequence, as_bits(keep))
            assert content(sequence).keys() == expected
        except ArenaFull:
            assert any((self.pool.ref[ids] > 1).any() for ids in sequence.pages()), "own pages leave room enough"
        after = content(sequence)
        # nothing is quantised again where slots share no mean (restoring a latent rounds by its place in the page)
        kept = {key: after[key] for key in after if key in alone}
        same(kept, {key: before[key] for key in kept}, 1e-5 if sequence.bases else 0.0)
        same(after, {key: before[key] for key in after}, 3.0)
        if id(sequence) in self.lossless:
            self.lossless[id(sequence)] = content(sequence)

    @precondition(lambda self: any(s.length for s in self.pool.sequences))
    @rule(data=st.data(), share=st.floats(0, 1))
    def truncate(self, data, share):
        sequence = data.draw(st.sampled_from(self.pool.sequences))
        length = int(sequence.length * share)
        before = content(sequence)
        try:
            sequence.truncate(length)
        except ArenaFull:  # a shared page is copied before it is cut
            return
        left = {key: value for key, value in before.items() if key[2] < length}
        same(content(sequence), left, 1e-5 if sequence.bases else 0.0)
        if id(sequence) in self.lossless:
            self.lossless[id(sequence)] = content(sequence)

    @precondition(lambda self: 0 < len(self.pool.sequences) < 4)
    @rule(data=st.data())
    def fork(self, data):
        sequence = data.draw(st.sampled_from(self.pool.sequences))
        try:
            other = sequence.fork()
        except ArenaFull:
            return
        same(content(other), content(sequence))
        self.lossless[id(other)] = content(other)

    @precondition(lambda self: self.pool.sequences)
    @rule(data=st.data())
    def free(self, data):
        sequence = data.draw(st.sampled_from(self.pool.sequences))
        self.lossless.pop(id(sequence), None)
        sequence.free()

    @rule()
    def measure_bounds(self):
        for sequence in self.pool.sequences:
            for ids in sequence.pages():
                if len(ids):
                    try:
                        low, high = bounds(self.pool, ids).unbind(1)
                    except ArenaFull:
                        return
                    assert (low <= high).all()

    @invariant()
    def whole(self):
        self.pool.check_integrity()
        for sequence in self.pool.sequences:
            if id(sequence) in self.lossless:
                same(content(sequence), self.lossless[id(sequence)])

    def teardown(self):
        for sequence in list(self.pool.sequences):
            sequence.free()
        self.pool.check_integrity()
        assert self.pool.device_used == self.pool.host_used == self.pool.disk_used == 0


TestMemory = Memory.TestCase
TestMemory.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("seed", range(3))
def test_arena_gives_room_of_one_size_to_another(seed):
    rng, arena, held = np.random.default_rng(seed), Arena(1 << 16), []
    for _ in range(200):
        if held and rng.random() < 0.5:
            arena.free(*held.pop(rng.integers(len(held))))
        else:
            size, n = 256 * int(rng.integers(1, 9)), int(rng.integers(1, 6))
            if arena.room(size) >= n:
                held.append((arena.alloc(size, n), size))
            else:
                with pytest.raises(ArenaFull):
                    arena.alloc(size, n)
        arena.check_integrity()
        spans = sorted((int(off), size) for offs, size in held for off in offs)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
        assert arena.used == sum(size * len(offs) for offs, size in held)


def test_compaction_makes_one_run_and_moves_no_region():
    p = pool(device_bytes=260_000)
    a, b = Sequence(p), Sequence(p)
    for step in range(3):
        feed(a, 64, step)
        feed(b, 64, step)
    before, tail = content(b), b.tail_k[0].data_ptr()
    a.free()
    size = p.arena(DEVICE).free_bytes // 256 * 256
    assert p.arena(DEVICE).room(size // 2) == 0
    offset, _ = p.region(size // 2)
    same(content(b), before)
    assert b.tail_k[0].data_ptr() == tail
    p.free_region(offset)
    p.check_integrity()


def test_sealing_a_full_tail_equals_appending_it():
    plain, sealed = Sequence(pool()), Sequence(pool())
    for sequence in (plain, sealed):
        feed(sequence, 100)
        sequence.drop(
            [np.eye(1, ids.shape[1], dtype=bool) & (np.arange(len(ids)) == 1)[:, None] for ids in sequence.ids]
        )
    feed(plain, 28, seed=7)
    generator, pos = torch.Generator().manual_seed(7), np.arange(100, 128)
    for layer, s in enumerate(SHAPES):  # what a CUDA graph does: the tail is full before anybody seals it
        for tail, dim in ((sealed.tail_k, s.k_dim), (sealed.tail_v, s.v_dim)):
            tail[layer][:, 36:] = torch.randn(s.heads, 28, dim, generator=generator)
    sealed.tail_pos[36:], sealed.tail_len, sealed.length = pos, 64, 128
    sealed.seal()
    same(content(sealed), content(plain))
    assert sealed.tail_len == 0 and sealed.bytes() == plain.bytes()
    sealed.pool.check_integrity()


def test_a_sequence_without_room_to_seal_keeps_its_tail():
    p = pool(device_bytes=Sequence.fixed_bytes(SHAPES, torch.float32, 0) + 20_000)
    sequence = Sequence(p)
    sequence.tail_len, sequence.tail_pos, used = 64, np.arange(64, dtype=np.int32), p.device_used
    with pytest.raises(ArenaFull):
        sequence.seal()
    assert (sequence.tail_len, p.device_used) == (64, used) and not any(ids.size for ids in sequence.ids)
    sequence.free()
    p.check_integrity()


def test_a_step_without_room_in_all_layers_changes_none():
    p = pool()
    sequence, plain = Sequence(p, window=8), Sequence(pool(), window=8)
    for s in (sequence, plain):
        feed(s, 100)
    first = 2 * SHAPES[0].heads * p.page_bytes(0, FORMATS["native"])  # what the first layer will seal, and no more
    rest, _ = p.region(p.arena(DEVICE).free_bytes - first)
    with pytest.raises(ArenaFull):
        feed(sequence, 100, seed=7)
    p.check_integrity()
    same(content(sequence), content(plain))
    assert p.arena(DEVICE).free_bytes == first and torch.equal(sequence.observed(0), plain.observed(0))
    p.free_region(rest)
    for s in (sequence, plain):
        feed(s, 100, seed=7)
    same(content(sequence), content(plain))


def test_a_step_that_stops_half_way_keeps_no_room():
    sequence, shape = Sequence(p := pool()), SHAPES[0]
    k, v = torch.zeros(shape.heads, 64, shape.k_dim), torch.zeros(shape.heads, 64, shape.v_dim)
    before = p.device_used
    for _ in range(2):  # and the next step does not take it twice
        sequence.append(0, k, v, np.arange(64))
    sequence.truncate(0)
    assert p.device_used == before
    sequence.append(0, k, v, np.arange(64))
    sequence.free()
    p.check_integrity()
    assert p.device_used == 0


def test_a_ring_that_is_opened_again_takes_no_more():
    sequence = Sequence(p := pool(), 8)
    held = p.device_used
    sequence.open_ring(8)
    assert p.device_used == held
    sequence.free()
    assert p.device_used == 0


@pytest.mark.parametrize("name", ["native", "int8", "fp8", "int4r", "k4v2r", "int2"])
def test_a_full_arena_still_converts_and_evicts(name):
    """Without any room beside the pages, changes go wave by wave, and in whatever order positions interleave."""
    p = pool(device_bytes=260_000)
    sequence = Sequence(p)
    while sequence.columns_needed(64) * p.column_bytes(FORMATS["native"]) <= p.arena(DEVICE).free_bytes:
        feed(sequence, 64, sequence.length)
    rest, size = [], 256
    while p.arena(DEVICE).free_bytes >= size:
        rest.append(p.region(size)[0])
    assert p.arena(DEVICE).free_bytes == 0
    if name != "native":
        sequence.convert([np.ones(ids.shape, bool) for ids in sequence.ids], FORMATS[name])
    rng = np.random.default_rng(0)
    for _ in range(3):  # every other page broken at first: survivors of its neighbours meet
        before = content(sequence)
        keep = [rng.random((*ids.shape, 64)) < 0.6 for ids in sequence.ids]
        for mask in keep:
            mask[:, ::2] = True
        expected = set()
        for layer, k in enumerate(keep):
            used, pos = sequence.slots(layer)
            expected |= {(layer, h, int(q)) for h in range(len(used)) for q in pos[h][used[h] & k[h]]}
        evict(sequence, as_bits(keep))
        after = content(sequence)
        assert after.keys() == expected
        change = torch.cat([after[key] - before[key] for key in after])
        if FORMATS[name].k.fields(8, torch.float32):
            assert not change.any()
        else:  # slots get the mean of another page, those of the page itself stay as they are
            assert change.square().mean().sqrt() < {"int8": 0.01, "int4r": 0.15, "k4v2r": 0.4, "int2": 0.6}[name]
            assert (change == 0).float().mean() > 0.4
        for layer in range(len(SHAPES)):
            used, pos = sequence.slots(layer)
            for page_used, page_pos in zip(used.reshape(-1, 64), pos.reshape(-1, 64), strict=True):
                assert (np.diff(page_pos[page_used]) > 0).all(), "a page is out of order"
        p.check_integrity()
    for offset in rest:
        p.free_region(offset)
