"""Documents that requests are made of: real text that lies wherever the project's dependencies are installed.

A document belongs to one split, which depends on its name alone: not on a seed, a scenario or the order of anything.
A module of Python is a document under its own name. Other texts are cut into pieces, and a hash of a piece's name puts
it into one of a fixed number of documents (`topics/07`); so a text that a machine lacks moves no other.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import tasks
from adaptivekv.trainer.trajectories import SPLITS

GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, spread evenly however many are taken
REGIONS = 36  # documents that the book is cut into, 8,000 tokens each
PIECE = 6000  # characters of a piece, and the rest of its last paragraph
BOILERPLATE = 60  # characters from which a paragraph that came before is left out: licences repeat each other
MODULE = 12_000  # characters of the smallest module
ASIDE = {"test", "tests", "site-packages", "encodings", "idlelib", "distutils", "lib2to3", "tkinter", "pydoc_data"}
PINNED = Path(__file__).parents[2] / "constraints.txt"


def by_split(sources: tuple[str, ...], splits: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """For each split, its documents and their characters. splits: shares, in any order.

    AdaptiveKVError if none of the sources is on this machine.
    """
    sizes = {name: len(text) for source in sources for name, text in documents(source).items()}
    if not sizes:
        raise AdaptiveKVError(
            f"documents: none of {', '.join(sources)} is on this machine; work in a checkout with the packages of "
            "constraints.txt, or leave the kinds that need them out of the scenario"
        )
    names = [split for split in SPLITS if split in splits]
    edges = np.cumsum([splits[split] for split in names]) / sum(splits.values())
    found: dict[str, dict[str, int]] = {split: {} for split in names}
    for name, size in sizes.items():
        found[names[int(np.searchsorted(edges[:-1], place(name), "right"))]][name] = size
    return found


def place(document: str) -> float:
    """A hash of a document's name, 0 to 1: numbered documents are spread evenly, others at random."""
    name = document.split("/", 1)[1]
    return (int(name) + 0.5) * GOLDEN % 1 if name.isdigit() else zlib.crc32(name.encode()) / 2**32


def text(document: str) -> str:
    """The text of a document. AdaptiveKVError if this machine has no such document."""
    source = document.split("/", 1)[0]
    try:
        return documents(source)[document]
    except KeyError:
        raise AdaptiveKVError(
            f"document {document!r} is not on this machine; draw the requests where they are written"
        ) from None


@lru_cache
def documents(source: str) -> dict[str, str]:
    """All documents of a source by name; empty if the source is missing. KeyError for an unknown source."""
    # no document may end a turn of a chat
    return {name: found.replace("<|", "< |") for name, found in SOURCES[source]().items()}


def _book() -> dict[str, str]:
    """Regions of the book, as long as each other."""
    if not tasks.BOOK.is_file():
        return {}
    paragraphs = tasks.haystack().split("\n\n")
    ends = np.cumsum([len(paragraph) for paragraph in paragraphs])
    parts: dict[str, list[str]] = defaultdict(list)
    for paragraph, at in zip(paragraphs, (ends - 1) * REGIONS // int(ends[-1]), strict=True):
        parts[f"book/{at:02d}"].append(paragraph)
    return {name: "\n\n".join(part) for name, part in parts.items()}


def _python() -> dict[str, str]:
    """Modules of Python's standard library that define some functions."""
    root = Path(sysconfig.get_paths()["stdlib"])
    tops = sorted(set(root.iterdir()) - {root / name for name in ASIDE})  # site-packages would take seconds to walk
    files = [f for top in tops for f in ([top] if top.is_file() else sorted(top.rglob("*.py"))) if f.suffix == ".py"]
    files = [f for f in files if not ASIDE & set(f.relative_to(root).parts) and f.stat().st_size >= MODULE]
    found = {f"python/{f.relative_to(root).as_posix()}": _read(f) for f in files}
    return {name: code for name, code in found.items() if len(re.findall(r"^ *def ", code, re.MULTILINE)) >= 8}


def _topics() -> dict[str, str]:
    """Python's language reference, as `help()` shows it."""
    try:
        from pydoc_data.topics import topics  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return {}
    return _bundle("topics", topics, 24)


def _packages() -> dict[str, str]:
    """What the pinned packages say of themselves, and scikit-learn's descriptions of its data."""
    texts = {name: (dist.read_text("METADATA") or "").partition("\n\n")[2] for name, dist in _pinned().items()}
    learn = importlib.util.find_spec("sklearn")
    for folder in (learn and learn.submodule_search_locations) or ():
        texts |= {f"sklearn {f.stem}": _read(f) for f in Path(folder, "datasets", "descr").glob("*.rst")}
    return _bundle("packages", texts, 24)


def _licences() -> dict[str, str]:
    """Licences of the pinned packages, each paragraph once."""
    texts: dict[str, str] = {}
    for name, dist in _pinned().items():
        for file in dist.files or ():
            if ".dist-info/" in file.as_posix() and re.search("licen[cs]e|copying|notice", file.name, re.IGNORECASE):
                path = Path(str(file.locate()))
                texts |= {f"{name} {file.as_posix().partition('/')[2]}": _read(path)} if path.is_file() else {}
    return _bundle("licences", texts, 12)


SOURCES: dict[str, Callable[[], dict[str, str]]] = {
    "book": _book, "python": _python, "topics": _topics, "packages": _packages, "licences": _licences,
}  # fmt: skip


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@lru_cache
def _pinned() -> dict[str, metadata.Distribution]:
    """Installed packages among those of constraints.txt: others would differ from machine to machine."""
    lines = _read(PINNED).splitlines() if PINNED.is_file() else []
    found = {}
    for name in (line.partition("==")[0].strip() for line in lines if "==" in line and not line.startswith("#")):
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _bundle(source: str, texts: Mapping[str, str], count: int) -> dict[str, str]:
    """Pieces of all texts in `count` documents, each piece in that which a hash of its name says."""
    seen: set[str] = set()
    parts: dict[str, list[str]] = defaultdict(list)
    for name, whole in sorted(texts.items()):
        for number, piece in enumerate(_pieces(whole)):
            at = zlib.crc32(f"{name} {number}".encode()) % count
            parts[f"{source}/{at:02d}"] += [p for p in piece if not _repeated(p, seen)]
    return {name: "\n\n".join(parts[name]) for name in sorted(parts) if parts[name]}


def _pieces(whole: str) -> Iterator[list[str]]:
    """The paragraphs of a text, in groups of PIECE characters or a little more."""
    piece: list[str] = []
    for paragraph in whole.split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) >= PIECE:
            yield piece
            piece = []
    yield piece


def _repeated(paragraph: str, seen: set[str]) -> bool:
    words = " ".join(paragraph.lower().split())
    known = words in seen
    seen.add(words)
    return known and len(words) >= BOILERPLATE
