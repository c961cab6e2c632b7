"""Whether a run goes on with other settings than it had: lawful, and to be told of, since nothing else shows it."""

from collections.abc import Mapping

from services.learner.config import LearnerConfig
from services.runtime.log import get_logger

_SECTIONS = frozenset({"policy", "data", "sampling", "reward", "staleness", "batch", "loss", "optimizer"})
"""What decides which policy comes out; the others are of hosts, links and disks."""

_log = get_logger("learner")


def settings_of(config: LearnerConfig) -> dict[str, object]:
    """ "section.key" to its value, as JSON has it: what a checkpoint keeps."""
    dumped: dict[str, object] = config.model_dump(mode="json", include=set(_SECTIONS))
    flat: dict[str, object] = {"run.seed": config.run.seed}
    for section, keys in dumped.items():
        if isinstance(keys, dict):
            flat |= {f"{section}.{key}": value for key, value in keys.items()}
        else:
            flat[section] = keys
    return flat


def tell_of_changes(before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """One warning with every key whose value is another than in the checkpoint. Keys of another release are not
    compared."""
    changes = [
        f"{key}: {before[key]} -> {value}" for key, value in now.items() if key in before and before[key] != value
    ]
    if changes:
        _log.warning("settings_changed", since="the checkpoint", changes=changes)
