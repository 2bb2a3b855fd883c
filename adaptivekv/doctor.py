"""What this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

PACKAGES = ("adaptivekv", "torch", "transformers", "triton", "ray", "mlflow", "scikit-learn", "gguf", "accelerate")
GIB = 1 << 30


def doctor() -> dict[str, Any]:
    """Look around without loading a model or importing Ray or MLflow.

    Returns a dict ready for JSON: `versions` (package -> version, None where missing), `gpus` (name, memory_bytes,
    capability), `cpu` (cores usable, ram_bytes), `model` (name, cache folder, converted) and `problems`: a list of
    {"problem", "fix"}, empty where all is well.
    """
    problems: list[dict[str, str]] = []

    def problem(text: str, fix: str) -> None:
        problems.append({"problem": text, "fix": fix})

    versions = {name: _version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    for name, least, below in (("torch", (2, 9), (3,)), ("transformers", (5, 17), (6,))):
        version = versions[name]
        if version is None or not least <= _numbers(version) < below:
            want = f"{name}>={'.'.join(map(str, least))},<{below[0]}"
            problem(f"{name} {version or 'is not installed'}: outside what is supported", f"pip install '{want}'")
    for extra, names in (("serve", ("ray",)), ("learn", ("ray", "mlflow", "scikit-learn"))):
        missing = [name for name in names if versions[name] is None]
        if missing:
            problem(f"{', '.join(missing)} missing: no `{extra}` here", f"pip install 'adaptivekv[{extra}]'")

    gpus = _gpus(problem)
    if gpus and versions["triton"] is None:
        problem("no triton: decoding on the GPU takes the slow path", "pip install triton")
    cpu = {"cores": _cores(), "ram_bytes": _ram_bytes()}
    if 0 < cpu["ram_bytes"] < 3 * GIB:
        problem(f"{cpu['ram_bytes'] / GIB:.1f} GiB of memory", "3 GiB are needed for the embedded model's long prompts")
    return {"versions": versions, "gpus": gpus, "cpu": cpu, "model": _model(problem), "problems": problems}


def _model(problem: Any) -> dict[str, Any]:
    from adaptivekv.embedded import DEFAULT, cache_folder, converted_folder, is_converted
    from adaptivekv.errors import AdaptiveKVError

    cache = cache_folder()
    converted = False
    try:
        converted = is_converted(converted_folder())
        missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
        if missing and not converted:
            problem(f"{DEFAULT} cannot be converted without {', '.join(missing)}", "pip install 'adaptivekv[model]'")
    except AdaptiveKVError as error:
        what, _, fix = str(error).partition(": ")
        problem(what, fix)
    there = _nearest_existing(cache)
    if not os.access(there, os.W_OK):
        problem(f"the model cache {cache} cannot be written", "set ADAPTIVEKV_CACHE to a folder that can")
    elif not converted and shutil.disk_usage(there).free < GIB:
        problem(f"less than 1 GiB free for the model cache {cache}", "set ADAPTIVEKV_CACHE to a larger disk")
    return {"default": DEFAULT, "cache": str(cache), "converted": converted}


def _gpus(problem: Any) -> list[dict[str, Any]]:
    try:
        import torch
    except Exception as error:  # a broken install raises OSError as readily as ImportError
        problem(f"torch does not import: {error}", "pip install --force-reinstall torch")
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        capability = f"{card.major}.{card.minor}"
        gpus.append({"name": card.name, "memory_bytes": card.total_memory, "capability": capability})
        if card.major < 8:
            problem(f"{card.name} has no bfloat16 units", "pass --dtype float16, or use a newer GPU")
    if not gpus and Path("/proc/driver/nvidia/version").exists():
        if torch.version.cuda is None:
            problem("this machine has an NVIDIA driver, but torch is a CPU build", "install a CUDA build of torch")
        else:
            problem(
                "this machine has an NVIDIA driver, but torch sees no GPU",
                f"check CUDA_VISIBLE_DEVICES and that the driver is new enough for CUDA {torch.version.cuda}",
            )
    return gpus


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _cores() -> int:
    # Containers and `taskset` often allow fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ram_bytes() -> int:
    """Memory this process may use: the machine's, or the container's limit where that is lower; 0 where unknown."""
    try:
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            ram = min(ram, int(text))
    return ram


def _nearest_existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
