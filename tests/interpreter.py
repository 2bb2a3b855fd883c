"""Running a test file's own checks in a process where Triton interprets its kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import adaptivekv

SEED = int(os.environ.get("ADAPTIVEKV_FUZZ", 1))
"""Of the random shapes: fixed, so that a run can be repeated; another value tries others."""


def run_in_interpreter(file: str, seconds: float = 400) -> None:
    """`python file` under TRITON_INTERPRET=1 must succeed: that is fixed when the kernels are first imported."""
    triton = pytest.importorskip("triton")
    if _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        pytest.skip("Triton 3.6's interpreter cannot loop to a run-time bound with NumPy 2.4")
    path = [str(Path(adaptivekv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)}
    run = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True, timeout=seconds)
    assert run.returncode == 0, run.stdout + run.stderr


def _version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])
