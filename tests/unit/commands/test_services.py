"""The short options of the services stand for keys of their config files."""

import argparse

import pytest

from services.cli import main
from services.commands import learner, relay, sampler
from services.commands.connection import tls_overrides

ADD = {"learner": learner.add_arguments, "sampler": sampler.add_arguments, "relay": relay.add_arguments}


def parse(verb: str, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ADD[verb](parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("verb", sorted(ADD))
def test_a_folder_of_certificates_stands_for_three_files(verb: str):
    words = tls_overrides(parse(verb, "--tls", "pki", "--identity", "paris"), "connect")
    assert words == ["--tls.ca=pki/ca.pem", "--tls.certificate=pki/paris.pem", "--tls.key=pki/paris-key.pem"]


@pytest.mark.parametrize("verb", sorted(ADD))
def test_insecure_sets_the_sections_that_have_the_key(verb: str):
    words = tls_overrides(parse(verb, "--insecure"), "connect", "listen")
    assert words == ["--connect.insecure=true", "--listen.insecure=true"]
    assert tls_overrides(parse(verb), "connect", "listen") == []


@pytest.mark.parametrize(
    ("verb", "key"),
    [
        ("learner", "listen.address"),
        ("learner", "listen.metrics_address"),
        ("sampler", "connect.learner"),
        ("sampler", "connect.weights"),
        ("sampler", "metrics_address"),
    ],
)
def test_a_wrong_address_names_its_key(verb: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, f"--{key}=foo"]) == 78
    assert f"{key} is 'foo', but must be HOST:PORT: the port is missing" in capsys.readouterr().err
