import functools

import pytest

from services.learner import weight_service as learner_service
from services.relay import weight_service as relay_service
from services.wire.objects import read_chunk


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of 500 bytes, so that small objects have boundaries to be cut at."""
    for module in (learner_service, relay_service):
        monkeypatch.setattr(module, "read_chunk", functools.partial(read_chunk, size=500))
    return 500
