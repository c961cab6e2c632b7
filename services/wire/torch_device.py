"""The device that a setting names. Imported by learner, sampler and lab only."""

import torch

from services.runtime.errors import ConfigError


def torch_device(name: str, key: str) -> torch.device:
    """`name` is "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"; `key` is the setting, for the error.

    Raises ConfigError for another name, and for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f'{key} is {name!r}: use "auto", "cpu", "cuda" or "cuda:N"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{key} is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here")
    return device
