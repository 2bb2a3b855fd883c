"""Long-context tasks whose answers are known, made from real text: the families of RULER (arXiv 2404.06654).

Differs from the paper: needles carry 7-digit numbers between the sentences of a book, word lists are drawn from the
book's own vocabulary, and lists are scaled to the length asked for, so that every family exists from a few hundred
tokens on. The prompt ends with the assistant's turn; no answer is begun for the model.
"""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptivekv.errors import AdaptiveKVError

BOOK = Path(__file__).parents[2] / "experiments" / "data" / "moby_dick.txt"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’)])\s+")
_LONGEST = 160  # characters of a sentence; longer ones are cut at a space
_COLOURS = [
    "amber",
    "azure",
    "coral",
    "crimson",
    "golden",
    "ivory",
    "jade",
    "lilac",
    "maroon",
    "olive",
    "purple",
    "scarlet",
    "silver",
    "teal",
    "violet",
    "white",
]
_THINGS = [
    "anchor",
    "basket",
    "candle",
    "drum",
    "engine",
    "falcon",
    "garden",
    "hammer",
    "island",
    "kettle",
    "lantern",
    "mirror",
    "needle",
    "orchard",
    "piano",
    "rocket",
]


@dataclass(frozen=True)
class Task:
    """A document, a question about it, and the strings a right answer contains."""

    name: str
    context: str
    question: str
    answers: tuple[str, ...]
    later: tuple[str, ...] = ()  # questions about other parts of the document

    def score(self, text: str) -> float:
        """Share of the answers found in `text` as whole strings, whatever their case: 0 to 1."""
        return score(self.answers, text)

    def ids(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """Token ids of the document and of what follows it (question, assistant's turn); their sum is the prompt."""
        whole, other = (_encode(tokenizer, f"{self.context}\n\n{rest}") for rest in (self.question, "~"))
        cut = next((i for i, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), len(other))
        return whole[:cut], whole[cut:]


def score(answers: Sequence[str], text: str) -> float:
    """Task.score of a task with these answers."""
    found = [re.search(rf"(?<!\w){re.escape(a)}(?!\w)", text, re.IGNORECASE) is not None for a in answers]
    return sum(found) / len(found)


def _encode(tokenizer: Any, text: str) -> list[int]:
    special = not tokenizer.chat_template  # a template writes the special tokens itself
    if tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    # not verbose: prompts are measured before they are cut to length
    return tokenizer(text if not special else text + "\n", add_special_tokens=special, verbose=False)["input_ids"]


def make(name: str, tokens: int, tokenizer: Any, seed: int, haystack: str) -> Task:
    """A task of `tokens` tokens at most, template and question included, and not much less.

    The same arguments give the same task. Errors: AdaptiveKVError for an unknown task or too few tokens.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1, 0.0)
        raise AdaptiveKVError(f"task {name!r}: unknown; did you mean {near[0]!r}? There are {', '.join(TASKS)}")
    if not haystack.strip():
        raise AdaptiveKVError("haystack: empty; give some text")
    return TASKS[name](_Desk(name, tokens, tokenizer, random.Random(f"{name} {tokens} {seed}"), haystack))


def haystack(path: str | Path | None = None) -> str:
    """The text that tasks are hidden in; None: the book that comes with the repository. Any fault: AdaptiveKVError."""
    where = BOOK if path is None else Path(path).expanduser()
    try:
        text = where.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdaptiveKVError(f"haystack {where}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        if path is None:
            raise AdaptiveKVError(
                "haystack: the book is only in the repository; pass --haystack with a text file"
            ) from None
        raise AdaptiveKVError(f"haystack {where}: {error.strerror or error}") from None
    if not text.strip():
        raise AdaptiveKVError(f"haystack {where}: empty; give a file with some text")
    return text


@dataclass
class _Desk:
    """What a task is made with; `tokens` bounds the whole prompt."""

    name: str
    tokens: int
    tokenizer: Any
    rng: random.Random
    haystack: str

    def numbers(self, n: int) -> list[str]:
        return [str(x) for x in self.rng.sample(range(1_000_000, 10_000_000), n)]

    def keys(self, n: int) -> list[str]:
        pairs = self.rng.sample(range(len(_COLOURS) * len(_THINGS)), n)
        return [f"{_COLOURS[i % len(_COLOURS)]} {_THINGS[i // len(_COLOURS)]}" for i in pairs]

    def stretch(self, characters: int) -> list[str]:
        """Sentences from a random place of the haystack on, round its end where it is short."""
        text, start = self.haystack, self.rng.randrange(len(self.haystack))
        first = _SENTENCE_END.search(text, start)
        start = first.end() if first and first.end() < len(text) else 0
        out: list[str] = []
        while sum(map(len, out)) < characters:
            for sentence in _SENTENCE_END.split(text[start : start + characters + _LONGEST]):
                words = " ".join(sentence.split())
                out += re.findall(rf".{{1,{_LONGEST}}}(?:\s|$)|\S{{1,{_LONGEST}}}", words)
            start = 0 if start + characters + _LONGEST >= len(text) else start + characters + _LONGEST
        return [sentence.strip() for sentence in out if sentence.strip()]

    def size(self, task: Task) -> int:
        return sum(map(len, task.ids(self.tokenizer)))

    def fit(self, build: Callable[[int], Task], most: int) -> Task:
        """The largest task of `build(n)`, n up to `most`, that keeps to the tokens; its size grows with n."""
        low, high = 0, 1
        while high < most and self.size(build(high)) <= self.tokens:
            low, high = high, min(most, 2 * high)
        if high == most and self.size(build(most)) <= self.tokens:
            return build(most)
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if self.size(build(middle)) <= self.tokens else (low, middle)
        if low == 0:
            need = self.size(build(1))
            raise AdaptiveKVError(f"length={self.tokens}: task {self.name} needs at least {need} tokens")
        return build(low)

    def hide(
        self,
        needles: list[str],
        intro: str,
        question: str,
        answers: list[str],
        later: Sequence[str] = (),
        ordered: bool = False,
    ) -> Task:
        """Needles between the sentences of a stretch, at random depths; `ordered` keeps them in order."""
        sentences = self.stretch(8 * self.tokens)
        depths = [self.rng.random() for _ in needles]
        depths = sorted(depths) if ordered else depths

        def build(n: int) -> Task:
            parts = sentences[:n]
            places = sorted(zip((round(d * n) for d in depths), range(len(needles)), strict=True), reverse=True)
            for at, which in places:
                parts.insert(at, needles[which])
            return Task(self.name, f"{intro}\n\n{' '.join(parts)}", question, tuple(answers), tuple(later))

        return self.fit(build, len(sentences))


def _needle(key: str, value: str) -> str:
    return f"The special magic number for the {key} is {value}."


_INTRO = "Some special magic numbers are hidden in the following text. Memorize them; you will be asked about them."


def _niah(desk: _Desk, keys: int, values: int, asked: int) -> Task:
    names, numbers = desk.keys(keys), desk.numbers(keys * values)
    pairs = [(names[i // values], number) for i, number in enumerate(numbers)]
    wanted = names[:asked]

    def ask(about: list[str]) -> str:
        numbers = "are all the special magic numbers" if len(about) * values > 1 else "is the special magic number"
        listed = " and ".join(filter(None, [", ".join(f"the {n}" for n in about[:-1]), f"the {about[-1]}"]))
        return f"What {numbers} for {listed} mentioned in the text?"

    answers = [number for name, number in pairs if name in wanted]
    later = [ask([name]) for name in names[asked:]]
    return desk.hide([_needle(*pair) for pair in pairs], _INTRO, ask(wanted), answers, later)


def niah_single(desk: _Desk) -> Task:
    """One needle in the haystack."""
    return _niah(desk, 1, 1, 1)


def niah_multikey(desk: _Desk) -> Task:
    """One needle asked for, among three of the same form about other things."""
    return _niah(desk, 4, 1, 1)


def niah_multivalue(desk: _Desk) -> Task:
    """One key with three values, all asked for."""
    return _niah(desk, 1, 3, 1)


def niah_multiquery(desk: _Desk) -> Task:
    """Three keys, all asked for, beside one that is not."""
    return _niah(desk, 4, 1, 3)


def vt(desk: _Desk) -> Task:
    """Variable tracking: a chain of assignments; which variables hold the value?"""
    letters = [chr(ord("A") + i) for i in range(26)]
    names: list[str] = []
    while len(names) < 8:
        name = "".join(desk.rng.sample(letters, 5))
        names += [name] if name not in names else []
    value, other = desk.numbers(2)
    chains = [(names[:4], value), (names[4:], other)]
    needles = [f"VAR {a} = {b}." for chain, first in chains for a, b in zip(chain, [first, *chain[:-1]], strict=True)]
    mixed = sorted(range(8), key=lambda i: (i % 4, desk.rng.random()))  # an assignment follows what it refers to
    intro = "Memorize the chains of variable assignments that are hidden in the following text."
    question, other_question = (
        f"Which variables are assigned the value {x}, directly or through other variables? List all four names."
        for x in (value, other)
    )
    return desk.hide([needles[i] for i in mixed], intro, question, names[:4], [other_question], ordered=True)


_COMMON, _RARE = "What are the 5 most common words in the list?", "Name 5 words that are rare in the list."


def cwe(desk: _Desk) -> Task:
    """Common words extraction: a few words of a list come back ten times as often as the others."""
    vocabulary = sorted(set(re.findall(r"\b[a-z]{4,8}\b", desk.haystack)))
    if len(vocabulary) < 50:
        raise AdaptiveKVError("haystack: fewer than 50 different words; task cwe needs more text")
    vocabulary = desk.rng.sample(vocabulary, len(vocabulary))
    common, rare = vocabulary[:5], vocabulary[5:]
    shuffle_seed = desk.rng.random()

    def build(n: int) -> Task:
        # each common word 10 k times at most for k appearances of a rare one; half of the list is common words
        times = max(3, n)
        words = common * times + [rare[i // max(1, times // 10) % len(rare)] for i in range(5 * n)]
        random.Random(shuffle_seed).shuffle(words)
        listed = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
        intro = "Below is a numbered list of words. Some of them appear more often than others. Memorize those."
        return Task(desk.name, f"{intro}\n\n{listed}", _COMMON, tuple(common), (_RARE,))

    return desk.fit(build, desk.tokens)


def fwe(desk: _Desk) -> Task:
    """Frequent words extraction: coded words with Zipf frequencies; which three are the most frequent?"""
    letters = [chr(ord("a") + i) for i in range(26)]
    codes: list[str] = []
    while len(codes) < 200:
        code = "".join(desk.rng.choices(letters, k=6))
        codes += [code] if code not in codes else []
    shuffle_seed = desk.rng.random()

    def build(n: int) -> Task:
        counts = Counter({code: round(2 * n / rank**2 + max(0, 4 - rank)) for rank, code in enumerate(codes, 1)})
        words = sorted(counts.elements())
        random.Random(shuffle_seed).shuffle(words)
        context = f"Read the following coded text and track how often each coded word appears.\n\n{' '.join(words)}"
        question = "What are the three most frequently appearing words in the coded text?"
        return Task(desk.name, context, question, tuple(codes[:3]))

    return desk.fit(build, desk.tokens)


def qa(desk: _Desk) -> Task:
    """Question answering: one of six short notes on people answers a question; its words differ from the note's."""
    people = desk.rng.sample(_PEOPLE, 6)
    jobs, places = desk.rng.sample(_JOBS, 6), desk.rng.sample(_PLACES, 6)
    notes = [
        f"{name} was born in {place}, the child of a fisherman, and earned a living as a {job}."
        for name, job, place in zip(people, jobs, places, strict=True)
    ]
    kind, answer = desk.rng.choice([("profession", jobs[0]), ("birthplace", places[0])])
    intro = "Read the following text. It mentions some people; you will be asked about one of them."
    question, *later = (f"What is the {kind} of {person}? Answer with one word." for person in people)
    return desk.hide(notes, intro, question, [answer], later)


_PEOPLE = [f"{a} {b}" for a in ("Edith", "Ruben", "Clara", "Otto") for b in ("Vance", "Moreno", "Lindqvist", "Okafor")]
_JOBS = ["baker", "weaver", "printer", "tailor", "carpenter", "potter", "glazier", "cobbler", "saddler", "dyer"]
_PLACES = ["Genoa", "Bergen", "Cadiz", "Tallinn", "Havana", "Dublin", "Antwerp", "Naples", "Calcutta", "Boston"]

TASKS: dict[str, Callable[[_Desk], Task]] = {
    make_one.__name__: make_one
    for make_one in (niah_single, niah_multikey, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa)
}
"""By name; `make` calls them."""
