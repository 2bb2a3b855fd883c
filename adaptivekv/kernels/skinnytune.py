"""Which configuration of the skinny product a device wants for a shape, if any: measured once a process.

The kernel library stays where it is at least as fast. ADAPTIVEKV_TUNE=0: it always stays, unmeasured.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator

import torch
import triton.testing
from torch import Tensor
from torch.nn.functional import linear

from adaptivekv.kernels.decode import processors
from adaptivekv.kernels.skinny import Config, fits, skinny_products

TILES = ((16, 128, 6, 1), (32, 128, 4, 2), (64, 128, 4, 4), (32, 512, 4, 4))
"""Of `Config`, all but the split: the best of 96 for the products of an 8B shape (docs/kernels.md)."""
SPLITS = (1, 2, 4)
"""A sum of fewer than eight is unrolled by inductor into what follows it."""
_PROGRAMS = 16  # most a multiprocessor: beyond, each has too few tiles to load ahead
_BYTES = 200 << 20  # of weights to measure on: more than any L2 holds
_SUM_RATE = 2e9  # bytes a millisecond at which partial sums are written and read
_SUM_MS = 1e-3  # and the least a sum costs: at worst, where nothing to fuse it with follows, a launch

_chosen: dict[tuple[object, ...], Config | None] = {}


def choose(
    model: torch.nn.Module, rows: int, outs: tuple[int, ...], inner: int, dtype: torch.dtype, device: torch.device
) -> Config | None:
    """The fastest configuration for `rows` rows times weights [outs[i], inner] in one launch; None: `F.linear`, each.

    Measured at the first call, on the weights of the model that have these shapes; not while a graph is captured.
    """
    wide = dtype not in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or wide or os.environ.get("ADAPTIVEKV_TUNE") == "0":
        return None
    key = (torch.cuda.get_device_name(device), rows, outs, inner, dtype)
    if key not in _chosen:
        try:
            _chosen[key] = _measured(model, rows, outs, inner, dtype, device)
        except torch.OutOfMemoryError:  # asked for again, there may be room
            return None
    return _chosen[key]


def candidates(rows: int, outs: tuple[int, ...], inner: int, processors: int) -> Iterator[Config]:
    """Configurations that fit, with at least one program a multiprocessor where the shape has as many."""
    for config in itertools.starmap(Config, (tile + (split,) for tile in TILES for split in SPLITS)):
        programs = sum(outs) // config.block_n * config.split
        few = programs < processors and config.split < SPLITS[-1]
        if fits(config, rows, outs, inner) and not few and (programs < _PROGRAMS * processors or config.split == 1):
            yield config


@torch.inference_mode()
def _measured(
    model: torch.nn.Module, rows: int, outs: tuple[int, ...], inner: int, dtype: torch.dtype, device: torch.device
) -> Config | None:
    groups = _weights(model, outs, inner, dtype, device)
    x = torch.randn(rows, inner, dtype=dtype, device=device)
    best, least = None, _ms(lambda group: [linear(x, w) for w in group], groups)
    for config in candidates(rows, outs, inner, processors(device)):
        try:  # without overlap: in a step other kernels stand between, here the kernel would overlap itself
            ms = _ms(functools.partial(skinny_products, x, config=config, pdl=False), groups)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a candidate that this device cannot run (shared memory, registers) is no candidate
            continue
        if config.split > 1:
            ms += _SUM_MS + 2 * 4 * config.split * rows * sum(outs) / _SUM_RATE
        if ms < least:
            best, least = config, ms
    return best


def _weights(
    model: torch.nn.Module, outs: tuple[int, ...], inner: int, dtype: torch.dtype, device: torch.device
) -> list[list[Tensor]]:
    """Groups of weights of these shapes, together more than L2 holds: the model's, and made ones where it has fewer."""
    ours = [p for p in model.parameters() if p.dtype is dtype and p.device == device and p.is_contiguous()]
    found = {n: [p for p in ours if p.shape == (n, inner)] for n in outs}
    groups, held = [], 0
    while held < _BYTES:
        made = [torch.randn(n, inner, dtype=dtype, device=device) if not found[n] else found[n].pop() for n in outs]
        groups.append(made)
        held += sum(w.nbytes for w in made)
    return groups


def _ms(product: Callable[[list[Tensor]], object], groups: list[list[Tensor]]) -> float:
    """Milliseconds of one product, weights read from memory: the groups in turn, replayed."""
    torch.cuda.synchronize()  # the benchmark's stream does not wait for weights that are still being made
    ms = triton.testing.do_bench_cudagraph(lambda: [product(group) for group in groups], rep=4, return_mode="median")
    return float(ms) / len(groups)
