"""What clients may ask: the OpenAI request shapes that are served, the job each becomes, and refusals."""

from __future__ import annotations

import difflib
import secrets
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.formats import parse_bytes
from adaptivekv.plan import Plan

Error = dict[str, Any]


class Fault(Exception):
    """A refusal or failure a client is told of: HTTP status and OpenAI's four fields."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, kind: str | None = None
    ):
        super().__init__(message)
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.status = status
        self.error: Error = {"message": message, "type": kind, "param": param, "code": code}

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


@dataclass(frozen=True)
class Job:
    """One request as a worker runs it. None: what the server, or the session, was set to."""

    id: str
    messages: list[dict[str, str]]
    raw: bool = False  # no chat template
    session: str | None = None
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    budget: str | float | int | None = None
    quality: float | None = None
    plan: str | None = None


class Reload(BaseModel):
    """What running replicas are to take up; what is absent stays."""

    model_config = ConfigDict(extra="forbid")
    selector: str | None = None
    tracking_uri: str | None = None
    margin: float | None = None
    epsilon: float | None = Field(None, ge=0, le=1)
    shadow: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class Part(BaseModel):
    """A piece of a message; text is the only kind there is."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class Asked(BaseModel):
    """The fields that chat and plain completions share. Others are refused, unless they ask for nothing."""

    model_config = ConfigDict(strict=True, extra="allow")
    neutral: ClassVar[dict[str, Any]] = {
        "n": 1, "best_of": 1, "logprobs": False, "echo": False, "presence_penalty": 0, "frequency_penalty": 0,
        "logit_bias": {}, "tools": [], "functions": [], "tool_choice": "none", "parallel_tool_calls": True,
        "response_format": {"type": "text"}, "modalities": ["text"], "top_logprobs": 0, "suffix": "",
    }  # fmt: skip
    """Values that ask for what is done anyway."""
    ignored: ClassVar[set[str]] = {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    }  # fmt: skip
    """Fields that do not change an answer."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # ours, sent through extra_body
    budget: str | int | float | None = None
    quality: float | None = None
    plan: str | None = None

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream and self.stream_options and self.stream_options.include_usage)

    def job(self, id: str, session: str | None, messages: list[dict[str, str]], **more: Any) -> Job:
        """The checked job. A Fault (400) names the field that cannot be served."""
        self._refuse_extras()
        if not any(m["content"].strip() for m in messages):
            raise Fault(400, "empty prompt: give some text", "prompt" if more.get("raw") else "messages")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > 4 or not all(stop):
            raise Fault(400, "stop: at most 4 strings, none of them empty", "stop")
        if self.quality is not None and not 0 <= self.quality < float("inf"):
            raise Fault(400, f"quality={self.quality}: nats per token, 0 or more", "quality")
        name = "plan"
        try:
            if self.plan is not None:
                Plan.parse(self.plan)
            name = "budget"
            if self.budget is not None:
                parse_bytes(self.budget)
        except AdaptiveKVError as error:
            raise Fault(400, str(error), name) from None
        return Job(
            id, messages, session=session, stop=stop, budget=self.budget, quality=self.quality, plan=self.plan,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbits(62) if self.seed is None else self.seed, **more,
        )  # fmt: skip

    def _refuse_extras(self) -> None:
        known = {*type(self).model_fields, *self.neutral, *self.ignored}
        for name, value in (self.model_extra or {}).items():
            if value is None or name in self.ignored or (name in self.neutral and value == self.neutral[name]):
                continue
            if name in known:
                raise Fault(400, f"{name}={value!r:.60} is not supported here", name, "unsupported_value")
            near = difflib.get_close_matches(name, known, 1, 0.7)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise Fault(400, f"unknown or unsupported field {name!r}{hint}", name, "unsupported_parameter")


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def to_job(self, id: str, session: str | None) -> Job:
        new = self.max_completion_tokens or self.max_tokens or 256
        return self.job(id, session, [message.plain() for message in self.messages], max_tokens=new)


class TextRequest(Asked):
    """POST /v1/completions: the prompt goes to the model as it is, without a chat template."""

    prompt: str | list[str]

    def to_job(self, id: str, session: str | None) -> Job:
        if not isinstance(self.prompt, str) and len(self.prompt) != 1:
            raise Fault(400, f"prompt: one text a request, not {len(self.prompt)}", "prompt")
        text = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        messages = [{"role": "user", "content": text}]
        return self.job(id, session, messages, raw=True, max_tokens=self.max_tokens or 16)


def invalid(errors: Any) -> Fault:
    """The Fault for a body that pydantic refused: the first field at fault, in one line."""
    first = max(errors, key=lambda error: len(error["loc"]))  # of a union's branches, the one that came furthest
    # a union also names its branches, which no client has written
    where = [str(p) for p in first["loc"] if p not in ("body", "str", "int", "float") and "[" not in str(p)]
    if first["type"] == "json_invalid" or not where:
        return Fault(400, f"the body is not a JSON object: {first['msg']}")
    path = where[0] + "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in where[1:])
    wrong = "" if first["type"] == "missing" else f", not {first['input']!r:.60}"
    return Fault(400, f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}{wrong}", where[0])
