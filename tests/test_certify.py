"""Certification from trajectories to a certified policy, and what it refuses; the test itself: test_ltt.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.plan import Plan
from adaptivekv.selector import SURE, RuleTable, TreeSelector, is_lossless
from adaptivekv.trainer import certify, dataset, frozen, ltt, registry, scoring, tracking, trajectories
from adaptivekv.trainer.logged import Logged
from adaptivekv.trainer.train import train

pytest.importorskip("mlflow")

from test_ltt import ALPHA, DELTA
from test_trainer import PLANS, rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trajectories")
    trajectories.write(rows(60, "train", 0) + rows(40, "select", 1), folder / "part-0000.parquet")
    trajectories.write(rows(240, "certify", 2), folder / "part-0001.parquet")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def trained(data, store, tmp_path_factory) -> dict:
    return train([data], 0, tmp_path_factory.mktemp("policy"), store)


def test_outcomes_are_what_scoring_would_choose(data, trained):
    requests = scoring.requests(dataset.rows(trajectories.read(data)).of("certify"))[:40]
    for selector in (TreeSelector.load(trained["policy"]), RuleTable()):
        loss, cost = certify.outcomes(selector, requests, certify.GRID)
        for at in (0, 17, 30, 40):
            selector.margin = certify.GRID[at]
            choose = scoring.trusting(selector)
            for j, quality in enumerate(scoring.QUALITIES):
                picks = [choose(request, quality) for request in requests]
                assert loss[:, j, at].tolist() == [r.rows.loss[i] for r, i in zip(requests, picks, strict=True)]
                assert cost[:, j, at].tolist() == [r.cost[i] for r, i in zip(requests, picks, strict=True)]
    assert len(np.unique(cost[0])) > 2  # margins do change choices


def test_the_controller_takes_the_plan_that_was_judged(data, trained):
    """Under every margin but 0, where it shuns evictions: that is why 0 is not on the grid."""
    some = dataset.rows(trajectories.read(data)).of("certify")
    some = some.where(np.isin(some.plan.astype(str), ("full", "int8", "snapkv(0.5)", "offload(0.25)")))
    requests = scoring.requests(some)[:40]

    class Measured(Logged):
        sizes: tuple[np.ndarray, ...]

        def _sizes(self, request):
            return self.sizes

        def _room(self, request):
            return np.inf, np.inf

    policy = TreeSelector.load(trained["policy"])
    taken, promised, lossy = {}, set(), ~is_lossless(requests[0].rows.plan_features)
    for margin in (certify.GRID[20], certify.GRID[38], 0.0):
        policy.margin = margin
        choose = scoring.trusting(policy)
        controller = Measured(selector=policy, candidates=tuple(map(str, requests[0].rows.plan)))
        controller.mask, controller.rows = np.ones(4, bool), requests[0].rows.plan_features
        for i, request in enumerate(requests):
            for quality in (0.01, 0.1, 1.0):
                controller.state, controller.quality = request.rows.state[0].copy(), quality
                controller.state[scoring.QUALITY] = np.log10(quality)
                controller.sizes = request.rows.device_bytes, request.rows.host_bytes, np.zeros(4)
                seen: Any = SimpleNamespace(plan=Plan(), generated=0, decisions=[])
                controller._decide(seen, "prefill")
                taken[margin, i, quality] = seen.decisions[-1].plan, str(request.rows.plan[choose(request, quality)])
                assert seen.decisions[-1].promised
            controller.quality, controller.state[scoring.QUALITY] = 1e-5, -5  # nothing certifies that: what is sure
            controller._decide(seen, "prefill")
            assert seen.decisions[-1].plan in ("full", "offload(0.25)")
            for quality in (1e-5, 1.0):  # where nothing lossless fits, a promise depends on the risk, as in `outcomes`
                controller.quality, controller.state[scoring.QUALITY] = quality, np.log10(quality)
                controller.mask = lossy
                controller._decide(seen, "prefill")
                promised.add(seen.decisions[-1].promised)
                assert seen.decisions[-1].promised == (scoring.asked(policy, request, quality)[1][lossy].min() < SURE)
            controller.mask = np.ones(4, bool)
    assert {judged for _, judged in taken.values()} >= {"int8", "snapkv(0.5)"}
    assert {margin for (margin, *_), (ours, judged) in taken.items() if ours != judged} == {0.0}
    assert promised == {True, False}


def test_certify_round_trip(data, store, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    steps = []
    got = certify.certify(
        [data], trained["run_id"], out_dir=tmp_path / "out", tracking_uri=store, leave_out=True,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert json.dumps(got) and steps[-1] == (240, 240)
    policy, before = TreeSelector.load(got["policy"]), TreeSelector.load(trained["policy"])
    assert policy.margin == got["margin"] in certify.GRID and before.margin == 0
    npz = "policy.npz"
    assert (tmp_path / "out" / npz).read_bytes() == (Path(trained["policy"]) / npz).read_bytes()
    made = policy.manifest["certificate"]
    assert made == got["certificate"] and policy.manifest["sha256"] == before.manifest["sha256"]
    assert made["policy_sha256"] == before.manifest["sha256"] and made["policy"] == before.name
    assert made["n"] == made["documents"] == 240 and made["bound"] <= ALPHA and made["confidence"] == 0.95
    assert made["plans"] == sorted(PLANS) and made["training"] == f"run {trained['run_id']}, same digest"
    assert made["earlier_tries"] == 0 and made["schema"] == schema.VERSION and len(made["data_sha256"]) == 64

    # the numbers again, from the certified files alone
    requests = scoring.requests(dataset.rows(trajectories.read(data)).of("certify"))
    choose = scoring.trusting(policy)
    for quality in scoring.QUALITIES:
        broken = sum(r.rows.loss[choose(r, quality)] > quality for r in requests)
        assert made["slos"][str(quality)]["violations"] == broken <= made["violations"]
    assert made["bound"] == pytest.approx(float(ltt.upper(made["violations"], 240, DELTA)))
    at = certify.GRID.index(got["margin"])  # and the next margin does not pass
    loss, _ = certify.outcomes(before, requests, certify.GRID)
    walked = ltt.walk(loss > np.array(scoring.QUALITIES)[:, None], ALPHA, DELTA)
    assert 0 < at < 40 and walked.p[at + 1] > DELTA >= walked.p[at] and at == walked.last

    assert set(made["groups"]["scenario"]) == {"digits", "prose"} == set(made["leave_out"])
    assert sum(g["n"] for g in made["groups"]["length"].values()) == 240 and "certified_groups" not in made
    run = tracking.client(store).get_run(got["run_id"])
    assert run.data.tags[tracking.KIND] == "certify" and run.data.tags["adaptivekv.margin"] == str(got["margin"])
    assert run.data.metrics["bound"] == made["bound"] and run.data.params["alpha"] == "0.05"
    logged = {a.path for a in tracking.client(store).list_artifacts(got["run_id"], "policy")}
    assert logged == {"policy/policy.npz", "policy/policy.json"} and Path(got["plot"]).stat().st_size > 5000
    select = scoring.requests(dataset.rows(trajectories.read(data)).of("select"))
    again = scoring.compare(policy, policy.manifest["best_static"], select)  # of the policy as it runs, margin included
    assert policy.manifest["metrics"].items() >= again.items()

    assert registry.promote(got["run_id"], force=True, tracking_uri=store)["version"] == 1
    assert registry.find_champion(tracking_uri=store).margin == got["margin"]
    again = certify.certify([data], "champion", alpha=0.1, out_dir=tmp_path / "b", tracking_uri=store, group="length")
    assert again["certificate"]["earlier_tries"] == 1 and again["certificate"]["policy"] == before.name
    groups = again["certificate"]["certified_groups"]
    assert again["margin"] == max(g["margin"] for g in groups.values()) and {g["delta"] for g in groups.values()} == {
        0.025
    }
    assert all(g["bound"] <= 0.1 for g in groups.values())


def test_nothing_passes(store, trained, tmp_path):
    """A population in which even the lossless plan loses: one line with the best bound, no files, a failed run."""
    lost = [row | {"label_loss": 1.0} for row in rows(80, "certify", 5)]
    trajectories.write(lost + rows(2, "train", 0), tmp_path / "part-0000.parquet")
    with pytest.raises(AdaptiveKVError, match=r"nothing is certified: the first, 3\.05, has bound 1\.") as e:
        certify.certify([tmp_path], trained["policy"], out_dir=tmp_path / "out", tracking_uri=store)
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()
    runs = tracking.client(store).search_runs(["1"], f"tags.`{tracking.KIND}` = 'certify'")
    assert {"FAILED", "FINISHED"} >= {run.info.status for run in runs} and runs[0].info.status == "FAILED"
    assert runs[0].data.params["requests"] == "80"  # a failed try counts as a look at the data


def seen_request(fresh):
    return [row | {"request_id": "train-0"} if row["request_id"] == "certify-0" else row for row in fresh]


def seen_document(fresh):
    return [row | {"document": "select-3"} if row["request_id"] == "certify-0" else row for row in fresh]


REFUSED = {
    r"request 'train-0' is in the training data too \(1 of 80\)": seen_request,
    r"document 'select-3' is in the training data too": seen_document,
    r"58 requests .* at least 59 are needed": lambda fresh: fresh[: 58 * len(PLANS)],
    r"label_kind is replay in 559 rows and online in 1": lambda f: [f[0] | {"label_kind": "online"}, *f[1:]],
    r"560 of 560 rows have no replay label": lambda f: [row | {"label_kind": "online"} for row in f],
    r"1 of 560 rows have no replay label": lambda f: [
        {k: v for k, v in f[0].items() if not k.startswith("label")},
        *f[1:],
    ],
    r"plan 'int8' was replayed for some requests only": lambda f: [f[0], *f[2:]],
    r"split 'certify' has 0 rows": lambda fresh: [],
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message, data, store, trained, tmp_path):
    known = rows(60, "train", 0) + rows(40, "select", 1)
    trajectories.write(known + REFUSED[message](rows(80, "certify", 2)), tmp_path / "part-0000.parquet")
    with pytest.raises(AdaptiveKVError, match=message) as caught:
        certify.certify([tmp_path], trained["policy"], out_dir=tmp_path / "out", tracking_uri=store)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_training_data_are_found_in_the_run_or_asked_for(data, store, trained, tmp_path):
    """Sources without training rows: the train run's are fetched; another store does not know them."""
    fresh = tmp_path / "fresh"
    part = seen_document(rows(80, "certify", 2))
    trajectories.write(part, fresh / "part-0000.parquet")
    with pytest.raises(AdaptiveKVError, match="document 'select-3' is in the training data"):
        certify.certify([fresh], trained["policy"], out_dir=tmp_path / "out", tracking_uri=store)
    other = f"sqlite:///{tmp_path}/other.db"
    with pytest.raises(AdaptiveKVError, match=r"not at hand.*--seen"):
        certify.certify([fresh], trained["policy"], out_dir=tmp_path / "out", tracking_uri=other)
    with pytest.raises(AdaptiveKVError, match="document 'select-3' is in the training data"):
        certify.certify([fresh], trained["policy"], seen=[data], out_dir=tmp_path / "out", tracking_uri=other)


def test_groups_need_enough_requests(data, store, trained, tmp_path):
    fresh = [row | {"scenario": "rare"} if row["request_id"] == "certify-7" else row for row in rows(90, "certify", 2)]
    trajectories.write(fresh, tmp_path / "part-0000.parquet")
    with pytest.raises(AdaptiveKVError, match=r"group '.*' has \d+ requests; .* over 3 groups\) at least 80"):
        certify.certify(
            [tmp_path], trained["policy"], group="scenario", out_dir=tmp_path / "o", seen=[data], tracking_uri=store
        )


def test_bad_arguments_and_policies(data, store, trained, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("policy.npz", "policy.json"):
        (foreign / name).write_bytes((Path(trained["policy"]) / name).read_bytes())
    manifest = json.loads((foreign / "policy.json").read_text())
    (foreign / "policy.json").write_text(json.dumps(manifest | {"schema": 99}))
    for wrong_one, message in (
        ({"alpha": 0.0}, "alpha is 0"), ({"delta": 1.0}, "delta is 1"), ({"group": "colour"}, "group 'colour' is not"),
        ({"policy": "rules"}, "the rule table has no files"),
        ({"policy": str(foreign)}, f"schema is 99, not {schema.VERSION}"),
        ({"policy": "nope"}, "run 'nope': not in"), ({"policy": "./nowhere"}, "no such folder"),
    ):  # fmt: skip
        with pytest.raises(AdaptiveKVError, match=message) as caught:
            certify.certify(
                [data], **({"policy": trained["policy"], "tracking_uri": store, "out_dir": tmp_path / "o"} | wrong_one)
            )
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_the_packaged_champion_is_found_where_nothing_is_promoted(tmp_path):
    found = frozen.find("champion", f"sqlite:///{tmp_path}/none.db")
    assert found.selector.name.startswith(("train-", "certify-")) and found.trained_as.startswith("train-")


def verb(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, in this process."""
    from adaptivekv.cli import main

    monkeypatch.setattr(sys, "argv", ["adaptivekv", *args])
    with pytest.raises(SystemExit) as done:
        main()
        sys.exit(0)
    return int(done.value.code or 0), *capsys.readouterr()


def test_command_line(data, store, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["certify", str(data), "--policy", trained["policy"], "--tracking-uri", store]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from adaptivekv.cli import main; main()", *common]
    done = subprocess.run([*command, "--out", "made", "--json"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    answer = json.loads(done.stdout)
    assert answer["certificate"]["n"] == 240 and TreeSelector.load(tmp_path / "made").margin == answer["margin"]
    code, shown, _ = verb(monkeypatch, capsys, *common, "--out", "again", "--leave-out")
    assert code == 0 and "left out: prose" in shown and str(answer["margin"]) in shown
    code, shown, said = verb(monkeypatch, capsys, *common, "--alpha", "0.001")
    assert code == 2 and len(said.strip().splitlines()) == 1 and "at least 2995" in said
    assert not shown and not (tmp_path / "certified").exists()
