"""The plans that a controller chooses among unless it is told others, and that are replayed to teach it."""

_WIDE, _FEW, _FEWEST = (
    "tuned(0.25, high=int8, low=int4, guard=int8)", "int4(window=0, guard=int8)", "k4v2(window=0, guard=int8)"
)  # fmt: skip


def _kept(keep: float, rest: str) -> str:
    return f"kvzap({keep}) | {rest}"


CANDIDATES = (
    "full", "int8", "int4(guard=int8)", _FEWEST,
    _kept(0.75, _WIDE), _kept(0.6, _FEW), _kept(0.4, _FEW), _kept(0.3, _FEWEST), _kept(0.2, _FEWEST),
    "offload(0.05)",
    *(f"{plan} | offload(0.05)" for plan in (
        "int8", "int4(guard=int8)",
        _kept(0.75, _WIDE),
        *(_kept(keep, "tuned(0.25, high=int8, low=int4, window=0, guard=int8)") for keep in (0.75, 0.6)),
        *(_kept(keep, _FEW) for keep in (0.6, 0.5, 0.4, 0.3)),
        _kept(0.2, _FEWEST),
    )),
)  # fmt: skip
"""What can be offloaded is best offloaded as a whole or not at all: between the two, the price of a step has its
maximum (docs/architecture.md)."""
