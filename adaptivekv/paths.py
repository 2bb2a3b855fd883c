"""Where things are kept between runs."""

import os
from pathlib import Path


def cache_root() -> Path:
    """`ADAPTIVEKV_CACHE`, else `~/.cache/adaptivekv`; it may not exist yet."""
    root = os.environ.get("ADAPTIVEKV_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "adaptivekv"
