import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.learner.admission import Fault, Inspected, LeaseFacts, Standing, inspect, judge
from services.learner.published import PublishedVersions
from services.wire.convert import encode_group
from services.wire.types import (
    Lease,
    LeasePurpose,
    Prompt,
    ScoredGroup,
    VerdictCode,
    VersionSpan,
)
from tests.support.data_side import FORM, completion, envelope, group_for, root, with_completion

PROMPT = Prompt(prompt_id="0-abc", text="1 + 1?", answer="2")
LEASE = Lease(
    lease_id="1-t0-1",
    ttl_ms=1000,
    prompt=PROMPT,
    group_size=2,
    purpose=LeasePurpose.TRAIN,
    min_policy_version=3,
    seed=1,
)
GROUP = group_for(LEASE)
EVAL_LEASE = replace(LEASE, lease_id="1-e1.0-1", purpose=LeasePurpose.EVAL, eval_round=1)
OPEN = LeaseFacts(standing=Standing.OPEN, prompt=PROMPT, group_size=2)
OPEN_EVAL = replace(OPEN, purpose=LeasePurpose.EVAL, eval_round=1, min_policy_version=3)


def versions(newest: int = 4) -> PublishedVersions:
    known = PublishedVersions()
    for version in range(newest + 1):
        known.publish(version, root(version))
    return known


def verdict(group: ScoredGroup, facts: LeaseFacts = OPEN, newest: int = 4, max_staleness: int = 2) -> tuple[str, str]:
    judgement = judge(group, facts, versions(newest), max_staleness)
    return judgement.code.name, judgement.reason


def test_an_honest_group_is_accepted() -> None:
    assert inspect(envelope(1, GROUP), FORM) == Inspected(group=GROUP)
    assert verdict(GROUP) == ("ACCEPTED", "")


FAULTY = {
    Fault.NO_COMPLETIONS: replace(GROUP, completions=()),
    Fault.EMPTY_COMPLETION: with_completion(GROUP, token_ids=(), sampler_logprobs=()),
    Fault.EMPTY_PROMPT: replace(GROUP, prompt_token_ids=()),
    Fault.PROMPT_TOO_LONG: replace(GROUP, prompt_token_ids=(1,) * 17),
    Fault.COMPLETION_TOO_LONG: replace(GROUP, completions=(completion(9),) * 2),
    Fault.LENGTH_MISMATCH: with_completion(GROUP, sampler_logprobs=(-1.0,)),
    Fault.LOGPROB_POSITIVE: with_completion(GROUP, sampler_logprobs=(-1.0, 0.01, -1.0)),
    Fault.WRONG_TEMPERATURE: replace(GROUP, temperature=0.7),
}


def test_the_protocol_page_names_every_reason() -> None:
    page = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
    assert [fault for fault in Fault if fault.value not in page] == []


@pytest.mark.parametrize("fault", FAULTY)
def test_each_fault_of_form_has_its_reason(fault: Fault) -> None:
    assert inspect(envelope(1, FAULTY[fault]), FORM).fault is fault


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_invalid(value: float) -> None:
    bad = with_completion(GROUP, sampler_logprobs=(-1.0, value, -1.0))
    assert inspect(envelope(1, bad), FORM).fault is Fault.LOGPROB_NOT_FINITE
    assert inspect(envelope(1, with_completion(GROUP, reward=value)), FORM).fault is Fault.REWARD_NOT_FINITE
    scored = with_completion(GROUP, grader_scores={"math": value})
    assert inspect(envelope(1, scored), FORM).fault is Fault.REWARD_NOT_FINITE
    assert inspect(envelope(1, replace(GROUP, temperature=value)), FORM).fault is Fault.WRONG_TEMPERATURE


@pytest.mark.parametrize("value", [1.1e12, -3e38])
def test_a_reward_that_would_break_a_step_is_invalid(value: float) -> None:
    assert inspect(envelope(1, with_completion(GROUP, reward=value)), FORM).fault is Fault.REWARD_TOO_LARGE
    scored = with_completion(GROUP, grader_scores={"math": value})
    assert inspect(envelope(1, scored), FORM).fault is Fault.REWARD_TOO_LARGE
    assert inspect(envelope(1, with_completion(GROUP, reward=-1e9)), FORM).fault is None


@pytest.mark.parametrize("token", [100, (1 << 32) - 1])
def test_a_token_at_or_above_the_vocabulary_is_invalid(token: int) -> None:
    in_completion = with_completion(GROUP, token_ids=(1, token, 2))
    in_prompt = replace(GROUP, prompt_token_ids=(token,))
    for bad in (in_completion, in_prompt):
        assert inspect(envelope(1, bad), FORM).fault is Fault.TOKEN_OUT_OF_VOCABULARY
    assert inspect(envelope(1, with_completion(GROUP, token_ids=(1, 99, 2))), FORM).fault is None


@pytest.mark.parametrize(
    "spans",
    [[(2, 3)], [(3, 2)], [(1, 4), (3, 3)], [(0, 3), (3, 3)], [(2, 3), (2, 4)], [(3, 3), (4, 4)], [(4, 3)]],
    ids=str,
)
def test_version_spans_must_tile_the_tokens_and_never_fall(spans: list[tuple[int, int]]) -> None:
    given = tuple(VersionSpan(end=end, policy_version=version) for end, version in spans)
    assert inspect(envelope(1, with_completion(GROUP, version_spans=given)), FORM).fault is Fault.BAD_VERSION_SPANS


def test_sound_version_spans_pass_and_must_be_published() -> None:
    def spanned(newest: int) -> ScoredGroup:
        spans = (VersionSpan(end=1, policy_version=3), VersionSpan(end=3, policy_version=newest))
        return with_completion(GROUP, version_spans=spans)

    assert inspect(envelope(1, spanned(4)), FORM).fault is None
    assert verdict(spanned(4)) == ("ACCEPTED", "")
    assert verdict(spanned(5)) == ("FUTURE_VERSION", "")


def test_what_the_bytes_claim_is_checked_before_they_are_read() -> None:
    good = envelope(1, GROUP)
    assert inspect(replace(good, payload=good.payload + b"\0"), FORM).fault is Fault.DIGEST_MISMATCH
    assert inspect(replace(good, content_sha256=b""), FORM).fault is Fault.DIGEST_MISMATCH
    for bad_id in ("", "x" * 65, "a\nb", "é"):
        assert inspect(replace(good, group_id=bad_id), FORM).fault is Fault.BAD_GROUP_ID
    assert inspect(envelope(1, b"\x08"), FORM).fault is Fault.DOES_NOT_PARSE
    unspecified = encode_group(GROUP).replace(bytes([0x18, LeasePurpose.TRAIN.value]), bytes([0x18, 0]), 1)
    assert inspect(envelope(1, unspecified), FORM).fault is Fault.DOES_NOT_PARSE


@given(st.binary(max_size=300))
def test_any_bytes_get_a_fault_or_a_group_and_never_an_exception(payload: bytes) -> None:
    found = inspect(envelope(1, payload), FORM)
    assert found.fault is not None or found.group is not None


@given(st.data())
def test_a_damaged_group_never_raises(data: st.DataObject) -> None:
    payload = bytearray(encode_group(GROUP))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    found = inspect(envelope(1, bytes(payload)), FORM)
    if found.fault is None and found.group is not None:
        assert verdict(found.group)[0] in VerdictCode.__members__


def test_the_lease_decides_what_form_cannot() -> None:
    assert verdict(GROUP, LeaseFacts(standing=Standing.NEVER)) == ("INVALID", Fault.NEVER_LEASED)
    assert verdict(GROUP, LeaseFacts(standing=Standing.OVER)) == ("LEASE_LOST", "")
    assert verdict(replace(GROUP, prompt_id="1-abc")) == ("INVALID", Fault.OTHER_PROMPT)
    assert verdict(replace(GROUP, purpose=LeasePurpose.EVAL)) == ("INVALID", Fault.OTHER_PURPOSE)
    assert verdict(replace(GROUP, eval_round=1)) == ("INVALID", Fault.OTHER_PURPOSE)
    assert verdict(replace(GROUP, completions=GROUP.completions * 2)) == ("INVALID", Fault.WRONG_GROUP_SIZE)


def test_staleness_at_arrival_is_refused_beyond_the_bound_only() -> None:
    assert verdict(GROUP, newest=5) == ("ACCEPTED", "")
    assert verdict(GROUP, newest=6) == ("STALE", "")


@pytest.mark.parametrize("version", [5, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_version_above_the_learners_is_set_aside(version: int) -> None:
    assert verdict(replace(GROUP, policy_version=version)) == ("FUTURE_VERSION", "")


def test_a_version_with_other_weights_is_invalid_whatever_the_lease_says() -> None:
    lying = replace(GROUP, policy_root=root(99))
    assert verdict(lying) == ("INVALID", Fault.UNKNOWN_ROOT)
    assert verdict(lying, LeaseFacts(standing=Standing.OVER)) == ("INVALID", Fault.UNKNOWN_ROOT)


def test_weights_that_a_restore_undid_are_told_apart_from_unknown_ones() -> None:
    known = versions(4)
    known.roll_back(2)
    known.publish(3, root(33))
    judgement = judge(GROUP, OPEN, known, 2)
    assert (judgement.code, judgement.reason) == (VerdictCode.FUTURE_VERSION, "ROLLED_BACK")


def test_an_evaluation_may_be_newer_than_its_round_but_not_older_and_never_stale() -> None:
    answer = group_for(EVAL_LEASE)
    assert inspect(envelope(1, answer), FORM).fault is None
    assert verdict(answer, OPEN_EVAL, newest=50) == ("ACCEPTED", "")
    older = replace(answer, policy_version=2, policy_root=root(2))
    assert verdict(older, OPEN_EVAL) == ("INVALID", Fault.VERSION_TOO_OLD_FOR_LEASE)
    assert verdict(replace(answer, eval_round=2), OPEN_EVAL) == ("INVALID", Fault.OTHER_PURPOSE)
