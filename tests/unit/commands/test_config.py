"""`heterorl config`, through the command line's own main."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from services.cli import main
from services.commands.config import TREES, tree_of


@pytest.mark.parametrize("process", TREES)
def test_the_default_file_is_valid_and_its_values_are_the_defaults(process: str, capsys: pytest.CaptureFixture[str]):
    assert main(["config", "default", process]) == 0
    table = tomllib.loads(capsys.readouterr().out)
    assert tree_of(process).model_validate(table) == tree_of(process)()


def test_show_names_the_origin_of_each_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "run.toml"
    file.write_text(
        "[listen]\ninsecure = true\n[[reward]]\nname = 'python'\nweight = 2\n"
        "options = {callable = 'rewards.length:score', arguments = {target = 400}}\n"
    )
    monkeypatch.setenv("HETERORL_RUN__STEPS", "7")
    words = ["config", "show", "learner", "-c", str(file), "--json", "--optimizer.lr=1e-4", "--policy.path=/m"]
    assert main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["optimizer.lr"] == {"value": 1e-4, "source": "command line"}
    assert shown["policy.path"] == {"value": "/m", "source": "command line"}
    assert shown["run.steps"] == {"value": 7, "source": "environment"}
    assert shown["listen.insecure"] == {"value": True, "source": f"file {file}"}
    assert shown["reward"]["value"][0]["weight"] == 2
    assert shown["reward"]["value"][0]["options"]["arguments"] == {"target": 400}
    assert shown["tls"] == {"value": None, "source": "default"}
    assert main([word for word in words if word != "--json"]) == 0
    assert any(line.split() == ["run.steps", "7", "environment"] for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("process", TREES)
def test_a_configuration_is_shown_without_the_certificates_that_another_layer_will_name(
    process: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "run.toml"
    file.write_text('[listen]\naddress = "0.0.0.0:1"\n' if process != "sampler" else "leases = 3\n")
    assert main(["config", "show", process, "-c", str(file)]) == 0
    assert f"file {file}" in capsys.readouterr().out


def test_an_unknown_key_ends_with_78_and_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "run.toml"
    file.write_text("[listen]\ninsecure = true\n\n[optimiser]\nlr = 1\n")
    assert main(["config", "show", "learner", "-c", str(file)]) == 78
    assert capsys.readouterr().err == (
        f"heterorl config: {file}, line 4: unknown key optimiser; did you mean optimizer?\n"
    )


def test_a_missing_file_ends_with_66_and_a_stray_word_with_2(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "show", "learner", "-c", "/absent.toml"]) == 66
    assert main(["config", "show", "learner", "--verbose"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["config", "default", "learner", "--verbose"])
    assert caught.value.code == 2


def test_showing_a_configuration_imports_nothing_heavy():
    program = """
import sys
from services.cli import main
main(["config", "show", "learner", "--listen.insecure=true"]), main(["config", "default", "sampler"])
heavy = sorted({"torch", "transformers", "grpc", "numpy", "vllm", "cryptography"} & set(sys.modules))
print(heavy, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "[]\n"
