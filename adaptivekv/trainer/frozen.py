"""A trained policy that stands still, to be judged: from a folder, a run or the registry."""

import dataclasses
import tempfile
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.selector import TreeSelector
from adaptivekv.trainer import registry, tracking


@dataclasses.dataclass(frozen=True)
class Frozen:
    selector: TreeSelector
    data: bytes  # policy.npz as it is

    @property
    def trained_as(self) -> str:
        """The label that training gave it; a certified copy has one of its own and remembers the first."""
        certificate = self.selector.manifest.get("certificate") or {}
        return str(certificate.get("policy", self.selector.manifest["label"]))


def find(policy: str, tracking_uri: str | None = None) -> Frozen:
    """A folder, the id of a run with a policy, or "champion": the registry's, else the packaged one.

    Unlike at run time nothing falls back to the rule table: what is judged must be what was asked for.
    """
    if policy == "rules":
        raise AdaptiveKVError("policy 'rules': the rule table has no files; name a folder, a run id or champion")
    with ExitStack() as stack:
        name = None
        if policy == registry.ALIAS:
            found = registry.resolve(tracking_uri)
            name = found.name if found else None
            folder = found or stack.enter_context(as_file(files("adaptivekv") / registry.ALIAS))
            if not (folder / "policy.json").is_file():
                raise AdaptiveKVError("policy 'champion': none is promoted or packaged; name a folder or a run id")
        elif Path(policy).exists():
            folder = Path(policy) if Path(policy).is_dir() else Path(policy).parent
        elif "/" in policy:
            raise AdaptiveKVError(f"policy {policy}: no such folder; train one, or name a run id or champion")
        else:
            into = stack.enter_context(tempfile.TemporaryDirectory())
            folder = tracking.download(tracking.client(tracking_uri), policy, "policy", into)
        return Frozen(TreeSelector.load(folder, name), (folder / "policy.npz").read_bytes())
