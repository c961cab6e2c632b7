"""The hostile list: every answer ends in time, a worker that had to die is replaced, other answers are unaffected.

Twice: through the grader `math`, whose guard refuses most of them before any algebra, and through a grader that calls
math-verify on the raw text, where only the pool's limits stand between the answer and the process.
"""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.reward.graders import Permissions
from services.reward.pool import Pool
from services.reward.scorer import Score, ScoreRequest, Status
from services.reward.spec import GraderSpec
from services.reward.worker import Limits

pytestmark = pytest.mark.asyncio(loop_scope="module")
HERE = "tests.integration.reward.graders_of_tests"
UNGUARDED = (GraderSpec(name="python", options={"callable": f"{HERE}:unguarded", "timeout_s": 0.001}),)
ENDS_S = 2.0

HOSTILE = {
    "tower": "10^{10^{10}}",
    "tower of nines": "9^{9^{9^{9}}}",
    "tower without braces": "10^10^10",
    "factorial": "(10^9)!",
    "factorial of a number": "1000000000!",
    "million digits": "7" * 1_000_000,
    "two million digits": "1" + "0" * 2_000_000,
    "nested parentheses": "(" * 20_000 + "7" + ")" * 20_000,
    "nested fractions": "\\frac{1}{" * 2_000 + "7" + "}" * 2_000,
    "nested roots": "\\sqrt{" * 500 + "7" + "}" * 500,
    "open braces": "{" * 50_000,
    "open boxes": "\\boxed{" * 10_000,
    "broken LaTeX": "\\frac{7}{\\sqrt{\\left( \\begin{matrix} 7 & \\\\",
    "NUL bytes": "7\x00" * 1000,
    "lone surrogates": "\ud800\udfff" * 1000 + "7",
    "ten megabytes": "7 " * 5_000_000,
    "sum": "\\sum_{k=1}^{1000000000} \\sqrt{k}",
    "integral": "\\int_0^1 \\frac{\\sin(x^x)}{\\log(1+x^{\\pi})} dx",
    "binomial": "\\binom{10^{8}}{5\\cdot 10^{7}}",
    "long product": "(x+1)" * 150 + "^{99}",
    "high power": "(x+y+z+w+1)^{9999}",
    "powers of powers": "((((2^{9999})^{9999})^{9999})^{9999})",
    "many roots": "+".join(f"\\sqrt{{{one}}}" for one in range(2, 90)),
    "dollars": "$" * 100_000,
    "spaces": " " * 150_000 + "7",
    "equals": "7=" * 50_000,
    "right to left": "\u202e7\u202c",
    "emoji": "7\U0001f600" * 1000,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[Pool]:
    async with Pool(workers=2, limits=Limits(), permissions=Permissions(python=(HERE,))) as pool:
        yield pool


def resident_bytes(pool: Pool) -> int:
    """Of the nursery and its workers, pages that they share counted for each."""
    children = Path(f"/proc/{pool.nursery_pid}/task/{pool.nursery_pid}/children").read_text().split()
    total = 0
    for pid in (pool.nursery_pid, *children):
        total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return total


def request(answer: str, completion: str) -> ScoreRequest:
    return ScoreRequest(prompt="What is 3+4?", answer=answer, completion=completion)


def ended_in_time(score: Score) -> bool:
    """By itself, or by the pool's limit, whose clock a busy machine may read late."""
    return score.seconds <= ENDS_S or (score.status is Status.ANSWER_TIMEOUT and Limits().wall_s < ENDS_S)


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("form", ["{}", "\\boxed{{{}}}"], ids=["bare", "boxed"])
async def test_the_math_grader_ends_in_time_and_gives_no_reward(pool: Pool, hostile: str, form: str) -> None:
    completions = ["\\boxed{8}", form.format(hostile), "8", "no"]
    started = time.perf_counter()
    scores = await pool.score_group([request("8", one) for one in completions], [GraderSpec(name="math")])
    assert ended_in_time(scores[1])
    assert time.perf_counter() - started < 30
    assert [one.reward for one in scores] == [1.0, 0.0, 1.0, 0.0]
    assert scores[1].status in (Status.OK, Status.ANSWER_TIMEOUT)


@pytest.mark.parametrize(
    "name", ["tower", "tower of nines", "factorial", "two million digits", "nested parentheses", "sum", "binomial"]
)
async def test_limits_alone_end_math_verify_on_raw_text(pool: Pool, name: str) -> None:
    restarts = pool.stats.restarts
    scores = await pool.score_group([request("7", one) for one in ("7", HOSTILE[name], "7")], UNGUARDED)
    assert scores[0].reward == 1.0
    assert scores[2].reward == 1.0
    assert scores[1].reward == 0.0
    assert ended_in_time(scores[1])
    # Twice where a busy machine gave the first worker no time to compute.
    assert pool.stats.restarts - restarts in ((0,) if scores[1].status is Status.OK else (1, 2))


async def test_a_regular_expression_that_backtracks_is_ended(pool: Pool) -> None:
    spec = GraderSpec(name="regex", options={"pattern": "(a|aa)+$"})
    scores = await pool.score_group([request("", one) for one in ("aaa", "a" * 60 + "b", "aaa")], [spec])
    assert [one.status for one in scores] == [Status.OK, Status.ANSWER_TIMEOUT, Status.OK]


async def test_memory_stays_bounded(pool: Pool) -> None:
    requests = [request("7", one) for one in ("7", *HOSTILE.values()) if len(one) < 200_000]
    await pool.score_group(requests, [GraderSpec(name="math")])
    before = resident_bytes(pool)
    for _ in range(5):
        await pool.score_group(requests, [GraderSpec(name="math")])
    assert resident_bytes(pool) - before < 64 << 20
