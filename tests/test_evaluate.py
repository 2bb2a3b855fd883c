"""Tasks with known answers, quality labels by replay, and the table of `evaluate`."""

import pytest
import torch

from adaptivekv import AdaptiveCache, AdaptiveKVError
from adaptivekv.controller import Controller
from adaptivekv.memory.shapes import DEVICE
from adaptivekv.trainer.branch import Branch
from adaptivekv.trainer.evaluate import COLUMNS, NEW, evaluate
from adaptivekv.trainer.replay import answer, reference, replay, replays
from adaptivekv.trainer.tasks import BOOK, TASKS, Task, haystack, make

LENGTH = 400
ROUNDING = 1e-6  # nats: known tokens are forced many at a time, sums in another order


@pytest.fixture(scope="module")
def book():
    return haystack()


@pytest.fixture(scope="module")
def needle(smol, book):
    return make("niah_single", LENGTH, smol.tokenizer, 1, book)


@pytest.fixture(scope="module", params=["aware", "agnostic"])
def read(request, smol, needle):
    document, question = needle.ids(smol.tokenizer)
    if request.param == "aware":
        document, question = document + question, []
    made = reference(smol, document, 6, question_ids=question, stop=True, plans=("snapkv(0.5, window=48)",))
    yield made
    made.cache.pool.check_integrity()
    made.free()


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_deterministic_fit_and_hold_their_answers(name, smol, book):
    for length in (LENGTH, 1500):
        task = make(name, length, smol.tokenizer, 7, book)
        assert task == make(name, length, smol.tokenizer, 7, book) != make(name, length, smol.tokenizer, 8, book)
        assert length - 100 <= sum(map(len, task.ids(smol.tokenizer))) <= length
        assert len(set(task.answers)) == len(task.answers) and all(answer in task.context for answer in task.answers)
        assert task.score(" and ".join(task.answers)) == 1 and task.score("no idea") == 0
    context = smol.tokenizer.decode(task.ids(smol.tokenizer)[0])
    assert task.context in context and task.question not in context


def test_needles_stand_between_sentences(smol, book):
    task = make("niah_multikey", 1500, smol.tokenizer, 3, book)
    assert task.context.count("The special magic number for the") == 4
    assert len({task.context.index(n) // 100 for n in task.answers}) == 1


def test_score_wants_whole_strings():
    task = Task("niah", "", "", ("7603660", "Ab"))
    assert task.score("7603660, ab.") == 1
    assert task.score("760 or 76036601") == 0
    assert task.score("AB!") == 0.5


def test_frequent_words_are_the_most_frequent(smol, book):
    for name in ("fwe", "cwe"):
        task = make(name, 1500, smol.tokenizer, 5, book)
        words = task.context.split("\n\n")[1].split()
        words = [w for w in words if w.isalpha()]
        best = sorted(set(words), key=words.count)[-len(task.answers) :]
        assert set(best) == set(task.answers)


def test_bad_tasks_and_haystacks(smol, book, tmp_path, monkeypatch):
    with pytest.raises(AdaptiveKVError, match=r"niah_singel.*did you mean 'niah_single'"):
        make("niah_singel", LENGTH, smol.tokenizer, 0, book)
    with pytest.raises(AdaptiveKVError, match="length=60: task vt needs at least"):
        make("vt", 60, smol.tokenizer, 0, book)
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes("déjà vu".encode("latin-1"))
    for name, message in {"empty": "empty", "latin": "not UTF-8", "none": "No such file"}.items():
        with pytest.raises(AdaptiveKVError, match=message) as error:
            haystack(tmp_path / name)
        assert "\n" not in str(error.value)
    assert BOOK.is_file()
    monkeypatch.setattr("adaptivekv.trainer.tasks.BOOK", tmp_path / "none")
    with pytest.raises(AdaptiveKVError, match="--haystack"):
        haystack()


def test_short_haystacks_go_round(smol):
    task = make("niah_single", LENGTH, smol.tokenizer, 0, "Call me Ishmael. It is a damp November.")
    assert sum(map(len, task.ids(smol.tokenizer))) > LENGTH - 50


# -- replay ------------------------------------------------------------------------------------------------------------


def test_full_loses_nothing_and_leaves_the_reference_as_it_was(read):
    pool, held = read.cache.pool, read.cache.sequences[0].bytes(DEVICE)
    used, seen = pool.device_used, read.cache.seen
    for plan in ("full", "snapkv(0.5, window=48) | k4v2", "offload(0.3)", "int4 | retrieve(0.5)"):
        run = replay(read, plan)
        assert run.plan == plan and len(run.kl) == len(read.tokens) and run.kl_worst == max(run.kl)
        assert len(pool.sequences) == 1 and read.cache.sequences[0].bytes(DEVICE) == held
        assert (pool.device_used, pool.host_used, read.cache.seen) == (used, 0, seen)
        pool.check_integrity()
    again = replay(read, "full", text=6)
    assert again.kl_mean < ROUNDING and again.flip_rate == 0 and again.text == read.text
    assert again.device_bytes == read.cache.sequences[0].bytes(DEVICE) - _ring(read) <= again.device_peak


def _ring(read):
    return sum(r.numel() * r.element_size() for r in read.cache.sequences[0].ring)


def test_losses_are_ordered_and_bytes_fall(read):
    full, int8, int2, offload = (replay(read, plan) for plan in ("full", "int8", "int2", "offload(0.3)"))
    assert 0 <= int8.kl_mean < 1e-4 < int2.kl_mean
    assert int2.device_bytes < int8.device_bytes < full.device_bytes
    assert offload.kl_mean < 1e-6 and offload.host_bytes > 0 and offload.device_bytes < full.device_bytes
    disk = replay(read, "offload(0.3, host=0.3)")
    assert (disk.device_bytes, disk.host_bytes) == (offload.device_bytes, offload.host_bytes)  # all that is below


def test_plans_that_differ_in_their_offload_alone_are_one_run(smol, book):
    """Whatever moves, losses, bytes and answers are those of a replay of each. A page is sealed on the way."""
    made = reference(smol, smol.tokenizer(book[:2000]).input_ids[:200], 12)
    plans = [
        "offload(0.3)", "full", "streaming(0.3) | int4 | offload(0.1)", "streaming(0.3) | int4",
        "int4 | offload(0.2, by=values) | retrieve(0.5, by=keys)",
    ]  # fmt: skip
    together = replays(made, plans, text=4, timed=1)
    assert list(together) == plans
    for name, run in together.items():
        alone = replay(made, name, text=4, timed=1)
        assert run.kl == pytest.approx(alone.kl, abs=ROUNDING) and (run.plan, run.text) == (alone.plan, alone.text)
        assert (run.device_bytes, run.host_bytes) == (alone.device_bytes, alone.host_bytes)
        assert (run.host_bytes > 0) == ("offload" in name) and run.step_ms > 0
    still = replays(made, plans[:3], host=0, timed=1)
    assert still["offload(0.3)"] is still["full"] and still[plans[2]].host_bytes == 0
    made.free()


def test_an_answer_of_its_own_goes_on_where_it_first_differs(smol, book):
    made = reference(smol, smol.tokenizer(book[:2000]).input_ids[:200], 24)
    run, (tokens, _) = replay(made, "streaming(0.3)", text=24), answer(made, "streaming(0.3)")
    assert run.flip_rate > 0 and tokens[0] == made.tokens[0] and tokens != made.tokens
    assert run.text == smol.tokenizer.decode(tokens, skip_special_tokens=True)
    made.free()


def test_eviction_sees_the_same_queries_as_a_cache_of_its_own(smol, needle):
    """A replay equals a fresh cache under the same plan, read in the same chunks."""
    document, question = needle.ids(smol.tokenizer)
    ids = document + question
    made = reference(smol, ids, 4)
    run = replay(made, "snapkv(0.5) | int4")
    cache = AdaptiveCache(smol.model, plan="snapkv(0.5) | int4", kv_dtype=torch.float16)
    losses = []
    with torch.inference_mode():
        rows = [(ids[i : i + 256], i) for i in range(0, len(ids), 256)]
        rows += [([token], len(ids) + i) for i, token in enumerate(made.tokens[:-1])]
        for part, at in rows:
            where = torch.arange(at, at + len(part))[None]
            out = smol.model(torch.tensor([part]), past_key_values=cache, position_ids=where).logits[0, -1]
            if at + len(part) >= len(ids):
                full, ours = made.logits[len(losses)], out.log_softmax(-1)
                losses.append(float((full.exp() * (full - ours)).sum()))
    assert losses == pytest.approx(run.kl, abs=1e-4)
    made.free()


def test_every_answer_of_a_conversation_counts(smol, needle, monkeypatch):
    """Forced many at a time or one by one, across a page that is sealed: the same losses."""
    document, question = needle.ids(smol.tokenizer)
    said = smol.tokenizer("\nAnd who speaks first in the text?", verbose=False).input_ids * 4
    made = reference(smol, document + question, 16, follow=[said])
    assert [len(turn.tokens) for turn in made.turns] == [16, 16] and made.turns[1].ids == said
    assert made.length == len(document + question + said) + 32 == made.full_bytes // 23_040
    whole = {plan: replay(made, plan) for plan in ("full", "snapkv(0.5) | int4", "k4v2 | offload(0.3)")}
    monkeypatch.setattr(Branch, "force", lambda run, tokens: (run.step([token]) for token in tokens))
    for plan, run in whole.items():
        single = replay(made, plan).kl
        assert len(single) == 32 and single == pytest.approx(run.kl, abs=2e-3)  # of a sealed page: rounds otherwise
    assert whole["full"].kl_worst < ROUNDING < whole["snapkv(0.5) | int4"].kl_mean
    assert max(whole["snapkv(0.5) | int4"].kl[17:]) > ROUNDING, "the second answer is judged too"
    made.free()


def test_an_answer_may_be_given(read):
    """The reference's own greedy tokens, given, are the same reference; others have the logits of others."""
    given = reference(read.loaded, read.ids, read.new, tokens=read.tokens, question_ids=read.question_ids)
    assert given.tokens == read.tokens and torch.allclose(given.logits, read.logits, atol=2e-2)
    given.free()
    other = reference(read.loaded, read.ids, 70, tokens=read.ids[:70], question_ids=read.question_ids)
    assert other.tokens == read.ids[:70] and (other.logits[1] - read.logits[1]).abs().max() > 1
    own = replay(other, "full", text=read.new)
    assert own.kl_worst < ROUNDING and own.text == read.text, "its own answer is its own, whatever was given"
    other.free()
    with pytest.raises(AdaptiveKVError, match="new=2: the answer has 3 tokens"):
        reference(read.loaded, read.ids, 2, tokens=[1, 2, 3])


def test_a_budget_holds_and_the_controller_decides(read):
    run = replay(read, Controller(quality=0.03), budget=0.75)
    assert run.device_peak <= run.budget == int(0.75 * read.cache.requests[0].full)
    assert [d.moment for d in run.decisions][:2] == ["admission", "prefill"] and run.decisions[1].features
    assert replay(read, "full", budget=0.75).host_bytes > 0
    twice = [replay(read, Controller(epsilon=0.9, seed=2), text=6) for _ in range(2)]
    assert twice[0].plan == twice[1].plan and twice[0].kl == twice[1].kl and twice[0].text == twice[1].text


def test_replay_refuses(smol, read):
    with pytest.raises(AdaptiveKVError, match="did you mean 'int8'"):
        replay(read, "int88")
    with pytest.raises(AdaptiveKVError, match="window=99"):
        replay(read, "snapkv(0.5, window=99)")
    with pytest.raises(AdaptiveKVError, match="too small"):
        replay(read, "full", budget=4096)
    read.cache.pool.check_integrity()
    for ids, new, message in (([], 4, "empty prompt"), ([5], 0, "new=0"), ([5] * 8192, 1, "8192 positions")):
        with pytest.raises(AdaptiveKVError, match=message):
            reference(smol, ids, new)
    overflow = smol.model.lm_head.register_forward_hook(lambda module, args, logits: logits * torch.inf)
    with pytest.raises(AdaptiveKVError, match=r"not numbers in torch\.float32"):
        reference(smol, [5] * 8, 4)
    overflow.remove()


# -- evaluate ----------------------------------------------------------------------------------------------------------


def test_rows(smol):
    steps = []
    rows = evaluate(
        smol, ["full", "int8", "adaptive"], ["niah_single"], [LENGTH], 1, selector="rules",
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert [row["plan"] for row in rows] == ["full", "int8", "adaptive"] and len(steps) == 3 and steps[-1] == (3, 3)
    for row in rows:
        assert tuple(row) == COLUMNS
        assert (row["task"], row["length"], row["samples"]) == ("niah_single", LENGTH, 1)
        assert 0 <= row["score"] <= 1 and 0 <= row["kl"] <= row["kl_worst"] and row["seconds"] > 0
        assert 0 < row["kv_bytes_end"] <= row["kv_bytes_peak"]
    full, int8, _ = rows
    assert full["score"] == 1 and full["kl"] < ROUNDING and full["flip_rate"] == 0
    assert int8["kl"] < 1e-3 and int8["kv_ratio"] < full["kv_ratio"] < 1.3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"plans": ["snapvk(0.5)"]}, "did you mean 'snapkv'"),
        ({"plans": []}, "plans: give at least one"),
        ({"tasks": ["niah"]}, "tasks: unknown task 'niah'; did you mean 'niah_single'"),
        ({"lengths": [8192]}, f"lengths: 8192 is too long, at most {8192 - NEW}"),
        ({"lengths": [0]}, "lengths: 0"),
        ({"lengths": [30]}, "length=30: task niah_single needs"),
        ({"samples": 0}, "samples=0: at least 1"),
        ({"haystack": " "}, "haystack: empty"),
        ({"budget": "lots"}, "budget 'lots'"),
        ({"selector": "no/such/policy"}, "policy no/such/policy"),
    ],
)
def test_bad_input_is_one_line(smol, change, message):
    arguments = {"plans": ["adaptive"], "tasks": ["niah_single"], "lengths": [LENGTH], "samples": 1} | change
    with pytest.raises(AdaptiveKVError, match="(?s)" + message.replace("(", "\\(")) as error:
        evaluate(smol, **arguments)
    assert "\n" not in str(error.value)
