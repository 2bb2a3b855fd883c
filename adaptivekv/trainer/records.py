"""Generated text: records of some lines, each with a question, that fill a prompt to any length."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

Record = Callable[[np.random.Generator], tuple[list[str], str]]  # some lines, one question

NAMES = ["Amara", "Bjorn", "Chen", "Dalia", "Emeka", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Kavya", "Lucia"]
PLACES = ["Lisbon", "Oslo", "Nairobi", "Kyoto", "Lima", "Austin", "Delhi", "Perth", "Quito", "Riga", "Sofia", "Tunis"]
GOODS = ["lamp", "kettle", "ladder", "violin", "anchor", "blanket", "compass", "drill", "easel", "funnel", "mirror"]


def fill(
    record: Record, tokens: int, glue: int, tokenizer: Any, rng: np.random.Generator
) -> tuple[list[str], list[str]]:
    """Lines and questions of as many records (one at least) as come closest to `tokens`; a line costs `glue` more."""
    lines: list[str] = []
    questions: list[str] = []
    while True:
        made, question = record(rng)
        cost = sum(len(ids) + glue for ids in tokenizer(made, add_special_tokens=False, verbose=False).input_ids)
        if lines and 2 * tokens < cost:
            return lines, questions
        tokens -= cost
        lines += made
        questions.append(question)


def _words(rng: np.random.Generator) -> tuple[str, str, str]:
    name, place, good = (words[int(rng.integers(len(words)))] for words in (NAMES, PLACES, GOODS))
    return name, place, good


def table(rng: np.random.Generator) -> tuple[list[str], str]:
    """A row of a table; the question is for one cell."""
    _, place, good = _words(rng)
    code, price, stock = f"{good}-{rng.integers(100, 1000)}", f"{rng.integers(100, 99999) / 100:.2f}", rng.integers(500)
    asked = "What is the price of" if rng.integers(2) else "How many pieces are in stock of"
    return [f"| {code} | {place} | {stock} | {price} |"], f"{asked} {code}? Answer with the number only."


def order(rng: np.random.Generator) -> tuple[list[str], str]:
    """A JSON object; the question is for two of its values."""
    name, place, good = _words(rng)
    number = int(rng.integers(10000, 99999))
    made = {"order": number, "buyer": name, "item": good, "count": int(rng.integers(1, 40)), "ship_to": place}
    return [json.dumps(made)], f"Where is order {number} shipped to, and who bought it?"


def result(rng: np.random.Generator) -> tuple[list[str], str]:
    """A sum or difference; the question is for its result."""
    a, b = (int(x) for x in rng.integers(10, 10000, 2))
    sign, value = ("+", a + b) if rng.integers(2) else ("-", a - b)
    return [f"{a} {sign} {b} = {value}"], f"What is {a} {sign} {b}? It is in the list. Answer with the number only."


def chain(rng: np.random.Generator) -> tuple[list[str], str]:
    """A worked problem of three steps; the question is another problem of that form."""
    asked, _ = _problem(rng)
    told, worked = _problem(rng)
    return [f"Problem: {told}", f"Solution: {worked}"], f"Problem: {asked} Solve it step by step like the others."


def _problem(rng: np.random.Generator) -> tuple[str, str]:
    name, _, good = _words(rng)
    start, more, times, given = (int(rng.integers(*ends)) for ends in ((5, 60), (2, 40), (2, 5), (1, 7)))
    some = start + more
    most = some * times
    told = (
        f"{name} has {start} {good}s and buys {more} more. Then {name} gets {times} times as many as that, "
        f"and gives {given} away. How many {good}s does {name} have now?"
    )
    steps = f"{start} + {more} = {some}. {some} * {times} = {most}. {most} - {given} = {most - given}."
    return told, f"{steps} The answer is {most - given}."


def assignments(rng: np.random.Generator) -> tuple[list[str], str]:
    """Three lines of a program, each from the one before; the question is for the last value."""
    first, second, third = (f"{_words(rng)[2]}_{number}" for number in rng.choice(np.arange(100, 1000), 3, False))
    a, b, c = (int(x) for x in rng.integers(1, 50, 3))
    lines = [f"{first} = {a}", f"{second} = {first} + {b}", f"{third} = {second} - {c}"]
    return lines, f"What is the value of {third} when the program has ended? Show how you get it, line by line."


def talk(rng: np.random.Generator) -> tuple[list[str], str]:
    """What a user says and is answered; the question is for something in it."""
    (name, place, good), hour, count = _words(rng), rng.integers(8, 20), rng.integers(2, 90)
    said, answered, question = TALK[int(rng.integers(len(TALK)))].format(**locals()).split("\n")
    return [said, answered], question


TALK = (
    """Please remind me: {name} arrives from {place} at {hour}:15 and brings {count} of the {good}s.
Noted. {name} comes from {place} at {hour}:15, with {count} {good}s. Shall I tell anyone else?
When does {name} arrive from {place}?""",
    """I told {name} that the {good} we ordered is stuck in {place}. What could I do next?
Call the carrier in {place}, ask for case {count}{hour}, and offer {name} a refund for the {good}.
Which case number did you give me for the {good} in {place}?""",
    """How would you describe {place} to {name}, who has never travelled further than the next village?
I would begin with the smell of the harbour, then the market where a {good} costs {count} coins, and say \
that the last tram leaves at {hour}:40, so that nobody has to walk home.
What does a {good} cost at the market in {place}?""",
)

RECORDS: dict[str, tuple[Record, str]] = {
    "table": (table, "Stock of all shops.\n\n| item | city | stock | price |\n| --- | --- | --- | --- |"),
    "json": (order, "These are the orders of the week, one JSON object a line.\n"),
    "numbers": (result, "A list of sums and differences.\n"),
    "chain": (chain, "Some problems and their solutions.\n"),
    "variables": (assignments, "Read this program.\n"),
    "dialogue": (talk, ""),
}
"""By kind: what makes a record, and what stands above all of them. A dialogue's lines are turns of their own."""
