"""Load the model a request runs on: an embedded one, or any Hugging Face causal language model."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptivekv.embedded import DEFAULT, EMBEDDED, converted
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.huggingface import line, prepare, quiet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass
class LoadedModel:
    """A model ready to generate: in eval mode, on `device`, its tokenizer padding on the left."""

    model: Any
    tokenizer: Any
    name: str
    device: torch.device


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
            raise AdaptiveKVError(f"cannot load model {name!r}: {line(error)}{fix}") from error
    if where.index is not None and where.type == "cuda":
        torch.cuda.set_device(where)  # Triton launches on the process's current GPU, wherever its arguments lie
    try:
        net = net.to(where).eval()
    except torch.cuda.OutOfMemoryError as error:
        raise AdaptiveKVError(f"model {name!r} does not fit on {where}: use a smaller model or --device cpu") from error
    prepare(net, tokenizer)
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
        raise AdaptiveKVError(f"model {name!r} {missing} ({line(error)}){_hint(name)}") from error
    return _from_pretrained(name, dtype)


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else f": check the name, or use a folder or {' or '.join(EMBEDDED)}"
