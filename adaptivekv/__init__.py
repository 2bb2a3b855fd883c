"""adaptivekv: a KV cache that keeps a byte budget and a quality, and learns how."""

from adaptivekv.cache import AdaptiveCache
from adaptivekv.errors import AdaptiveKVError, BudgetError, CacheFileError
from adaptivekv.plan import Plan

__all__ = ["AdaptiveCache", "AdaptiveKVError", "BudgetError", "CacheFileError", "Plan"]
