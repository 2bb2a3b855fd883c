"""Plans x tasks x lengths: answers right, loss against the full cache, bytes and time, in one table."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adaptivekv.controller import DEFAULT_QUALITY, Controller
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.formats import parse_bytes
from adaptivekv.model import LoadedModel
from adaptivekv.plan import Plan
from adaptivekv.selector import Selector
from adaptivekv.trainer.registry import find_champion
from adaptivekv.trainer.replay import Budget, Replay, reference, replay
from adaptivekv.trainer.tasks import TASKS, make
from adaptivekv.trainer.tasks import haystack as read_haystack

ADAPTIVE = "adaptive"  # as a plan's name: the controller chooses
PLANS = ("full", "int8", "int4", "k4v2", "int2", "snapkv(0.5)", "snapkv(0.5) | k4v2", "offload(0.25)", ADAPTIVE)
LENGTHS = (1024, 2048)
NEW = 64  # tokens of an answer at most
COLUMNS = (
    "plan", "task", "length", "samples", "score", "kl", "kl_worst", "flip_rate",
    "kv_bytes_end", "kv_bytes_peak", "kv_ratio", "seconds",
)  # fmt: skip


def evaluate(
    loaded: LoadedModel,
    plans: Sequence[str] = PLANS,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = LENGTHS,
    samples: int = 8,
    seed: int = 0,
    haystack: str | None = None,
    question_aware: bool = True,
    quality: float = DEFAULT_QUALITY,
    selector: Selector | str | None = None,
    budget: Budget = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """One row a task, length and plan, over `samples` prompts; every prompt is read once for all plans.

    plans: as `Plan.parse` reads them, or "adaptive": `selector` (None: the champion) under `quality`. haystack: the
    text that tasks are made of (None: the book). question_aware: the plan is applied to the whole prompt, else to the
    document before the question is read. budget: device bytes a request, as for AdaptiveCache. progress(done, total)
    is called after every replay.

    Rows have the keys `COLUMNS`: score 0 to 1 (greedy answers of up to 64 tokens), kl mean and kl_worst largest over
    all tokens (nats), bytes on the device (mean), kv_ratio = end / 16-bit cache of prompt and answer, seconds a
    request (prompt, applying the plan, answer). Raises AdaptiveKVError, one line, for bad input.
    """
    plans, tasks, lengths = list(dict.fromkeys(plans)), list(dict.fromkeys(tasks)), list(dict.fromkeys(lengths))
    fixed = _check(loaded, plans, tasks, lengths, samples)
    budget = None if budget is None else parse_bytes(budget)
    text = read_haystack() if haystack is None else haystack
    if ADAPTIVE in plans and (selector is None or isinstance(selector, str)):
        selector = find_champion(selector)
    rows, done, total = [], 0, len(plans) * len(tasks) * len(lengths) * samples
    for name in tasks:
        for length in lengths:
            results: dict[str, list[tuple[Replay, float, float]]] = {plan: [] for plan in plans}
            for i in range(samples):
                task = make(name, length, loaded.tokenizer, 10_000 * seed + i, text)
                document, question = task.ids(loaded.tokenizer)
                if question_aware:
                    document, question = document + question, []
                full = reference(loaded, document, NEW, None, question, stop=True, plans=tuple(fixed))
                try:
                    for plan in plans:
                        run = replay(full, _controller(plan, selector, quality), budget, text=NEW)
                        spent = full.seconds + run.apply_s + run.step_ms * len(run.kl) / 1e3
                        results[plan].append((run, task.score(run.text or ""), spent))
                        done += 1
                        if progress:
                            progress(done, total)
                finally:
                    full.free()
            rows += [_row(plan, name, length, results[plan]) for plan in plans]
    return rows


def _controller(plan: str, selector: Any, quality: float) -> Controller:
    return Controller(None, selector, quality) if plan == ADAPTIVE else Controller(Plan.parse(plan), quality=quality)


def _check(
    loaded: LoadedModel, plans: Sequence[str], tasks: Sequence[str], lengths: Sequence[int], samples: int
) -> list[str]:
    """Refuse what cannot be evaluated before anything runs. Returns the fixed plans."""
    for field, given in (("plans", len(plans)), ("tasks", len(tasks)), ("lengths", len(lengths))):
        if not given:
            raise AdaptiveKVError(f"{field}: give at least one")
    fixed = [plan for plan in plans if plan != ADAPTIVE]
    for plan in fixed:
        Plan.parse(plan)
    for task in tasks:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, 1, 0.0)
            raise AdaptiveKVError(
                f"tasks: unknown task {task!r}; did you mean {near[0]!r}? There are {', '.join(TASKS)}"
            )
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise AdaptiveKVError(f"samples={samples}: at least 1")
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", 0) or 0
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise AdaptiveKVError(f"lengths: {length} is not a number of tokens above 0")
        if positions and length + NEW > positions:
            raise AdaptiveKVError(
                f"lengths: {length} is too long, at most {positions - NEW}: the model has {positions} positions, "
                f"{NEW} of them for the answer"
            )
    return fixed


def _row(plan: str, task: str, length: int, results: list[tuple[Replay, float, float]]) -> dict[str, Any]:
    """results: of each sample the replay, the score and the seconds."""
    runs = [run for run, *_ in results]
    losses = np.concatenate([run.kl for run in runs])
    tokens = [len(run.kl) for run in runs]
    values = (
        plan,
        task,
        length,
        len(runs),
        float(np.mean([score for _, score, _ in results])),
        float(losses.mean()),
        float(losses.max()),
        float(np.average([run.flip_rate for run in runs], weights=tokens)),
        round(np.mean([run.device_bytes for run in runs])),
        round(np.mean([run.device_peak for run in runs])),
        float(np.mean([run.device_bytes / run.full_bytes for run in runs])),
        float(np.mean([spent for _, _, spent in results])),
    )
    return dict(zip(COLUMNS, values, strict=True))
