"""The contract's own rules: every element of every .proto file is commented, and names follow buf's STANDARD rules."""

import re
from pathlib import Path

import pytest

PROTOS = sorted((Path(__file__).parents[3] / "proto" / "heterorl" / "v1").glob("*.proto"))
ELEMENT = re.compile(r"^\s*(message|enum|service|rpc|oneof)\s+(\w+)|^\s*(?:repeated |map<[^>]+> )?[\w.]*\s*\w+ = \d+;")


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.name)
def test_every_message_field_enum_value_and_call_is_commented(proto: Path):
    lines = proto.read_text().splitlines()
    bare = [
        f"{number + 1}: {line.strip()}"
        for number, line in enumerate(lines)
        if ELEMENT.match(line) and not lines[number - 1].strip().startswith("//")
    ]
    assert bare == []


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.name)
def test_names_follow_the_standard_rules(proto: Path):
    text = proto.read_text()
    assert all(name.endswith("Service") for name in re.findall(r"^service (\w+)", text, re.M))
    for call, request, response in re.findall(r"rpc (\w+)\((?:stream )?(\w+)\) returns \((?:stream )?(\w+)\)", text):
        assert (request, response) == (f"{call}Request", f"{call}Response")
    for name, body in re.findall(r"^enum (\w+) \{(.*?)^\}", text, re.M | re.S):
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper() + "_"
        values = re.findall(r"^\s*(\w+) = \d+;", body, re.M)
        assert values[0] == f"{prefix}UNSPECIFIED"
        assert all(value.startswith(prefix) for value in values)


def test_all_six_services_are_there():
    services = {name for proto in PROTOS for name in re.findall(r"^service (\w+)", proto.read_text(), re.M)}
    assert services == {
        "ControlService",
        "WeightService",
        "RolloutService",
        "RewardService",
        "MonitorService",
        "AdminService",
    }
