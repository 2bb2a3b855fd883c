"""Lines that were collected on another host, in the study."""

import json
import lzma
from pathlib import Path

import pytest

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import trajectories
from experiments import away

ROOT = Path(__file__).parents[1]
DATA = ROOT / "experiments" / "data" / "again" / "gpu"
PLAN = "kvzap(0.2) | int4(window=0, guard=int8) | offload(0.05)"


def test_merge_replaces_adds_and_drops(tmp_path, monkeypatch):
    """A plan that was replayed anew, a request that the study lacks, one that lacks a plan, a line that was cut."""
    monkeypatch.chdir(ROOT)
    study = ROOT / "experiments/data/study/edge/trajectories/part-00001.parquet"
    edge = away.by_request(trajectories.read(study).slice(0, 60).to_pylist())
    first, second, third = list(edge)[:3]
    folder = tmp_path / "study" / "edge" / "trajectories"
    old = [row for name in (first, second) for plan, row in edge[name].items() if (name, plan) != (second, PLAN)]
    trajectories.write(old, folder / "part-00000.parquet")
    anew = edge[first][PLAN] | {"label_loss": 7.0}
    lines = [{"id": first, "rows": [anew]}, {"id": third, "rows": list(edge[third].values())}]
    (tmp_path / "lines").mkdir()
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "lines" / "000.jsonl").write_text(text + '\n{"id": "edge-0-')
    before = (folder / "part-00000.parquet").read_bytes()
    with pytest.raises(AdaptiveKVError, match="1 requests lack a plan"):
        away.merge(tmp_path / "study", tmp_path / "lines")
    assert [file.read_bytes() for file in folder.iterdir()] == [before]
    away.merge(tmp_path / "study", tmp_path / "lines", drop=True)
    kept, added = (away.by_request(trajectories.read(file).to_pylist()) for file in sorted(folder.glob("*.parquet")))
    assert list(kept) == [first] and list(added) == [third]
    for requests in (kept, added):
        for name, rows in requests.items():
            assert rows.keys() == edge[name].keys() == set(rows[PLAN]["plans"])
            losses = {plan: row["label_loss"] for plan, row in rows.items()}
            want = {plan: row["label_loss"] for plan, row in edge[name].items()}
            assert losses == want | ({PLAN: 7.0} if name == first else {})
    with pytest.raises(AdaptiveKVError, match="has no lines"):
        away.merge(tmp_path / "study", tmp_path / "none")


def test_requests_that_the_study_lacks_come_after_those_it_has(tmp_path):
    rows = [row for row in trajectories.read(DATA).to_pylist() if row["plan"] == "full"]
    ids = {"edge-0-certify-00003", "edge-0-certify-00005", "edge-0-test-00002"}
    made = [row | {"request_id": name} for name in sorted(ids) for row in rows[:1]]
    trajectories.write(made, tmp_path / "edge" / "trajectories" / "part-00000.parquet")
    fresh = [request.id for request in away.lacking(tmp_path, "edge", 3)]
    assert fresh == ["edge-0-certify-00004", "edge-0-test-00003", "edge-0-test-00004"]
    again = ["edge-0-certify-00003", "edge-0-test-00002", "edge-0-certify-00005"]
    assert [request.id for request in away.again_of(tmp_path, "edge")] == again


def test_a_process_that_fails_is_told_of(tmp_path, capsys):
    """A line that is no job ends the process that reads it, whatever GPU that was to use."""
    with lzma.open(tmp_path / "jobs.xz", "wt") as file:
        file.write('{"request": {"id": "edge-0-test-00002"}}\n{"request": {}}\n')
    with pytest.raises(AdaptiveKVError, match="1 of 1 processes failed and said why"):
        away.run(tmp_path / "jobs.xz", tmp_path / "lines", None, 60, 1)
    assert "0 done, 1 processes failed" in capsys.readouterr().out


def test_a_file_that_was_cut_is_one_line(tmp_path):
    jobs = tmp_path / "jobs.jsonl.xz"
    whole = lzma.compress(b"".join(json.dumps({"request": {"id": str(i)}}).encode() + b"\n" for i in range(999)))
    cut, other, empty = (whole[:-40], "cannot be read"), (lzma.compress(b"5\n"), "cannot be read"), lzma.compress(b"")
    for content, why in (cut, other, (empty, "holds no requests"), (lzma.compress(b"{}\n"), "holds no requests")):
        jobs.write_bytes(content)
        with pytest.raises(AdaptiveKVError, match=f"{jobs} {why}"):
            away.run(jobs, tmp_path / "lines", None, 5.0, 1)
    assert not (tmp_path / "lines").exists()


def test_losses_tell_one_answer_from_another(monkeypatch):
    """Those of the same requests on a CPU and on a GPU: one answer has another length, one goes another way."""
    monkeypatch.setattr(away, "WITNESS", "int4")  # as it was when these were replayed
    gpu = away.by_request(trajectories.read(DATA).to_pylist())
    cpu = away.by_request(trajectories.read(DATA.with_name("cpu")).to_pylist())
    other = [
        name for name, rows in gpu.items() if not away.same(list(rows.values()), cpu[name][away.WITNESS]["label_kl"])
    ]
    assert other == ["edge-0-test-00132", "hardware-0-test-00137"]
