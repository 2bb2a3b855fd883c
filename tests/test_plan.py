"""The plan language: whatever prints parses back, whatever is wrong is named with its place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivekv import AdaptiveKVError, Plan
from adaptivekv.features import schema
from adaptivekv.policies import KINDS, STAGES
from adaptivekv.policies.base import NEEDS
from adaptivekv.policies.named import NAMED

share = st.floats(0.001, 1).map(lambda x: round(x, 4))
stage_text = {
    "evict": st.one_of(
        st.builds("streaming({})".format, share),
        st.builds("snapkv({}, window={}, pool={})".format, share, st.integers(1, 64), st.integers(1, 9)),
        st.builds("h2o(keep={}, sinks={})".format, share, st.integers(0, 9)),
    ),
    "quantize": st.builds(
        "{}(window={}, rotate={})".format,
        st.sampled_from(["int8", "int4", "k4v2", "int2"]), st.integers(0, 500), st.sampled_from(["true", "false"]),
    ),
    "offload": st.builds("offload({}{})".format, share, st.sampled_from(["", ", by=values", ", host=0.25"])),
    "retrieve": st.builds("retrieve({}{})".format, share, st.sampled_from(["", ", by=keys"])),
}  # fmt: skip
plans = st.sets(st.sampled_from(KINDS)).flatmap(
    lambda kinds: st.tuples(*(stage_text[kind] for kind in KINDS if kind in kinds)).map(" | ".join)
)


@given(plans)
def test_what_prints_parses_back(text):
    plan = Plan.parse(text or "full")
    assert Plan.parse(str(plan)) == plan
    assert [stage.kind for stage in plan.stages] == sorted((s.kind for s in plan.stages), key=KINDS.index)
    assert not set(schema.row(plan.features(), schema.PLAN_NAMES)) - set(plan.features().values())


@given(st.text(max_size=40))
def test_any_text_is_a_plan_or_one_line(text):
    try:
        assert Plan.parse(str(Plan.parse(text))) == Plan.parse(text)
    except AdaptiveKVError as error:
        assert "\n" not in str(error).replace(repr(text), "")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("snapvk(0.5)", ["position 1", "did you mean 'snapkv'"]),
        ("snapkv(0.5) | k4v3", ["position 15", "did you mean 'k4v2'"]),
        ("snapkv", ["position 1", "needs keep"]),
        ("snapkv(1.5)", ["keep=1.5", "at most 1"]),
        ("snapkv(0.5, windw=3)", ["'windw'", "did you mean 'window'"]),
        ("snapkv(0.5, keep=0.5)", ["twice"]),
        ("int4(window=two)", ["int4(window)", "not a number"]),
        ("int4 | snapkv(0.5)", ["snapkv", "cannot follow int4"]),
        ("int4 | int8", ["cannot follow"]),
        ("int4 |", ["position 7"]),
        ("", ["position 1"]),
        ("offload(0)", ["above 0"]),
    ],
)
def test_errors_name_place_and_fix(text, parts):
    with pytest.raises(AdaptiveKVError) as error:
        Plan.parse(text)
    for part in parts:
        assert part in str(error.value)


def test_named_plans_are_their_stages():
    for name, named in NAMED.items():
        plan = Plan.parse(name)
        assert plan == Plan.parse(named.plan) and str(plan) == named.plan and name not in STAGES
        assert named.paper.startswith("https://") and named.note
    with pytest.raises(AdaptiveKVError, match="did you mean 'rocketkv'"):
        Plan.parse("roketkv")


def test_every_stage_declares_itself():
    for stage in STAGES.values():
        assert stage.kind in KINDS and stage.paper.startswith("https://") and stage.formula
        assert stage.__doc__ and stage.needs <= NEEDS.keys()
