"""What clients get back: OpenAI's response shapes, whole or as server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from adaptivekv.cluster.api import Error

Event = dict[str, Any]
"""From a worker: {"text": ...} as it comes, then {"done": {"finish_reason", "usage", "kv"}}; or {"error": ...}."""


def usage(prompt: int, new: int, cached: int) -> dict[str, Any]:
    """Tokens of prompt and answer, and how many of the prompt's the session already held."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Reply:
    """The answer to one request, for chat or plain completions. Our own key `kv` says what the cache did."""

    def __init__(self, id: str, model: str, chat: bool, usage_wanted: bool = False):
        self.chat, self.usage_wanted = chat, usage_wanted
        self.head = {"id": id, "created": int(time.time()), "model": model}

    def whole(self, text: str, done: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": done["finish_reason"]}
        choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self.head | {"object": kind, "choices": [choice], "usage": done["usage"], "kv": done["kv"]}

    async def stream(self, first: Event, rest: AsyncIterator[Event]) -> AsyncIterator[str]:
        """Server-sent events. An error after the first token ends the stream with an event of its own."""
        if self.chat:
            yield _sse(self._chunk({"role": "assistant", "content": ""}))
        event: Event | None = first
        while event is not None:
            if "error" in event:
                yield _sse({"error": event["error"]})
                return
            if "text" in event:
                yield _sse(self._chunk({"content": event["text"]}))
            else:
                for chunk in self._end(event["done"]):
                    yield _sse(chunk)
            event = await anext(rest, None)
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        choice |= {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        none = {"usage": None} if self.usage_wanted else {}
        return self.head | {"object": kind, "choices": [choice]} | none

    def _end(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        last = self._chunk({}, done["finish_reason"])
        if not self.usage_wanted:
            return [last | {"kv": done["kv"]}]
        return [last, last | {"choices": [], "usage": done["usage"], "kv": done["kv"]}]


def model_card(model: str, created: int) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": created, "owned_by": "adaptivekv"}


def error_body(error: Error) -> dict[str, Error]:
    return {"error": error}


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
