"""Who takes part: exclusions, counts, over-long rows, refusals."""

import math
from dataclasses import replace

import pytest
import torch

from services.learner.losses.evaluate import loss_of
from services.learner.losses.metrics import finish_metrics
from services.learner.losses.prepare import prepare
from services.learner.losses.prepared import Exclusion
from services.learner.losses.settings import LossSettings
from tests.unit.learner.losses.building import batch_of, evaluate, learner_of, random_case, settings_of


def test_every_reason_to_leave_a_row_out_is_counted_once() -> None:
    case = random_case("gepo", 31, prompts=3, size=4)
    case.groups = [0] * 4 + [1] * 4 + [2] * 4
    case.rewards = [1.0, 0.0, 1.0, math.nan] + [1.0] * 4 + [0.0, 1.0, 0.0, 1.0]
    case.logq[0][0] = math.nan
    case.logq[1][0] = -math.inf
    case.logq[2][0] = 0.5
    case.overlong = [i in (0, 8) for i in range(12)]
    for rows in (case.logp, case.logq, case.prox, case.ref):
        assert rows is not None
        rows[9] = []
    case.options["zero_variance"] = "drop"
    prepared = prepare(batch_of(case), settings_of(case))
    metrics = finish_metrics([loss_of(prepared, learner_of(case)).metrics])
    assert {name: value for name, value in metrics.items() if name.startswith("excluded_") and value} == {
        "excluded_sampler_nonfinite": 2.0,
        "excluded_sampler_positive": 1.0,
        "excluded_reward_nonfinite": 1.0,
        "excluded_zero_variance": 4.0,
        "excluded_overlong": 1.0,
        "excluded_empty": 1.0,
    }
    assert metrics["rows"] == 2.0
    assert metrics["groups_dropped"] == 2.0
    assert metrics["groups_zero_variance"] == 1.0


def test_a_row_with_a_broken_log_prob_stays_out_of_its_groups_expectation() -> None:
    case = random_case("gepo", 32, prompts=1)
    whole = prepare(batch_of(case), settings_of(case)).log_expected_q_B
    case.logq[0][0] = -math.inf
    without = prepare(batch_of(case), settings_of(case))
    assert bool((without.log_expected_q_B[1:] != whole[1:]).all())
    assert without.reason_B.tolist() == [Exclusion.SAMPLER_NONFINITE, 0, 0, 0]
    assert bool(torch.isfinite(without.log_expected_q_B).all())


def test_a_group_without_a_sound_row_is_dropped_and_the_others_train() -> None:
    case = random_case("gepo", 33, prompts=2)
    alone = [i for i, group in enumerate(case.groups) if group == 0]
    for i in alone:
        case.logq[i][0] = math.nan
    output, gradient_BT = evaluate(case)
    assert finish_metrics([output.metrics])["groups_dropped"] == 1.0
    assert not bool(gradient_BT[alone].any())
    assert bool(gradient_BT.any())


def test_a_batch_without_a_sound_row_has_loss_zero_and_gradient_zero() -> None:
    case = random_case("grpo", 34)
    case.logq = [[math.nan] * len(row) for row in case.logq]
    output, gradient_BT = evaluate(case)
    assert output.loss.item() == 0.0
    assert not bool(gradient_BT.any())
    metrics = finish_metrics([output.metrics])
    assert metrics["groups_dropped"] == 3.0
    assert all(math.isfinite(value) for value in metrics.values())


def test_rounding_above_zero_is_let_pass() -> None:
    case = random_case("gepo", 35)
    case.logq[0][0] = 1e-6
    assert prepare(batch_of(case), settings_of(case)).reason_B[0] == Exclusion.NONE


def test_several_rewards_give_the_mean_of_their_own_advantages() -> None:
    case = random_case("gepo", 36, prompts=1)
    parts_BK = torch.tensor([[1.0, 100.0], [0.0, 300.0], [1.0, 100.0], [0.0, 100.0]])
    batch = replace(batch_of(case), reward_parts_BK=parts_BK)
    mean = prepare(batch, LossSettings(advantage="mean")).advantage_B
    assert mean.tolist() == pytest.approx([-24.75, 74.75, -24.75, -25.25])
    scaled = prepare(batch, LossSettings(advantage="mean_std", advantage_epsilon=0.0)).advantage_B
    assert scaled.tolist() == pytest.approx(
        [(math.sqrt(3) / 2 - 0.5) / 2, (1.5 - math.sqrt(3) / 2) / 2] * 1
        + [(math.sqrt(3) / 2 - 0.5) / 2, (-math.sqrt(3) / 2 - 0.5) / 2]
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mask_BT": torch.ones(12, 7)}, "must be a bool tensor"),
        ({"mask_BT": torch.ones(0, 7, dtype=torch.bool)}, "no rows"),
        (
            {"mask_BT": torch.ones(12, 3, dtype=torch.bool)},
            r"sampler's log-probs are \[12, 7\] but the mask is \[12, 3\]",
        ),
        ({"rewards_B": torch.zeros(11)}, r"rewards are \[11\] but the batch has 12 rows"),
        ({"group_B": torch.zeros(12)}, "group numbers must be integers"),
        (
            {"group_B": torch.tensor([0] * 11 + [9])},
            "group 9 has one row: with group size 1 the advantage is undefined",
        ),
        ({"proximal_logprobs_BT": torch.zeros(12, 2)}, "proximal policy's log-probs"),
        ({"reward_parts_BK": torch.zeros(12)}, "reward parts"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_sentence(change: dict[str, torch.Tensor], sentence: str) -> None:
    case = random_case("gepo", 37)
    assert max(map(len, case.logp)) == 7
    with pytest.raises(ValueError, match=sentence):
        prepare(replace(batch_of(case), **change), LossSettings())


def test_a_reference_kl_without_a_reference_is_refused() -> None:
    batch = replace(batch_of(random_case("gepo", 38)), reference_logprobs_BT=None)
    with pytest.raises(ValueError, match="needs the reference model's log-probs"):
        prepare(batch, LossSettings(kl_beta=0.1, kl_target="reference"))


def test_bnpo_refuses_rewards_outside_zero_and_one() -> None:
    case = random_case("bnpo", 39)
    case.rewards[0] = 2.0
    with pytest.raises(ValueError, match="between 0 and 1"):
        prepare(batch_of(case), settings_of(case))


def test_bnpo_takes_a_weighted_sum_that_rounding_put_beyond_one() -> None:
    case = random_case("bnpo", 39)
    case.rewards[0] = 0.1 + 0.2 + 0.7 + 1e-7
    assert torch.isfinite(prepare(batch_of(case), settings_of(case)).advantage_B).all()


def test_log_probs_of_another_shape_than_the_mask_are_refused() -> None:
    case = random_case("gepo", 40)
    with pytest.raises(ValueError, match="learner's log-probs are"):
        loss_of(prepare(batch_of(case), settings_of(case)), learner_of(case)[:, :2])


def test_an_unknown_loss_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"unknown loss 'gepoo': nearest names are gepo, "):
        LossSettings.model_validate({"name": "gepoo"})
