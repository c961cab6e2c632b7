"""Grader specifications arrive from another machine: every mistake is one sentence."""

import pytest

from services.reward.graders import Permissions, build
from services.reward.spec import GraderSpec, as_json, parse_graders, parse_graders_text
from services.runtime.errors import ScoreError


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([], "names no grader"),
        ([{"weight": 1}], "needs a name"),
        ([{"name": "math", "wieght": 1}], "no key 'wieght'"),
        ([{"name": "math", "weight": "1"}], "finite number"),
        ([{"name": "math", "weight": True}], "finite number"),
        ([{"name": "math", "weight": float("nan")}], "finite number"),
        ([{"name": "math", "weight": 10**400}], "finite number"),
        ([{"name": "math", "options": []}], "must be an object"),
        ([3], "must be a name or an object"),
        (["math"] * 17, "at most 16"),
    ],
)
def test_a_malformed_specification_is_refused(value: object, sentence: str) -> None:
    with pytest.raises(ScoreError, match=sentence):
        parse_graders(value)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (GraderSpec(name="maths"), "did you mean math"),
        (GraderSpec(name="quux"), "known are math, exact"),
        (GraderSpec(name="math", options={"extrakt": "boxed"}), "did you mean extract"),
        (GraderSpec(name="math", options={"extract": "box"}), "option extract of the grader math"),
        (GraderSpec(name="math", options={"tolerance": -1}), "option tolerance"),
        (GraderSpec(name="regex"), "option pattern"),
        (GraderSpec(name="regex", options={"pattern": "("}), "not a regular expression"),
        (GraderSpec(name="format", options={"require": "pattern", "pattern": "["}), "not a regular expression"),
        (GraderSpec(name="python", options={"callable": "os:system"}), "does not allow functions of os"),
        (GraderSpec(name="python", options={"callable": "os.system"}), "package.module:function"),
        (GraderSpec(name="code"), "--allow-code"),
    ],
    ids=lambda value: value.name if isinstance(value, GraderSpec) else "",
)
def test_an_unknown_or_forbidden_grader_is_refused_when_it_is_built(spec: GraderSpec, sentence: str) -> None:
    with pytest.raises(ScoreError, match=sentence):
        build([spec], Permissions())


def test_a_module_allows_its_submodules_and_not_its_namesakes() -> None:
    allowed = Permissions(python=("rewards",))
    build([GraderSpec(name="python", options={"callable": "rewards.length:score"})], allowed)
    with pytest.raises(ScoreError, match="does not allow"):
        build([GraderSpec(name="python", options={"callable": "rewards_of_others:score"})], allowed)


def test_text_may_be_a_name_or_json() -> None:
    assert parse_graders_text("math") == (GraderSpec(name="math"),)
    assert parse_graders_text('{"name":"exact","weight":2}') == (GraderSpec(name="exact", weight=2.0),)
    with pytest.raises(ScoreError, match="not JSON"):
        parse_graders_text("[{")


def test_the_json_form_reads_back_as_it_was() -> None:
    specs = (GraderSpec(name="math", weight=0.5, options={"which": "all"}), GraderSpec(name="format"))
    assert parse_graders(as_json(specs)) == specs
