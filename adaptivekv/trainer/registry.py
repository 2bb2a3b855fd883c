"""Which policy runs: promote one in the MLflow registry, fetch it, and fall back in order when there is none.

MLflow takes seconds to import, so a local store is asked through sqlite, and a fetched version is kept in a cache.
"""

import hashlib
import logging
import os
import shutil
import sqlite3
import tempfile
import urllib.request
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.selector import RuleTable, Selector, TreeSelector, load_or_rules
from adaptivekv.trainer import tracking

NAME, ALIAS = "kv-selector", "champion"
log = logging.getLogger("adaptivekv")


def find_champion(selector: str | None = None, tracking_uri: str | None = None) -> Selector:
    """None or "champion": the registry's, else the packaged one, else rules. "rules", or the path of a policy.

    A path that does not load is an AdaptiveKVError; a champion that does not load is the rule table and one warning.
    """
    if selector == "rules":
        return RuleTable()
    if selector not in (None, ALIAS):
        return TreeSelector.load(str(selector))
    path = resolve(tracking_uri)
    name = path.name if path else None
    with as_file(files("adaptivekv") / "champion") as packaged:
        path = path or (packaged if (packaged / "policy.json").is_file() else None)
        if path is None:
            return RuleTable()
        found, note = load_or_rules(path, name)
    if note:
        log.warning(note)
    return found


def resolve(tracking_uri: str | None = None, name: str = NAME, alias: str = ALIAS) -> Path | None:
    """The folder of the aliased version, called `alias@version`; None without a store, a model or an alias."""
    where = tracking.uri(tracking_uri)
    file = tracking.database(where)
    try:
        found = _ask_sqlite(file, name, alias) if file else _ask_mlflow(where, name, alias)
    except (AdaptiveKVError, sqlite3.Error, OSError) as error:
        log.warning(f"tracking uri {where!r}: {error}; looking for the {alias} elsewhere")
        return None
    if found is None:
        return None
    version, source = found
    key = hashlib.sha256(f"{where} {file} {name} {source}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptivekv" / "policies" / key
    folder = cache / f"{alias}@{version}"
    if load_or_rules(folder)[1]:  # not fetched yet, or damaged since
        try:
            shutil.rmtree(folder, ignore_errors=True)
            _download(where, source, folder)
        except AdaptiveKVError as error:
            log.warning(f"{name}@{alias}: {error}")
            return None
    return folder


def promote(
    run_id: str,
    name: str = NAME,
    alias: str = ALIAS,
    force: bool = False,
    tracking_uri: str | None = None,
    gate: Sequence[str | Path] | None = None,
    seen: Sequence[str | Path] | None = None,
) -> dict[str, Any]:
    """Registers the policy of a train or certify run and points the alias at it.

    Refuses, with the reason: a policy that does not load; one that gives up the champion's certificate; one that is not
    better. gate: fresh labelled trajectories (runs or folders) on which the two are compared (trainer/gate.py; `seen`:
    the training data where its run does not hold it). Without any, the recorded select_cost must be below the
    champion's. `force` overrides all but the first; `overridden` lists what was.
    """
    from adaptivekv.trainer.frozen import Frozen
    from adaptivekv.trainer.gate import replay

    mlflow = tracking.client(tracking_uri)
    with tempfile.TemporaryDirectory() as folder:
        path = tracking.download(mlflow, run_id, "policy", folder)
        candidate = Frozen(TreeSelector.load(path), (path / "policy.npz").read_bytes())
    policy = candidate.selector
    cost = policy.manifest["metrics"].get("select_cost")
    if cost is None:
        raise AdaptiveKVError(f"run {run_id!r}: its policy records no select_cost; train it again")
    previous = resolve(tracking_uri, name, alias)
    champion, note = load_or_rules(previous, previous.name) if previous else (None, None)
    old = champion.manifest if isinstance(champion, TreeSelector) else {"metrics": {}}
    previous_cost = old["metrics"].get("select_cost")
    found, reasons = None, []
    marks = {str(manifest["model"]) for manifest in (policy.manifest, old) if manifest.get("model")}
    if len(marks) > 1:
        reasons.append(f"the champion was trained on another model ({' and '.join(sorted(marks))})")
    if lost := _certificate_lost(policy.manifest.get("certificate"), old.get("certificate")):
        reasons.append(lost)
    if gate:
        try:
            found = replay(candidate, champion or find_champion(None, tracking_uri), gate, mlflow, seen, tracking_uri)
            if not found.better:
                reasons.append(f"{found}; not surely better")
        except AdaptiveKVError as error:
            reasons.append(str(error))
    elif previous and previous_cost is not None and cost >= previous_cost:
        reasons.append(f"select_cost {cost:.4f} is not below {previous.name}'s {previous_cost:.4f}")
    if reasons and not force:
        raise AdaptiveKVError(f"run {run_id!r}: {'; and '.join(reasons)}; use --force to promote it all the same")
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise AdaptiveKVError(f"registry {name!r}: {str(error).splitlines()[0]}") from None
    source = mlflow.get_run(run_id).info.artifact_uri.rstrip("/") + "/policy"
    tags = {"sha256": policy.manifest["sha256"]}
    version = mlflow.create_model_version(name, source, run_id=run_id, tags=tags).version
    mlflow.set_registered_model_alias(name, alias, version)
    return {
        "name": name,
        "version": int(version),
        "alias": alias,
        "run_id": run_id,
        "select_cost": cost,
        "previous": previous.name if previous else None,
        "previous_cost": previous_cost,
        "note": note,
        "gate": asdict(found) if found else None,
        "overridden": reasons,
    }


def _certificate_lost(new: dict[str, Any] | None, old: dict[str, Any] | None) -> str | None:
    """What a certified champion promises and the candidate does not."""
    if not old:
        return None
    promise = f"the champion is certified for at most {old['alpha']:g} violations"
    if not new:
        return f"{promise} and this policy is not; certify it first"
    return f"{promise}, this policy for {new['alpha']:g}" if new["alpha"] > old["alpha"] else None


def _ask_sqlite(file: Path, name: str, alias: str) -> tuple[str, str] | None:
    """(version, artifact uri) behind an alias, read without MLflow."""
    if not file.is_file():
        return None
    query = (
        "SELECT v.version, coalesce(v.storage_location, v.source) FROM registered_model_aliases a JOIN model_versions v"
        " ON v.name = a.name AND v.version = a.version WHERE a.name = ? AND a.alias = ?"
    )
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=2)) as database:
        row = database.execute(query, (name, alias)).fetchone()
    return (str(row[0]), str(row[1])) if row else None


def _ask_mlflow(where: str, name: str, alias: str) -> tuple[str, str] | None:
    """The same from a server, which must answer within three seconds: MLflow itself would retry for minutes."""
    if where.startswith("http"):
        urllib.request.urlopen(f"{where.rstrip('/')}/health", timeout=3).close()
    mlflow = tracking.client(where)
    from mlflow.exceptions import MlflowException

    try:
        version = mlflow.get_model_version_by_alias(name, alias).version
        return str(version), mlflow.get_model_version_download_uri(name, version)
    except MlflowException:
        return None


def _download(where: str, source: str, folder: Path) -> None:
    """Both policy files, complete before `folder` appears."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        local = Path(urllib.request.url2pathname(source.removeprefix("file://")))
        if not local.is_dir():
            import mlflow

            try:
                local = Path(mlflow.artifacts.download_artifacts(source, dst_path=temporary, tracking_uri=where))
            except Exception as error:  # each artifact store raises its own
                raise AdaptiveKVError(f"artifacts {source}: not readable ({str(error).splitlines()[0]})") from None
        ready = Path(temporary) / "ready"
        ready.mkdir()
        for file in ("policy.npz", "policy.json"):
            if not (local / file).is_file():
                raise AdaptiveKVError(f"artifacts {source}: {file} is missing")
            shutil.copyfile(local / file, ready / file)
        try:
            os.rename(ready, folder)
        except OSError:
            if not (folder / "policy.json").is_file():  # else another process was first
                raise
