"""Recorded groups under other losses."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from services.cli import main
from services.lab.replay import BUCKETS, read_buckets, replay
from services.lab.staleness import parse_contender
from services.learner.data_plane import JOURNAL_FILE
from services.learner.journal_schema import connect
from services.runtime.errors import BadInputError, InputMissingError
from services.wire.convert import decode_group, encode_group
from services.wire.types import Completion, FinishReason, LeasePurpose, ScoredGroup

POLICY = Path(__file__).parents[3] / "services" / "lab" / "assets" / "tiny-policy"
LOSSES = [(name, parse_contender(name).settings) for name in ("gepo", "gspo", "grpo")]


def group(rng: random.Random, highest: int = 17) -> bytes:
    completions = tuple(
        Completion(
            token_ids=tuple(rng.randint(3, highest) for _ in range(length)),
            sampler_logprobs=tuple(-rng.expovariate(0.5) for _ in range(length)),
            reward=float(place % 2),
            finish_reason=FinishReason.STOP,
        )
        for place, length in enumerate((2, 3, 4, 3))
    )
    return encode_group(
        ScoredGroup(
            lease_id="1-t1-1",
            prompt_id="p",
            purpose=LeasePurpose.TRAIN,
            policy_version=0,
            policy_root="",
            prompt_token_ids=(5, 6, 13, 7, 16),
            completions=completions,
            generation_s=1.0,
            scoring_s=0.1,
            temperature=1.0,
            seed=1,
        )
    )


def write_journal(state_dir: Path, staleness: list[int | None], highest: int = 17) -> Path:
    """A learner's journal with one group per entry; None is a group that was not trained."""
    rng = random.Random(4)
    connection = connect(state_dir / JOURNAL_FILE, "run")
    for row, versions in enumerate(staleness):
        step = None if versions is None else row
        values = (row, "s", "spool", row, str(row), b"", 1, "", 1, "1-t1-1", 1, 0, 12, 4, 0, 1, 1, step, versions)
        connection.execute(
            f"INSERT INTO groups VALUES ({', '.join('?' * 19)}, NULL, NULL, ?)", (*values, group(rng, highest))
        )
    connection.close()
    return state_dir / JOURNAL_FILE


def test_groups_come_in_buckets_of_staleness_and_untrained_ones_do_not(tmp_path: Path) -> None:
    buckets = read_buckets(write_journal(tmp_path, [0, 0, None, 1, 2, 8, 200]), most_groups=64)
    assert [(bucket.name, len(bucket.groups)) for bucket in buckets] == [("0", 2), ("1-2", 2), ("3-8", 1), ("129+", 1)]
    assert [item.staleness for item in buckets[1].groups] == [2, 1]


def test_buckets_leave_no_staleness_out() -> None:
    assert BUCKETS[0][0] == 0
    assert BUCKETS[-1][1] is None
    assert all(before[1] == after[0] - 1 for before, after in itertools.pairwise(BUCKETS) if before[1])


def test_only_the_newest_groups_of_a_bucket_are_taken(tmp_path: Path) -> None:
    (bucket,) = read_buckets(write_journal(tmp_path, [0] * 5), most_groups=2)
    assert len(bucket.groups) == 2


def test_groups_that_an_operator_has_emptied_are_left_out(tmp_path: Path) -> None:
    journal = write_journal(tmp_path, [0, 0, 0])
    connection = connect(journal, "run")
    connection.execute("UPDATE groups SET payload = x'' WHERE trained_step <= 1")
    connection.close()
    (bucket,) = read_buckets(journal, most_groups=64)
    assert len(bucket.groups) == 1


def test_every_loss_sees_the_same_groups_and_gives_its_own_numbers(tmp_path: Path) -> None:
    buckets = read_buckets(write_journal(tmp_path, [0, 0, 5, 5]), most_groups=64)
    found = list(replay(buckets, POLICY, LOSSES, device="cpu"))
    assert [(one.bucket, one.label) for one in found] == [
        (b, n) for b in ("0", "3-8") for n in ("gepo", "gspo", "grpo")
    ]
    fresh = {one.label: one.metrics for one in found if one.bucket == "0"}
    assert len({metrics["grad_norm"] for metrics in fresh.values()}) == 3
    assert len({metrics["kl_k2"] for metrics in fresh.values()}) == 1
    assert fresh["gepo"]["rows"] == 8


def test_the_cut_into_micro_batches_changes_nothing(tmp_path: Path) -> None:
    buckets = read_buckets(write_journal(tmp_path, [3, 3, 3]), most_groups=64)
    (whole,) = replay(buckets, POLICY, LOSSES[:1], device="cpu")
    (cut,) = replay(buckets, POLICY, LOSSES[:1], device="cpu", micro_batch_tokens=9)
    assert cut.metrics["grad_norm"] == pytest.approx(whole.metrics["grad_norm"], rel=1e-4)
    assert cut.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5, abs=1e-7)


def test_what_is_no_journal_or_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="state_dir"):
        read_buckets(tmp_path / JOURNAL_FILE, 8)
    with pytest.raises(BadInputError, match="no trained group"):
        read_buckets(write_journal(tmp_path, [None]), 8)
    other = tmp_path / "other.sqlite3"
    other.write_bytes(b"not a database, but long enough to look at" * 40)
    with pytest.raises(BadInputError, match="cannot be read"):
        read_buckets(other, 8)


def rewritten(journal: Path, **changes: object) -> Path:
    """The journal with these fields of its groups, or of their completions, set."""
    connection = connect(journal, "run")
    for row, payload in connection.execute("SELECT id, payload FROM groups").fetchall():
        group = decode_group(payload)
        of_rows = {name: value for name, value in changes.items() if name in Completion.__dataclass_fields__}
        of_group = {name: value for name, value in changes.items() if name not in of_rows}
        completions = tuple(replace(one, **of_rows) for one in group.completions)
        group = replace(group, completions=completions, **of_group)
        connection.execute("UPDATE groups SET payload = ? WHERE id = ?", (encode_group(group), row))
    connection.close()
    return journal


def test_groups_of_another_models_vocabulary_are_refused(tmp_path: Path) -> None:
    journal = write_journal(tmp_path, [0], highest=5000)
    with pytest.raises(BadInputError, match="vocabulary"):
        list(replay(read_buckets(journal, 8), POLICY, LOSSES, device="cpu"))
    (tmp_path / "prompt").mkdir()
    journal = rewritten(write_journal(tmp_path / "prompt", [0]), prompt_token_ids=(5, 5000))
    with pytest.raises(BadInputError, match="vocabulary"):
        list(replay(read_buckets(journal, 8), POLICY, LOSSES, device="cpu"))


def test_rewards_that_a_loss_cannot_take_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(write_journal(tmp_path, [0]), reward=2.0)
    code, sentence = refusal(capsys, tmp_path, "--losses", "bnpo")
    assert code == 65
    assert "the recorded groups do not fit bnpo: the bnpo advantage needs rewards between 0 and 1" in sentence


def test_a_number_beyond_all_floats_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = write_journal(tmp_path, [0])
    connection = connect(journal, "run")
    (payload,) = connection.execute("SELECT payload FROM groups").fetchone()
    group = decode_group(payload)
    torn = tuple(
        replace(one, sampler_logprobs=(-3e38,) * len(one.token_ids), reward=float(place))
        for place, one in enumerate(group.completions)
    )
    connection.execute("UPDATE groups SET payload = ?", (encode_group(replace(group, completions=torn)),))
    connection.close()
    words = ["lab", "replay", "--run", str(tmp_path), "--policy", str(POLICY), "--device", "cpu", "--json"]
    assert main([*words, "--losses", "grpo:kl_beta=1000"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["grad_norm"] is None
    assert found["kl_k2"] > 1e70


def test_the_command_prints_one_object_for_each_bucket_and_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_journal(tmp_path, [0, 4])
    words = ["lab", "replay", "--run", str(tmp_path), "--policy", str(POLICY), "--losses", "gepo,gspo", "--json"]
    assert main([*words, "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["staleness"], one["loss_name"]) for one in found] == [
        ("0", "gepo"),
        ("0", "gspo"),
        ("3-8", "gepo"),
        ("3-8", "gspo"),
    ]
    assert all(one["grad_norm"] >= 0 and one["rows"] == 4 for one in found)


def refusal(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> tuple[int, str]:
    """Exit code and message; the command printed nothing else, and one sentence."""
    code = main(["lab", "replay", "--run", str(run), "--policy", str(POLICY), "--device", "cpu", "--json", *words])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("heterorl lab: ")
    assert output.err.count("\n") == 1
    return code, output.err


def test_the_command_refuses_a_recording_that_is_missing_or_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, sentence = refusal(capsys, tmp_path)
    assert code == 66
    assert "journal.sqlite3 is not there: --run takes the state_dir of a learner" in sentence

    (tmp_path / JOURNAL_FILE).touch()
    code, sentence = refusal(capsys, tmp_path)
    assert code == 65
    assert "cannot be read as a learner's journal" in sentence

    (tmp_path / JOURNAL_FILE).unlink()
    write_journal(tmp_path, [None, None])
    code, sentence = refusal(capsys, tmp_path)
    assert code == 65
    assert "holds no trained group yet" in sentence


def test_the_command_says_which_option_takes_the_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_journal(tmp_path, [0, 1])
    code, sentence = refusal(capsys, tmp_path, "--policy", str(tmp_path / "policy"))
    assert code == 66
    assert "--policy takes a policy's" in sentence


def test_the_command_refuses_a_recording_whose_groups_are_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = write_journal(tmp_path, [0, 3])
    connection = connect(journal, "run")
    connection.execute("UPDATE groups SET payload = x'ffff'")
    connection.close()
    code, sentence = refusal(capsys, tmp_path)
    assert code == 65
    assert "scored group" in sentence


@pytest.mark.parametrize(
    ("words", "exit_code", "part"),
    [
        (("--losses", "gepoo"), 2, "no loss is called 'gepoo': nearest are gepo"),
        (("--losses", "gepo,nothing-like-it"), 2, "no loss is called 'nothing-like-it': nearest are "),
        (("--losses", "gepo:clip_hgih=1"), 2, "clip_hgih"),
        (("--losses", ","), 2, "a list on the command line is empty"),
        (("--losses", "gepo:kl_beta=1:kl_target=reference"), 2, "replay holds no reference model"),
        (("--groups", "0"), 2, "--groups must be 1 or more"),
        (("--policy", "/nowhere/policy"), 66, "/nowhere/policy"),
        (("--device", "abacus"), 78, "abacus"),
    ],
)
def test_the_command_refuses_words_that_mean_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], exit_code: int, part: str
) -> None:
    write_journal(tmp_path, [0])
    code, sentence = refusal(capsys, tmp_path, *words)
    assert code == exit_code
    assert part in sentence
