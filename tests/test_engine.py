"""The engine behind the server, without Ray: what it keeps, changes, stops and says when it breaks."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptivekv.engine.session import Options
from adaptivekv.model import LoadedModel
from adaptivekv.selector import RuleTable

pytest.importorskip("ray.serve")
from adaptivekv.cluster.api import Job
from adaptivekv.cluster.conversations import Cut, Engine

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def engine(smol: LoadedModel) -> Iterator[Engine]:
    before = smol.model.config._attn_implementation
    made = Engine(smol, Options(selector=RuleTable()), keep=1)
    yield made
    made.close()
    smol.model.set_attn_implementation(before)


async def run(engine: Engine, **more: Any) -> list[dict[str, Any]]:
    asked: dict[str, Any] = {"id": "job", "messages": FRANCE, "max_tokens": 4, "temperature": 0.0}
    job = Job(**(asked | more))
    return [event async for event in engine.generate(job)]


def test_an_engine_keeps_few_sessions(engine: Engine) -> None:
    async def both() -> None:
        await run(engine, session="a")
        kept = engine.warm["a"]
        await run(engine, session="b")
        assert list(engine.warm) == ["b"] and not kept.tokens and kept.cache.pool is None
        await run(engine)
        assert list(engine.warm) == ["b"]

    asyncio.run(both())


def test_an_engine_changes_its_selector_in_place(engine: Engine, tmp_path: Path) -> None:
    class Other(RuleTable):
        name = "other"

    async def change() -> None:
        engine.defaults.selector = Other()
        await run(engine, session="a")
        (tmp_path / "policy.json").write_text("{}")
        await engine.reconfigure(str(tmp_path))
        assert engine.selector is not None and engine.selector.name == "other"
        await engine.reconfigure("rules")
        more = [*FRANCE, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Spain?"}]
        events = await run(engine, session="a", messages=more)
        kv = events[-1]["done"]["kv"]
        assert [kv["decisions"][at]["selector"] for at in (0, -1)] == ["other", "rules"]

    asyncio.run(change())


def test_an_engine_stops_when_nobody_listens(engine: Engine) -> None:
    async def leave() -> None:
        events = engine.generate(Job("job", FRANCE, session="a", max_tokens=4000, seed=1))
        assert "text" in await anext(events)
        await events.aclose()  # type: ignore[attr-defined]
        begun = time.monotonic()
        again = await run(engine, session="a")  # the cache it left is whole
        assert time.monotonic() - begun < 20
        assert again[-1]["done"]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert "".join(e.get("text", "") for e in again) == "".join(e.get("text", "") for e in await run(engine))

    asyncio.run(leave())


def test_a_bug_is_one_event_and_no_traceback(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_begin", lambda job: 1 / 0)
    (event,) = asyncio.run(run(engine))
    assert event["status"] == 500 and "Zero" not in event["error"]["message"]


def test_stop_strings_across_pieces() -> None:
    cut = Cut(("END", "nd of"))
    assert [cut.push(piece) for piece in ("the E", "N", "d", " EN", "D!")] == ["the ", "", "ENd", " ", ""]
    assert cut.hit
    cut = Cut(("END",))
    assert cut.push("an EN") == "an " and cut.waiting == "EN" and not cut.hit
