"""What pages are made of: the tiers they live on, the shapes of their layers, the kinds one launch can handle."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaptivekv.kernels.codec import Codec
from adaptivekv.memory.formats import Format

DEVICE, HOST = 0, 1
TIERS = ("device", "host")


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
    """What pages have in common that one launch can handle, whatever their layer and head."""

    k_dim: int
    v_dim: int
    dtype: torch.dtype
    fmt: Format
    tier: int

    @property
    def parts(self) -> tuple[tuple[Codec, int], tuple[Codec, int]]:
        """Codec and size (elements) of the keys, and of the values."""
        return (self.fmt.k, self.k_dim), (self.fmt.v, self.v_dim)

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of a page's keys and of its values."""
        k, v = (codec.part_bytes(dim, self.dtype) for codec, dim in self.parts)
        return k, v
