"""Devices by the names that settings give them."""

import pytest
import torch

from services.runtime.errors import ConfigError
from services.wire.torch_device import torch_device


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert torch_device("auto", "policy.device") == torch.device(device)


def test_a_device_is_taken_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torch_device("cuda:1", "policy.device") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"policy.device is 'cuda:2', but torch sees 2 CUDA devices here"):
        torch_device("cuda:2", "policy.device")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "mps", "", "cpu:cpu"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r'engine\.device is .*: use "auto", "cpu", "cuda" or "cuda:N"'):
        torch_device(name, "engine.device")
