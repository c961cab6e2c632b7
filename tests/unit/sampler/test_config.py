import pytest

from services.reward.spec import GraderSpec
from services.runtime.config import load
from services.runtime.errors import ConfigError
from services.sampler.config import RewardSection, SamplerConfig
from services.sampler.scoring import check_allowed
from services.wire.convert import from_lease_ids

INSECURE = ["--connect.insecure=true", "--connect.sampler_id=s"]
CODE = GraderSpec(name="code")
PYTHON = GraderSpec(name="python", options={"callable": "rewards.length:score"})


def reward_of(*overrides: str) -> RewardSection:
    return load(SamplerConfig, None, [*INSECURE, *overrides], {}).value.reward


def test_graders_that_run_code_are_off_until_the_owner_of_the_host_turns_them_on() -> None:
    assert (reward_of().allow_code, reward_of().allow_python) == (False, ())
    given = reward_of("--reward.allow_code=true", "--reward.allow_python=rewards,more.rewards")
    assert (given.allow_code, given.allow_python) == (True, ("rewards", "more.rewards"))


def test_allowing_code_where_no_reward_service_is_started_is_an_error() -> None:
    with pytest.raises(ConfigError, match="names a running reward service"):
        reward_of("--reward.address=unix:///run/reward.sock", "--reward.allow_code=true")


@pytest.mark.parametrize(
    ("grader", "settings", "allowed"),
    [
        (GraderSpec(name="math"), RewardSection(), True),
        (CODE, RewardSection(), False),
        (CODE, RewardSection(allow_code=True), True),
        (PYTHON, RewardSection(allow_code=True), False),
        (PYTHON, RewardSection(allow_python=("rewards",)), True),
        (PYTHON, RewardSection(allow_python=("rewards.other",)), False),
        (GraderSpec(name="newer"), RewardSection(), False),
    ],
)
def test_a_run_whose_graders_this_host_refuses_is_found_out_at_the_start(
    grader: GraderSpec, settings: RewardSection, allowed: bool
) -> None:
    if allowed:
        check_allowed([grader], settings)
        return
    with pytest.raises(ConfigError, match="this sampler cannot score for this run"):
        check_allowed([grader], settings)


@pytest.mark.parametrize("key", ["leases", "engine.max_batch_rows"])
def test_no_sampler_holds_more_leases_than_a_heartbeat_may_name(key: str) -> None:
    """Two batches of groups of two are a lease for each row."""
    load(SamplerConfig, None, [*INSECURE, f"--{key}=16384"], {})
    from_lease_ids([str(number) for number in range(16384)])
    with pytest.raises(ConfigError, match=f"{key} is '16385', but must be less than or equal to 16384"):
        load(SamplerConfig, None, [*INSECURE, f"--{key}=16385"], {})


@pytest.mark.parametrize("address", ["", "unix:///run/reward.sock", "unix:reward.sock", "localhost:7445"])
def test_a_reward_service_is_a_socket_or_an_address(address: str) -> None:
    assert reward_of(f"--reward.address={address}").address == address
    with pytest.raises(ConfigError, match=r"option --reward\.address: .* must be HOST:PORT: the port is missing"):
        reward_of("--reward.address=/run/reward.sock")
    with pytest.raises(ConfigError, match=r"must be unix:///path"):
        reward_of("--reward.address=unix:///")
