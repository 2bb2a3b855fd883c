"""The plans that a controller chooses among unless it is told others, and that are replayed to teach it."""

HIGH, INT4, LOW = "tuned(0.25, high=int8, low=int4)", "int4(window=0)", "k4v2(window=0)"

CANDIDATES = (
    "full", "int8", "int4", LOW,
    f"kvzap(0.75) | {HIGH}", *(f"kvzap({keep}) | {INT4}" for keep in (0.6, 0.4)),
    *(f"kvzap({keep}) | {LOW}" for keep in (0.2, 0.15)),
    "offload(0.05)",
    *(f"{plan} | offload(0.05)" for plan in (
        "int8", "int4",
        *(f"kvzap({keep}) | {HIGH}" for keep in (0.75, 0.6)),
        *(f"kvzap({keep}) | {INT4}" for keep in (0.75, 0.6, 0.5, 0.4, 0.3)),
        f"kvzap(0.2) | {LOW}",
    )),
)  # fmt: skip
"""What can be offloaded is best offloaded as a whole or not at all: between the two, the price of a step has its
maximum (docs/architecture.md). How they were chosen: docs/selector.md."""
