"""Quality labels by teacher-forced replay: what a plan does to the tokens that the full cache would have produced.

A prompt is read once, with the full cache. Every plan then starts from a copy of that cache in a pool of its own, so
that plans cannot disturb each other and bytes, peak and budget are those of a request that runs alone. The loss is the
KL divergence of the plan from the full cache (arXiv 2407.09141 on why, and why flips belong beside it), per generated
token. The first token's logits come from the prompt's own forward, before any plan can act: it counts, with no loss,
unless a question follows the compressed document. In a conversation every answer counts.

Tokens that are known are forced many at a time, up to the next page to be sealed: what a plan does to the cache happens
between pages. Only pages chosen anew for each token (`retrieve`), and a controller that may decide anew, need single
steps.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from adaptivekv.cache import AdaptiveCache
from adaptivekv.candidates import CANDIDATES
from adaptivekv.controller import Controller
from adaptivekv.decisions import Decision
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features.request import text_features
from adaptivekv.memory.shapes import DEVICE, DISK, HOST
from adaptivekv.model import LoadedModel
from adaptivekv.plan import Plan
from adaptivekv.policies.offload.host import Offload
from adaptivekv.recall import recall
from adaptivekv.trainer.branch import TIMED, Branch, Budget, Reference, Turn, feed, stop_tokens


@dataclass
class Replay:
    """One plan against its reference. Losses in nats per generated token; bytes physical, after the last step."""

    plan: str  # in force at the end
    kl_mean: float
    kl_worst: float
    flip_rate: float  # share of the tokens whose most likely choice differs
    step_ms: float  # the quickest decode step after the last token; processor time on one thread of a CPU
    apply_s: float  # deciding and applying at the end of the first prompt, likewise
    device_bytes: int
    host_bytes: int  # below the device: on disk too
    device_mean: float  # bytes, over the forced tokens: a plan may change on the way
    device_peak: int  # most held at once, the full cache before the plan was applied and staging included
    full_bytes: int  # a 16-bit cache of prompt and tokens
    budget: int | None
    decisions: list[Decision]
    kl: list[float] = field(default_factory=list)  # token by token
    text: str | None = None  # free-running greedy answer, where asked for
    seconds: float = 0.0


@torch.inference_mode()
def reference(
    loaded: LoadedModel,
    ids: list[int],
    new: int,
    kv_dtype: torch.dtype | None = None,
    question_ids: list[int] | None = None,
    stop: bool = False,
    plans: tuple[str, ...] = (),
    follow: Iterable[list[int]] = (),
    tokens: list[int] | None = None,
) -> Reference:
    """Read `ids` with the full cache, watched as any plan would need it, and go on greedily for `new` tokens.

    kv_dtype: of native pages (None: 16 bits). question_ids: what follows the document; plans are then applied before
    it is read (question-agnostic), else to all of `ids`. stop: end with the model's own stop token, as an answer does.
    plans: those to be replayed, where they need more queries than the candidates do. follow: token ids of the turns
    after the first, each with an answer of its own. tokens: what the first answer is, instead of greedy choices.
    """
    question = question_ids or []
    if not ids or new < 1:
        raise AdaptiveKVError(f"new={new}: at least 1" if ids else "empty prompt: give some text")
    if tokens and len(tokens) > new:
        raise AdaptiveKVError(f"new={new}: the answer has {len(tokens)} tokens")
    model = loaded.model
    dtype = kv_dtype or (torch.float16 if model.dtype == torch.float32 else model.dtype)
    watch = Controller(Plan(), candidates=tuple(dict.fromkeys(CANDIDATES + plans)), watch=True)
    follow = list(follow)
    total = len(ids) + len(question) + sum(map(len, follow)) + new * (1 + len(follow))
    cache = AdaptiveCache(model, kv_dtype=dtype, controller=watch, max_tokens=total, host=0)
    if cache.positions and total > cache.positions:
        raise AdaptiveKVError(f"{total} tokens, answer included: the model has {cache.positions} positions; shorten it")
    facts = text_features(loaded.tokenizer.decode(ids), ids)  # what is known when the plan is chosen
    cache.expect(len(ids) + len(question), new, facts)
    start = time.perf_counter()
    last = feed(loaded, cache, ids, 0)
    if not last.isfinite().all():
        raise AdaptiveKVError(f"model {loaded.name}: its logits are not numbers in {model.dtype}; use another dtype")
    if watch.recalls:
        recall(model, cache, torch.tensor([ids], device=loaded.device))
    made = Reference(loaded, cache, last, ids, question, new, [], total, time.perf_counter() - start)
    run = Branch(made, Controller(Plan()), None)
    stops = stop_tokens(loaded) if stop else set()
    for said in [[], *follow]:
        if said:
            run.hear(made.turns[-1], said)
        if tokens and not said:
            rows = torch.cat([run.logits[None], *run.force(tokens[:-1])]).float().log_softmax(-1)
            made.turns.append(Turn(said, tokens, rows))
        else:
            greedy, chosen = run.generate(new, stops)
            made.turns.append(Turn(said, greedy, torch.stack(chosen)))
    run.free()
    return made


def replay(
    reference: Reference,
    plan: str | Plan | Controller,
    budget: Budget = None,
    text: int = 0,
    host: int | None = None,
    timed: int = TIMED,
) -> Replay:
    """Force the reference's tokens through a plan (or whatever a fresh controller chooses).

    budget: as for AdaptiveCache; pages beyond it wait in host memory until the plan is applied, as while a prompt is
    read. text: also answer freely with up to this many tokens (`new` at most). host: bytes of host memory (None:
    enough); what finds no room there stays on the device. timed: decode steps that are timed. The reference is left as
    it was.
    """
    controller = plan if isinstance(plan, Controller) else Controller(Plan.parse(plan))
    return _replay(reference, controller, budget, text, host, timed)[0]


def replays(
    reference: Reference,
    plans: Iterable[str],
    text: int = 0,
    host: int | None = None,
    timed: int = TIMED,
) -> dict[str, Replay]:
    """`replay` of each of many plans, by the name it was asked for by.

    Plans that differ in their offload alone are one run, since what is offloaded is attended as it is: tokens are
    forced once, with everything on the device; then each placement's bytes are counted and its steps timed.
    """
    asked, alike, made = {}, defaultdict[Plan, list[Plan]](list), dict[Plan, Replay]()
    for name in plans:
        plan = Plan.parse(name)
        rest = plan.without("offload")
        asked[name] = rest if host == 0 else plan  # where there is no host, nothing moves
        if asked[name] not in alike[rest]:
            alike[rest].append(asked[name])
    for rest, placements in alike.items():
        runs = _replay(reference, Controller(rest), None, text, host, timed, placements)
        made |= zip(placements, runs, strict=True)
    return {name: made[plan] for name, plan in asked.items()}


def _replay(
    reference: Reference,
    controller: Controller,
    budget: Budget,
    text: int,
    host: int | None,
    timed: int,
    placements: Sequence[Plan] = (),
) -> list[Replay]:
    """placements: the controller's plan with what is to be offloaded once all tokens were forced; a Replay of each."""
    start, state = time.perf_counter(), controller.rng.bit_generator.state
    with torch.inference_mode():
        run = Branch(reference, controller, budget, host, timed * max(1, len(placements)))
        try:
            made, agreed = _forced(run)
            out = [_placed(run, made, plan) for plan in placements] or [made]
            for one, plan in zip_longest(out, placements):  # bytes of all are counted: steps lengthen the tail
                if plan:
                    _place(run, plan)
                one.step_ms = run.quickest(timed)
        finally:
            run.free()
        if text:
            made.text = _answer(reference, controller, state, budget, host, min(text, reference.new), agreed)
    for one in out:
        one.text, one.seconds = made.text, time.perf_counter() - start
    return out


def _place(run: Branch, plan: Plan) -> None:
    (plan.stage("offload") or Offload(1.0)).apply(run.request.sequence)


def _placed(run: Branch, made: Replay, plan: Plan) -> Replay:
    """What was made with all pages on the device, with pages where the plan wants them."""
    if not plan.stage("offload"):
        return replace(made)
    sequence, start = run.request.sequence, run.clock()
    _place(run, plan)
    seconds, away = run.clock() - start, sequence.bytes(HOST) + sequence.bytes(DISK)
    return replace(
        made, plan=str(plan), apply_s=made.apply_s + seconds, device_bytes=sequence.bytes(DEVICE), host_bytes=away,
        device_mean=max(0.0, made.device_mean - away),
    )  # fmt: skip


@torch.inference_mode()
def answer(reference: Reference, plan: str | Plan) -> tuple[list[int], int]:
    """The plan's own greedy answer, up to `new` tokens, and the slots it held at its start, over all layers and heads.

    Only the answer: no losses, so half the steps of a `replay` with text.
    """
    run = Branch(reference, Controller(Plan.parse(plan)), None)
    try:
        sequence = run.request.sequence
        pages = sum(int(sequence.slots(layer)[0].sum()) for layer in range(len(sequence.ids)))
        held = pages + sequence.tail_len * sum(len(ids) for ids in sequence.ids)
        return run.generate(reference.new, stop_tokens(reference.loaded))[0], held
    finally:
        run.free()


def _answer(
    reference: Reference, controller: Controller, state: Any, budget: Budget, host: int | None, limit: int, agreed: int
) -> str:
    """The free-running answer: the reference's own up to the first choice that differed, then its own."""
    stops, own = stop_tokens(reference.loaded), reference.turns[0].tokens[:limit]
    if agreed >= len(own) and (len(own) == limit or own[-1] in stops):
        return reference.loaded.tokenizer.decode(own, skip_special_tokens=True)
    controller.rng.bit_generator.state = state  # explores as it did
    run = Branch(reference, controller, budget, host)
    try:
        own = own[:agreed] if controller.fixed else []  # one that decides is asked at every step
        for _ in run.force(own):
            pass
        tokens = own + run.generate(limit - len(own), stops)[0]
    finally:
        run.free()
    return reference.loaded.tokenizer.decode(tokens, skip_special_tokens=True)


def _forced(run: Branch) -> tuple[Replay, int]:
    """The reference's tokens, whatever this run would have chosen; and how many it would have chosen at first."""
    losses: list[float] = []
    flips, held, other = 0, [(0, 0)], list[bool]()
    for i, turn in enumerate(run.reference.turns):
        if i:
            run.hear(run.reference.turns[i - 1], turn.ids)
        rows = [run.logits[None]]
        for logits in run.force(turn.tokens[:-1]):
            rows.append(logits)
            held.append((len(logits), run.request.sequence.bytes(DEVICE)))
        ours, full = torch.cat(rows).float().log_softmax(-1), turn.logits
        losses += (full.exp() * (full - ours)).sum(-1).clamp_min(0.0).tolist()
        flips += int((ours.argmax(-1) != full.argmax(-1)).sum())
        other += [mine != said for mine, said in zip(ours.argmax(-1).tolist(), turn.tokens, strict=True)]
    pool, sequence = run.cache.pool, run.request.sequence
    assert pool is not None
    made = Replay(
        plan=str(run.request.plan),
        kl_mean=float(np.mean(losses)),
        kl_worst=max(losses),
        flip_rate=flips / len(losses),
        step_ms=0.0,
        apply_s=run.apply_s,
        device_bytes=sequence.bytes(DEVICE),
        host_bytes=sequence.bytes(HOST) + sequence.bytes(DISK),
        device_mean=sum(n * b for n, b in held) / max(1, sum(n for n, _ in held)),
        device_peak=pool.arena(DEVICE).peak + pool.staging_bytes,
        full_bytes=run.reference.full_bytes,
        budget=run.request.budget,
        decisions=list(run.request.decisions),
        kl=losses,
    )
    return made, [*other, True].index(True)
