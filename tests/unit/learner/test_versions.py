"""Version rows as a disk gives them back: whole, or not at all."""

import json
from pathlib import Path

import pytest

from services.learner.versions import Version, VersionFiles
from tests.unit.learner.weights_of_tests import make_weights, nudged, open_shop


@pytest.fixture
async def rows(tmp_path: Path) -> dict[int, Version]:
    """Versions 0 to 2, published in `tmp_path`."""
    shop = open_shop(tmp_path)
    weights = make_weights(1)
    for number in range(3):
        await shop.publisher.publish(number, weights)
        weights = nudged(weights, number)
    return shop.versions.rows


def reopened(folder: Path) -> dict[int, Version]:
    return VersionFiles(folder / "versions").rows


async def test_a_row_with_any_flipped_bit_is_left_out(tmp_path: Path, rows: dict[int, Version]) -> None:
    path = tmp_path / "versions" / "00000001.json"
    sound = path.read_bytes()
    others = {number: row for number, row in rows.items() if number != 1}
    for place in range(0, len(sound), 3):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << place % 8]) + sound[place + 1 :])
        assert reopened(tmp_path) in (others, rows), f"byte {place}"


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"format": 2}', b'{"format": 1}'])
async def test_a_row_that_is_none_is_left_out(tmp_path: Path, rows: dict[int, Version], text: bytes) -> None:
    (tmp_path / "versions" / "00000002.json").write_bytes(text)
    assert reopened(tmp_path) == {number: rows[number] for number in (0, 1)}


async def test_a_row_that_was_cut_is_left_out(tmp_path: Path, rows: dict[int, Version]) -> None:
    path = tmp_path / "versions" / "00000002.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert 2 not in reopened(tmp_path)


async def test_a_row_of_a_release_that_wrote_no_digest_is_read(tmp_path: Path, rows: dict[int, Version]) -> None:
    path = tmp_path / "versions" / "00000002.json"
    row = json.loads(path.read_bytes())
    del row["sha256"]
    path.write_text(json.dumps(row))
    assert reopened(tmp_path) == rows
