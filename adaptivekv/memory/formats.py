"""Format descriptors: how the keys and the values of a page are encoded, each on its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels import CODECS, DECODED, Codec


@dataclass(frozen=True)
class Format:
    """Encoding of one page. `rotate`: keys and values are stored Hadamard-rotated (QuaRot, arXiv 2404.00456).

    rank: eighths of the head size that are stored, in bases of the sequence's own (bases.py); 0: all of it, as it is.
    """

    name: str
    k: Codec
    v: Codec
    rotate: bool = False
    rank: int = 0

    def dims(self, k_dim: int, v_dim: int) -> tuple[int, int]:
        """Elements that are stored of a key and of a value; ranks are multiples of 8."""
        if not self.rank:
            return k_dim, v_dim
        k, v = (min(dim, -(-dim * self.rank // 64) * 8) for dim in (k_dim, v_dim))
        return k, v

    def sizes(self, k_dim: int, v_dim: int, dtype: torch.dtype) -> tuple[int, int]:
        """Stored bytes of the keys and of the values of one page, scales included."""
        k_dim, v_dim = self.dims(k_dim, v_dim)
        return self.k.part_bytes(k_dim, dtype), self.v.part_bytes(v_dim, dtype)

    def bytes(self, k_dim: int, v_dim: int, dtype: torch.dtype) -> int:
        """Stored bytes of one page, scales included."""
        return sum(self.sizes(k_dim, v_dim, dtype))

    @property
    def kernel(self) -> bool:
        """Whether captured steps know it. Low-rank pages are attended eagerly, by the kernels of their codecs."""
        return self.k.kernel and self.v.kernel and not self.rank

    @property
    def bits(self) -> float:
        """Bits per element without scales, keys and values together."""
        return (self.k.bits + self.v.bits) / 2 * (self.rank / 8 or 1)

    def demotes(self, other: Format) -> bool:
        """Whether going from this format to `other` loses bits and gains none (a lost bit never comes back).

        Not between formats of equal bits: encoding again adds an error and may take more bytes. Only native pages
        become low-rank ones, and those stay what they are.
        """
        if self.rank or other.rank:
            return self.name == "native" and other.rank > 0
        return other.bits < self.bits and other.k.bits <= self.k.bits and other.v.bits <= self.v.bits


def _formats() -> dict[str, Format]:
    c = CODECS
    pairs = {"int8": ("int8", "int8"), "int4": ("int4", "int4"), "k4v2": ("int4", "int2"), "int2": ("int2", "int2")}
    table = {"native": Format("native", c["native"], c["native"])}
    for name, (k, v) in pairs.items():
        table[name] = Format(name, c[k], c[v])
        table[name + "r"] = Format(name + "r", c[k], c[v], rotate=True)
    # New ones at the end: files and tables know a format by its place. Those without kernels come last.
    pairs = {
        "fp8": ("fp8", "fp8"), "kivi4": ("kivi4k", "kivi4v"), "kivi42": ("kivi4k", "kivi2v"),
        "kivi2": ("kivi2k", "kivi2v"), "nuq4": ("nuq4k", "nuq4v"),
    }  # fmt: skip
    table |= {name: Format(name, DECODED[k], DECODED[v]) for name, (k, v) in pairs.items()}
    for latent in LATENTS:
        for n in range(1, 8):
            name = low_rank(n, latent)
            table[name] = Format(name, table[latent].k, table[latent].v, rank=n)
    return table


LATENTS = "native", "int4", "k4v2"
"""Formats of what a low-rank page stores."""


def low_rank(rank: int, latent: str) -> str:
    """The name of a low-rank format: `rank` eighths of the head size, stored in the format `latent`."""
    return f"rank{rank}" + ("" if latent == "native" else f"_{latent}")


FORMATS = _formats()
"""By name; a trailing `r` means rotated. The position in this table is a page's format code."""
CODES = {name: i for i, name in enumerate(FORMATS)}
BY_CODE = list(FORMATS.values())
WITH_KERNEL = [fmt for fmt in BY_CODE if fmt.kernel]
"""The formats of a captured decode step; the first of `BY_CODE`, so that their codes are those of this list."""


def parse_bytes(text: str | int | float) -> float | int:
    """`0.25` (a share of the full cache, returned as float) or `64MiB`, `2GB`, `35000000` (bytes, returned as int)."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        value: float | int = text
    else:
        units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
        digits = str(text).strip().lower()
        number = digits.rstrip("abcdefghijklmnopqrstuvwxyz ")
        unit = digits[len(number) :].strip()
        try:
            value = float(number) if ("." in number and not unit) else int(float(number) * units[unit])
        except (ValueError, KeyError):
            raise AdaptiveKVError(f"budget {text!r}: use a share such as 0.25 or a size such as 64MiB") from None
    if not (0 < value < float("inf")) or (isinstance(value, float) and value > 16):
        raise AdaptiveKVError(f"budget {text!r}: must be above 0 (a share such as 0.25, or bytes such as 64MiB)")
    return value
