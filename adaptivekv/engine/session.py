"""A conversation over one AdaptiveCache: read, answer, go on, park on disk, come back."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adaptivekv.cache import AdaptiveCache
from adaptivekv.controller import DEFAULT_QUALITY, Controller
from adaptivekv.engine.sampling import Sampler
from adaptivekv.errors import AdaptiveKVError, CacheFileError
from adaptivekv.features.request import text_features
from adaptivekv.graph import GraphDecoder, refused
from adaptivekv.memory import store
from adaptivekv.memory.shapes import DEVICE, DISK, HOST
from adaptivekv.model import LoadedModel
from adaptivekv.plan import Plan
from adaptivekv.policies.base import NEEDS
from adaptivekv.recall import recall
from adaptivekv.selector import Selector

Message = dict[str, str]


@dataclass
class Options:
    """How a session's cache is kept. Budget and host: bytes, "64MiB", or (budget) a share of the full cache."""

    budget: str | float | int | None = None
    quality: float = DEFAULT_QUALITY
    plan: str | None = None
    selector: Selector | None = None
    host: str | int | None = None
    kv_dtype: torch.dtype | None = None  # None: 16 bits, whatever the model computes in
    epsilon: float = 0.0
    seed: int = 0
    goes_on: bool = True  # more turns may follow: what an eviction drops may still be asked for
    graphs: bool = True  # replay decode steps as CUDA graphs where that is possible
    compiled: bool = False  # what is captured goes through torch.compile first: a minute once, then faster steps


@dataclass
class Answer:
    """One answer and what it took, in the shape of `adaptivekv generate --json`."""

    text: str
    prompt_tokens: int
    new_tokens: int
    finish_reason: str  # "stop" or "length"
    tokens: list[int] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


class Session:
    """Messages in, text out; keys and values of everything said stay in one cache between turns.

    Not safe for concurrent use: one answer at a time.
    """

    def __init__(self, loaded: LoadedModel, options: Options | None = None):
        self.loaded, self.options = loaded, options or Options()
        self.tokens: list[int] = []  # whose keys and values the cache has seen
        self.cache = self._new_cache()
        reason = refused(self.cache)
        if self.options.compiled and reason:
            raise AdaptiveKVError(f"compile: {reason}, so decode steps are not captured; leave it out")
        captured = self.options.graphs and not reason
        self.model = GraphDecoder(loaded.model, self.cache, self.options.compiled) if captured else loaded.model
        self.last: Answer | None = None

    def _new_cache(self) -> AdaptiveCache:
        o, model = self.options, self.loaded.model
        dtype = o.kv_dtype or (torch.float16 if model.dtype == torch.float32 else model.dtype)
        plan = None if o.plan is None else Plan.parse(o.plan)
        controller = Controller(plan, o.selector, o.quality, epsilon=o.epsilon, seed=o.seed)
        return AdaptiveCache(model, o.budget, o.quality, o.plan, o.selector, dtype, o.host, controller=controller)

    # -- text in, text out -------------------------------------------------------------------------------------------

    def encode(self, messages: list[Message], raw: bool = False) -> list[int]:
        """Token ids of a conversation, ready for the assistant to speak; `raw`: the contents alone, no template."""
        tokenizer = self.loaded.tokenizer
        if not any(m["content"].strip() for m in messages):
            raise AdaptiveKVError("empty prompt: give some text")
        if raw or not tokenizer.chat_template:
            return tokenizer("".join(m["content"] for m in messages), verbose=False).input_ids
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]

    def read(self, messages: list[Message], expect_new: int = 256, raw: bool = False) -> None:
        """Take in a conversation's beginning (a document) and compress it now, before any question is known.

        The template's tokens after the last message are left for what follows.
        """
        ids = self.encode(messages, raw)
        if not raw and self.loaded.tokenizer.chat_template:
            other = self.encode([*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + " x"}])
            ids = ids[: _common(ids, other)]
        self._check(len(ids), expect_new)
        self._feed(ids, expect_new, "".join(m["content"] for m in messages))
        self.cache.end_prefill()

    def answer(
        self, messages: list[Message], max_new_tokens: int = 256, sampler: Sampler | None = None, raw: bool = False
    ) -> Iterator[str]:
        """Yields the answer's text as it comes; `self.last` then holds the whole of it with its report."""
        ids, sampler = self.encode(messages, raw), sampler or Sampler(seed=self.options.seed)
        if max_new_tokens < 1:
            raise AdaptiveKVError(f"max_new_tokens={max_new_tokens}: at least 1")
        limit = self._check(len(ids), max_new_tokens)
        prompt = len(ids)
        logits = self._feed(ids, limit, "".join(m["content"] for m in messages))
        stops = self._stops()
        out: list[int] = []
        text, reason = "", "length"
        while True:
            token = sampler(logits)
            if token in stops:
                reason = "stop"
                break
            out.append(token)
            new = self.loaded.tokenizer.decode(out, skip_special_tokens=True)
            if not new.endswith("\ufffd"):  # half a character waits for its other half
                yield new[len(text) :]
                text = new
            if len(out) == limit:
                break
            logits = self._forward([token])
        self.last = Answer(text, prompt, len(out), reason, out, self.cache.report())

    def score(self, messages: list[Message], tokens: list[int], expect_new: int = 256) -> torch.Tensor:
        """Log-probabilities [len(tokens), V] of an answer after `messages`, float32; the answer is not stored.

        Reads what is new of the messages, ends the prompt, and forwards the answer in one step (so a plan that
        retrieves pages reads all of them here).
        """
        ids = self.encode(messages)
        logits = self._feed(ids, expect_new, "".join(m["content"] for m in messages))
        self.cache.end_prefill()
        rows = [logits[None]]
        if len(tokens) > 1:
            at, device = len(self.tokens), self.loaded.device
            with self.cache.frozen_step(), torch.inference_mode():
                out = self.loaded.model(
                    torch.tensor([tokens[:-1]], device=device),
                    past_key_values=self.cache,
                    position_ids=torch.arange(at, at + len(tokens) - 1, device=device)[None],
                )
            rows.append(out.logits[0])
        return torch.cat(rows).float().log_softmax(-1)[: len(tokens)]

    def _stops(self) -> set[int]:
        stop = self.loaded.model.generation_config.eos_token_id
        return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)

    def _check(self, prompt: int, new: int) -> int:
        """How many new tokens there is room for in the model's positions."""
        positions = self.cache.positions
        if positions and prompt >= positions:
            raise AdaptiveKVError(f"prompt of {prompt} tokens: the model has {positions} positions; shorten it")
        return min(new, positions - prompt) if positions else new

    def _feed(self, ids: list[int], new: int, text: str) -> torch.Tensor:
        """Forward what the cache has not seen of `ids`, in chunks. Returns the last logits [V]."""
        common = min(_common(ids, self.tokens), len(ids) - 1)
        if common < len(self.tokens):  # the conversation was edited, or its answer re-encoded differently
            if self.cache.kept:  # windows and recurrent states do not go back: read all of it again
                self.cache.clear()
                common = 0
            else:
                self.cache.truncate(common)
            del self.tokens[common:]
        facts = text_features(text, ids) | {"session": float(self.options.goes_on)}
        if self.cache.requests:
            self.cache.requests[0].facts |= facts
        else:
            self.cache.expect(len(ids), new, facts)
        step, logits = self.cache.chunk, None
        self.cache.reading = True
        for start in range(common, len(ids), step):
            logits = self._forward(ids[start : start + step])
        self.cache.reading = False
        if self.cache.controller.recalls:
            recall(self.loaded.model, self.cache, torch.tensor([ids], device=self.loaded.device), start=common)
        assert logits is not None
        return logits

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> torch.Tensor:
        device, at = self.loaded.device, len(self.tokens)
        out = self.model(
            input_ids=torch.tensor([ids], device=device),
            past_key_values=self.cache,
            position_ids=torch.arange(at, at + len(ids), device=device)[None],
            logits_to_keep=1,
        )
        self.tokens += ids
        self.cache.observe_logits(out.logits[:, -1])
        return out.logits[0, -1]

    # -- facts and rest ----------------------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """The last answer in the JSON shape of the command line."""
        assert self.last is not None
        a, (request,) = self.last, self.cache.requests
        token = sum(s.slot_elements for s in self.cache.shapes) * 2
        return {
            "text": a.text,
            "plan": str(request.plan),
            "prompt_tokens": a.prompt_tokens,
            "new_tokens": a.new_tokens,
            "finish_reason": a.finish_reason,
            "decisions": a.report["requests"][0]["decisions"],
            "kv_bytes": {
                "full": token * (a.prompt_tokens + a.new_tokens),
                "budget": request.budget,
                "device_peak": a.report["device_peak"],
                "device_end": request.sequence.bytes(DEVICE),
                "host_end": request.sequence.bytes(HOST),
                "disk_end": request.sequence.bytes(DISK),
            },
            "timing": {
                "prefill_s": a.report["prefill_s"],
                "decode_ms_per_token": a.report["decode_ms_per_step"],
                "controller_us_per_step": a.report["controller_us_per_step"],
            },
        }

    def close(self) -> None:
        self.cache.clear()
        self.tokens = []

    def _parkable(self) -> None:
        if self.cache.kept:
            raise AdaptiveKVError(
                f"session: model {self.loaded.name} has layers whose cache transformers keeps, and they are not saved; "
                "leave --session away"
            )

    def save(self, folder: str | Path, messages: list[Message] | None = None) -> None:
        """Park the conversation on disk: `cache.safetensors`, then `session.json` that makes it valid."""
        self._parkable()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (request,) = self.cache.requests
        store.save(request.sequence, folder / "cache.safetensors")
        state = {
            "model": self.loaded.name, "tokens": self.tokens, "messages": messages or [], "saved": time.time(),
            "plan": str(request.plan), "kept": request.kept, "evictor": request.evictor, "turn": request.turn,
            "generated": request.generated,
        }  # fmt: skip
        partial = folder / f"session.json.{os.getpid()}.partial"
        partial.write_text(json.dumps(state))
        os.replace(partial, folder / "session.json")

    def restore(self, folder: str | Path, new: int = 256) -> list[Message] | None:
        """Take up a parked conversation and return its messages; None where there is none.

        A damaged one raises CacheFileError and leaves the session as it was before its first message.
        """
        self._parkable()
        folder = Path(folder)
        if not (folder / "session.json").exists():
            return None
        try:
            state = json.loads((folder / "session.json").read_text())
            tokens, name = [int(t) for t in state["tokens"]], state["model"]
            plan = Plan.parse(state["plan"])
            kept, evictor = float(state["kept"]), str(state["evictor"])
            turn, generated = int(state["turn"]), int(state["generated"])
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in state["messages"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheFileError(
                f"session {folder}: session.json cannot be read ({error}); delete the folder"
            ) from None
        if name != self.loaded.name:
            raise CacheFileError(f"session {folder}: made with model {name!r}, this one is {self.loaded.name!r}")
        plan = plan if self.options.plan is None else Plan.parse(self.options.plan)
        if "surrogate" in plan.needs and not self.cache.surrogate:
            raise CacheFileError(
                f"session {folder}: its plan {plan} needs {NEEDS['surrogate']}, and there is none here"
            )
        self.cache.adopt(lambda pool: store.load(pool, folder / "cache.safetensors"), len(tokens), new)
        (request,) = self.cache.requests
        request.plan = plan
        request.kept, request.evictor = kept, evictor
        request.turn, request.generated, request.prefilling = turn, generated, False
        request.sequence.retrieve = request.plan.stage("retrieve")
        self.tokens = tokens
        return messages


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
