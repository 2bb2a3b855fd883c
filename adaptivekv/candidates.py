"""The plans that a controller chooses among unless it is told others, and that are replayed to teach it."""

CANDIDATES = (
    "full", "int8", "tuned(0.12, high=int8, low=int4)", "int4", "k4v2(window=0)",
    "kvzap(0.5) | int4(window=0)", "kvzap(0.3) | k4v2(window=0)",
    "offload(0.05)",
    *(f"{plan} | offload(0.05)" for plan in (
        "int8", "tuned(0.12, high=int8, low=int4)", "int4",
        "kvzap(0.75) | tuned(0.25, high=int8, low=int4)",
        *(f"kvzap({keep}) | int4(window=0)" for keep in (0.75, 0.6, 0.5)),
        *(f"kvzap({keep}) | k4v2(window=0)" for keep in (0.5, 0.4, 0.3, 0.2)),
        "snapkv(0.5, pool=32) | int4(window=0)",
    )),
)  # fmt: skip
"""What can be offloaded is best offloaded as a whole or not at all: between the two, the price of a step has its
maximum (docs/architecture.md)."""
