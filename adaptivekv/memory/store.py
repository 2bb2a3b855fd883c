"""Save a sequence to a file and load it back: pages as stored, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adaptivekv.errors import CacheFileError
from adaptivekv.memory.bases import Bases
from adaptivekv.memory.formats import BY_CODE
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, DISK, HOST, TIERS

VERSION = 4


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _shape(pool: PagePool) -> str:
    return json.dumps([str(pool.dtype), *[[s.heads, s.q_heads, s.k_dim, s.v_dim] for s in pool.layers]])


def save(sequence: Sequence, path: str | Path) -> None:
    """Write everything needed to go on from here, atomically, with a checksum over all of it."""
    pool, tensors = sequence.pool, {}
    for layer, table in enumerate(sequence.ids):
        live = table[table >= 0]
        key = (pool.code[live].astype(np.int32) * len(TIERS) + pool.tier[live]) * 2 + pool.split[live]
        for value in np.unique(key):  # one matrix of stored bytes a kind
            for part, raw in zip("kv", pool.raw(live[key == value]), strict=True):
                tensors[f"{layer}.{part}.{value}"] = raw.cpu()
        tensors[f"{layer}.table"] = torch.from_numpy(table >= 0)
        tensors[f"{layer}.mass"] = torch.from_numpy(sequence.mass[layer].copy())
        tensors[f"{layer}.meta"] = torch.from_numpy(np.stack([key, pool.count[live]]))
        tensors[f"{layer}.pos"] = torch.from_numpy(pool.pos[live])
        tensors[f"{layer}.tail_k"] = sequence.tail_k[layer].cpu().clone()
        tensors[f"{layer}.tail_v"] = sequence.tail_v[layer].cpu().clone()
        if sequence.bases:
            for part, basis in zip("kv", sequence.bases.layer(layer), strict=True):
                tensors[f"{layer}.basis_{part}"] = basis.cpu().clone()
        if sequence.ring:
            tensors[f"{layer}.ring"] = sequence.ring[layer].cpu().clone()
        for name, credit in sequence.credits.items():
            tensors[f"{layer}.credit.{name}"] = torch.from_numpy(credit[layer].copy())
    tensors["tail_pos"] = torch.from_numpy(sequence.tail_pos.copy())
    numbers = {
        "length": sequence.length,
        "prompt": sequence.prompt,
        "tail_len": sequence.tail_len,
        "window": sequence.window,
        "ring_fill": sequence.ring_fill,
        "ranks": sequence.bases.ranks if sequence.bases else [],
    }
    head = {"version": VERSION, "shape": _shape(pool), "protected": sequence.protected, **numbers}
    meta_text = {"adaptivekv": json.dumps(head, sort_keys=True)}
    meta_text["sha256"] = hashlib.sha256((meta_text["adaptivekv"] + _digest(tensors)).encode()).hexdigest()
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, meta_text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(pool: PagePool, path: str | Path) -> Sequence:
    """A sequence as `save` left it, on the tiers it had (split pages whole on their values' tier); what finds no
    room there goes to a lower one, or from the disk to the host.

    Errors: CacheFileError; ArenaFull where there is no room.
    """
    try:
        with safe_open(path, "pt") as file:
            head, checksum = json.loads(file.metadata()["adaptivekv"]), file.metadata()["sha256"]
            text = file.metadata()["adaptivekv"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CacheFileError(f"saved cache {path}: cannot be read ({str(error).splitlines()[0]})") from None
    if head["version"] != VERSION:
        raise CacheFileError(f"saved cache {path}: version {head['version']}, this program reads {VERSION}")
    if head["shape"] != _shape(pool):
        raise CacheFileError(f"saved cache {path}: made for another model or dtype")
    if checksum != hashlib.sha256((text + _digest(tensors)).encode()).hexdigest():
        raise CacheFileError(f"saved cache {path}: checksum differs, the file is damaged")
    sequence = Sequence(pool, head["window"])
    try:
        if head["ranks"]:
            sequence.bases = Bases(pool, head["ranks"])
        for layer in range(len(pool.layers)):
            _fill(sequence, layer, tensors)
    except Exception:
        sequence.free()
        raise
    for name in ("length", "prompt", "tail_len", "ring_fill"):
        setattr(sequence, name, head[name])
    sequence.tail_pos[:] = tensors["tail_pos"].numpy()
    sequence.protected = [tuple(span) for span in head["protected"]]
    layers = range(len(pool.layers))
    for name in {key.split(".", 2)[2] for key in tensors if ".credit." in key}:
        sequence.credits[name] = [tensors[f"{layer}.credit.{name}"].numpy().copy() for layer in layers]
    return sequence


def _fill(sequence: Sequence, layer: int, tensors: dict[str, torch.Tensor]) -> None:
    pool, (key, count) = sequence.pool, tensors[f"{layer}.meta"].numpy()
    mask, pos = tensors[f"{layer}.table"].numpy(), tensors[f"{layer}.pos"].numpy()
    table: np.ndarray = np.full(mask.shape, -1, np.int32)
    live: np.ndarray = np.full(len(key), -1, np.int32)
    sequence.ids[layer], sequence.mass[layer] = table, tensors[f"{layer}.mass"].numpy().copy()
    for value in np.unique(key):
        raw, here = (tensors[f"{layer}.k.{value}"], tensors[f"{layer}.v.{value}"]), key == value
        fmt, tier = BY_CODE[value // 2 // len(TIERS)], int(value // 2 % len(TIERS))
        size = sum(part.shape[1] for part in raw) * len(raw[0])
        places = (DISK, HOST) if tier == DISK else (DEVICE, HOST, DISK)[tier:]
        room = [pool.arena(DEVICE).free_bytes, pool.away_free(HOST), pool.away_free(DISK)]
        tier = next((place for place in places if size <= room[place]), tier)
        np.put(live, np.flatnonzero(here), pool.adopt(layer, raw, count[here], pos[here], fmt, tier))
        table[mask] = live
    if sequence.bases:
        for part, basis in zip("kv", sequence.bases.layer(layer), strict=True):
            basis.copy_(tensors[f"{layer}.basis_{part}"])
        sequence.bases.name(live, np.nonzero(mask)[0])
    sequence.tail_k[layer].copy_(tensors[f"{layer}.tail_k"])
    sequence.tail_v[layer].copy_(tensors[f"{layer}.tail_v"])
    if sequence.ring:
        sequence.ring[layer].copy_(tensors[f"{layer}.ring"])
