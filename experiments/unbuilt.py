"""Why MiniCache and Palu's data-free bases are not built: what each would cost the embedded model, in plain torch.

    python -m experiments.unbuilt --out experiments/results/unbuilt.json

A prompt is read into a full cache; what lies between its first and last 64 tokens is changed as the method would; the
text goes on, teacher-forced, and its loss against the unchanged cache is taken (KL, nats a token).

MiniCache (arXiv 2405.14366) merges two adjacent layers of the deep half: one direction for both, interpolated on the
sphere at t = 0.6, each layer's own lengths, and the 5 % of tokens whose directions lie furthest apart kept as they are.
It lives on those directions being alike, so their mean angle is recorded: 0 is the same, pi / 2 is nothing in common.
Palu (arXiv 2407.21118) takes the directions of a head's values from the singular vectors of its projection, of the
weights alone or weighted by the inputs' covariance; the latter are the principal axes of the values themselves.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from adaptivekv.model import load
from adaptivekv.trainer.tasks import haystack

PROMPT, NEW, EDGE = 1024, 64, 64
Change = Callable[[list[Tensor], list[Tensor]], None]  # of keys and values, a layer [H, n, dim], in place


def merged(a: Tensor, b: Tensor, t: float = 0.6, kept: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """Two layers' keys (or values) [H, n, dim], a above b, as MiniCache restores them, and the angles [H, n]."""
    size = [x.norm(dim=-1, keepdim=True) for x in (a, b)]
    unit_a, unit_b = a / size[0], b / size[1]
    angle = (unit_a * unit_b).sum(-1, keepdim=True).clamp(-1, 1).arccos()
    shared = (torch.sin((1 - t) * angle) * unit_b + torch.sin(t * angle) * unit_a) / angle.sin()
    apart = angle >= angle.flatten().quantile(1 - kept)
    return *(x.where(apart, shared * n) for x, n in zip((a, b), size, strict=True)), angle[..., 0]


def axes_of_weights(weight: Tensor) -> Tensor:
    return torch.linalg.svd(weight.float(), full_matrices=False)[0]


def axes_of_values(values: Tensor) -> Tensor:
    return torch.linalg.eigh(values.T @ values)[1].flip(1)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load(device="cpu", dtype="float32")
    model, text = loaded.model, haystack()
    layers, dim = model.model.layers, model.config.head_dim
    angles: dict[int, list[float]] = {}

    def minicache(first: int) -> Change:
        def change(keys: list[Tensor], values: list[Tensor]) -> None:
            for low in range(first, len(layers) - 1, 2):
                for part in (keys, values):
                    part[low + 1], part[low], angle = merged(part[low + 1], part[low])
                    angles.setdefault(low, []).append(float(angle.mean()))

        return change

    def low_rank(rank: int, from_weights: bool) -> Change:
        def change(_: list[Tensor], values: list[Tensor]) -> None:
            for layer, v in zip(layers, values, strict=True):
                weights = layer.self_attn.v_proj.weight.split(dim)
                for head, weight in enumerate(weights):
                    basis = (axes_of_weights(weight) if from_weights else axes_of_values(v[head]))[:, :rank]
                    v[head] = v[head] @ basis @ basis.T

        return change

    half = len(layers) // 2
    methods: dict[str, Change] = {"minicache, deep half": minicache(half)}
    methods["minicache, last 4 layers"] = minicache(len(layers) - 4)
    for rank in (dim // 2, 3 * dim // 4):
        methods[f"values in {rank} of {dim} directions, of the weights"] = low_rank(rank, True)
        methods[f"values in {rank} of {dim} directions, of the values"] = low_rank(rank, False)
    losses: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(args.documents):
        at = 50_000 + 200_000 * number
        ids = loaded.tokenizer(text[at : at + 8 * PROMPT], return_tensors="pt").input_ids[:, : PROMPT + NEW]
        cache = DynamicCache(config=model.config)
        model(ids[:, :PROMPT], past_key_values=cache)

        def logits(used: DynamicCache, ids: Tensor = ids) -> Tensor:
            return model(ids[:, PROMPT:], past_key_values=used).logits[0].log_softmax(-1)

        full = logits(copy.deepcopy(cache))
        for name, change in methods.items():
            other = copy.deepcopy(cache)
            parts = [[getattr(x, part)[0].clone() for x in other.layers] for part in ("keys", "values")]
            change(*parts)
            for layer, k, v in zip(other.layers, *parts, strict=True):
                layer.keys[0, :, EDGE:-EDGE], layer.values[0, :, EDGE:-EDGE] = k[:, EDGE:-EDGE], v[:, EDGE:-EDGE]
            losses[name].append(float((full.exp() * (full - logits(other))).sum(-1).mean()))
    result = {
        "command": shlex.join(["python", "-m", "experiments.unbuilt", *sys.argv[1:]]),
        "model": loaded.name,
        "documents": args.documents,
        "kl": {name: [round(x, 4) for x in each] for name, each in losses.items()},
        "mean_angle": {f"{low} and {low + 1}": round(sum(each) / len(each), 3) for low, each in sorted(angles.items())},
        "right_angle": round(math.pi / 2, 3),
    }
    out = json.dumps(result, indent=1) + "\n"
    if args.out:
        args.out.write_text(out)
    sys.stdout.write(out)


if __name__ == "__main__":
    main()
