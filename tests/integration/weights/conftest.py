from collections.abc import Generator

import pytest

from tests.support.weight_site import chunks_of


@pytest.fixture
def small_chunks() -> Generator[None]:
    with chunks_of(500):
        yield
