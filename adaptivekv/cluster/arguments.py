"""Arguments of a server: words of a command line or a config file, into what they stand for.

AdaptiveKVError, naming the argument, for what they cannot be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.model import resolve_device, resolve_dtype
from adaptivekv.trainer import tracking


def gpus(device: str, dtype: str, replicas: int) -> float:
    """GPUs a worker asks Ray for: one, or the share that lets all replicas run; 0 on the CPU."""
    if device.startswith("cuda:"):
        raise AdaptiveKVError(f"device {device!r}: Ray gives out the GPUs; use cuda and CUDA_VISIBLE_DEVICES")
    where = resolve_device(device)
    resolve_dtype(dtype, where)
    return min(1.0, torch.cuda.device_count() / replicas) if where.type == "cuda" else 0


def number(args: dict[str, Any], name: str, default: int, least: int) -> int:
    try:
        value = int(args.get(name, default))
    except (TypeError, ValueError):
        value = least - 1
    if value < least:
        raise AdaptiveKVError(f"{name}={args[name]!r}: a whole number, {least} or more")
    return value


def real(args: dict[str, Any], name: str, default: float, most: float, what: str) -> float:
    """From 0 to `most`; `what` that is."""
    try:
        value = float(args.get(name, default))
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value <= most:
        raise AdaptiveKVError(f"{name}={args[name]!r}: {what}")
    return value


def yes(args: dict[str, Any], name: str) -> bool:
    value = str(args.get(name, False)).lower()
    if value not in ("true", "false"):
        raise AdaptiveKVError(f"{name}={args[name]!r}: true or false")
    return value == "true"


def absolute(name: str, always: bool = False) -> str:
    """Workers may stand in another folder than we do."""
    path = Path(name).expanduser()
    return str(path.resolve()) if always or path.exists() else name


def tracking_of(args: dict[str, Any]) -> str:
    """The tracking URI; a database file by its whole path, for the same reason."""
    where = tracking.uri(args.get("tracking_uri"))
    file = tracking.database(where)
    return f"sqlite:///{file}" if file else where
