"""kvpress's side of the comparison: reads prompts, writes answers. Runs in kvpress's own environment.

    python -m venv kvp && kvp/bin/pip install kvpress==0.5.5
    kvp/bin/python experiments/kvpress_side.py WORK/prompts.json WORK/theirs.jsonl

One prefill serves all methods: a press looks at a layer after its attention and changes nothing but that layer's
cache, so each press is shown the same prefill and gives a cache of its own, from which the answer is decoded greedily.
Answers are appended line by line; a run that was stopped goes on where it was.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import AutoModelForCausalLM, DynamicCache


def presses(ratio: float) -> dict[str, Any]:
    """By the name of our method; ratio is the share removed. Every other parameter is kvpress's default."""
    return {
        "snapkv": SnapKVPress(ratio),
        "expected": ExpectedAttentionPress(ratio),
        "streaming": StreamingLLMPress(ratio),
        "knorm": KnormPress(ratio),
        "tova": TOVAPress(ratio),
        "keydiff": KeyDiffPress(ratio),
        "pyramid": PyramidKVPress(ratio),
        "adasnap": AdaKVPress(SnapKVPress(ratio)),
    }


@torch.inference_mode()
def read(model: Any, ids: list[int], ratio: float) -> tuple[int, dict[str, list[Any]]]:
    """The first token, and for each press the layers' (keys, values, masked): one prefill for all of them."""
    kept: dict[str, list[Any]] = {name: [] for name in ["full", *presses(ratio)]}
    made = presses(ratio)

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        kept["full"].append((layer.keys, layer.values, None))
        for name, press in made.items():
            k, v = press.compress(module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs)
            kept[name].append((k, v, module.__dict__.pop("masked_key_indices", None)))

    hooks = []
    for press in made.values():
        press.post_init_from_model(model)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
        hooks.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
    logits = model(torch.tensor([ids]), past_key_values=DynamicCache(), logits_to_keep=1).logits
    for one in hooks:
        one.remove()
    return int(logits[0, -1].argmax()), kept


@torch.inference_mode()
def answer(model: Any, layers: list[Any], at: int, token: int, new: int, stops: set[int]) -> tuple[list[int], int]:
    """Greedy tokens and the slots held before the first of them was stored, summed over layers and heads."""
    cache, held = DynamicCache(), 0
    for i, (k, v, masked) in enumerate(layers):
        cache.update(k.clone(), v.clone(), i)
        held += k.shape[1] * k.shape[2] - (0 if masked is None else len(masked[0]))
        model.model.layers[i].self_attn.masked_key_indices = masked
    tokens = [token]
    while len(tokens) < new and tokens[-1] not in stops:
        where = torch.tensor([[at]])
        out = model(torch.tensor([tokens[-1:]]), past_key_values=cache, position_ids=where, cache_position=where[0])
        tokens.append(int(out.logits[0, -1].argmax()))
        at += 1
    return tokens, held


def main(prompts: Path, out: Path) -> None:
    job = json.loads(prompts.read_text())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa").eval()
    done = len(out.read_text().splitlines()) if out.exists() else 0
    for i, ids in enumerate(job["ids"][done:], done):
        start = time.perf_counter()
        token, kept = read(model, ids, 1 - job["keep"])
        stops = set(job["stops"])
        answers = {name: answer(model, layers, len(ids), token, job["new"], stops) for name, layers in kept.items()}
        with out.open("a") as file:
            file.write(json.dumps({"prompt": i, "answers": answers}) + "\n")
        print(f"{i + 1}/{len(job['ids'])} {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
