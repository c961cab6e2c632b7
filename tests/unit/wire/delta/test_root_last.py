"""Updates whose first parts were made before the root was known: only the last one names it."""

import itertools

import numpy as np
import pytest

from services.runtime.errors import CorruptObjectError
from services.wire.delta import (
    BitTensor,
    EncodedUpdate,
    WrongBaseError,
    apply_update,
    encode_delta,
    encode_keyframe,
    inspect,
    iter_encode,
    root_of,
)
from services.wire.delta import layout as layout_module
from services.wire.delta.fold import fold
from services.wire.delta.part import parse_part, read_info
from tests.unit.wire.delta.samples import edited, model, nudged, same, split_part

Policy = dict[str, BitTensor]
RNG = np.random.default_rng(9)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are cut over several parts."""
    monkeypatch.setattr(layout_module, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(layout_module, "PART_BYTES", 8192)


@pytest.fixture
def versions() -> list[Policy]:
    made = [model(RNG)]
    for _ in range(3):
        made.append(nudged(RNG, made[-1], 0.05))
    return made


def delta_of(versions: list[Policy], number: int, *, root_last: bool = True, workers: int = 1) -> EncodedUpdate:
    base, new = versions[number : number + 2]
    return encode_delta(
        base,
        new,
        run_id="run",
        base_version=number,
        target_version=number + 1,
        codec="sx",
        workers=workers,
        root_last=root_last,
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_the_last_part_alone_names_the_root_and_nothing_else_differs(versions: list[Policy], workers: int) -> None:
    early, late = delta_of(versions, 0, root_last=False), delta_of(versions, 0, workers=workers)
    infos = [read_info(part) for part in late.parts]
    assert len(infos) > 3
    assert [info.target_root for info in infos] == [""] * (len(infos) - 1) + [root_of(versions[1])]
    for one, other in zip(early.parts, late.parts, strict=True):
        assert split_part(one)[1] == split_part(other)[1]
    assert late.parts[-1] == early.parts[-1]
    assert inspect(late.parts).target_root == inspect(early.parts).target_root == late.info.target_root


def test_it_makes_the_weights_from_parts_in_any_order(versions: list[Policy]) -> None:
    parts = delta_of(versions, 0).parts
    for order in itertools.islice(itertools.permutations(parts), 0, None, 97):
        assert same(apply_update(order, versions[0], expect_root=root_of(versions[1])), versions[1])
    with pytest.raises(CorruptObjectError, match="manifest"):
        apply_update(parts, versions[0], expect_root=root_of(versions[2]))
    with pytest.raises(WrongBaseError, match="not version 0"):
        apply_update(parts, versions[1])


def test_a_keyframe_may_be_made_so_too(versions: list[Policy]) -> None:
    parts = list(iter_encode(None, versions[0], run_id="run", target_version=0, root_last=True))
    assert same(apply_update(parts, None), versions[0])
    whole = encode_keyframe(versions[0], run_id="run", version=0)
    assert parts[-1] == whole.parts[-1]
    assert parts[0] != whole.parts[0]


def test_digests_that_are_known_name_the_root_everywhere(versions: list[Policy]) -> None:
    digests = {
        name: digest for part in delta_of(versions, 0).parts for name, digest in parse_part(part).digests.items()
    }
    parts = iter_encode(
        versions[0], versions[1], run_id="run", base_version=0, target_version=1, digests=digests, root_last=True
    )
    assert tuple(parts) == delta_of(versions, 0, root_last=False).parts


def test_digests_that_are_known_in_part_are_an_error_where_the_root_is_wanted_first(versions: list[Policy]) -> None:
    with pytest.raises(KeyError):
        iter_encode(versions[0], versions[1], run_id="", base_version=0, target_version=1, digests={})


def test_they_fold_with_each_other_and_with_others(versions: list[Policy]) -> None:
    updates = [delta_of(versions, 0).parts, delta_of(versions, 1, root_last=False).parts, delta_of(versions, 2).parts]
    folded = fold(updates)
    assert {read_info(part).target_root for part in folded.parts} == {root_of(versions[3])}
    assert same(apply_update(folded.parts, versions[0]), versions[3])


def test_parts_that_name_no_root_or_different_ones_are_refused(versions: list[Policy]) -> None:
    parts = list(delta_of(versions, 0).parts)
    other = root_of(versions[2])

    def nameless(fields: dict[str, str]) -> None:
        fields["format"] = "heterorl-weights/2"
        del fields["target_root"]

    def renamed(fields: dict[str, str]) -> None:
        fields["format"], fields["target_root"] = "heterorl-weights/1", other

    def both(fields: dict[str, str]) -> None:
        fields["target_root"] = other

    def cut_short(fields: dict[str, str]) -> None:
        del fields["target_root"]

    for bad, words in (
        ([*parts[:-1], edited(parts[-1], nameless)], "last part"),
        ([*parts[:-1], edited(parts[-1], cut_short)], "target_root"),
        ([edited(parts[0], both), *parts[1:]], "which its format has not"),
        ([*parts[:-1], edited(parts[-1], renamed)], "root"),
        ([parts[0], edited(parts[1], renamed), *parts[2:]], "different updates"),
        ([edited(parts[0], renamed), *parts[1:]], "different updates"),
        (parts[:-1], "parts of a weight update are there"),
    ):
        with pytest.raises(CorruptObjectError, match=words):
            apply_update(bad, versions[0])
