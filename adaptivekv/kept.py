"""The layers that transformers keeps beside ours (sliding windows, linear attention), and how they follow a cache."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.layers import AdaptiveLayer

if TYPE_CHECKING:
    from adaptivekv.cache import AdaptiveCache


def make_layers(cache: AdaptiveCache, config: PreTrainedConfig) -> list[CacheLayerMixin]:
    """New layers for a cache: ours where transformers makes a plain DynamicLayer, else transformers' own."""
    layers = DynamicCache(config=config).layers
    own = 0
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[i], own = AdaptiveLayer(cache, own), own + 1
    return layers


def copied(layers: list[CacheLayerMixin]) -> list[CacheLayerMixin]:
    """Layers for a step that must not be stored: kept ones store whatever they see, so it is copies that see it."""
    return [x if isinstance(x, AdaptiveLayer) else copy.deepcopy(x) for x in layers]


def crop(layers: list[CacheLayerMixin], seen: int, length: int) -> None:
    """Return kept layers from `seen` to `length` tokens.

    AdaptiveKVError, and nothing happens, where a window has moved on or a state is recurrent: they no longer know what
    they were.
    """
    for layer in layers:
        if type(layer) is not DynamicSlidingWindowLayer or layer.get_seq_length() >= layer.sliding_window:
            raise AdaptiveKVError(
                f"truncate: {type(layer).__name__}, which transformers keeps, cannot return to {length} tokens; "
                "clear() the cache and read the prompt again"
            )
    for layer in layers:
        layer.crop(length - seen)
