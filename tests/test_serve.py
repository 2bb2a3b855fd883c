"""The server with the official client: one real server for the module."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adaptivekv.errors import AdaptiveKVError

pytest.importorskip("ray.serve")
from adaptivekv.cluster.api import ChatRequest, Fault
from adaptivekv.cluster.app import build, serve
from adaptivekv.cluster.reload import reload
from adaptivekv.trainer import trajectories

KEY = "secret"
LAUNCH = """
import sys
from adaptivekv.cluster.app import serve
sys.exit(serve("127.0.0.1", int(sys.argv[1]), api_key=sys.argv[2], trajectories=sys.argv[3], threads=1, queue=4))
"""
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell a long story about a whale."}]


class Server:
    """A server in a process of its own, and clients for it."""

    def __init__(self, folder: Path):
        self.trajectories, self.log = folder / "trajectories", folder / "log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-c", LAUNCH, str(self.port), KEY, str(self.trajectories)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = self.as_client(KEY)

    def as_client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def wait(self, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while "serving smollm2" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)

    def ask(self, messages: Any = FRANCE, **more: Any) -> Any:
        create: Any = self.client.chat.completions.create
        return create(**({"model": "smollm2", "messages": messages, "max_tokens": 12, "temperature": 0} | more))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("serve"))
    try:
        running.wait()
        yield running
    finally:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGTERM)
            try:
                running.process.wait(60)
            except subprocess.TimeoutExpired:
                running.process.kill()


def text(answer: Any) -> str:
    return answer.choices[0].message.content


# -- the server, in this order: the last one stops it ------------------------------------------------------------------


def test_models_and_health(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["smollm2"]
    assert server.client.models.retrieve("smollm2").owned_by == "adaptivekv"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "model": "smollm2"}


def test_a_restarted_replica_keeps_what_reload_gave(server: Server) -> None:
    reload(server.url, KEY, selector="rules", margin=0.4)
    psutil = pytest.importorskip("psutil")
    (worker,) = [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if "ServeReplica" in child.name() + " ".join(child.cmdline()) and "Worker" in " ".join(child.cmdline())
    ]
    worker.kill()
    end, answer = time.monotonic() + 120, None
    while answer is None:
        assert time.monotonic() < end
        with contextlib.suppress(openai.InternalServerError):  # the worker died
            answer = server.ask(max_tokens=2)
    assert answer.kv["decisions"][-1]["selector"] == "rules~0.4"
    (kept,) = server.trajectories.glob(".reload-*.json*")
    assert not worker.is_running() and kept.suffix == ".json" and kept.stat().st_mode & 0o077 == 0
    assert reload(server.url, KEY, selector="champion")["margin"] != 0.4


def test_metrics_count_what_was_served(server: Server) -> None:
    def counts() -> dict[str, float]:
        answer = httpx.get(f"{server.url}/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = [line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    whole, plan = server.ask(max_tokens=3), 'adaptivekv_plans_total{plan="%s"}'
    before = counts()
    with pytest.raises(openai.BadRequestError):
        server.ask(messages=[])
    for event in server.ask(max_tokens=3, stream=True):
        assert event.choices
    after = counts()
    assert (
        after['adaptivekv_requests_total{status="length"}'] == before['adaptivekv_requests_total{status="length"}'] + 1
    )
    assert after['adaptivekv_tokens_total{kind="new"}'] == before['adaptivekv_tokens_total{kind="new"}'] + 3
    assert after[plan % whole.kv["plan"]] >= 1 and after["adaptivekv_requests_running"] == 0
    assert after["adaptivekv_first_token_seconds_count"] == after["adaptivekv_request_seconds_count"]
    assert after["adaptivekv_kv_device_peak_bytes_sum"] > whole.kv["kv_bytes"]["device_peak"]


def test_chat_and_its_stream_say_the_same(server: Server) -> None:
    whole = server.ask()
    assert "Paris" in text(whole) and whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.kv["kv_bytes"]["device_peak"] > 0 and "text" not in whole.kv
    chunks = list(server.ask(stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text(whole)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].kv["plan"] == whole.kv["plan"] and chunks[-1].usage is None


def test_stream_with_usage_and_parts(server: Server) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": FRANCE[0]["content"]}]}]
    chunks = list(server.ask(parts, stream=True, stream_options={"include_usage": True}, max_completion_tokens=3))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3 and chunks[-1].kv
    assert chunks[-2].choices[0].finish_reason == "length"


def test_plain_completions_and_stop(server: Server) -> None:
    create = server.client.completions.create
    prompt: dict[str, Any] = {"model": "smollm2", "prompt": "One, two, three, four,", "temperature": 0}
    plain = create(**prompt, max_tokens=8)
    assert "five" in plain.choices[0].text
    cut = create(**prompt, max_tokens=8, stop=[" six", "nothing"])
    assert "five" in cut.choices[0].text and "six" not in cut.choices[0].text
    assert cut.choices[0].finish_reason == "stop" and cut.usage.completion_tokens <= 8
    streamed = "".join(chunk.choices[0].text for chunk in create(**prompt, max_tokens=8, stream=True))
    assert streamed == plain.choices[0].text


def test_a_session_keeps_its_cache(server: Server) -> None:
    talk = [{"role": "user", "content": "The secret word is banana. Say OK."}]
    more: dict[str, Any] = {"extra_headers": {"x-session-id": "words"}, "extra_body": {"plan": "full"}}
    first = server.ask(talk, **more)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    talk += [{"role": "assistant", "content": text(first)}, {"role": "user", "content": "What is the secret word?"}]
    second = server.ask(talk, **more)
    assert "banana" in text(second)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    fresh = server.ask(talk, extra_body={"plan": "full"})
    assert text(fresh) == text(second) and fresh.usage.prompt_tokens_details.cached_tokens == 0
    other = server.ask(talk, extra_headers={"x-session-id": "words"}, extra_body={"plan": "int8"})
    assert other.kv["plan"] == "int8" and other.usage.prompt_tokens_details.cached_tokens == 0


def test_plan_budget_and_quality(server: Server) -> None:
    document = [{"role": "user", "content": "The whale swam north. " * 60 + "Where did it swim?"}]
    small = server.ask(document, max_tokens=4, extra_body={"plan": "streaming(0.5) | int4", "budget": "6MiB"})
    assert small.kv["plan"] == "streaming(0.5) | int4"
    assert 0 < small.kv["kv_bytes"]["device_peak"] <= small.kv["kv_bytes"]["budget"] == 6 << 20
    exact = server.ask(document, max_tokens=4, extra_body={"quality": 0})
    assert exact.kv["plan"] in ("full", "offload(0.05)")


@pytest.mark.parametrize(
    ("more", "kind", "param", "words"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model", "'gpt-5' does not exist"),
        ({"n": 2}, openai.BadRequestError, "n", "n=2"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs", "not supported"),
        ({"extra_body": {"plan": "int8 | ofload(0.5)"}}, openai.BadRequestError, "plan", "position 8"),
        ({"extra_body": {"budget": "6MiBs"}}, openai.BadRequestError, "budget", "64MiB"),
        ({"extra_body": {"budget": 1000}}, openai.BadRequestError, "budget", "at least"),
        ({"extra_body": {"qualty": 1}}, openai.BadRequestError, "qualty", "'quality'"),
        ({"messages": []}, openai.BadRequestError, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": " "}]}, openai.BadRequestError, "messages", "empty prompt"),
        ({"messages": [{"role": "user", "content": "whale " * 9000}]}, openai.BadRequestError, "messages", "8192"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "greater than or equal to 1"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "less than or equal to 2"),
    ],
)
def test_bad_requests(server: Server, more: dict[str, Any], kind: type, param: str, words: str) -> None:
    with pytest.raises(kind) as caught:
        server.ask(**more)
    body: Any = caught.value.body  # type: ignore[attr-defined]
    assert body["param"] == param and words in body["message"] and "\n" not in body["message"]
    assert body["type"] == "invalid_request_error"


def test_bad_bodies_and_keys(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError, match="API key"):
        server.as_client("wrong").models.list()
    headers = {"Authorization": f"Bearer {KEY}"}
    broken = httpx.post(f"{server.url}/v1/chat/completions", content="{", headers=headers)
    assert broken.status_code == 400 and "JSON" in broken.json()["error"]["message"]
    nowhere = httpx.get(f"{server.url}/v2/models", headers=headers)
    assert nowhere.status_code == 404 and set(nowhere.json()["error"]) == {"message", "type", "param", "code"}


def test_requests_at_once(server: Server) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: text(server.ask(max_tokens=6, seed=i)), range(6)))
    assert all("France" in answer for answer in answers) and len(set(answers)) == 1


def test_overload_is_refused_politely(server: Server) -> None:
    """Four jobs at the worker and four in the queue; a long one first, so that five of twelve more find no place."""

    def one(_: int) -> Any:
        try:
            return text(server.ask(max_tokens=4))
        except openai.RateLimitError as error:
            return error

    with server.ask(STORY, stream=True, max_tokens=4000, temperature=1, seed=1) as busy, ThreadPoolExecutor(12) as pool:
        next(busy)
        answers = (asked.result() for asked in as_completed([pool.submit(one, i) for i in range(12)]))
        refused = next(answers)  # the others wait for as long as the story is told
        assert isinstance(refused, openai.RateLimitError) and refused.code == "rate_limit_exceeded"
        assert refused.response.headers["retry-after"] == "1"
        busy.close()
        assert any(isinstance(answer, str) for answer in answers)


def test_health_during_a_generation_and_a_client_that_leaves(server: Server) -> None:
    stream = server.ask(STORY, stream=True, max_tokens=4000, temperature=1, seed=1)
    for _ in range(3):
        next(stream)
    begun = time.monotonic()
    assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
    assert time.monotonic() - begun < 2
    next(stream)  # it was still going
    stream.close()
    assert "Paris" in text(server.ask(timeout=20))  # 4000 tokens would take minutes


def test_ctrl_c_ends_it_cleanly(server: Server) -> None:
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    said = [line for line in server.log.read_text().splitlines() if "(raylet)" not in line]  # of the killed replica
    assert said == [f"serving smollm2 on {server.url}/v1"]
    rows = trajectories.read(server.trajectories).to_pylist()
    assert {row["scenario"] for row in rows} == {"serve"} and all(row["label_loss"] is None for row in rows)
    assert any(row["session_id"] == "words" for row in rows) and all(row["device_byte_s"] > 0 for row in rows)


# -- before anything starts --------------------------------------------------------------------------------------------


def test_what_cannot_be_served_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AdaptiveKVError, match=rf"^port {port} on 127.0.0.1: address already in use; .*--port"):
            serve(port=port)
    for more, words in (
        ({"port": 0}, "between 1 and 65535"),
        ({"model": str(tmp_path / "none")}, "does not exist"),
        ({"model": "smollm"}, "did you mean smollm2"),
        ({"selector": str(tmp_path)}, "policy"),
        ({"replicas": 0}, "replicas"),
        ({"budget": "lots"}, "budget 'lots'"),
        ({"device": "tpu"}, "unknown device"),
        ({"quality": "good"}, "quality='good': nats per token"),
        ({"device": "cpu", "compile": True}, "compile: .* on a GPU only"),
        ({"compile": "yes"}, "compile='yes': true or false"),
        ({"trajectory": "x"}, "'trajectories'"),
    ):
        with pytest.raises(AdaptiveKVError, match=words) as caught:
            serve(**({"port": port} | more))
        assert "\n" not in str(caught.value)


def test_build_takes_words() -> None:
    build({"model": "smollm2", "replicas": "2", "quality": "0.1", "queue": "3"})


def test_neutral_values_pass() -> None:
    body = {"model": "m", "messages": FRANCE, "n": 1, "tools": [], "user": "u", "logprobs": None, "top_p": 1}
    assert ChatRequest.model_validate(body).to_job("id", None).max_tokens == 256
    with pytest.raises(Fault, match="tools"):
        ChatRequest.model_validate(body | {"tools": [{"type": "function"}]}).to_job("id", None)
