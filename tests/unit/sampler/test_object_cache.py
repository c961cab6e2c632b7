"""What a sampler keeps of the objects that it fetched."""

import os
from pathlib import Path
from typing import Any, cast

from services.sampler.object_cache import ObjectCache
from services.sampler.weight_sources import WeightSources

NOBODY = cast("Any", object())
"""A stub that is never called."""


def test_small_objects_are_bounded_by_number_and_the_oldest_go_first(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path, WeightSources(NOBODY), 1 << 20)
    for version in range(1500):
        file = tmp_path / f"{version:064x}"
        file.write_bytes(b"small")
        os.utime(file, (version, version))
    cache.evict([f"{0:064x}"])
    left = sorted(int(file.name, 16) for file in tmp_path.iterdir())
    assert left == [0, *range(1500 - 1024, 1500)]
