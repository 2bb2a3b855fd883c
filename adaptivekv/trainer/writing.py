"""From a drawn request to its prompt: text of about the tokens asked for, and the turns that follow."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import records, sources, tasks

if TYPE_CHECKING:
    from adaptivekv.trainer.workload import Request

TEXTS = ("book", "topics", "packages", "licences")
FROM_DOCUMENTS: dict[str, tuple[str, ...]] = {
    "prose": ("book",), "docs": TEXTS[1:], "code": ("python",), "edit": ("python",),
    "needle": TEXTS, "multikey": TEXTS, "words": TEXTS, "tracking": TEXTS, "people": TEXTS,
}  # fmt: skip
"""Kinds that are made of real text, and their sources."""
KINDS = (*FROM_DOCUMENTS, *records.RECORDS)
TASKS = {"needle": "niah_single", "multikey": "niah_multikey", "words": "cwe", "tracking": "vt", "people": "qa"}
CONTINUED = ("prose", "code")  # as they are, with no chat round them, if there is one turn only
MARK = "@@answer@@"  # stands for an answer in a chat template
ASKED = {
    "prose": (
        "Here is a part of a novel.",
        "Continue the story from there.",
        "What happens at the beginning of this part? Answer in one sentence.",
        "What happens at the end of this part? Answer in one sentence.",
        "Name the people in this part.",
    ),
    "code": (
        "Here is a part of a Python module.",
        "Continue the code from there.",
        "What does the first function in it do?",
        "What does the last function in it do?",
        "Which exceptions does it raise?",
    ),
    "docs": (
        "Here is a part of a document.",
        "Summarise it in one sentence.",
        "What is the first paragraph about?",
        "What is the last paragraph about?",
        "Which terms does it explain?",
    ),
}
EDITS = (
    "Rename the function `{name}` to `{new}` and print it again. Answer with the code only.",
    "Print the function `{name}` again, with a first line that prints its name. Answer with the code only.",
)


@dataclass(frozen=True)
class Prompt:
    """A written request."""

    ids: list[int]  # of the first turn, up to where the model answers
    text: str  # of the first turn, as features see it
    follow: list[list[int]]  # for each later turn, what to feed after an answer that has not ended itself
    answers: tuple[str, ...] = ()  # what a right first answer contains; empty: not known


def write(request: Request, tokenizer: Any) -> Prompt:
    """The request's text and tokens; the same request and tokenizer give the same prompt.

    Prose and code of one turn are continued as they are; all else is a chat, or lines of text where the tokenizer has
    no chat template. Questions of later turns are about other parts of the same text and come round again when there
    are more turns than questions. AdaptiveKVError if the tokens do not suffice for the kind.
    """
    rng = np.random.default_rng(request.seed)
    if request.kind in CONTINUED and request.turns == 1:
        text = passage(sources.text(request.document), request.tokens, tokenizer, rng)
        return Prompt(tokenizer(text, verbose=False).input_ids[: request.tokens], text, [])
    messages, later, answers = _chat(request, tokenizer, rng)
    follow = [following(question, tokenizer) for question in islice(cycle(later), request.turns - 1)]
    return Prompt(opening(messages, tokenizer), "\n\n".join(messages), follow, answers)


def opening(messages: list[str], tokenizer: Any) -> list[int]:
    """Token ids of a conversation that begins and ends with the user, up to the start of the next answer."""
    if not tokenizer.chat_template:
        return tokenizer("\n".join(messages) + "\n", verbose=False).input_ids
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])


def following(question: str, tokenizer: Any) -> list[int]:
    """Token ids from the end of an answer, through the user's next question, to the start of the answer to it.

    AdaptiveKVError if the chat template leaves earlier answers out.
    """
    if not tokenizer.chat_template:
        return tokenizer(f"\n{question}\n", add_special_tokens=False).input_ids
    turns = [{"role": role, "content": text} for role, text in (("user", "?"), ("assistant", MARK), ("user", question))]
    whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    _, mark, after = whole.partition(MARK)
    if not mark:
        raise AdaptiveKVError("chat template: it leaves earlier answers out; use a scenario with turns of 1")
    return tokenizer(after, add_special_tokens=False).input_ids


def _chat(request: Request, tokenizer: Any, rng: np.random.Generator) -> tuple[list[str], list[str], tuple[str, ...]]:
    """Messages up to the first question, the questions of later turns, and the first answer's parts where known."""
    if request.kind in TASKS:
        name = "niah_multikey" if request.kind == "needle" and request.turns > 1 else TASKS[request.kind]
        task = tasks.make(name, request.tokens, tokenizer, request.seed, sources.text(request.document))
        return [f"{task.context}\n\n{task.question}"], [*task.later, task.question], task.answers
    if request.kind in records.RECORDS:
        return *_records(request, tokenizer, rng), ()
    edit = request.kind == "edit"
    title, *asked = ("Here is a part of a Python module.", EDITS[0]) if edit else ASKED[request.kind]
    room = request.tokens - len(opening([f"{title}\n\n{max(asked, key=len)}\n\n"], tokenizer))
    text = passage(sources.text(request.document), max(room, 1), tokenizer, rng, r"^ *def " if edit else "^")
    questions = _edits(text, rng) if edit else [asked[int(i)] for i in rng.permutation(len(asked))]
    return [f"{title}\n\n{text}\n\n{questions[0]}"], [*questions[1:], questions[0]], ()


def _records(request: Request, tokenizer: Any, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    record, title = records.RECORDS[request.kind]
    talk = request.kind == "dialogue"
    # what a message or line costs beyond its own tokens, and the whole beyond its lines
    glue = len(opening(["?", "!", "?"], tokenizer)) - len(opening(["?"], tokenizer)) - 2 if talk else 2
    room = request.tokens - len(opening([f"{title}\n\n{record(rng)[1]}"], tokenizer))
    lines, questions = records.fill(record, room, glue // 2, tokenizer, rng)
    asked = [questions[int(i)] for i in rng.permutation(len(questions))]
    messages = [*lines, asked[0]] if talk else ["\n".join([title, *lines, "", asked[0]])]
    return messages, [*asked[1:], asked[0]]


def _edits(code: str, rng: np.random.Generator) -> list[str]:
    """Both edits of all functions that the code (it begins with one) defines; one after another is of another."""
    names = list(dict.fromkeys(re.findall(r"^ *def (\w+)", code, re.MULTILINE)))
    names = names[:-1] or names  # the last one may be cut
    names = [names[int(i)] for i in rng.permutation(len(names))]
    edits = [EDITS[int(i)] for i in rng.permutation(len(EDITS))]
    return [edit.format(name=name, new=f"{name.strip('_')}_renamed") for edit in edits for name in names]


def passage(text: str, tokens: int, tokenizer: Any, rng: np.random.Generator, start: str = "^") -> str:
    """About `tokens` tokens of the text, or all it has, from the start of a line that matches the pattern `start`."""
    starts = [found.start() for found in re.finditer(start, text, re.MULTILINE)] or [0]
    starts = [at for at in starts if at + tokens * 5 < len(text)] or starts[:1]
    at = starts[int(rng.integers(len(starts)))]
    offsets = tokenizer(text[at : at + tokens * 12], return_offsets_mapping=True, verbose=False).offset_mapping
    return text[at : at + offsets[min(tokens, len(offsets)) - 1][1]]
