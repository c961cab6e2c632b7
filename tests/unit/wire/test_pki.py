"""`heterorl pki dev`'s folder: what is in it, and what a second run keeps."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from services.runtime.errors import ConfigError, InputMissingError, RefusedError, UsageError
from services.wire.certificates import alternative_names, check_to_dial, check_to_serve
from services.wire.identity import Role
from services.wire.pki import LEAF_LIFE, Outcome, make_dev_pki, samplers_in
from services.wire.tls import TlsFiles

NOW = datetime(2026, 1, 15, 12, tzinfo=UTC)
NAMES = ["ca", "learner", "relay", "monitor", "admin", "eu-1"]


def outcomes(directory: Path, samplers: list[str], hosts: list[str], now: datetime = NOW) -> dict[str, str]:
    return {made.name: made.outcome.value for made in make_dev_pki(directory, samplers, hosts, now)}


def hosts(directory: Path, name: str) -> list[str]:
    names = alternative_names(x509.load_pem_x509_certificate((directory / f"{name}.pem").read_bytes()))
    assert names is not None
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return [*names.get_values_for_type(x509.DNSName), *addresses]


def test_a_new_folder_has_a_pair_for_everyone_and_private_keys(tmp_path: Path):
    directory = tmp_path / "pki"
    assert outcomes(directory, ["eu-1"], []) == dict.fromkeys(NAMES, "made")
    assert {path.name for path in directory.iterdir()} == {
        f"{name}{end}" for name in NAMES for end in (".pem", "-key.pem")
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.glob("*-key.pem")} == {0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_every_certificate_passes_the_check_of_its_side_with_its_role(tmp_path: Path):
    make_dev_pki(tmp_path, ["eu-1"], [], NOW)
    for name, role in {"learner": Role.LEARNER, "relay": Role.RELAY}.items():
        assert check_to_serve(TlsFiles.in_directory(tmp_path, name), NOW).identity.role is role
    for name, role in {"relay": Role.RELAY, "monitor": Role.MONITOR, "admin": Role.ADMIN, "eu-1": Role.SAMPLER}.items():
        identity = check_to_dial(TlsFiles.in_directory(tmp_path, name), NOW).identity
        assert (identity.role, identity.id) == (role, name)


def test_samplers_are_known_by_their_certificates(tmp_path: Path):
    assert samplers_in(tmp_path / "none") == []
    make_dev_pki(tmp_path, ["us-1", "eu-1"], [], NOW - 2 * LEAF_LIFE)
    (tmp_path / "renamed.pem").write_bytes((tmp_path / "eu-1.pem").read_bytes())
    (tmp_path / "damaged.pem").write_text("-----BEGIN")
    assert samplers_in(tmp_path) == ["eu-1", "us-1"], "expired ones too: they are to be renewed"


def test_only_those_that_serve_carry_host_names(tmp_path: Path):
    make_dev_pki(tmp_path, ["eu-1"], ["learner.example.org", "10.0.0.7"], NOW)

    expected = {"localhost", "learner.example.org", "127.0.0.1", "::1", "10.0.0.7"}
    assert set(hosts(tmp_path, "learner")) == set(hosts(tmp_path, "relay")) == expected
    assert hosts(tmp_path, "eu-1") == hosts(tmp_path, "admin") == []


def test_a_second_run_keeps_what_is_valid_byte_for_byte(tmp_path: Path):
    make_dev_pki(tmp_path, ["eu-1"], ["a.example"], NOW)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert outcomes(tmp_path, ["eu-1"], ["a.example"]) == dict.fromkeys(NAMES, "kept")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_second_run_makes_only_what_changed(tmp_path: Path):
    make_dev_pki(tmp_path, ["eu-1"], [], NOW)
    (tmp_path / "monitor-key.pem").unlink()
    changed = {"learner": "renewed", "relay": "renewed", "monitor": "renewed", "us-1": "made"}
    assert outcomes(tmp_path, ["eu-1", "us-1"], ["a.example"]) == dict.fromkeys(NAMES, "kept") | changed


def test_leaves_that_expire_soon_are_renewed_under_the_same_ca(tmp_path: Path):
    make_dev_pki(tmp_path, ["eu-1"], [], NOW)
    later = NOW + LEAF_LIFE - timedelta(days=1)
    assert outcomes(tmp_path, ["eu-1"], [], later) == dict.fromkeys(NAMES, "renewed") | {"ca": "kept"}
    assert check_to_dial(TlsFiles.in_directory(tmp_path, "eu-1"), later + LEAF_LIFE).identity.id == "eu-1"


def test_a_renewal_keeps_the_host_names_that_nobody_repeated(tmp_path: Path):
    make_dev_pki(tmp_path, [], ["learner.example.org", "10.0.0.7"], NOW)
    make_dev_pki(tmp_path, [], ["fe80::7"], NOW)
    make_dev_pki(tmp_path, [], [], NOW + LEAF_LIFE - timedelta(days=1))
    named = ["localhost", "learner.example.org", "127.0.0.1", "::1", "10.0.0.7", "fe80::7"]
    assert sorted(hosts(tmp_path, "learner")) == sorted(named)


def test_a_leaf_never_outlives_its_ca(tmp_path: Path):
    make_dev_pki(tmp_path, [], [], NOW)
    made = {item.name: item for item in make_dev_pki(tmp_path, ["x"], [], NOW + timedelta(days=3640))}
    assert made["x"].outcome is Outcome.MADE
    assert made["x"].expires == made["ca"].expires


def test_a_broken_ca_is_never_replaced_silently(tmp_path: Path):
    make_dev_pki(tmp_path, [], [], NOW)
    with pytest.raises(RefusedError, match=r"ca\.pem expired"):
        make_dev_pki(tmp_path, [], [], NOW + timedelta(days=4000))
    (tmp_path / "ca-key.pem").write_bytes((tmp_path / "learner-key.pem").read_bytes())
    with pytest.raises(ConfigError, match="does not belong to"):
        make_dev_pki(tmp_path, [], [], NOW)
    (tmp_path / "ca-key.pem").unlink()
    with pytest.raises(InputMissingError, match=r"ca-key\.pem"):
        make_dev_pki(tmp_path, [], [], NOW)


@pytest.mark.parametrize("name", ["ca", "learner", "monitor", "eu-key"])
def test_a_sampler_cannot_take_another_files_name(tmp_path: Path, name: str):
    with pytest.raises(UsageError, match="another file has that name"):
        make_dev_pki(tmp_path, [name], [], NOW)


@pytest.mark.parametrize("host", ["https://x", "x:7443", "", "bücher.example"])
def test_a_host_that_no_certificate_can_name_is_a_usage_error(tmp_path: Path, host: str):
    with pytest.raises(UsageError, match="is not a host name or address"):
        make_dev_pki(tmp_path / "new", [], [host], NOW)
