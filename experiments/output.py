"""What an experiment found, as JSON with the command that makes it again: to a file, if one is named, and printed."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from adaptivekv.errors import AdaptiveKVError


def check(out: Path | None) -> None:
    """AdaptiveKVError if nothing can be written there; said before anything is measured."""
    try:
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            if out.is_dir():
                raise IsADirectoryError(21, "is a folder")
    except OSError as error:
        raise AdaptiveKVError(f"out {out}: {error.strerror or error}; name another file") from None


def emit(name: str, result: dict[str, Any], out: Path | None) -> None:
    """name: of the module in `experiments`."""
    command = shlex.join(["python", "-m", f"experiments.{name}", *sys.argv[1:]])
    text = json.dumps({"command": command} | result, indent=1) + "\n"
    if out:
        out.write_text(text)
    sys.stdout.write(text)
