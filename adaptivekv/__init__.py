"""adaptivekv: a KV cache that keeps a byte budget and a quality, and learns how."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adaptivekv.errors import AdaptiveKVError, BudgetError, CacheFileError

if TYPE_CHECKING:
    from adaptivekv.cache import AdaptiveCache
    from adaptivekv.plan import Plan

__all__ = ["AdaptiveCache", "AdaptiveKVError", "BudgetError", "CacheFileError", "Plan"]
_LATER = {"AdaptiveCache": "adaptivekv.cache", "Plan": "adaptivekv.plan"}
"""These bring torch and transformers, seconds that a command line without a model need not wait for."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
