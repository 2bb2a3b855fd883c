"""The command line from outside: JSON contracts, and one clear line for everything a user can get wrong."""

import json
import os
import subprocess
import sys

import pytest

from adaptivekv.cli import main


def cli(*args: str, cwd=None) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "adaptivekv.cli", *args], capture_output=True, text=True, cwd=cwd, env=env, timeout=300
    )


@pytest.fixture(scope="module", autouse=True)
def converted(smol):
    """The model is converted before any subprocess starts."""


def test_generate_json_keeps_its_contract(tmp_path):
    document = tmp_path / "doc.txt"
    document.write_text("The code of the vault is 4711. " + "The sea was calm and grey that morning. " * 60)
    done = cli(
        "generate", "--prompt-file", str(document), "--question", "What is the code of the vault?", "--budget", "0.7",
        "--max-new-tokens", "12", "--plan", "int8", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) == {
        "text", "plan", "prompt_tokens", "new_tokens", "finish_reason", "decisions", "kv_bytes", "timing",
    }  # fmt: skip
    assert answer["text"].strip() and answer["plan"] == "int8"
    size = answer["kv_bytes"]
    assert set(size) == {"full", "budget", "device_peak", "device_end", "host_end", "disk_end"}
    assert size["full"] == 23_040 * (answer["prompt_tokens"] + answer["new_tokens"])
    assert size["device_end"] <= size["device_peak"] <= size["budget"]
    assert set(answer["timing"]) == {"prefill_s", "decode_ms_per_token", "controller_us_per_step"}
    assert answer["decisions"] and set(answer["decisions"][0]) >= {"step", "plan", "reason", "selector"}
    again = cli(
        "generate", "--prompt-file", str(document), "--question", "What is the code of the vault?", "--budget", "0.7",
        "--max-new-tokens", "12", "--plan", "int8", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(again.stdout)["text"] == answer["text"]


def test_session_goes_on_from_disk(tmp_path, monkeypatch):
    from adaptivekv.embedded import cache_folder

    home = tmp_path / "cache"
    home.mkdir()
    (home / "models").symlink_to(cache_folder())
    monkeypatch.setenv("ADAPTIVEKV_CACHE", str(home))
    first = cli(
        "generate",
        "--prompt",
        "My name is Ishmael and my dog is called Rex.",
        "--session",
        "s1",
        "--max-new-tokens",
        "20",
        "--json",
    )
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["kv_bytes"]["disk_end"] > 0
    second = cli(
        "generate", "--prompt", "What is my dog called?", "--session", "s1", "--max-new-tokens", "12", "--json"
    )
    assert "Rex" in json.loads(second.stdout)["text"]
    assert json.loads(second.stdout)["prompt_tokens"] > json.loads(first.stdout)["prompt_tokens"]
    (home / "sessions" / "s1" / "cache.safetensors").write_bytes(b"damaged")
    third = cli("generate", "--prompt", "And now?", "--session", "s1", "--max-new-tokens", "4")
    assert third.returncode == 2 and "cannot be read" in third.stderr and "Traceback" not in third.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["generate"], "exactly one of --prompt and --prompt-file"),
        (["generate", "--prompt", "  "], "empty"),
        (["generate", "--prompt-file", "nowhere.txt"], "no such file"),
        (["generate", "--prompt-file", "latin.txt"], "not UTF-8"),
        (["generate", "--prompt", "hi", "--plan", "snapvk(0.5)"], "did you mean 'snapkv'"),
        (["generate", "--prompt", "hi", "--budget", "4KiB"], "too small"),
        (["generate", "--prompt", "hi", "--model", "no/such-model"], "no/such-model"),
        (["generate", "--prompt", "hi", "--selector", "nowhere"], "policy"),
        (["generate", "--prompt", "hi", "--selector", "corrupt"], "policy"),
        (["generate", "--prompt", "hi", "--session", "../x"], "session"),
        (["generate", "--prompt", "hi", "--device", "cpu", "--compile"], "compile: the model is not on a GPU"),
        (["generate", "--prompt", "hi", "--temperature", "9"], "temperature"),
        (["generate", "--prompt-file", "long.txt"], "8192 positions"),
        (["evaluate", "--tasks", "niah_singel"], "niah_single"),
        (["frobnicate"], "No such command"),
        (["demo", "--file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, args, says):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "long.txt").write_text("word " * 9000)
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "policy.npz").write_bytes(b"no")
    (tmp_path / "corrupt" / "policy.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["adaptivekv", *args])
    with pytest.raises(SystemExit) as ended:  # in this process: fifteen of their own would take a minute
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2, (out, err)
    assert says in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 and not out


def test_plans_and_doctor_speak_json():
    rows = json.loads(cli("plans", "--json").stdout)
    assert {"name", "direction", "paper", "needs", "lossy", "undoable", "bytes", "parameters"} <= set(rows[0])
    assert {row["direction"] for row in rows} == {"evict", "quantize", "offload", "retrieve", "combination"}
    table = cli("plans").stdout
    assert all(row["name"] in table for row in rows) and "2505.23416" in table
    facts = json.loads(cli("doctor", "--json").stdout)
    assert facts["versions"]["torch"] and isinstance(facts["problems"], list)


def test_nothing_is_imported_that_is_not_needed():
    """torch and transformers take seconds: help and refusals wait for neither, the table of plans not for the last."""
    code = """if True:
        import sys, adaptivekv.cli
        assert not {"torch", "transformers", "ray", "mlflow"} & set(sys.modules)
        import adaptivekv.policies
        assert "transformers" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
