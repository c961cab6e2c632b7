"""What people get wrong: one sentence, the documented exit code, no traceback, and nothing written."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

POLICY = Path(__file__).parents[2] / "services" / "lab" / "assets" / "tiny-policy"


def heterorl(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that would start, on loopback without TLS."""
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    (tmp_path / "run.toml").write_text(
        f'run = {{ state_dir = "state" }}\nlisten = {{ address = "127.0.0.1:0", insecure = true }}\n'
        f'policy = {{ path = "{POLICY}", device = "cpu" }}\ndata = {{ train = "train.jsonl" }}\n'
    )
    return tmp_path


def sentence_of(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line that a person reads; log lines in JSON may stand before it."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("{")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_good_configuration_passes_the_check(folder: Path):
    done = heterorl(folder, "learner", "-c", "run.toml", "--check")
    assert done.returncode == 0, done.stderr
    assert "1 training prompts" in done.stdout


def test_an_unknown_key_suggests_the_nearest_one(folder: Path):
    with (folder / "run.toml").open("a") as file:
        file.write("[optimizer]\nlearning_rat = 1e-6\nl = 1\n")
    sentence = sentence_of(heterorl(folder, "learner", "-c", "run.toml"), 78)
    assert "run.toml" in sentence
    assert "lr" in sentence


def test_a_missing_config_file_is_named(folder: Path):
    assert "absent.toml" in sentence_of(heterorl(folder, "learner", "-c", "absent.toml"), 66)


def test_a_missing_data_file_is_named(folder: Path):
    sentence = sentence_of(heterorl(folder, "learner", "-c", "run.toml", "--data.train=absent.jsonl"), 66)
    assert "absent.jsonl" in sentence


def test_a_data_line_that_does_not_parse_is_named_by_number(folder: Path):
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"prompt": "2+2=", "answer": "4"}\n{"prompt": oops}\n')
    sentence = sentence_of(heterorl(folder, "learner", "-c", "run.toml"), 65)
    assert "train.jsonl" in sentence
    assert "line 3" in sentence


def test_a_reference_answer_that_no_grader_can_read_is_named(folder: Path):
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Half of one?", "answer": "\\frac{1}{"}) + "\n")
    sentence = sentence_of(heterorl(folder, "learner", "-c", "run.toml"), 65)
    assert "train.jsonl, prompt 2" in sentence
    assert "cannot be graded" in sentence


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("--run.export_dir=train.jsonl", "train.jsonl"),
        ("--optimizer.betas=[0.9, 2]", "less than 1"),
        ("--lease.heartbeat_s=60", "session_ttl_s"),
        ("--reward=[]", "at least 1"),
    ],
)
def test_what_could_not_go_well_is_said_before_the_run_begins(folder: Path, setting: str, says: str):
    assert says in sentence_of(heterorl(folder, "learner", "-c", "run.toml", "--check", setting), 78)


def test_an_unknown_grader_suggests_the_nearest_one(folder: Path):
    with (folder / "run.toml").open("a") as file:
        file.write('[[reward]]\nname = "maths"\n')
    sentence = sentence_of(heterorl(folder, "learner", "-c", "run.toml"), 65)
    assert "maths" in sentence
    assert "math" in sentence.replace("maths", "")


def test_an_unknown_dtype_of_the_engine_is_named(folder: Path):
    sentence = sentence_of(heterorl(folder, "sampler", "--learner", "127.0.0.1:7443", "--engine.dtype=float8"), 78)
    assert "engine.dtype" in sentence
    assert "bfloat16" in sentence


def test_a_model_directory_without_a_tokenizer_is_refused(folder: Path):
    shutil.copytree(POLICY, folder / "model")
    for file in (folder / "model").glob("tokenizer*"):
        file.unlink()
    sentence = sentence_of(heterorl(folder, "learner", "-c", "run.toml", "--policy.path=model"), 66)
    assert "tokenizer" in sentence


def test_a_chat_template_that_fails_is_found_by_the_check(folder: Path):
    shutil.copytree(POLICY, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}")
    sentence = sentence_of(heterorl(folder, "learner", "-c", "run.toml", "--check", "--policy.path=model"), 78)
    assert "the chat template fails" in sentence


def test_a_port_in_use_is_named(folder: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sentence = sentence_of(heterorl(folder, "learner", "-c", "run.toml", f"--listen.address=127.0.0.1:{port}"), 69)
    assert f"port {port} on 127.0.0.1" in sentence
    assert "in use" in sentence


def test_a_metrics_port_in_use_is_named_before_anybody_is_served(folder: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = heterorl(folder, "learner", "-c", "run.toml", f"--listen.metrics_address=127.0.0.1:{port}")
    assert f"port {port} on 127.0.0.1 (metrics) is in use" in sentence_of(done, 69)
    assert "listens" not in done.stdout


def test_insecure_is_refused_on_an_address_that_others_can_reach(folder: Path):
    sentence = sentence_of(heterorl(folder, "learner", "-c", "run.toml", "--listen.address=0.0.0.0:0"), 77)
    assert "loopback" in sentence


@pytest.mark.parametrize("target", ["learner.example.org", "host:port", "host:99999", "http://host:7443"])
def test_a_wrong_host_and_port_is_refused_before_anything_starts(folder: Path, target: str):
    sentence = sentence_of(heterorl(folder, "sampler", "--learner", target), 2)
    assert "HOST:PORT" in sentence
    assert not (folder / "sampler-state").exists()


def test_an_absent_learner_is_waited_for_visibly_and_given_up_as_configured(folder: Path):
    done = heterorl(
        folder,
        *("sampler", "--learner", "127.0.0.1:9", "--connect.insecure=true", "--connect.sampler_id=s"),
        *("--connect.give_up_s=3", "--log.format=json"),
    )
    assert "127.0.0.1:9" in sentence_of(done, 69)
    tries = [line for line in done.stderr.splitlines() if line.startswith("{") and "127.0.0.1:9" in line]
    assert tries, "each try leaves a log line that names the learner"


@pytest.mark.parametrize(
    "words", [("sampler", "--learner", "127.0.0.1:7443"), ("learner", "-c", "run.toml", "--listen.insecure=false")]
)
def test_a_process_without_certificates_says_how_to_get_them(folder: Path, words: tuple[str, ...]):
    assert "pki dev" in sentence_of(heterorl(folder, *words), 78)


@pytest.mark.parametrize("verb", ["status", "why"])
def test_monitoring_a_learner_that_is_not_there_is_one_sentence(folder: Path, verb: str):
    sentence = sentence_of(heterorl(folder, verb, "--learner", "127.0.0.1:9", "--insecure"), 69)
    assert "does not answer" in sentence
    assert "refused" in sentence


def test_an_interval_that_is_no_time_is_refused(folder: Path):
    assert "--interval" in sentence_of(heterorl(folder, "top", "--insecure", "--interval=nan"), 2)
