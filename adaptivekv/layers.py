"""The layers of an AdaptiveCache: which of a model's layers it owns, and what transformers sees of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from adaptivekv.attention import Staged
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.memory.shapes import LayerShape

if TYPE_CHECKING:
    from adaptivekv.cache import AdaptiveCache


class AdaptiveLayer(CacheLayerMixin):
    """One full-attention layer: stages keys and values for the attention function, which stores them."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: AdaptiveCache, index: int):
        super().__init__()
        self.cache, self.index = cache, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.is_initialized = True
        shape = self.cache.shapes[self.index]
        if (key_states.shape[1], key_states.shape[3], value_states.shape[3]) != (shape.heads, shape.k_dim, shape.v_dim):
            raise AdaptiveKVError(
                f"layer {self.index} of this cache stores {list(key_states.shape)} keys and {list(value_states.shape)} "
                f"values, but the model's configuration says {shape}; use DynamicCache"
            )
        staged = Staged(self.cache, self.index, key_states, value_states)
        return staged, staged

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        if self.index == 0:
            self.cache.clear()

    def _refuse(self, *args: Any) -> None:
        raise AdaptiveKVError("AdaptiveCache does not support beams; use num_beams=1 and num_return_sequences=1")

    reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse


def model_mark(model: PreTrainedModel) -> str:
    """What a policy knows a model by. Fine-tuned copies have the same mark; other precisions too."""
    config = model.config.get_text_config(decoder=True)
    return f"{config.model_type} {config.num_hidden_layers}x{config.hidden_size}, {config.vocab_size} tokens"


def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """Shapes of the layers an AdaptiveCache owns. Raises AdaptiveKVError for models it cannot serve."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        # the model asks the cache for latents and expands them itself, before any attention function is called
        raise AdaptiveKVError(
            f"model type {config.model_type}: latent attention (MLA) keeps transformers' own cache and leaves no layer "
            "to manage; use DynamicCache"
        )
    if getattr(config, "num_kv_shared_layers", 0) or "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise AdaptiveKVError(f"model type {config.model_type}: layers that share one KV cache are not supported")
    kinds = DynamicCache(config=config).layers
    configs = getattr(config, "per_layer_config", None) or [config] * len(kinds)  # Gemma 4: wider heads where full
    own = [_shape(each) for layer, each in zip(kinds, configs, strict=True) if type(layer) is DynamicLayer]
    if not own:
        raise AdaptiveKVError(
            f"model type {config.model_type}: it has no full-attention layer whose cache could be managed"
        )
    return own


def _shape(config: PreTrainedConfig) -> LayerShape:
    heads = config.num_attention_heads
    k_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return LayerShape(
        getattr(config, "num_key_value_heads", None) or heads,
        heads,
        k_dim,
        getattr(config, "v_head_dim", None) or k_dim,
    )
