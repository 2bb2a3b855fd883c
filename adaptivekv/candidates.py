"""The plans that a controller chooses among unless it is told others, and that are replayed to teach it."""

CANDIDATES = (
    "full",
    "int8",
    "int4(guard=int8)",
    "kvzap(0.75) | tuned(0.25, high=int8, low=int4, guard=int8)",
    "kvzap(0.6) | tuned(0.25, high=int8, low=int4, guard=int8)",
    "kvzap(0.5) | tuned(0.25, high=int8, low=int4, guard=int8)",
    "kvzap(0.6) | int4(window=0, guard=int8)",
    "kvzap(0.5) | int4(window=0, guard=int8)",
    "kvzap(0.4) | k4v2(window=0, guard=int8)",
    "kvzap(0.2) | int4(window=0, guard=int8)",
    "offload(0.05)",
    "int8 | offload(0.05)",
    "int4(guard=int8) | offload(0.05)",
    "kvzap(0.75) | tuned(0.25, high=int8, low=int4, guard=int8) | offload(0.05)",
    "kvzap(0.6) | tuned(0.25, high=int8, low=int4, guard=int8) | offload(0.05)",
    "kvzap(0.5) | tuned(0.25, high=int8, low=int4, guard=int8) | offload(0.05)",
    "kvzap(0.6) | int4(window=0, guard=int8) | offload(0.05)",
    "kvzap(0.5) | int4(window=0, guard=int8) | offload(0.05)",
    "kvzap(0.4) | k4v2(window=0, guard=int8) | offload(0.05)",
    "kvzap(0.2) | int4(window=0, guard=int8) | offload(0.05)",
)
"""What can be offloaded is best offloaded as a whole or not at all: between the two, the price of a step has its
maximum (docs/architecture.md)."""
