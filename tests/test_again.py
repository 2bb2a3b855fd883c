"""The comparison of labels that were taken twice."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import dataset, trajectories
from experiments import again

DATA = Path(__file__).parents[1] / "experiments" / "data" / "again"


def test_a_tenfold_loss_is_found():
    table = trajectories.read(DATA / "gpu")
    plan = "kvzap(0.2, layers=uniform) | k4v2(window=0) | offload(0.05)"
    at = table.column_names.index("label_loss")
    more = pc.if_else(pc.equal(table["plan"], plan), pc.multiply(table["label_loss"], 10.0), table["label_loss"])
    changed = table.set_column(at, table.schema.field("label_loss"), more.cast(pa.float64()))
    found = again.compare(dataset.rows(table), dataset.rows(changed))
    assert found["requests"] == 28 and not found["answers_of_another_length"]
    for row in found["rows"]:
        tenfold = row["plan"] == plan
        assert row["log10_ratio"] == pytest.approx(float(tenfold), abs=2e-2) and row["requests"] == 28
        loss = dataset.rows(table).loss[dataset.rows(table).plan == row["plan"]]
        turned = [float(np.mean((loss <= slo) & (10 * loss > slo))) if tenfold else 0.0 for slo in again.SLOS]
        assert row["verdicts_turned"] == pytest.approx(turned)
    one = dataset.rows(table.filter(pc.equal(table["plan"], plan)))
    with pytest.raises(AdaptiveKVError, match="in common"):
        again.compare(one, dataset.rows(table.filter(pc.equal(table["plan"], "full"))))
