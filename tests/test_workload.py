"""Workloads: scenarios and their faults, what is drawn from them, documents and their splits, written prompts."""

import copy
import dataclasses
from collections import defaultdict

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import sources, tasks, workload, writing

NAMES = sorted(file.stem for file in workload.FOLDER.glob("*.yaml"))
MIXED = (workload.FOLDER / "mixed.yaml").read_text()


# -- scenarios ---------------------------------------------------------------------------------------------------------


def test_scenarios():
    """The survey's eight and the mix; a document is in the same split in all of them."""
    found = [workload.load(name) for name in NAMES]
    assert [scenario.name for scenario in found] == NAMES
    sections = [s.about.split()[1] for s in found if s.name != "mixed"]
    assert sorted(sections) == [f"5.{i}" for i in range(1, 9)]
    assert {tuple(s.splits.items()) for s in found} == {tuple(found[0].splits.items())}
    splits: dict[str, set[str]] = defaultdict(set)
    drawn = [request for s in found for seed in (0, 1) for request in workload.draw(s, 200, seed)]
    for request in drawn:
        splits[request.document].add(request.split)
    assert all(len(names) == 1 for names in splits.values()) and len(splits) > 1000
    assert len({(r.kind, r.seed) for r in drawn}) == len(drawn)  # no generated text comes twice
    assert {kind for s in found for kind in s.kinds} == set(writing.KINDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("table: 2", "tabel: 2"), "kinds.tabel is not one of kinds; did you mean 'table'"),
        (("prose: 3", "prose: -3"), "kinds.prose is -3"),
        (("min: 300", "min: many"), "tokens.min is 'many'"),
        (("new: {min: 32", "new: {min: 200"), "new.min is 200, above new.max 192"),
        (("new: {min: 32", "new: {min: 8.5"), "new.min is 8.5, not a whole number"),
        (("turns: {min: 1, max: 2}", "turns: 2"), "turns is 2, not {min: ..., max: ...}"),
        (("quality: [0.003", "quality: [0.0"), r"quality\[0\] is 0.0"),
        (("link: [1,", "link: [0,"), r"link\[0\] is 0, not a number from 0.001"),
        (("host: [0.0, 0.5, 2.0]", "host: 3"), "host is 3, not a list"),
        (("name: mixed", ""), "name is missing"),
        (("new: {", "#"), "new is missing; mixed.yaml shows all fields"),
        (("splits: {train", "splits: {trian"), "did you mean 'train'"),
        (("pressure:", "presure:"), "presure is not a field; did you mean 'pressure'"),
        (("quality: [", "quality: {"), "not YAML"),
    ],
)
def test_bad_scenario(tmp_path, change, message):
    assert change[0] in MIXED
    file = tmp_path / "bad.yaml"
    file.write_text(MIXED.replace(*change))
    with pytest.raises(AdaptiveKVError, match=message) as caught:
        workload.load(file)
    assert "\n" not in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["min", "max", "table"]), inner),
    max_leaves=4,
)


@given(field=st.sampled_from(list(workload.Scenario.__dataclass_fields__)), value=ANYTHING)
@settings(max_examples=150, deadline=None)
def test_parse_anything(field, value):
    """Whatever stands in a field, the scenario is usable or the message begins with the field's name."""
    try:
        scenario = workload.parse(yaml.safe_load(MIXED) | {field: value})
    except AdaptiveKVError as error:
        assert str(error).startswith(field)
    else:
        assert all(low <= high for low, high in (scenario.tokens, scenario.new, scenario.turns))


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_draw(name):
    """Repeatable, prefix-stable, within the bounds; the same requests of a split whatever is drawn beside them."""
    mix = workload.load(name)
    drawn = workload.draw(mix, 300, 7, 4000)
    assert drawn[:20] == workload.draw(mix, 20, 7, 4000) and drawn != workload.draw(mix, 300, 8, 4000)
    for r in drawn:
        assert r.scenario == name and r.id.startswith(f"{name}-7-{r.split}-")
        assert min(mix.tokens[0], 4000) <= r.tokens <= min(mix.tokens[1], 4000)
        assert mix.new[0] <= r.new <= mix.new[1] and mix.turns[0] <= r.turns <= mix.turns[1]
        assert r.link in mix.link and r.host in mix.host
    assert {r.kind for r in drawn} == set(mix.kinds) and {r.split for r in drawn} == set(workload.SPLITS)
    assert {r.turns for r in drawn} == set(range(mix.turns[0], mix.turns[1] + 1))
    some = workload.draw(mix, 40, 7, 4000, ("certify", "select"))
    assert {r.split for r in some} == {"certify", "select"} and set(some[:20]) <= set(drawn)


def test_draw_of_no_share():
    lone = dataclasses.replace(workload.load("mixed"), splits={"train": 1.0})
    with pytest.raises(AdaptiveKVError, match=r"'certify': scenario .* has train"):
        workload.draw(lone, 4, 0, None, ("certify",))


# -- documents ---------------------------------------------------------------------------------------------------------


def test_documents():
    """All kinds have text for every split; the order of shares changes nothing; no paragraph is in two documents."""
    splits = workload.load("mixed").splits
    for kind, names in writing.FROM_DOCUMENTS.items():
        found = sources.by_split(names, splits)
        assert all(max(sizes.values()) > 10_000 for sizes in found.values()), kind
        assert found == sources.by_split(names, dict(reversed(splits.items())))
    for source in ("topics", "packages", "licences"):
        paragraphs = [p.lower().split() for t in sources.documents(source).values() for p in t.split("\n\n")]
        long = [" ".join(p) for p in paragraphs if len(" ".join(p)) >= sources.BOILERPLATE]
        assert len(long) == len(set(long)) > 100


def test_missing_sources(tmp_path, monkeypatch):
    """A machine with fewer texts has fewer documents, in the same splits; with none, an error says what to do."""
    splits = workload.load("mixed").splits
    before = sources.by_split(writing.TEXTS, splits)
    for where in (sources.documents, sources._pinned):
        monkeypatch.setattr(sources, where.__name__, where.__wrapped__)  # not cached
    monkeypatch.setattr(sources, "PINNED", tmp_path / "none")
    monkeypatch.setattr(tasks, "BOOK", tmp_path / "none")
    after = sources.by_split(writing.TEXTS, splits)
    assert 0 < sum(map(len, after.values())) < sum(map(len, before.values()))
    assert all(set(after[split]) <= set(before[split]) for split in splits)
    with pytest.raises(AdaptiveKVError, match=r"none of book is on this machine; .*leave the kinds"):
        workload.draw(workload.load("mixed"), 1)
    with pytest.raises(AdaptiveKVError, match="'book/03' is not on this machine"):
        sources.text("book/03")


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(smol):
    """The embedded tokenizer without its chat template."""
    tokenizer = copy.deepcopy(smol.tokenizer)
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("kind", writing.KINDS)
def test_write(smol, plain, kind, turns):
    """The same prompt twice, of the length asked for; later turns differ; no chat where there is none."""
    mix = dataclasses.replace(workload.load("mixed"), kinds={kind: 1.0}, tokens=(700, 900), turns=(turns, turns))
    request = workload.draw(mix, 3, 5)[2]
    prompt = workload.write(request, smol.tokenizer)
    assert prompt == workload.write(request, smol.tokenizer)
    assert 0.85 * request.tokens <= len(prompt.ids) <= 1.15 * request.tokens
    assert len(prompt.follow) == turns - 1
    assert bool(prompt.answers) == (kind in writing.TASKS) and all(answer in prompt.text for answer in prompt.answers)
    end = smol.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (end in prompt.ids) == (turns > 1 or kind not in writing.CONTINUED)
    questions = [smol.tokenizer.decode(ids) for ids in prompt.follow]
    assert len(set(questions)) == len(questions) or kind in ("words", "tracking")  # these have one other part
    assert all(q.startswith("<|im_end|>\n<|im_start|>user\n") for q in questions)
    assert all(q.endswith("<|im_end|>\n<|im_start|>assistant\n") for q in questions)
    assert not turns > 1 or questions[0].split("\n")[2].removesuffix("<|im_end|>") not in prompt.text
    unformatted = workload.write(request, plain)
    assert "<|im" not in plain.decode([i for ids in (unformatted.ids, *unformatted.follow) for i in ids])


def test_follow_is_the_template(smol):
    """First turn, answer and later turns, put together, are the template of the whole conversation."""
    tokenizer = smol.tokenizer
    asked = ["What is the price of drill-803?", "  And of the lamp?\nAnswer briefly.", "Thank you!"]
    answers = ["It is 187.", " A lamp costs 9\n"]
    ids = writing.opening(asked[:1], tokenizer)
    for answer, question in zip(answers, asked[1:], strict=True):
        ids += tokenizer(answer, add_special_tokens=False).input_ids + writing.following(question, tokenizer)
    assert ids == writing.opening([asked[0], answers[0], asked[1], answers[1], asked[2]], tokenizer)


def test_template_without_answers(plain):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(AdaptiveKVError, match="chat template: it leaves earlier answers out"):
        writing.following("And then?", tokenizer)
