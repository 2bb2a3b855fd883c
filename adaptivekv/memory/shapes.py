"""What pages are made of: the tiers they live on, the shapes of their layers, the kinds one launch can handle."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaptivekv.kernels.codec import Codec
from adaptivekv.memory.formats import Format

DEVICE, HOST, DISK = 0, 1, 2
TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class LayerShape:
    """One full-attention layer: KV heads, query heads, key size, value size (elements)."""

    heads: int
    q_heads: int
    k_dim: int
    v_dim: int

    @property
    def slot_elements(self) -> int:
        """Elements of one token in this layer, keys and values of all KV heads."""
        return self.heads * (self.k_dim + self.v_dim)


@dataclass(frozen=True)
class Kind:
    """What pages have in common that one launch can handle, whatever their layer and head.

    split: the values alone are on `tier`, the host, and the keys on the device.
    """

    k_dim: int
    v_dim: int
    dtype: torch.dtype
    fmt: Format
    tier: int
    split: bool = False

    @property
    def tiers(self) -> tuple[int, int]:
        """Where the keys are, and the values."""
        return DEVICE if self.split else self.tier, self.tier

    @property
    def parts(self) -> tuple[tuple[Codec, int], tuple[Codec, int]]:
        """Codec and size (elements) of the keys, and of the values, as they are stored."""
        k_dim, v_dim = self.fmt.dims(self.k_dim, self.v_dim)
        return (self.fmt.k, k_dim), (self.fmt.v, v_dim)

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of a page's keys and of its values."""
        k, v = (codec.part_bytes(dim, self.dtype) for codec, dim in self.parts)
        return k, v

    def bytes_on(self, tier: int) -> int:
        """Bytes of a page that lie on `tier`."""
        return sum(size for size, where in zip(self.sizes, self.tiers, strict=True) if where == tier)
