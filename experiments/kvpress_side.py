"""kvpress's side of the comparison: reads prompts, writes answers. Runs in kvpress's own environment.

    python -m venv kvp && kvp/bin/pip install kvpress==0.5.5
    kvp/bin/python experiments/kvpress_side.py WORK/prompts.json WORK/theirs.jsonl [DEVICE [JOBS]]

One prefill serves all methods: a press looks at a layer after its attention and changes nothing but that layer's
cache, so each press is shown the same prefill and gives a cache of its own, from which the answer is decoded greedily;
caches of one length are decoded as a batch. Answers are appended line by line, by JOBS processes that share the
prompts; a run that was stopped goes on where it was.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
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
from torch import multiprocessing
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
    logits = model(torch.tensor([ids], device=model.device), past_key_values=DynamicCache(), logits_to_keep=1).logits
    for one in hooks:
        one.remove()
    return int(logits[0, -1].argmax()), kept


@torch.inference_mode()
def answer(model: Any, caches: list[Any], at: int, token: int, new: int, stops: set[int]) -> list[Any]:
    """For each cache greedy tokens and the slots held before the first of them was stored, over layers and heads.

    The caches have the same lengths; one whose keys are masked comes alone.
    """
    cache, held = DynamicCache(), [0] * len(caches)
    for i, layers in enumerate(zip(*caches, strict=True)):
        keys, values = (torch.cat([layer[part] for layer in layers]) for part in (0, 1))
        cache.update(keys, values, i)
        for row, (k, _, masked) in enumerate(layers):
            held[row] += k.shape[1] * k.shape[2] - (0 if masked is None else len(masked[0]))
        model.model.layers[i].self_attn.masked_key_indices = layers[0][2]
    tokens = [[token] for _ in caches]
    while len(tokens[0]) < new and not all(stops & set(row) for row in tokens):
        where = torch.tensor([[at]], device=model.device)
        last = torch.tensor([row[-1:] for row in tokens], device=model.device)
        out = model(last, past_key_values=cache, position_ids=where.expand(len(tokens), 1), cache_position=where[0])
        for known, one in zip(tokens, out.logits[:, -1].argmax(-1).tolist(), strict=True):
            known.append(one)
        at += 1
    ends = [next((i + 1 for i, one in enumerate(row) if one in stops), len(row)) for row in tokens]
    return [(row[:end], slots) for row, end, slots in zip(tokens, ends, held, strict=True)]


def work(job: dict[str, Any], out: Path, device: str, todo: list[int], at: Any) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // job["jobs"]))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
    model = model.to(device).eval()
    facts = {"device": torch.cuda.get_device_name() if device != "cpu" else "CPU", "torch": torch.__version__}
    facts |= {"transformers": transformers.__version__}
    while True:
        with at.get_lock():
            number, at.value = at.value, at.value + 1
        if number >= len(todo):
            return
        ids, start = job["ids"][todo[number]], time.perf_counter()
        token, kept = read(model, ids, 1 - job["keep"])
        alike: dict[Any, list[str]] = {}  # methods whose caches have the same lengths
        for name, layers in kept.items():
            alone = name if any(masked is not None for *_, masked in layers) else ""
            alike.setdefault((alone, *(k.shape[2] for k, *_ in layers)), []).append(name)
        answers: dict[str, Any] = {}
        for names in alike.values():
            caches = [kept[name] for name in names]
            found = answer(model, caches, len(ids), token, job["new"], set(job["stops"]))
            answers |= dict(zip(names, found, strict=True))
        line = {"prompt": todo[number], "answers": answers, "seconds": round(time.perf_counter() - start, 2)} | facts
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main(prompts: Path, out: Path, device: str = "cpu", jobs: str = "1") -> None:
    job = json.loads(prompts.read_text()) | {"jobs": int(jobs)}
    done = {json.loads(line)["prompt"] for line in out.read_text().splitlines()} if out.exists() else set()
    todo = [i for i in range(len(job["ids"])) if i not in done]
    context = multiprocessing.get_context("spawn")
    at = context.Value("i", 0)
    workers = [context.Process(target=work, args=(job, out, device, todo, at)) for _ in range(int(jobs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
