"""The launch of the split kernel: what is kept of a measurement, and that it is taken on memory that is ready."""

import json

import pytest
import torch

triton = pytest.importorskip("triton")

from adaptivekv.kernels import tune  # noqa: E402
from adaptivekv.kernels.table import Launch  # noqa: E402
from adaptivekv.memory.tables import PAIRS  # noqa: E402


def test_of_the_launches_kept_the_damaged_ones_are_measured_again(tmp_path):
    good = {"warps": 2, "stages": 3, "native_tiles": 2, "int8_tiles": 1, "programs": 6}
    file = tmp_path / "launches.json"
    assert tune._known(file) == {}
    entries = {"good": good, "short": {"warps": 2}, "wild": good | {"programs": 0}, "odd": good | {"warps": "2"}}
    file.write_text(json.dumps(entries | {"list": [1]}))
    assert tune._known(file) == {"good": Launch(2, 3, 2, 1, 6)}
    file.write_text(file.read_text()[:-9])
    assert tune._known(file) == {}


@pytest.mark.gpu
def test_a_launch_is_measured_on_what_is_ready(monkeypatch):
    """The benchmark has a stream of its own, which waits for nothing: on a busy GPU it read tables still to be made."""
    make, bench = tune.even_work, triton.testing.do_bench_cudagraph
    waited = []

    def late(*args):
        made = make(*args)
        torch.cuda._sleep(100_000_000)
        return made

    def benched(call, **options):
        waited.append(torch.cuda.current_stream().query())
        return bench(call, **options)

    monkeypatch.setattr(tune, "even_work", late)
    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", benched)
    launch = tune.measure(torch.device("cuda", 0), 16, 16, 2, torch.float32, PAIRS)
    assert len(waited) == len(PAIRS) * len(tune.CANDIDATES) and all(waited)
    assert (launch.warps, launch.stages) in {(c.warps, c.stages) for c in tune.CANDIDATES}
