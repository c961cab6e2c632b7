"""Layers, provenance and error sentences of the configuration loader."""

import tomllib
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from services.runtime.config import Section, load
from services.runtime.config_render import render_toml
from services.runtime.errors import ConfigError, InputMissingError, UsageError


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Optimizer(Section):
    """How the policy steps."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Learning rate, per step."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's two decays."""
    kind: Literal["adamw", "sgd"] = "adamw"
    """Update rule."""


class Limits(Section):
    max_bytes: int | None = None
    """Most bytes on disk; unset means no limit."""


class Tree(Section):
    """Settings of a test process."""

    model: Path
    """Folder of the policy."""
    name: str = ""
    """Of the run."""
    seed: int = 0
    """Seed of every random stream."""
    colour: Colour = Colour.RED
    """A closed set."""
    optimizer: Optimizer = Optimizer()
    limits: Limits = Limits()
    """Bounds of the disk."""
    weights: dict[str, float] = {}
    """Weight per task."""
    tls: Limits | None = None
    """An optional table."""

    @model_validator(mode="after")
    def _seed_is_even(self) -> "Tree":
        if self.seed % 2:
            raise ValueError("seed must be even: use 2 or 4")
        return self


def test_data_may_hold_integers_of_any_size():
    class Case(Section):
        value: Any = None

    assert Case(value=10**30).value == 10**30


def run(tmp_path: Path, text: str, *overrides: str, **environ: str):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return load(Tree, path, overrides, environ)


def failure(tmp_path: Path, text: str, *overrides: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, text, *overrides, **environ)
    assert caught.value.exit_code == 78
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(tmp_path) + "/", "")


def test_the_command_line_wins_over_the_environment_over_the_file(tmp_path: Path):
    text = 'model = "m"\nseed = 2\n[optimizer]\nlr = 0.1\nkind = "sgd"\n'
    environ = {"HETERORL_OPTIMIZER__LR": "0.2", "HETERORL_SEED": "4", "PATH": "/bin"}
    resolved = run(tmp_path, text, "--optimizer.lr=0.3", **environ)
    assert (resolved.value.optimizer.lr, resolved.value.seed, resolved.value.optimizer.kind) == (0.3, 4, "sgd")
    assert resolved.sources["optimizer.lr"] == "command line"
    assert resolved.sources["seed"] == "environment"
    assert resolved.sources["optimizer.kind"] == f"file {tmp_path / 'run.toml'}"
    assert resolved.sources["optimizer.betas"] == "default"


def test_lists_optionals_and_tables_of_free_names_are_read_from_words(tmp_path: Path):
    words = ["--optimizer.betas=0.5,0.6", "--limits.max_bytes=none", "--weights.gsm8k=2", "--colour=blue"]
    value = run(tmp_path, 'model = "m"\n[limits]\nmax_bytes = 3\n[weights]\nmath = 1', *words).value
    assert value.optimizer.betas == (0.5, 0.6)
    assert value.limits.max_bytes is None
    assert value.weights == {"math": 1.0, "gsm8k": 2.0}
    assert value.colour is Colour.BLUE


def test_an_unknown_key_in_the_file_names_its_line_and_the_nearest_key(tmp_path: Path):
    message = failure(tmp_path, 'model = "m"\n\n[optimizer]\nlrr = 3\n')
    assert message == "run.toml, line 4: unknown key optimizer.lrr; did you mean optimizer.lr?"


def test_an_unknown_key_is_reported_before_the_missing_key_that_it_caused(tmp_path: Path):
    assert failure(tmp_path, 'modle = "m"') == ("run.toml, line 1: unknown key modle; did you mean model? (and 1 more)")


def test_a_key_in_the_wrong_table_is_led_to_the_right_one(tmp_path: Path):
    assert "did you mean optimizer.kind?" in failure(tmp_path, 'model = "m"\nkind = "sgd"')


def test_unknown_keys_of_the_environment_and_the_command_line_name_their_origin(tmp_path: Path):
    text = 'model = "m"'
    assert failure(tmp_path, text, HETERORL_OPTIMIZER__LRR="1") == (
        "environment variable HETERORL_OPTIMIZER__LRR: unknown key optimizer.lrr; did you mean optimizer.lr?"
    )
    assert failure(tmp_path, text, "--optimiser.lr=1") == (
        "option --optimiser.lr: unknown key optimiser; did you mean optimizer?"
    )
    assert "did you mean HETERORL_SEED?" in failure(tmp_path, text, HETERORL_SEEDS="1")
    assert "did you mean HETERORL_OPTIMIZER__LR?" in failure(tmp_path, text, HETERORL_OPTIMIZER_LR="1")


def test_variables_that_are_no_settings_are_left_alone(tmp_path: Path):
    assert run(tmp_path, 'model = "m"', HETERORL_FAILPOINTS="journal.commit=kill").value.seed == 0


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("[optimizer]\nlr = -1", [], "run.toml, line 3: optimizer.lr is -1, but must be greater than 0"),
        ("", ["--seed=two"], "option --seed: seed is 'two', but must be a valid integer"),
        ("[optimizer]\nkind = 'lion'", [], "optimizer.kind is 'lion', but must be 'adamw' or 'sgd'"),
        ("colour = 'green'", [], "line 2: colour is 'green', but must be 'red' or 'blue'"),
        ("optimizer = 3", [], "line 2: optimizer is 3, but must be a table"),
        ("seed = 3", [], "run.toml: seed must be even: use 2 or 4"),
        ("[optimizer]\nbetas = [1, 2, 3]", [], "optimizer.betas is"),
        ("[optimizer]\nlr = true", [], "line 3: optimizer.lr is True, but must be a number"),
        ("seed = 9223372036854775808", [], "line 2: seed is 9223372036854775808, but must be an integer of 64 bits"),
        ("", ["--seed=" + "9" * 5000], "option --seed: seed is"),
        ("", ["--optimizer.betas=" + "9" * 5000], "option --optimizer.betas: optimizer.betas.0 is"),
        ("", ["--name=\udcff"], "option --name: name is '\\udcff', but must be UTF-8 text"),
        ("", ["--model=a\0b"], "option --model: model is 'a\\x00b', but must be a path"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_place_value_and_what_is_allowed(
    tmp_path: Path, text: str, words: list[str], expected: str
):
    assert expected in failure(tmp_path, 'model = "m"\n' + text, *words)


def test_a_missing_key_says_the_three_ways_to_set_it():
    with pytest.raises(ConfigError, match=r"model is missing: .* HETERORL_MODEL=… or as --model=…"):
        load(Tree, None, [], {})


def test_a_missing_file_broken_toml_and_a_stray_word_have_their_own_errors(tmp_path: Path):
    with pytest.raises(InputMissingError, match=r"there is no config file .*absent\.toml"):
        load(Tree, tmp_path / "absent.toml", [], {})
    assert "not valid TOML" in (message := failure(tmp_path, 'model = "m"\nseed = = 2'))
    assert "line 2" in message
    with pytest.raises(UsageError, match=r"'--verbose' is neither an option nor a setting"):
        load(Tree, None, ["--verbose"], {})
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Tree, tmp_path, [], {})
    assert "nested too deeply" in failure(tmp_path, "seed = " + "[" * 100_000)
    assert "nested too deeply" in failure(tmp_path, ".".join("a" * 3000) + " = 1")
    assert "not valid TOML" in failure(tmp_path, "seed = " + "9" * 5000)


def test_a_rendered_tree_reads_back_as_the_same_tree(tmp_path: Path):
    value = run(tmp_path, 'model = "m \\" ü"\n[weights]\n"a b" = 2.5\n[tls]\nmax_bytes = 9').value
    text = render_toml(Tree, value)
    (tmp_path / "again.toml").write_text(text)
    assert load(Tree, tmp_path / "again.toml", [], {}).value == value


def test_rendered_defaults_show_every_key_with_documentation_bounds_and_choices():
    text = render_toml(Tree)
    assert "# Learning rate, per step. [> 0]\nlr = 1e-06\n" in text
    assert '# Update rule. [one of: adamw, sgd]\nkind = "adamw"\n' in text
    assert "# model =    (required)" in text
    assert "# max_bytes =    (unset)" in text
    assert "\n# [tls]\n" in text
    assert tomllib.loads(text)["optimizer"]["betas"] == [0.9, 0.999]


@pytest.mark.parametrize(
    ("text", "words", "environ"),
    [
        ("optimizer = 3", ["--optimizer.lr=0.1"], {}),
        ("optimizer = 3", [], {"HETERORL_OPTIMIZER__LR": "0.1"}),
        ("[[optimizer]]\nlr = 0.1", ["--optimizer.kind=sgd"], {}),
        ("tls = 'x'", ["--tls.max_bytes=1"], {}),
        ("limits = 'x'", ["--limits.max_bytes=1"], {}),
    ],
)
def test_what_stands_where_a_table_must_is_refused_whatever_stronger_layers_set(
    tmp_path: Path, text: str, words: list[str], environ: dict[str, str]
):
    message = failure(tmp_path, 'model = "m"\n' + text, *words, **environ)
    assert message.startswith("run.toml, line 2: ")
    assert message.endswith("but must be a table")


@pytest.mark.parametrize(
    ("text", "words", "environ"),
    [
        ("[optimizer.lr]\nx = 1", ["--optimizer.lr=0.1"], {}),
        ("[optimizer.lr]", [], {"HETERORL_OPTIMIZER__LR": "0.1"}),
        ("[tls.max_bytes.x.y]\nz = 1", ["--tls=none"], {}),
    ],
)
def test_a_table_where_a_plain_value_must_stand_is_refused_whatever_stronger_layers_set(
    tmp_path: Path, text: str, words: list[str], environ: dict[str, str]
):
    message = failure(tmp_path, 'model = "m"\n' + text, *words, **environ)
    assert message.startswith("run.toml")
    assert message.endswith("is a table, but must be a plain value")


def test_a_stronger_layer_may_unset_an_optional_table_or_set_it_again(tmp_path: Path):
    text = 'model = "m"\n[tls]\nmax_bytes = 1\n'
    assert run(tmp_path, text, "--tls=none").value.tls is None
    assert run(tmp_path, text, HETERORL_TLS="none").value.tls is None
    assert run(tmp_path, text, "--tls.max_bytes=2", HETERORL_TLS="none").value.tls == Limits(max_bytes=2)


def test_an_empty_path_is_refused_with_its_place(tmp_path: Path):
    assert failure(tmp_path, 'model = ""') == "run.toml, line 1: model is '', but must be a path"
    assert failure(tmp_path, 'model = "m"', "--model=") == "option --model: model is '', but must be a path"


def test_the_home_of_a_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`state_dir = "~/runs/a"` would be a folder named ~ otherwise."""
    monkeypatch.setenv("HOME", "/home/somebody")
    assert run(tmp_path, 'model = "~/m"').value.model == Path("/home/somebody/m")
    assert run(tmp_path, 'model = "a/~"').value.model == Path("a/~")


def test_infinite_numbers_are_refused(tmp_path: Path) -> None:
    """`lease.ahead = inf` would be a traceback in a running learner, `optimizer.lr = inf` weights of NaN."""
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\n[optimizer]\nlr = inf\n')
    with pytest.raises(ConfigError, match=r"line 3: optimizer\.lr is inf, but must be a finite number"):
        load(Tree, path, [], {})
    with pytest.raises(ConfigError, match=r"finite number"):
        load(Tree, None, ["--model=m", "--optimizer.betas=0.9,nan"], {})
