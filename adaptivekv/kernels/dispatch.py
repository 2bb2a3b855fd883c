"""Whether Triton is used, and its kernels, imported only then: the import fixes if they are interpreted or compiled."""

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec

import torch

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


def has_twin(module: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """A torch function whose Triton twin, of the same name and arguments in `module`, runs if an argument is on a GPU.

    The torch function itself, the reference, is the result's `__wrapped__`.
    """

    def decorate(reference: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> None:
            tables = args[2]  # where the offsets lie decides: kernels reach pinned host memory themselves
            on_gpu = isinstance(tables, torch.Tensor) and tables.is_cuda and triton_works()
            (getattr(triton_module(module), reference.__name__) if on_gpu else reference)(*args, **kwargs)

        return call

    return decorate
