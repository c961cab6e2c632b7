"""The supervised warm-up, and the policy that it made and that ships."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.lab import warmup
from services.lab.arithmetic import Difficulty, Split, distinct_problems
from services.lab.warmup import WarmUp, careless_sum, measure
from services.runtime.errors import ConfigError

_SHIPPED = Path(warmup.__file__).parent / "assets" / "tiny-policy"


def test_a_pupil_who_forgets_nothing_is_right() -> None:
    rng = random.Random(0)
    for _ in range(500):
        left, right = rng.randrange(10_000), rng.randrange(10_000)
        assert careless_sum(left, right, 1.0, rng) == str(left + right)


@pytest.mark.parametrize(
    ("left", "right", "written"),
    [(123, 456, "579"), (128, 456, "574"), (199, 1, "190"), (600, 700, "1300"), (999, 999, "1888"), (5, 95, "90")],
)
def test_a_pupil_who_forgets_every_carry_writes_column_sums(left: int, right: int, written: str) -> None:
    assert careless_sum(left, right, 0.0, random.Random(0)) == written


def test_a_carry_is_done_with_the_set_chance() -> None:
    rng = random.Random(1)
    done = sum(careless_sum(128, 456, 0.3, rng) == "584" for _ in range(4000))
    assert 0.27 < done / 4000 < 0.33


def test_the_shipped_policy_is_small_and_about_thirty_percent_right() -> None:
    assert sum(file.stat().st_size for file in _SHIPPED.iterdir()) < 4_000_000
    model = AutoModelForCausalLM.from_pretrained(_SHIPPED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(_SHIPPED)
    held_out = distinct_problems(Split.HELD_OUT, count=500, seed=5, difficulty=Difficulty())
    accuracy = measure(model, tokenizer, held_out)
    assert 0.25 < accuracy.greedy < 0.37
    assert 0.30 < accuracy.sampled < 0.50


def test_the_measured_accuracy_is_that_of_generation() -> None:
    model = AutoModelForCausalLM.from_pretrained(_SHIPPED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(_SHIPPED)
    held_out = distinct_problems(Split.HELD_OUT, count=100, seed=6, difficulty=Difficulty())
    prompts = tokenizer([problem.prompt for problem in held_out], return_tensors="pt")
    written = tokenizer.batch_decode(
        model.generate(**prompts, do_sample=False, max_new_tokens=8)[:, prompts["input_ids"].shape[1] :],
        skip_special_tokens=True,
    )
    right = sum(text == problem.answer for text, problem in zip(written, held_out, strict=True))
    assert measure(model, tokenizer, held_out).greedy == pytest.approx(right / 100)


def test_a_short_warm_up_writes_a_loadable_policy_with_its_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert warmup.main(["--out", str(tmp_path), "--steps", "2"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "2 supervised steps" in (tmp_path / "README.md").read_text()
    assert "held-out accuracy 0.0% greedy" in capsys.readouterr().out


def test_an_impossible_warm_up_is_refused() -> None:
    with pytest.raises(ConfigError, match="carry_chance"):
        WarmUp(carry_chance=1.5)
