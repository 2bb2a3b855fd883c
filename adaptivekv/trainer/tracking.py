"""MLflow, imported only when used (it takes seconds), addressed through a client and kept from printing."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptivekv.errors import AdaptiveKVError

EXPERIMENT = "adaptivekv"
KIND = "adaptivekv.kind"  # tag of a run: collect, train, certify or compare


def uri(tracking_uri: str | None = None) -> str:
    """The argument, else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working folder."""
    found = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if "://" not in found or found.startswith("file:"):
        raise AdaptiveKVError(f"tracking uri {found!r}: MLflow takes no folder; use sqlite:///FILE or http://HOST")
    return found


def database(tracking_uri: str) -> Path | None:
    """The file behind a sqlite uri."""
    return Path(tracking_uri.removeprefix("sqlite:///")).resolve() if tracking_uri.startswith("sqlite:///") else None


def client(tracking_uri: str | None = None) -> Any:
    """An mlflow.MlflowClient whose registry is the same store."""
    where = uri(tracking_uri)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise AdaptiveKVError("MLflow is not installed; pip install 'adaptivekv[learn]'") from None
    for name in ("mlflow", "mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return MlflowClient(where, registry_uri=where)
    except MlflowException as error:
        raise AdaptiveKVError(f"tracking uri {where!r}: {str(error).splitlines()[0]}") from None


def experiment_id(mlflow: Any, name: str = EXPERIMENT) -> str:
    """Made if missing. Artifacts of a sqlite store lie beside its file, in mlartifacts/, wherever the caller stands."""
    found = mlflow.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise AdaptiveKVError(f"experiment {name!r}: deleted in MLflow; restore it or name another")
        return str(found.experiment_id)
    file = database(mlflow.tracking_uri)
    location = (file.parent / "mlartifacts" / name).as_uri() if file else None
    return str(mlflow.create_experiment(name, artifact_location=location))


@contextmanager
def run(mlflow: Any, kind: str, experiment: str = EXPERIMENT, name: str | None = None) -> Iterator[str]:
    """The id of a new run; it ends FINISHED, or FAILED when the block raises."""
    made = mlflow.create_run(experiment_id(mlflow, experiment), tags={KIND: kind}, run_name=name)
    status = "FAILED"
    try:
        yield made.info.run_id
        status = "FINISHED"
    finally:
        mlflow.set_terminated(made.info.run_id, status)


def log(mlflow: Any, run_id: str, params: dict[str, Any], metrics: dict[str, float]) -> None:
    """One batch. At most 100 params and 1,000 metrics."""
    import time

    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    mlflow.log_batch(
        run_id,
        metrics=[Metric(key, float(value), now, 0) for key, value in metrics.items()],
        params=[Param(key, str(value)) for key, value in params.items()],
    )


def runs(mlflow: Any, kind: str, experiment: str | None = None) -> list[Any]:
    """Finished runs of a kind, oldest first, of one experiment or of all."""
    experiments = [e for e in mlflow.search_experiments() if experiment in (None, e.name)]
    if not experiments:
        return []
    ids = [e.experiment_id for e in experiments]
    wanted = f"tags.`{KIND}` = '{kind}' and attributes.status = 'FINISHED'"
    return list(mlflow.search_runs(ids, wanted, order_by=["attributes.start_time ASC"], max_results=1000))


def download(mlflow: Any, run_id: str, path: str, into: str | Path) -> Path:
    """The run's artifacts under `path`, copied into the folder `into`."""
    from mlflow.exceptions import MlflowException

    try:
        run_id = mlflow.get_run(run_id).info.run_id
    except MlflowException:
        raise AdaptiveKVError(f"run {run_id!r}: not in {mlflow.tracking_uri}; see `adaptivekv compare`") from None
    try:
        if mlflow.list_artifacts(run_id, path):
            return Path(mlflow.download_artifacts(run_id, path, str(into)))
    except (MlflowException, OSError):
        pass
    raise AdaptiveKVError(f"run {run_id!r}: has no artifacts under {path}/")
