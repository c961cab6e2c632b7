"""One cell: the same buffer and trainer as production, under virtual time."""

import random
import statistics
from pathlib import Path

import pytest
import torch

from services.lab.arena import Arena, Cell
from services.lab.contestants import PolicyName, expected_accuracy, make_drawer, make_model, snapshot
from services.lab.experiment import CellResult, base_policy, run_cell
from services.lab.sum_tasks import SumTask, TaskName
from services.learner.config import OptimizerSection
from services.learner.losses.settings import KlTarget, LossName, LossSettings
from services.runtime.errors import BadInputError, ConfigError
from services.sampler.delays import DelayKind, DelayModel, DelaySection

# An arena in which a step takes milliseconds.
SMALL: dict[str, object] = {
    "columns": 2,
    "prompts_per_step": 4,
    "group_size": 4,
    "steps": 12,
    "eval_every": 4,
    "eval_problems": 32,
    "warm_up": 0.1,
    "samplers": 2,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def cell(lag: int | None = 0, delay: DelaySection | None = None, seed: int = 0, **arena: object) -> Cell:
    return Cell(
        arena=Arena.model_validate(SMALL | arena),
        loss=LossSettings(name=LossName.GSPO, clip_low=0.2, clip_high=0.2),
        lag_versions=lag,
        delay=delay or DelaySection(),
        seed=seed,
    )


def on_rollouts(seconds: float) -> DelaySection:
    model = DelayModel(kind=DelayKind.CONSTANT, mean_s=seconds, min_s=0.0, max_s=1e6)
    return DelaySection(rollouts=model)


def on_weights(seconds: float) -> DelaySection:
    model = DelayModel(kind=DelayKind.CONSTANT, mean_s=seconds, min_s=0.0, max_s=1e6)
    return DelaySection(weights=model)


def trained(result: CellResult) -> int:
    return sum(result.staleness.values())


def test_without_lag_nothing_is_stale(bases: Path) -> None:
    result = run_cell(cell(0), bases)
    assert result.staleness == {"0": 12 * 4}
    assert result.kl_mean == pytest.approx(0.0, abs=1e-9)
    assert result.dropped == {}


def test_with_a_lag_staleness_is_the_lag_after_the_first_versions(bases: Path) -> None:
    assert run_cell(cell(3), bases).staleness == {"0": 4, "1": 4, "2": 4, "3": 9 * 4}


def test_links_without_delay_give_fresh_groups_in_the_online_mode(bases: Path) -> None:
    result = run_cell(cell(None, max_staleness=0), bases)
    assert result.staleness == {"0": 12 * 4}
    assert result.dropped == {}


def test_the_same_seed_gives_the_same_result_and_another_seed_another(bases: Path) -> None:
    delay = DelaySection(weights=DelayModel(kind=DelayKind.LOGNORMAL), rollouts=DelayModel(kind=DelayKind.WEIBULL))
    first = run_cell(cell(None, delay), bases)
    assert run_cell(cell(None, delay), bases) == first
    assert run_cell(cell(None, delay, seed=1), bases).course != first.course


def test_a_group_that_is_late_beyond_the_bound_is_dropped_and_counted(bases: Path) -> None:
    # A batch takes step_s × samplers × count / (P × supply) = 24 s, a step 30 s; its groups arrive 10 steps late.
    result = run_cell(cell(None, on_rollouts(300.0), max_staleness=2, ahead=100.0, steps=20), bases)
    assert result.dropped["STALE_IN_BUFFER"] > 0
    assert max(map(int, result.staleness)) <= 2
    assert trained(result) == 20 * 4


def versions_of(result: CellResult) -> list[int]:
    return [int(versions) for versions, count in result.staleness.items() for _ in range(count)]


def test_a_delay_of_weights_makes_groups_stale_by_one_to_two_delays(bases: Path) -> None:
    """Weights are a delay old when they come, and two when the next ones do."""
    result = run_cell(cell(None, on_weights(150.0), max_staleness=64, ahead=0.0, steps=40), bases)
    step_s = result.virtual_s / 40
    settled = versions_of(result)[24:]
    assert min(settled) >= int(150.0 / step_s)
    assert max(settled) <= 300.0 / step_s + 1


def test_staleness_follows_the_distribution_of_the_delays(bases: Path) -> None:
    """The learner waits for groups and takes them at once: a group's staleness is the number of steps in its delay."""
    model = DelayModel(kind=DelayKind.UNIFORM, min_s=60.0, max_s=600.0)
    arena = {"max_staleness": 64, "ahead": 1.0, "supply": 0.7, "steps": 240, "samplers": 4}
    result = run_cell(cell(None, DelaySection(rollouts=model), **arena), bases)
    step_s = result.virtual_s / 240
    found = versions_of(result)
    rng = random.Random(0)
    expected = [rng.uniform(60.0, 600.0) / step_s for _ in range(4000)]
    # A step or two on top: a batch takes a step to write, and waits for the rest of its step.
    assert statistics.fmean(expected) <= statistics.fmean(found) <= statistics.fmean(expected) + 2.5
    assert statistics.stdev(found) == pytest.approx(statistics.stdev(expected), rel=0.2)


def test_a_slower_sampler_makes_fewer_groups(bases: Path) -> None:
    fast = run_cell(cell(None, speeds=(1.0, 1.0)), bases)
    slow = run_cell(cell(None, speeds=(1.0, 0.1)), bases)
    assert slow.virtual_s > fast.virtual_s


def test_learning_raises_the_accuracy(bases: Path) -> None:
    arena = {"columns": 5, "steps": 60, "prompts_per_step": 16, "group_size": 8, "warm_up": 0.22}
    result = run_cell(cell(0, eval_problems=256, **arena), bases)
    assert result.last > result.first + 0.04
    assert result.best >= result.last
    assert [measured.step for measured in result.course][:3] == [0, 4, 8]


def test_a_reference_holds_a_cell_back(bases: Path) -> None:
    def moved(beta: float) -> float:
        loss = LossSettings(name=LossName.GRPO, kl_beta=beta, kl_target=KlTarget.REFERENCE)
        one = cell(12).model_copy(update={"loss": loss})  # samplers keep the first policy, so KL to them is to it
        return run_cell(one, bases).kl_mean

    assert moved(3.0) < 0.8 * moved(0.0)


def test_weights_that_explode_answer_nothing(bases: Path) -> None:
    exploding = cell(0).model_copy(update={"optimizer": OptimizerSection(lr=1e30)})
    result = run_cell(exploding, bases)
    assert result.last == 0.0
    assert result.skipped_steps > 0
    assert CellResult.model_validate_json(result.model_dump_json()) == result


def test_the_warmed_up_policy_is_kept_and_used_again(tmp_path: Path) -> None:
    made = base_policy(cell(0), tmp_path)
    (kept,) = tmp_path.iterdir()
    again = base_policy(cell(0), tmp_path)
    assert kept.name.startswith("base-fixed-columns-s0")
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in made.state_dict().items())


def test_columns_cannot_write_out_their_working() -> None:
    with pytest.raises(ConfigError, match=r"written|write out"):
        run_cell(cell(0, task="worked"))


@pytest.mark.parametrize("name", [PolicyName.COLUMNS, PolicyName.SMALL])
def test_a_drawer_reports_the_log_probs_that_the_learner_finds(name: PolicyName) -> None:
    task = SumTask(name=TaskName.VARIABLE, columns=2)
    model, drawer = make_model(name, task, seed=3), make_drawer(name, task, torch.device("cpu"))
    drawer.load(snapshot(model))
    problems = task.draw(3, seed=1)
    drawn = drawer.draw(problems, 4, seed=2)
    prompts_BL = problems.prompts_PL.repeat_interleave(4, 0)
    ids_BL = torch.cat([prompts_BL, drawn.tokens_BT], 1)
    with torch.no_grad():
        logits_BLV = model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).logits
    logprobs_BTV = torch.log_softmax(logits_BLV[:, prompts_BL.shape[1] - 1 : -1], -1)
    found_BT = logprobs_BTV.gather(-1, drawn.tokens_BT[..., None])[..., 0]
    counted_BT = torch.arange(task.max_tokens) < drawn.length_B[:, None]
    assert torch.allclose(found_BT[counted_BT], drawn.logprobs_BT[counted_BT], atol=1e-5)


def test_expected_accuracy_is_the_share_of_right_draws(bases: Path) -> None:
    start = cell(0, eval_problems=64)
    model, task = base_policy(start, bases), start.arena.sums
    drawer = make_drawer(PolicyName.COLUMNS, task, torch.device("cpu"))
    drawer.load(snapshot(model))
    problems = task.draw(64, seed=8)
    drawn = drawer.draw(problems, 64, seed=9)
    share = float(task.rewards(problems, drawn.tokens_BT, drawn.length_B).mean())
    assert share == pytest.approx(expected_accuracy(model, problems), abs=0.03)


def test_a_damaged_base_policy_is_named(tmp_path: Path) -> None:
    one = cell()
    (tmp_path / f"{one.base_key}.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(BadInputError, match=r"base-.*\.safetensors is not the base policy"):
        base_policy(one, tmp_path)
