"""`adaptivekv bench`: what a run has measured is kept when it is cut short. The numbers themselves need a GPU."""

import json

import pytest
import torch

from adaptivekv.bench import cli


def test_a_run_that_is_cut_short_keeps_its_rows(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr("sys.argv", ["adaptivekv", "bench", "decode", "--case", "8b 1 1024 full"])

    def rows():
        yield {"shape": "8b", "ms": 6.5}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cli._report("decode", rows(), cli.DECODE, tmp_path / "out.json", False)
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["rows"] == [{"shape": "8b", "ms": 6.5}]
    assert kept["command"] == "adaptivekv bench decode --case '8b 1 1024 full'"
