"""What the deployment files name exists: verbs, flags, configuration keys, image targets, extras, secrets."""

import io
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import yaml

from heterorl.v1 import monitor_pb2
from services.cli import build_parser
from services.commands.config import TREES, tree_of
from services.learner import telemetry as learner_telemetry
from services.runtime.config import load
from services.runtime.config_render import render_toml
from services.runtime.errors import ConfigError, HeteroRLError
from services.sampler import telemetry as sampler_telemetry
from services.sampler.config import EngineSection
from services.sampler.tally import Tally
from services.sampler.vllm_child.arguments import environment as vllm_environment

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()
MACHINES = ["learner", "sampler", "relay"]
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
INSTANCE = DEPLOY / "systemd" / "instance" / "10-instance.conf"
VARIABLE = re.compile(r"\$\{(HETERORL_[A-Z_]+)(?::([-?])([^}]*))?\}")
CERTIFICATES = {f"HETERORL_TLS__{key}": f"/pki/{key}" for key in ("CA", "CERTIFICATE", "KEY")}


def assert_starts(words: list[str], environment: Mapping[str, str]) -> None:
    """The command line parses, and the environment resolves in the configuration of its process."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            arguments, rest = build_parser(words[0]).parse_known_args(words)
    except SystemExit:
        pytest.fail(f"{' '.join(words)}: {said.getvalue()}")
    assert rest == [], words
    if words[0] in TREES:
        assert arguments.overrides == []
        load(tree_of(words[0]), None, [], {**CERTIFICATES, **environment})


def compose(machine: str, name: str = "compose.yaml") -> dict[str, Any]:
    text = (DEPLOY / "compose" / machine / name).read_text()
    return yaml.safe_load(VARIABLE.sub(lambda found: found[3] if found[2] == "-" else "host.example:7443", text))


def unit(path: Path) -> dict[str, list[str]]:
    """Directive -> its values, in order."""
    directives: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            directives.setdefault(key, []).append(value)
    return directives


CONTAINERS = [
    pytest.param(machine, service, id=f"{machine}-{name}")
    for machine in MACHINES
    for name, service in compose(machine)["services"].items()
]


@pytest.mark.parametrize(("machine", "service"), CONTAINERS)
def test_a_container_starts_with_words_and_settings_that_exist(machine: str, service: dict[str, Any]) -> None:
    assert_starts(service["command"], service.get("environment", {}))
    probe = service["healthcheck"]["test"]
    assert probe[:2] == ["CMD", "heterorl"]
    assert_starts(probe[2:], {})


@pytest.mark.parametrize(("machine", "service"), CONTAINERS)
def test_a_container_is_granted_every_secret_that_it_names(machine: str, service: dict[str, Any]) -> None:
    words = [*service["command"], *service["healthcheck"]["test"], *service.get("environment", {}).values()]
    named = {word.removeprefix("/run/secrets/") for word in words if word.startswith("/run/secrets/")}
    assert named == set(service.get("secrets", []))
    assert named <= set(compose(machine).get("secrets", {}))


@pytest.mark.parametrize(("machine", "service"), CONTAINERS)
def test_a_container_can_write_nothing_but_its_volumes(machine: str, service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    named = {one.split(":")[0] for one in service["volumes"] if isinstance(one, str)}
    assert named <= set(compose(machine)["volumes"])
    for mounted in (one for one in service["volumes"] if not isinstance(one, str)):
        assert mounted["read_only"] is True
        assert mounted["bind"] == {"create_host_path": False}, "Docker would make a folder in place of a missing file"


@pytest.mark.parametrize(("machine", "service"), CONTAINERS)
def test_a_containers_log_is_bounded(machine: str, service: dict[str, Any]) -> None:
    assert service["logging"] == {"driver": "local"}, "Docker's default driver keeps everything"


@pytest.mark.parametrize(("machine", "service"), CONTAINERS)
def test_a_container_runs_an_image_that_the_dockerfile_builds(machine: str, service: dict[str, Any]) -> None:
    target = service["image"].removeprefix("heterorl-").removesuffix(":latest")
    assert re.search(rf"^FROM \S+ AS {target}$", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_example_environment_sets_exactly_what_the_compose_file_reads(machine: str) -> None:
    folder = DEPLOY / "compose" / machine
    read = {found[1] for found in VARIABLE.finditer((folder / "compose.yaml").read_text())}
    lines = (folder / ".env.example").read_text().splitlines()
    assert {line.split("=")[0] for line in lines if not line.startswith("#")} == read


@pytest.mark.parametrize("machine", ["learner", "sampler"])
def test_the_gpu_overlay_changes_services_that_are_there(machine: str) -> None:
    assert set(compose(machine, "gpu.yaml")["services"]) <= set(compose(machine)["services"])


def test_samplers_publish_no_port() -> None:
    assert not [name for name, service in compose("sampler")["services"].items() if "ports" in service]


def test_each_image_starts_a_verb_that_exists_as_an_ordinary_user() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    final = [stage for stage in stages if "\nCMD " in stage]
    assert len(final) == 6
    for stage in final:
        assert "\nUSER heterorl\n" in stage
        command = re.search(r"^CMD (\[.*\])$", stage, re.MULTILINE)
        assert command
        words = yaml.safe_load(command[1])
        if "--help" not in words:
            assert_starts(words, {})


def test_what_vllm_compiles_is_not_kept_where_nothing_may_be_run() -> None:
    """Docker mounts a tmpfs with noexec: a compiled library that lies there cannot be loaded."""
    mounted = compose("sampler")["services"]["sampler"]["tmpfs"]
    (stage,) = [one for one in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE) if " AS sampler-vllm\n" in one]
    set_here = dict(re.findall(r"(\w+)=(\S+)", stage))
    caches = vllm_environment(EngineSection(), Path("/var/lib/heterorl/state"), set_here)
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        assert not any(Path(caches[name]).is_relative_to(one) for one in mounted), name


def test_images_install_extras_that_the_project_has() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for group in re.findall(r"/src\[([a-z,]+)\]", DOCKERFILE) for name in group.split(",")}
    assert named
    assert named <= set(extras)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_with_words_and_settings_that_exist(path: Path) -> None:
    directives = unit(path)
    (start,) = directives["ExecStart"]
    binary, *words = shlex.split(start)
    assert binary == "/opt/heterorl/bin/heterorl"
    pairs = [word.partition("=") for value in directives.get("Environment", []) for word in shlex.split(value)]
    environment = {key: value for key, _, value in pairs}
    assert_starts(words, environment)
    loaded = {value.split(":")[0] for value in directives.get("LoadCredential", [])}
    assert {value.removeprefix("%d/") for value in environment.values() if value.startswith("%d/")} == loaded


def test_an_instance_of_the_sampler_has_files_of_its_own() -> None:
    common, own = unit(DEPLOY / "systemd" / "heterorl-sampler.service"), unit(INSTANCE)
    reset, start = own["ExecStart"]
    assert reset == ""
    assert start == common["ExecStart"][0].replace("sampler.toml", "%i.toml")
    (place,) = own["Environment"]
    (before,) = [value for value in common["Environment"] if value.startswith("HETERORL_STATE_DIR=")]
    assert place == before.replace("/state", "/%i"), "in the folder that the unit may write to"
    of_the_instance = [value.replace("/pki/sampler", "/pki/%i") for value in common["LoadCredential"]]
    assert own["LoadCredential"] == ["", *of_the_instance]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_does_not_restart_on_what_restarting_cannot_heal(path: Path) -> None:
    (codes,) = unit(path)["RestartPreventExitStatus"]
    known = {error.exit_code for error in exceptions(HeteroRLError)}
    assert {str(ConfigError.exit_code)} <= set(codes.split()) <= {str(code) for code in known}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_notifies_and_is_watched(path: Path) -> None:
    directives = unit(path)
    assert directives["Type"] == ["notify"]
    assert directives["WatchdogSec"]
    assert directives["User"] == ["heterorl"]


@pytest.mark.parametrize("role", ["learner", "sampler"])
def test_a_unit_that_may_compile_kernels_has_a_home_that_it_can_write_to(role: str) -> None:
    directives = unit(DEPLOY / "systemd" / f"heterorl-{role}.service")
    assert directives["ProtectSystem"] == ["strict"]
    (place,) = directives["StateDirectory"]
    assert f"HOME=/var/lib/{place}" in directives["Environment"]


@pytest.mark.parametrize("process", MACHINES)
def test_the_shipped_configuration_is_the_one_that_the_classes_describe(process: str) -> None:
    assert (DEPLOY / "config" / f"{process}.toml").read_text() == render_toml(tree_of(process))


@pytest.mark.parametrize("process", MACHINES)
def test_the_shipped_configuration_needs_certificates_and_nothing_else(process: str) -> None:
    path = DEPLOY / "config" / f"{process}.toml"
    assert load(tree_of(process), path, [], CERTIFICATES).value


def test_the_manual_has_every_exit_code() -> None:
    manual = (ROOT / "docs" / "operations.md").read_text()
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", manual, re.MULTILINE)}
    assert listed == {0} | {error.exit_code for error in exceptions(HeteroRLError)}


def test_the_manual_names_the_metrics_that_exist() -> None:
    counts = {"spool_groups", "spool_bytes", "spool_limit_bytes", "leases", "policy_version", "learner_version"}
    counts |= {"engine_restarts", "relay_fallbacks"}
    sampler = sampler_telemetry.Observed(tally=Tally(), received_bytes={}, **dict.fromkeys(counts, 0))
    learner = monitor_pb2.RunStatus(evals=[monitor_pb2.EvalPoint()])
    exist = [*learner_telemetry.metrics_of(learner), *sampler_telemetry.metrics_of(sampler)]
    manual = (ROOT / "docs" / "operations.md").read_text()
    named = set(re.findall(r"`(heterorl_(?:learner|sampler)_[a-z_]+)`", manual))
    assert named == {f"{metric.name}_total" if metric.type == "counter" else metric.name for metric in exist}
    assert not [name for name in named if name.endswith(("_count", "_sum", "_bucket"))], "parts of a histogram"


def exceptions(error: type[HeteroRLError]) -> Iterator[type[HeteroRLError]]:
    yield error
    for child in error.__subclasses__():
        yield from exceptions(child)
