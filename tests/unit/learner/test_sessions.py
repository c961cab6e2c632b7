import asyncio
from collections import Counter

import pytest

from services.learner.sessions import Sessions
from services.runtime.errors import FencedError, RefusedError, SessionLostError
from services.wire.types import ROOT_IN_LAST_PART, Directive, SamplerReport, SamplerState, Session
from tests.support.data_side import Clock


class Store:
    """Session epochs in memory; registrations can be made to overtake each other."""

    def __init__(self) -> None:
        self.epochs: Counter[str] = Counter()
        self.hold = asyncio.Event()
        self.hold.set()

    async def raise_session_epoch(self, sampler_id: str) -> int:
        self.epochs[sampler_id] += 1
        epoch = self.epochs[sampler_id]
        if epoch == 1:
            await self.hold.wait()
        return epoch

    async def set_denied(self, sampler_id: str, denied: bool) -> None:
        pass


def sessions(store: Store, clock: Clock, learner_epoch: int = 3) -> Sessions:
    return Sessions(run_id="run", learner_epoch=learner_epoch, ttl_s=30.0, store=store, clock=clock)


REPORT = SamplerReport(state=SamplerState.GENERATING, policy_version=1, policy_root="")


async def test_a_session_is_good_until_a_newer_one_of_the_same_sampler() -> None:
    known = sessions(Store(), Clock())
    old = await known.register("eu-1")
    assert known.check(old).session_epoch == 1
    new = await known.register("eu-1")
    with pytest.raises(FencedError):
        known.check(old)
    assert known.check(new).restarts == 1
    assert (await known.register("us-1")).session_epoch == 1


@pytest.mark.parametrize(
    ("session", "error"),
    [
        (Session(run_id="run", sampler_id="eu-1", learner_epoch=2, session_epoch=1), SessionLostError),
        (Session(run_id="run", sampler_id="eu-1", learner_epoch=4, session_epoch=1), SessionLostError),
        (Session(run_id="run", sampler_id="us-1", learner_epoch=3, session_epoch=1), SessionLostError),
        (Session(run_id="run", sampler_id="eu-1", learner_epoch=3, session_epoch=(1 << 64) - 1), SessionLostError),
        (Session(run_id="run", sampler_id="eu-1", learner_epoch=3, session_epoch=0), FencedError),
        (Session(run_id="walk", sampler_id="eu-1", learner_epoch=3, session_epoch=1), SessionLostError),
        (Session(run_id="", sampler_id="", learner_epoch=0, session_epoch=0), SessionLostError),
    ],
    ids=str,
)
async def test_every_other_session_is_told_what_to_do(session: Session, error: type[Exception]) -> None:
    known = sessions(Store(), Clock())
    await known.register("eu-1")
    with pytest.raises(error):
        known.check(session)


async def test_the_newest_wins_also_when_registrations_overtake_each_other() -> None:
    store = Store()
    known = sessions(store, Clock())
    store.hold.clear()
    slow = asyncio.create_task(known.register("eu-1", hostname="old"))
    await asyncio.sleep(0)
    new = await known.register("eu-1", hostname="new")
    store.hold.set()
    with pytest.raises(FencedError):
        known.check(await slow)
    assert known.check(new).hostname == "new"


async def test_silence_makes_a_sampler_lost_and_a_call_brings_it_back() -> None:
    clock = Clock()
    known = sessions(Store(), clock)
    session = await known.register("eu-1")
    sampler = known.check(session)
    known.heartbeat(session, REPORT)
    assert known.state(sampler) is SamplerState.GENERATING
    clock.advance(31.0)
    assert (known.state(sampler), known.alive_count(), known.is_alive("eu-1", 1)) == (SamplerState.LOST, 0, False)
    assert known.last_seen_s(sampler) == 31.0
    known.check(session)
    assert (known.state(sampler), known.alive_count()) == (SamplerState.GENERATING, 1)


async def test_a_feature_counts_where_all_have_it_and_somebody_is_there() -> None:
    clock = Clock()
    known = sessions(Store(), clock)
    assert not known.all_can(ROOT_IN_LAST_PART)
    await known.register("eu-1", features=frozenset({ROOT_IN_LAST_PART}))
    assert known.all_can(ROOT_IN_LAST_PART)
    await known.register("us-1")
    assert not known.all_can(ROOT_IN_LAST_PART)
    clock.advance(31)
    await known.register("eu-1", features=frozenset({ROOT_IN_LAST_PART}))
    assert not known.all_can(ROOT_IN_LAST_PART), "the other one is lost, and may come back"
    await known.register("us-1", features=frozenset({ROOT_IN_LAST_PART}))
    assert known.all_can(ROOT_IN_LAST_PART)


async def test_orders_reach_the_sampler_and_a_new_process_starts_without_them() -> None:
    known = sessions(Store(), Clock())
    session = await known.register("eu-1")
    assert known.heartbeat(session, REPORT) is Directive.CONTINUE
    known.paused = True
    assert known.heartbeat(session, REPORT) is Directive.PAUSE
    known.check(session).draining = True
    assert known.heartbeat(session, REPORT) is Directive.DRAIN
    assert known.state(known.check(session)) is SamplerState.DRAINING
    known.paused = False
    assert known.heartbeat(await known.register("eu-1"), REPORT) is Directive.CONTINUE
    known.draining = True
    assert known.directive(known.all()[0]) is Directive.DRAIN


async def test_an_evicted_id_is_refused_until_it_is_allowed() -> None:
    known = sessions(Store(), Clock())
    session = await known.register("eu-1")
    await known.evict("eu-1")
    assert (known.is_evicted("eu-1"), known.is_alive("eu-1", 1)) == (True, False)
    for call in (lambda: known.check(session), lambda: known.heartbeat(session, REPORT)):
        with pytest.raises(RefusedError):
            call()
    with pytest.raises(RefusedError):
        await known.register("eu-1")
    await known.evict("eu-1", allow=True)
    assert (await known.register("eu-1")).session_epoch == 2


async def test_a_spool_of_another_run_is_remembered_with_the_session() -> None:
    known = sessions(Store(), Clock())
    assert known.check(await known.register("eu-1", spool_id="s", last_run_id="run")).foreign_spool == ""
    assert known.check(await known.register("eu-1", spool_id="s", last_run_id="walk")).foreign_spool == "s"
    assert known.check(await known.register("eu-1", spool_id="s")).foreign_spool == ""


async def test_of_samplers_that_come_and_go_under_ever_new_names_the_last_ones_are_remembered() -> None:
    clock = Clock()
    known = sessions(Store(), clock)
    here = await known.register("eu-1")
    spot = [await known.register("spot-0")]
    for number in range(1, 400):
        clock.advance(1.0)
        known.check(here)
        spot.append(await known.register(f"spot-{number}"))
    names = [sampler.sampler_id for sampler in known.all()]
    assert len(names) < 300
    assert {"eu-1", "spot-399", "spot-200"} < set(names)
    with pytest.raises(SessionLostError, match="register again"):
        known.check(spot[0])
    assert (await known.register("spot-0")).session_epoch == 2
