"""Tiny models with random weights, one per architecture whose cache the project must serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.models import (
    deepseek_v3,
    gemma2,
    gemma3,
    gemma3n,
    gemma4,
    gpt_neo,
    gpt_oss,
    kimi_linear,
    lfm2,
    llama,
    mimo_v2_flash,
    ministral,
    mistral,
    nemotron_h,
    phi3,
    qwen3,
    qwen3_next,
)

from adaptivekv.layers import layer_shapes
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.policies.eviction.surrogate import Surrogate, mark_of, width

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

FOUR = {**SMALL, "num_hidden_layers": 4}
SLIDING = {"head_dim": 16, "sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"] * 2}
PER_LAYER = {**FOUR, **SLIDING, "vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 8}
MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
# Models some of whose layers transformers keeps.
MIXED = {
    "qwen3-next": qwen3_next.Qwen3NextConfig(
        **FOUR, head_dim=16, layer_types=["linear_attention", "full_attention"] * 2, linear_key_head_dim=16,
        linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    ),
    "lfm2": lfm2.Lfm2Config(**FOUR, layer_types=["conv", "full_attention"] * 2),
    # A layer that is only an MLP has a cache layer too, an empty one. Made when asked for: older transformers name such
    # layers otherwise, and every GPU test needs this module.
    "nemotron-h": lambda: nemotron_h.NemotronHConfig(
        **FOUR, head_dim=16, layer_types=["mamba", "attention", "mlp", "attention"], mamba_num_heads=4,
        mamba_head_dim=32, ssm_state_size=8, n_groups=1,
    ),
    "gemma3-image": gemma3.Gemma3Config(text_config=CONFIGS["gemma3"].to_dict(), vision_config=TOWER),
    "mimo-v2": mimo_v2_flash.MiMoV2FlashConfig(  # values shorter than keys
        **FOUR, **SLIDING, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "ministral": ministral.MinistralConfig(**FOUR, **SLIDING),
    "gemma2-softcap": gemma2.Gemma2Config(**FOUR, **SLIDING, query_pre_attn_scalar=16, attn_logit_softcapping=5.0),
    "gpt-oss": gpt_oss.GptOssConfig(**FOUR, **SLIDING, num_local_experts=4, num_experts_per_tok=2),
    "gemma4": gemma4.Gemma4TextConfig(  # full layers have other heads than the configuration as a whole says
        **PER_LAYER, global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True
    ),
}  # fmt: skip
REFUSED = {
    "gemma3n": gemma3n.Gemma3nTextConfig(**PER_LAYER, num_kv_shared_layers=2),
    "deepseek-v3": deepseek_v3.DeepseekV3Config(**FOUR, **MLA, first_k_dense_replace=4),
    "kimi-linear": kimi_linear.KimiLinearConfig(
        **FOUR, **{**MLA, "q_lora_rank": None}, layer_types=["linear_attention", "full_attention"] * 2,
        first_k_dense_replace=4,
    ),
    "mistral-all-sliding": mistral.MistralConfig(**FOUR, head_dim=16, sliding_window=48),
    "gpt-neo": gpt_neo.GPTNeoConfig(
        vocab_size=160, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
        max_position_embeddings=256, bos_token_id=1, eos_token_id=None,
    ),
}  # fmt: skip


def tiny(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A fresh model on the CPU in float32, weights large enough for attention to be far from uniform."""
    set_seed(seed)
    config: Any = (CONFIGS | MIXED | REFUSED)[name]
    model = AutoModelForCausalLM.from_config(
        config() if callable(config) else config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(4 if "proj" in key else 1)
            if key.endswith("sinks"):
                weight.copy_(torch.linspace(-1, 3, len(weight)))
    return model


def twins(name: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models with the same weights: one for AdaptiveCache, one that stays as transformers made it."""
    return tiny(name), tiny(name)


def calibrated(model: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives a model a map for `kvzap`, any map, where the cache looks for one."""
    monkeypatch.setenv("ADAPTIVEKV_CACHE", str(folder))
    (folder / "surrogates").mkdir()
    random_surrogate(layer_shapes(model), mark_of(model)).save(folder / "surrogates" / "kvzap-tiny.npz")


def random_surrogate(shapes: list[LayerShape], mark: np.ndarray | None = None) -> Surrogate:
    rng, sizes = np.random.default_rng(0), [(width(s), s.heads) for s in shapes]
    mean, weight, bias = (
        [rng.standard_normal(size).astype(np.float32) for size in each]
        for each in ([d for d, _ in sizes], sizes, [h for _, h in sizes])
    )
    return Surrogate(mean, weight, bias, np.zeros(256, np.float32) if mark is None else mark)
