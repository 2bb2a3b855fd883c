"""Systems of the literature that are pipelines of our stages, by name; `Plan.parse` reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Named:
    plan: str
    paper: str
    note: str  # how the pipeline differs from the paper


NAMED: dict[str, Named] = {
    "flexgen": Named(
        "int4 | offload(0.5)", "https://arxiv.org/abs/2303.06865",
        "pages are placed by attention mass; the share is given, or found by the selector, not by a linear program",
    ),
    "qhitter_int4": Named(
        "qhitter(0.5) | int4", "https://mlsys.org/virtual/2024/poster/2642", "see the stage `qhitter`",
    ),
    "rocketkv": Named(
        "snapkv(0.25, pool=63, pooling=max) | retrieve(0.25)", "https://arxiv.org/abs/2502.14051",
        "the second stage chooses pages by key minima and maxima, without the paper's pairs over channels",
    ),
    "rocketkv_mt": Named(
        "retrieve(0.1)", "https://arxiv.org/abs/2502.14051", "the multi-turn variant keeps everything and reads a part",
    ),
    "infinigen": Named(
        "offload(0.25) | retrieve(0.1)", "https://arxiv.org/abs/2406.19707",
        "pages to fetch are chosen by key bounds of this layer, not by a speculated query of the layer before",
    ),
    "shadowkv": Named(
        "int4 | offload(0.25) | retrieve(0.1)", "https://arxiv.org/abs/2410.21465",
        "keys are kept in 4 bits, not in low rank, and leave the device with their values",
    ),
    "tailorkv": Named(
        "tuned(0.25, low=int2) | offload(0.5)", "https://arxiv.org/abs/2505.19586",
        "layers are told apart by sensitivity; those that fetch do not differ from those that quantize",
    ),
}  # fmt: skip
