import contextlib
import math
from dataclasses import replace

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from heterorl.v1 import control_pb2, rollouts_pb2, types_pb2, weights_pb2
from services.runtime.errors import BadInputError, CorruptObjectError
from services.wire import convert
from services.wire import types as t

ids = st.text(max_size=40)
counts = st.integers(min_value=0, max_value=2**64 - 1)
float32 = st.floats(width=32, allow_nan=False)
object_refs = st.builds(
    t.ObjectRef, object_id=st.text(alphabet="0123456789abcdef", min_size=64, max_size=64), size_bytes=counts
)


@st.composite
def completions(draw: st.DrawFn) -> t.Completion:
    length = draw(st.integers(min_value=0, max_value=5))
    return t.Completion(
        token_ids=tuple(draw(st.lists(st.integers(0, 2**32 - 1), min_size=length, max_size=length))),
        sampler_logprobs=tuple(draw(st.lists(float32, min_size=length, max_size=length))),
        reward=draw(float32),
        finish_reason=draw(st.sampled_from(t.FinishReason)),
        version_spans=tuple(
            draw(st.lists(st.builds(t.VersionSpan, end=st.integers(0, 2**32 - 1), policy_version=counts), max_size=2))
        ),
        grader_scores=draw(st.dictionaries(ids, float32, max_size=2)),
    )


groups = st.builds(
    t.ScoredGroup,
    lease_id=ids,
    prompt_id=ids,
    purpose=st.sampled_from(t.LeasePurpose),
    policy_version=counts,
    policy_root=ids,
    prompt_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple),
    completions=st.lists(completions(), max_size=3).map(tuple),
    generation_s=st.floats(allow_nan=False),
    scoring_s=st.floats(allow_nan=False),
    temperature=st.floats(allow_nan=False),
    seed=counts,
    eval_round=counts,
)


@given(groups)
def test_a_group_survives_its_payload(group: t.ScoredGroup):
    assert convert.decode_group(convert.encode_group(group)) == group


@given(st.binary(max_size=200))
def test_any_bytes_either_decode_or_are_bad_input(data: bytes):
    for decode in (convert.decode_group, convert.decode_manifest):
        with contextlib.suppress(BadInputError):
            decode(data)


@given(
    st.builds(
        t.Lease,
        lease_id=ids,
        ttl_ms=st.integers(0, 2**32 - 1),
        prompt=st.builds(t.Prompt, prompt_id=ids, text=ids, answer=ids, metadata_json=ids),
        group_size=st.integers(0, 2**32 - 1),
        purpose=st.sampled_from(t.LeasePurpose),
        min_policy_version=counts,
        seed=counts,
        eval_round=counts,
    )
)
def test_a_lease_survives_the_wire(lease: t.Lease):
    message = control_pb2.Lease.FromString(convert.to_lease(lease).SerializeToString())
    assert convert.from_lease(message) == lease


def manifest(version: int) -> t.Manifest:
    return t.Manifest(
        run_id="run",
        learner_epoch=1,
        version=version,
        root="ab",
        parent_root="cd",
        full_bytes=10,
        parameters=5,
        changed=1,
        model_files_sha256="ef",
        published_unix_ms=1,
        update_bytes=3,
    )


@given(st.lists(object_refs, max_size=3), counts)
def test_a_plan_survives_the_wire_and_knows_its_bytes(refs: list[t.ObjectRef], version: int):
    whole = replace(manifest(version), full_bytes=min(2**64 - 1, sum(ref.size_bytes for ref in refs)))
    signed = t.SignedManifest(manifest=convert.encode_manifest(whole), signature=b"s", decoded=whole)
    step = t.PlanStep(
        kind=t.UpdateKind.DELTA, base_root="a", target_root="b", target_version=version, objects=tuple(refs)
    )
    plan = t.Plan(target=signed, steps=(step,))
    if plan.total_bytes < 2**64:
        message = weights_pb2.GetPlanResponse.FromString(convert.to_plan(plan).SerializeToString())
        assert convert.from_plan(message) == plan
        assert message.total_bytes == plan.total_bytes


@given(st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), min_size=1, max_size=4))
def test_edited_announcements_and_plans_either_decode_or_are_bad_input(edits: list[tuple[float, bytes]]):
    signed = weights_pb2.SignedManifest(manifest=convert.encode_manifest(manifest(3)), signature=b"s" * 64)
    refs = [types_pb2.ObjectRef(object_id=digit * 64, size_bytes=3) for digit in "ab"]
    step = weights_pb2.PlanStep(
        kind=weights_pb2.UPDATE_KIND_DELTA, base_root="cd", target_root="ab", target_version=3, objects=refs
    )
    coming = weights_pb2.ComingUpdate(base_root="ab", target_root="ef", target_version=4, first=1, objects=refs)
    announced = weights_pb2.WatchPolicyResponse(manifest=signed, update=step, coming=coming)
    planned = weights_pb2.GetPlanResponse(target=signed, steps=[step], total_bytes=6)
    for message, decode in ((announced, convert.from_announcement), (planned, convert.from_plan)):
        data = message.SerializeToString()
        for where, extra in edits:
            at = int(where * len(data))
            data = data[:at] + extra + data[at + len(extra) :]
        try:
            parsed = type(message).FromString(data)
        except (DecodeError, ValueError):  # gRPC refuses it
            continue
        with contextlib.suppress(BadInputError):
            decode(parsed)


@pytest.mark.parametrize("size_bytes", [65 << 20, 1 << 40, 2**64 - 1])
def test_a_plan_of_more_bytes_than_its_weights_can_need_is_refused(size_bytes: int):
    ref = types_pb2.ObjectRef(object_id="0" * 64, size_bytes=size_bytes)
    step = weights_pb2.PlanStep(kind=weights_pb2.UPDATE_KIND_KEYFRAME, objects=[ref])
    message = weights_pb2.GetPlanResponse(steps=[step])
    message.target.manifest = convert.encode_manifest(manifest(1))
    with pytest.raises(CorruptObjectError, match="keyframe"):
        convert.from_plan(message)


def test_a_report_survives_the_wire_with_and_without_its_optional_parts():
    session = t.Session(run_id="r", sampler_id="s", learner_epoch=1, session_epoch=2)
    bare = t.SamplerReport(state=t.SamplerState.GENERATING, policy_version=3, policy_root="ab")
    full = t.SamplerReport(
        state=t.SamplerState.SWAPPING,
        policy_version=3,
        policy_root="ab",
        lease_ids=("x", "y"),
        tokens_per_s=2.5,
        fetch=t.FetchProgress(target_version=4, bytes_done=1, bytes_total=2, bytes_per_s=0.5),
        groups_dropped={"scoring_failed": 2},
        engine=t.EngineInfo(kind="vllm", version="1", device="cpu", dtype="bfloat16"),
    )
    for report in (bare, full):
        assert convert.from_heartbeat(convert.to_heartbeat(session, report)) == report
    assert convert.from_session(convert.to_heartbeat(session, bare).session) == session


def test_what_a_report_makes_the_learner_keep_is_bounded():
    flood = "x" * 100_000
    message = control_pb2.HeartbeatRequest(
        state=types_pb2.SAMPLER_STATE_GENERATING,
        policy_root=flood,
        groups_dropped={f"\x1b[2J{flood}{n}": 1 for n in range(1000)},
        engine=control_pb2.EngineInfo(kind=flood, version=flood, device=flood, dtype=flood),
    )
    kept = convert.to_heartbeat(
        t.Session(run_id="run", sampler_id="evil", learner_epoch=1, session_epoch=1), convert.from_heartbeat(message)
    )
    assert kept.ByteSize() < 20_000
    assert all(reason.isprintable() for reason in kept.groups_dropped), "it is shown on terminals"


def test_more_leases_than_a_sampler_can_hold_are_refused():
    message = control_pb2.HeartbeatRequest(state=types_pb2.SAMPLER_STATE_GENERATING, lease_ids=["l"] * 16_384)
    assert len(convert.from_heartbeat(message).lease_ids) == 16_384
    message.lease_ids.append("l")
    with pytest.raises(BadInputError, match="at most 16384 leases"):
        convert.from_heartbeat(message)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e300])
def test_a_speed_that_nobody_can_have_measured_counts_as_none(value: float):
    message = control_pb2.HeartbeatRequest(
        state=types_pb2.SAMPLER_STATE_GENERATING,
        tokens_per_s=value,
        last_swap_pause_ms=value,
        fetch=control_pb2.FetchProgress(bytes_per_s=value),
    )
    report = convert.from_heartbeat(message)
    assert report.fetch is not None
    assert (report.tokens_per_s, report.last_swap_pause_ms, report.fetch.bytes_per_s) == (0.0, 0.0, 0.0)


def test_a_million_empty_completions_are_refused_before_they_become_objects():
    group = rollouts_pb2.ScoredGroup(purpose=types_pb2.LEASE_PURPOSE_TRAIN)
    group.completions.extend([rollouts_pb2.Completion(finish_reason=1)] * 70_000)
    with pytest.raises(BadInputError, match="70000 completions"):
        convert.decode_group(group.SerializeToString())


def test_verdicts_survive_the_wire():
    for verdict in (
        t.Verdict(seq=1, code=t.VerdictCode.ACCEPTED),
        t.Verdict(seq=2**63, code=t.VerdictCode.DUPLICATE, reason="x", first=t.VerdictCode.STALE),
    ):
        assert convert.from_verdict(convert.to_verdict(verdict)) == verdict


@pytest.mark.parametrize("code", [0, 99])
def test_unspecified_and_unknown_enum_values_are_refused(code: int):
    with pytest.raises(BadInputError, match="not known"):
        convert.from_verdict(rollouts_pb2.Verdict(seq=1, code=code))


@pytest.mark.parametrize("object_id", ["", "AB" * 32, "../../etc/passwd", "a" * 63, "g" * 64])
def test_an_object_id_that_could_be_a_path_is_refused(object_id: str):
    with pytest.raises(BadInputError, match="64 lower-case hex digits"):
        convert.from_object(types_pb2.ObjectRef(object_id=object_id))


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\\b", ".hidden", "x" * 129, "naïve.json", "nul\0"])
def test_a_model_file_name_that_is_not_a_plain_file_name_is_refused(name: str):
    settings = control_pb2.RunSettings(
        model_files=[types_pb2.ModelFile(name=name, object=types_pb2.ObjectRef(object_id="a" * 64))]
    )
    with pytest.raises(BadInputError, match="not a plain file name"):
        convert.from_run_settings(settings)


def test_nan_and_infinite_rewards_reach_the_judge_as_they_are():
    completion = t.Completion(
        token_ids=(1,), sampler_logprobs=(-math.inf,), reward=math.nan, finish_reason=t.FinishReason.STOP
    )
    group = t.ScoredGroup(
        lease_id="l",
        prompt_id="p",
        purpose=t.LeasePurpose.TRAIN,
        policy_version=0,
        policy_root="",
        prompt_token_ids=(1,),
        completions=(completion,),
        generation_s=0.0,
        scoring_s=0.0,
        temperature=1.0,
        seed=0,
    )
    back = convert.decode_group(convert.encode_group(group)).completions[0]
    assert math.isnan(back.reward)
    assert back.sampler_logprobs == (-math.inf,)
