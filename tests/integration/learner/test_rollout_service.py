"""Exactly once, over a real stream and a real journal: acknowledged groups are trained once, whatever breaks."""

import asyncio
from pathlib import Path

import grpc
import pytest

from heterorl.v1 import rollouts_pb2
from services.learner import submit_stream
from services.learner.admission import Fault
from services.learner.submit_stream import SubmitStream
from services.runtime.errors import BadInputError, FencedError, MismatchError, SessionLostError
from services.wire.convert import to_session
from services.wire.errors import from_rpc_error
from services.wire.types import VerdictCode
from tests.integration.learner.learner_of_tests import running_learner, sampler
from tests.support.data_side import RUN, envelope, group_for, root, settings, with_completion


async def test_groups_are_acknowledged_and_come_out_as_a_batch(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        leases = await one.lease(2)
        stream = await one.open_stream()
        assert stream.welcome.last_committed_seq == 0
        verdicts = await stream.verdicts_for(*(envelope(n, group_for(lease)) for n, lease in enumerate(leases, 1)))
        assert [(v.seq, v.code) for v in verdicts] == [(1, VerdictCode.ACCEPTED), (2, VerdictCode.ACCEPTED)]
        batch = await learner.plane.take_batch(2, 0)
        assert [group.group.lease_id for group in batch.groups] == [lease.lease_id for lease in leases]
        await learner.plane.mark_trained(batch, 1)
        tally = learner.plane.tally
        assert (tally.acknowledged, tally.trained, tally.buffered, tally.staleness) == (2, 2, 0, {0: 2})


async def test_a_group_sent_again_after_a_lost_acknowledgement_is_trained_once(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        lease = (await one.lease(1))[0]
        sent = envelope(1, group_for(lease))
        first = await one.open_stream()
        await first.send(sent, envelope(3, b""))  # a gap: its Rewind says that the one before was read
        while (await first.read()).WhichOneof("message") != "rewind":
            pass
        first.call.cancel()  # whether its acknowledgement came or not, the sampler has forgotten it
        second = await one.open_stream()
        assert second.welcome.last_committed_seq == 1
        verdict = (await second.verdicts_for(sent))[0]
        assert (verdict.code, verdict.first) == (VerdictCode.DUPLICATE, VerdictCode.ACCEPTED)
        assert (len(learner.plane.buffer), learner.plane.tally.duplicates) == (1, 1)


async def test_a_commit_survives_the_death_of_its_stream(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        leases = await one.lease(2)
        stream = await one.open_stream()
        await stream.send(*(envelope(n, group_for(lease)) for n, lease in enumerate(leases, 1)))
        await stream.send(envelope(4, b""))  # a gap: its Rewind says that the two before were read
        while (await stream.read()).WhichOneof("message") != "rewind":
            pass
        stream.call.cancel()
        again = await one.open_stream()
        assert again.welcome.last_committed_seq == 2


async def test_a_gap_is_rewound_and_nothing_beyond_it_is_taken(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        leases = await one.lease(3)
        sent = [envelope(n, group_for(lease)) for n, lease in enumerate(leases, 1)]
        stream = await one.open_stream()
        await stream.verdicts_for(sent[0])
        await stream.send(sent[2], envelope(4, b""))
        message = await stream.read()
        assert message.rewind.expected_seq == 2
        verdicts = await stream.verdicts_for(sent[1], sent[2])
        assert [v.code for v in verdicts] == [VerdictCode.ACCEPTED] * 2
        assert learner.plane.tally.acknowledged == 3


async def test_the_same_id_with_other_content_is_invalid_and_the_stream_lives(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        first, second = await one.lease(2)
        stream = await one.open_stream()
        verdicts = await stream.verdicts_for(
            envelope(1, group_for(first), "an-id"), envelope(2, group_for(first, reward=0.0), "an-id")
        )
        assert (verdicts[1].code, verdicts[1].reason) == (VerdictCode.INVALID, Fault.ID_REUSE)
        again = await stream.verdicts_for(envelope(2, group_for(first, reward=0.0), "an-id"))
        assert (again[0].code, again[0].first) == (VerdictCode.DUPLICATE, VerdictCode.INVALID)
        assert (await stream.verdicts_for(envelope(3, group_for(second))))[0].code is VerdictCode.ACCEPTED
        tally = learner.plane.tally
        assert (tally.acknowledged, tally.buffered, tally.dropped) == (3, 2, {"INVALID/ID_REUSE": 1})


async def test_a_sampler_that_counts_anew_within_its_old_spool_is_told_so(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        first, second = await one.lease(2)
        sent = envelope(1, group_for(first), "an-id")
        stream = await one.open_stream()
        assert (await stream.verdicts_for(sent))[0].code is VerdictCode.ACCEPTED
        other = envelope(1, group_for(second), "another-id")
        lost, known = await stream.verdicts_for(other, sent)
        assert (lost.code, lost.reason) == (VerdictCode.INVALID, Fault.ID_REUSE)
        assert (known.code, known.first) == (VerdictCode.DUPLICATE, VerdictCode.ACCEPTED)
        await stream.verdicts_for(*[other] * 8)
        assert (await one.lease_response(1)).reason == "paused"  # in quarantine, where operators see it


async def test_a_group_that_comes_again_from_another_spool_is_a_duplicate(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        group = group_for((await one.lease(1))[0])
        await (await one.open_stream()).verdicts_for(envelope(1, group, "an-id"))
        other = await one.open_stream("a-new-spool")
        assert other.welcome.last_committed_seq == 0
        assert (await other.verdicts_for(envelope(1, group, "an-id")))[0].code is VerdictCode.DUPLICATE
        assert learner.plane.tally.buffered == 1


async def test_one_bad_group_does_not_end_the_stream_and_frees_its_prompt(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        lease = (await one.lease(1))[0]
        bad = with_completion(group_for(lease), sampler_logprobs=(0.1, 0.1, 0.1))
        stream = await one.open_stream()
        verdicts = await stream.verdicts_for(envelope(1, bad), envelope(2, b"\xff\xff"))
        assert [v.reason for v in verdicts] == [Fault.LOGPROB_POSITIVE, Fault.DOES_NOT_PARSE]
        again = (await one.lease(1))[0]
        assert again.prompt == lease.prompt
        assert again.lease_id != lease.lease_id
        assert (await stream.verdicts_for(envelope(3, group_for(again))))[0].code is VerdictCode.ACCEPTED


async def test_a_late_group_counts_until_somebody_else_has_answered(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one, sampler(learner, "us-1") as two:
        await learner.plane.advance(0, root(0))
        held = (await one.lease(1))[0]
        learner.clock.advance(31)  # the session of `one` is lost, and its leases with it
        await two.heartbeat([])
        granted = (await two.lease(1))[0]
        assert granted.prompt == held.prompt
        late, early = await one.open_stream(), await two.open_stream()
        assert (await early.verdicts_for(envelope(1, group_for(granted))))[0].code is VerdictCode.ACCEPTED
        assert (await late.verdicts_for(envelope(1, group_for(held))))[0].code is VerdictCode.LEASE_LOST
        assert learner.plane.tally.dropped == {"LEASE_LOST": 1}


async def test_a_fenced_session_ends_its_stream_and_the_newer_one_goes_on(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as old, sampler(learner) as new:
        await learner.plane.advance(0, root(0))
        old_stream = old.rollouts.SubmitGroups()
        hello = rollouts_pb2.SubmitHello(session=to_session(old.session), spool_id=old.spool_id)
        await old_stream.write(rollouts_pb2.SubmitGroupsRequest(hello=hello))
        with pytest.raises(FencedError, match="newer process"):
            await raised_by(old_stream)
        stream = await new.open_stream()
        lease = (await new.lease(1))[0]
        assert (await stream.verdicts_for(envelope(1, group_for(lease))))[0].code is VerdictCode.ACCEPTED


async def test_an_open_stream_is_fenced_by_a_newer_registration(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as old:
        await learner.plane.advance(0, root(0))
        lease = (await old.lease(1))[0]
        stream = await old.open_stream()
        async with sampler(learner):
            await stream.send(envelope(1, group_for(lease)))
            with pytest.raises(FencedError, match="newer process"):
                await raised_by(stream.call)
        assert learner.plane.tally.acknowledged == 0


async def test_a_newer_stream_of_the_same_sampler_ends_the_older(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        older = await one.open_stream()
        await one.open_stream()
        assert (await older.read()).go_away.reason == "a newer stream of this sampler was opened"
        assert await older.read() is grpc.aio.EOF


async def test_a_drain_acknowledges_what_was_sent_and_says_go_away(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        lease = (await one.lease(1))[0]
        stream = await one.open_stream()
        await stream.verdicts_for(envelope(1, group_for(lease)))
        learner.drain.set()
        assert (await stream.read()).go_away.reason
        assert await stream.read() is grpc.aio.EOF


async def test_a_stream_without_hello_is_cut(tmp_path: Path) -> None:
    async with running_learner(tmp_path, hello_timeout_s=0.1) as learner, sampler(learner) as one:
        silent = one.rollouts.SubmitGroups()
        await silent.wait_for_connection()
        assert await silent.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        rude = one.rollouts.SubmitGroups()
        await rude.write(rollouts_pb2.SubmitGroupsRequest(group=rollouts_pb2.GroupEnvelope(seq=1)))
        with pytest.raises(BadInputError, match="begins with Hello"):
            await raised_by(rude)


async def test_sequence_numbers_at_the_edge_of_64_bits_do_no_harm(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        for seq in (0, (1 << 63), (1 << 64) - 1):
            stream = await one.open_stream()
            await stream.send(envelope(seq, b""))
            with pytest.raises(BadInputError, match="seq"):
                await raised_by(stream.call)
        stream = await one.open_stream()
        await stream.send(envelope(1 << 62, b""))
        assert (await stream.read()).rewind.expected_seq == 1


async def test_a_spool_of_another_run_is_refused(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await one.register(last_run_id="another-run")
        call = one.rollouts.SubmitGroups()
        hello = rollouts_pb2.SubmitHello(session=to_session(one.session), spool_id=one.spool_id)
        await call.write(rollouts_pb2.SubmitGroupsRequest(hello=hello))
        with pytest.raises(MismatchError, match="another run"):
            await raised_by(call)
        await one.open_stream("a-fresh-spool")


async def test_a_restarted_learner_knows_every_group_it_acknowledged(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        leases = await one.lease(3)
        sent = [envelope(n, group_for(lease)) for n, lease in enumerate(leases, 1)]
        await (await one.open_stream()).verdicts_for(*sent[:2])
        old = one.session
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        assert learner.plane.learner_epoch == old.learner_epoch + 1
        await learner.plane.advance(0, root(0))
        session, one.session = one.session, old
        with pytest.raises(SessionLostError, match="register again"):
            await raised_by_call(one.heartbeat([]))
        one.session = session
        assert session.session_epoch == old.session_epoch + 1
        stream = await one.open_stream()
        assert stream.welcome.last_committed_seq == 2
        verdicts = await stream.verdicts_for(sent[1], sent[2])
        assert [v.code for v in verdicts] == [VerdictCode.DUPLICATE, VerdictCode.ACCEPTED]
        assert (learner.plane.tally.acknowledged, learner.plane.tally.buffered) == (3, 3)
        batch = await learner.plane.take_batch(3, 0)
        assert sorted(g.group.lease_id for g in batch.groups) == sorted(lease.lease_id for lease in leases)
        assert batch.groups[0].group.prompt_id == leases[0].prompt.prompt_id
        assert session.run_id == RUN


async def test_a_sender_that_ignores_its_credit_is_held_back_and_loses_nothing(tmp_path: Path) -> None:
    given = settings(groups_per_step=10, max_staleness=1)
    async with running_learner(tmp_path, given, credit_bytes=64) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        leases = await one.lease(20)
        stream = await one.open_stream()
        assert stream.welcome.credit_bytes == 64
        verdicts = await stream.verdicts_for(*(envelope(n, group_for(lease)) for n, lease in enumerate(leases, 1)))
        assert [v.code for v in verdicts] == [VerdictCode.ACCEPTED] * 20


async def test_a_sender_that_reads_no_acknowledgements_is_held_back_though_its_groups_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit_stream, "_MOST_PENDING", 3)
    wait, seen = SubmitStream._wait_for_credit, list[int]()

    async def watched(stream: SubmitStream, size: int) -> None:
        await wait(stream, size)
        seen.append(len(stream._pending))

    monkeypatch.setattr(SubmitStream, "_wait_for_credit", watched)
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        stream = await one.open_stream()
        verdicts = await stream.verdicts_for(*(envelope(n, b"") for n in range(1, 31)))
        assert [v.seq for v in verdicts] == list(range(1, 31))
    assert max(seen) <= 2  # and the one that is read


async def test_the_books_balance_over_every_kind_of_verdict(tmp_path: Path) -> None:
    given = settings(groups_per_step=2, max_staleness=2)
    async with running_learner(tmp_path, given) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        leases = await one.lease(6)
        stream = await one.open_stream()
        await stream.verdicts_for(
            envelope(1, group_for(leases[0])),
            envelope(2, group_for(leases[0])),  # answered already
            envelope(3, group_for(leases[1], version=5)),  # not made yet
            envelope(4, group_for(leases[2])),
            envelope(5, b"garbage"),
            envelope(6, group_for(leases[3])),
        )
        batch = await learner.plane.take_batch(2, 0)
        await learner.plane.mark_trained(batch, 1)
        for version in (1, 2, 3):
            await learner.plane.advance(version, root(version))
        assert (await stream.verdicts_for(envelope(7, group_for(leases[4]))))[0].code is VerdictCode.STALE
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await learner.plane.take_batch(1, 3)
        tally = learner.plane.tally
        assert tally.dropped == {
            "LEASE_LOST": 1,
            "FUTURE_VERSION": 1,
            "INVALID/DOES_NOT_PARSE": 1,
            "STALE": 1,
            "STALE_IN_BUFFER": 1,
        }
        assert tally.acknowledged == 7 == tally.trained + sum(tally.dropped.values()) + len(learner.plane.buffer)
        assert tally.lengths_dropped == {4: 2}


async def raised_by(call: grpc.aio.StreamStreamCall) -> None:
    """Raises what ended the stream."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


async def raised_by_call(call: object) -> None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
