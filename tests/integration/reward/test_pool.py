"""The pool with real worker processes: order, faults of the answer, faults of the grader, and the end of everything."""

import asyncio
import inspect
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from services.reward import worker_handle
from services.reward.graders import Permissions
from services.reward.pool import Pool, PoolStats
from services.reward.scorer import Score, ScoreRequest, Status
from services.reward.spec import GraderSpec
from services.reward.worker import Limits
from services.runtime.errors import EngineError, ScoreError
from tests.integration.reward import graders_of_tests

pytestmark = pytest.mark.asyncio(loop_scope="module")
HERE = "tests.integration.reward.graders_of_tests"
MATH = (GraderSpec(name="math"),)
RAISES = 1 + inspect.getsource(graders_of_tests).split("the grader is broken")[0].count("\n")
OBEY = (GraderSpec(name="python", options={"callable": f"{HERE}:obey", "timeout_s": 0.001}),)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def open_pool() -> AsyncIterator[Pool]:
    async with Pool(workers=2, limits=Limits(cpu_s=0.5, wall_s=1.0), permissions=Permissions(python=(HERE,))) as pool:
        yield pool


@pytest.fixture
def pool(open_pool: Pool) -> Pool:
    """One pool for all tests, with counts from zero."""
    open_pool.stats = PoolStats()
    return open_pool


def workers_of(pool: Pool) -> list[int]:
    return list(map(int, Path(f"/proc/{pool.nursery_pid}/task/{pool.nursery_pid}/children").read_text().split()))


async def score(
    pool: Pool, answer: str, completions: Sequence[str], graders: Sequence[GraderSpec] = MATH, **metadata: object
) -> list[Score]:
    requests = [ScoreRequest(prompt="", answer=answer, completion=one, metadata=metadata) for one in completions]
    return await pool.score_group(requests, graders)


async def test_scores_come_in_the_order_of_the_completions(pool: Pool) -> None:
    scores = await score(pool, "7", [str(one) for one in range(50)])
    assert [one.reward for one in scores] == [float(one == 7) for one in range(50)]
    assert [one.extracted for one in scores] == [str(one) for one in range(50)]
    assert all(one.status is Status.OK and one.seconds > 0 and one.reason for one in scores)
    assert pool.stats.scored == 50
    assert pool.stats.restarts == 0


async def test_an_empty_group_has_no_scores(pool: Pool) -> None:
    assert await score(pool, "7", []) == []


async def test_weights_are_summed_and_each_part_is_kept(pool: Pool) -> None:
    graders = [GraderSpec(name="math"), GraderSpec(name="format", weight=0.25)]
    (right, formless, wrong) = await score(pool, "7", ["\\boxed{7}", "7", "\\boxed{8}"], graders)
    assert [right.reward, formless.reward, wrong.reward] == [1.25, 1.0, 0.25]
    assert [(part.grader, part.reward, part.weight) for part in right.parts] == [
        ("math", 1.0, 1.0),
        ("format", 1.0, 0.25),
    ]
    assert right.extracted == "7"


@pytest.mark.parametrize("order", ["loop", "memory", "kernel"])
async def test_an_answer_that_exhausts_a_limit_has_reward_0_and_costs_the_others_nothing(
    pool: Pool, order: str
) -> None:
    scores = await score(pool, "", ["fine", order, "fine", "fine"], OBEY)
    assert [one.status for one in scores] == [Status.OK, Status.ANSWER_TIMEOUT, Status.OK, Status.OK]
    assert [one.reward for one in scores] == [1.0, 0.0, 1.0, 1.0]
    assert "over the limit" in scores[1].reason
    assert pool.stats.answer_timeouts == 1
    assert pool.stats.restarts == 1
    assert [one.reward for one in await score(pool, "7", ["7"] * 4)] == [1.0] * 4


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("crash", "died with SIGSEGV"),
        ("exit", "died with exit code 7"),
        ("odd signal", "died with signal 40"),
        ("speak", "sent no score"),
        ("raise", f"RuntimeError('the grader is broken') (graders_of_tests.py, line {RAISES})"),
        ("wait", "hung for 1"),
        ("recurse", "obey called itself too deeply"),
    ],
)
async def test_a_grader_that_fails_twice_is_an_infrastructure_failure_and_no_reward(
    pool: Pool, order: str, reason: str
) -> None:
    scores = await score(pool, "", ["fine", order, "fine"], OBEY)
    assert [one.status for one in scores] == [Status.OK, Status.INFRASTRUCTURE_FAILURE, Status.OK]
    assert reason in scores[1].reason
    assert pool.stats.infrastructure_failures == 1
    assert pool.stats.restarts == 2
    assert pool.stats.answer_timeouts == 0


async def test_a_reward_that_no_learner_takes_is_a_failure_of_the_grader(pool: Pool) -> None:
    (only,) = await score(pool, "", ["too much"], OBEY)
    assert (only.status, only.reward) == (Status.INFRASTRUCTURE_FAILURE, 0.0)
    assert "1e+12" in only.reason
    vast = [GraderSpec(name="exact", weight=1e308)] * 2
    (infinite,) = await pool.score_group([ScoreRequest(prompt="", answer="7", completion="7")], vast)
    assert infinite.status is Status.INFRASTRUCTURE_FAILURE


async def test_a_grader_that_fails_once_is_tried_again(pool: Pool, tmp_path: Path) -> None:
    (only,) = await score(pool, "", ["crash once"], OBEY, mark=str(tmp_path / "mark"))
    assert (only.status, only.reward) == (Status.OK, 1.0)
    assert pool.stats.restarts == 1


async def test_a_child_that_a_grader_forked_gives_no_score_of_its_own(pool: Pool) -> None:
    scores = await score(pool, "", ["fork", "fine", "raise", "fine"], OBEY)
    assert [one.status for one in scores] == [Status.OK, Status.OK, Status.INFRASTRUCTURE_FAILURE, Status.OK]


async def test_importing_a_graders_module_costs_no_completion_its_time(pool: Pool) -> None:
    slow = f"{__package__}.slow_grader_of_tests"
    async with Pool(workers=1, limits=Limits(cpu_s=0.3, wall_s=0.5), permissions=Permissions(python=(slow,))) as own:
        graders = [GraderSpec(name="python", options={"callable": f"{slow}:score", "timeout_s": 0.001})]
        assert [one.reward for one in await score(own, "", ["a", "b"], graders)] == [1.0, 1.0]


async def test_a_worker_that_hangs_before_its_first_answer_is_replaced(pool: Pool) -> None:
    for worker in workers_of(pool):
        os.kill(worker, signal.SIGSTOP)
    async with asyncio.timeout(30):
        assert [one.reward for one in await score(pool, "7", ["7"] * 4)] == [1.0] * 4


async def test_a_hang_longer_than_an_import_may_take_is_tried_again_too(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_handle, "LOAD_S", 0.5)  # less than the pool's wall_s, as where that is over 60 s
    for worker in workers_of(pool):
        os.kill(worker, signal.SIGSTOP)
    async with asyncio.timeout(30):
        assert [one.reward for one in await score(pool, "7", ["7"] * 4)] == [1.0] * 4


@pytest.mark.parametrize("missing", [f"{HERE}:absent", f"{HERE}.absent:score"])
async def test_a_callable_that_is_not_here_is_no_fault_of_a_prompt(pool: Pool, missing: str) -> None:
    with pytest.raises(EngineError, match="cannot be imported"):
        await score(pool, "", ["fine"], [GraderSpec(name="python", options={"callable": missing})])
    assert [one.reward for one in await score(pool, "7", ["7"] * 4)] == [1.0] * 4


async def test_an_unusable_reference_answer_raises_and_leaves_the_pool_usable(pool: Pool) -> None:
    with pytest.raises(ScoreError, match="reference answer is empty"):
        await score(pool, "", ["1"] * 20)
    assert [one.reward for one in await score(pool, "7", ["7"] * 20)] == [1.0] * 20


async def test_unknown_and_forbidden_graders_raise_before_any_work(pool: Pool) -> None:
    with pytest.raises(ScoreError, match="did you mean math"):
        await score(pool, "7", ["7"], [GraderSpec(name="mat")])
    with pytest.raises(ScoreError, match="does not allow functions of os"):
        await score(pool, "7", ["7"], [GraderSpec(name="python", options={"callable": "os:system"})])
    assert pool.stats.scored == 0


async def test_an_overlong_completion_has_reward_0_without_being_graded(pool: Pool) -> None:
    (long, short) = await score(pool, "7", ["7" * 10_000_000, "7"])
    assert (long.reward, long.status) == (0.0, Status.OK)
    assert "longer than 500000 characters" in long.reason
    assert short.reward == 1.0
    assert pool.stats.restarts == 0


async def test_the_blocks_of_a_completion_are_found_within_the_time_of_one() -> None:
    slow = ["```" + " " * 100_000 + "`", "```a\n" * 30_000, "```a\n```" + " " * 100_000 + "x"]
    async with Pool(workers=1, permissions=Permissions(code="isolated")) as own:
        scores = await score(own, '{"asserts": ["assert True"]}', slow, [GraderSpec(name="code")])
    assert [(one.status, one.reason) for one in scores] == [(Status.OK, "no program")] * 3


async def test_many_groups_at_once_share_the_workers(pool: Pool) -> None:
    groups = [score(pool, str(one), [str(one), "x", str(one + 1)]) for one in range(40)]
    for scores in await asyncio.gather(*groups):
        assert [one.reward for one in scores] == [1.0, 0.0, 0.0]


async def test_a_cancelled_group_does_not_leave_a_worker_in_the_middle_of_it(pool: Pool) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await score(pool, "", ["loop", "loop"], OBEY)
    assert [one.reward for one in await score(pool, "7", ["7", "8", "7"])] == [1.0, 0.0, 1.0]
    assert pool.stats.restarts == 2
    assert pool.stats.answer_timeouts == 0


async def test_a_worker_is_replaced_after_its_term() -> None:
    async with Pool(workers=1, limits=Limits(items_per_worker=10)) as pool:
        for _ in range(5):
            assert [one.reward for one in await score(pool, "7", ["7"] * 8)] == [1.0] * 8
        assert pool.stats.restarts == 2


async def test_the_nursery_is_started_again_when_it_is_killed(pool: Pool) -> None:
    killed = pool.nursery_pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    async with asyncio.timeout(60):
        while pool.nursery_pid == killed:
            scores = await score(pool, "7", ["7"] * 20)
            assert [one.reward for one in scores] == [1.0] * 20
    assert pool.stats.restarts >= 1


async def test_workers_import_neither_grpc_nor_torch(pool: Pool) -> None:
    specs = [*MATH, GraderSpec(name="python", options={"callable": f"{HERE}:modules"})]
    (only,) = await score(pool, "\\sqrt{8}", ["\\boxed{2\\sqrt{2}}"], specs)
    assert only.reward == 1.0
    assert only.parts[1].reason == f"from {HERE}:modules"


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_no_process_is_left_when_the_pool_closes() -> None:
    async with Pool(workers=2) as pool:
        await score(pool, "7", ["7"] * 4)
        nursery = pool.nursery_pid
        assert nursery is not None
        workers = children_of(nursery)
        assert len(workers) == 2
    for pid in (nursery, *workers):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
