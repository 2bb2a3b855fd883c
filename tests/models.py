"""Tiny models with random weights, one per architecture whose cache the project must serve."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.models import gemma3, llama, mistral, phi3, qwen3

SMALL = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llama": llama.LlamaConfig(**SMALL, head_dim=16),
    "qwen3": qwen3.Qwen3Config(**SMALL, head_dim=32),
    "mistral": mistral.MistralConfig(**SMALL, head_dim=16, sliding_window=None),
    "mistral-mqa": mistral.MistralConfig(**{**SMALL, "num_key_value_heads": 1}, head_dim=16, sliding_window=None),
    "phi3": phi3.Phi3Config(**SMALL),
    "gemma3": gemma3.Gemma3TextConfig(
        **{**SMALL, "num_hidden_layers": 4}, head_dim=16, sliding_window=48, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}  # fmt: skip


def tiny(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A fresh model on the CPU in float32, weights large enough for attention to be far from uniform."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(4 if "proj" in key else 1)
    return model


def twins(name: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models with the same weights: one for AdaptiveCache, one that stays as transformers made it."""
    return tiny(name), tiny(name)
