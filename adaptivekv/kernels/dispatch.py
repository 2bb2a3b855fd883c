"""Whether Triton is used, and its kernels, imported only then: the import fixes if they are interpreted or compiled."""

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec

import torch

from adaptivekv.kernels.codec import Codec

P = ParamSpec("P")


@functools.lru_cache
def triton_works() -> bool:
    """Whether the Triton kernels can be used; where not, says once what runs instead. ADAPTIVEKV_TRITON=0: not."""
    if os.environ.get("ADAPTIVEKV_TRITON") == "0":
        return False
    try:
        triton_module("decode")
    except ImportError as error:
        warnings.warn(f"Triton is missing ({error}): attention runs in plain torch, several times slower", stacklevel=2)
        return False
    return True


@functools.lru_cache
def triton_module(name: str) -> ModuleType:
    """The module `adaptivekv.kernels.<name>`, for callers that may not import Triton themselves."""
    return importlib.import_module(f"adaptivekv.kernels.{name}")


def has_kernel(*parts: tuple[Codec, int]) -> bool:
    """Whether the Triton attention kernels read parts of these codecs and head dimensions."""
    return all(codec.kernel and (codec.native or dim * codec.bits % 16 == 0) for codec, dim in parts)


def twin_runs(args: tuple[object, ...]) -> bool:
    """Whether the Triton twin of a page operation takes these arguments: offsets on a GPU, codecs with a kernel."""
    tables = args[2]  # where the offsets lie decides: kernels reach pinned host memory themselves
    on_gpu = isinstance(tables, torch.Tensor) and tables.is_cuda
    return on_gpu and all(x.kernel for x in args if isinstance(x, Codec)) and triton_works()


def has_twin(module: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """A torch function whose Triton twin, of the same name and arguments in `module`, runs where `twin_runs`.

    The torch function itself, the reference, is the result's `__wrapped__`.
    """

    def decorate(reference: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> None:
            twin = twin_runs((*args, *kwargs.values()))
            (getattr(triton_module(module), reference.__name__) if twin else reference)(*args, **kwargs)

        return call

    return decorate
