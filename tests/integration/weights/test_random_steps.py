"""A thousand random steps over links that break at random chunks: in the end everyone has the same root."""

from pathlib import Path

import pytest

from tests.support.random_steps import random_steps


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.timeout(300)
async def test_a_thousand_random_steps_end_with_equal_roots_however_fetches_are_cut(tmp_path: Path) -> None:
    outcome = await random_steps(tmp_path, steps=1000, seed=11)
    assert set(outcome.roots.values()) == {outcome.root}
    assert outcome.cuts > 100
    assert min(outcome.loaded.values()) > 20, "they follow all the way, and not only at the end"
    assert outcome.keyframes_refetched == 0, "a cut is no reason to start over"
