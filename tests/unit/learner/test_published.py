import pytest

from services.learner.published import Origin, PublishedVersions, VersionRow


def test_the_origin_of_a_group_follows_the_history_of_the_run() -> None:
    known = PublishedVersions()
    assert (known.current, known.current_root, known.origin(0, "a")) == (-1, "", Origin.FUTURE)
    known.publish(3, "c")
    known.publish(4, "d")
    assert [known.origin(3, "c"), known.origin(4, "x"), known.origin(5, "e"), known.origin(2, "b")] == [
        Origin.PUBLISHED,
        Origin.UNKNOWN_ROOT,
        Origin.FUTURE,
        Origin.FORGOTTEN,
    ]


def test_a_roll_back_sets_versions_aside_until_the_same_weights_come_again() -> None:
    known = PublishedVersions()
    for version, root in enumerate("abc"):
        known.publish(version, root)
    known.roll_back(0)
    assert (known.current, known.current_root) == (0, "a")
    assert known.origin(1, "b") is Origin.ROLLED_BACK
    known.publish(1, "b")
    known.publish(2, "z")
    assert [known.origin(1, "b"), known.origin(2, "c"), known.origin(2, "z")] == [
        Origin.PUBLISHED,
        Origin.ROLLED_BACK,
        Origin.PUBLISHED,
    ]


def test_versions_do_not_go_back_or_change_their_weights() -> None:
    known = PublishedVersions()
    known.publish(1, "a")
    known.publish(1, "a")
    with pytest.raises(ValueError, match="cannot follow"):
        known.publish(1, "b")
    known.publish(2, "b")
    with pytest.raises(ValueError, match="cannot follow"):
        known.publish(1, "a")


def test_history_is_read_back_and_bounded() -> None:
    rows = [VersionRow(version=n, root=str(n), retired=n == 7) for n in range(10_000)]
    known = PublishedVersions(reversed(rows))
    assert known.current == 9999
    assert known.origin(7, "7") is Origin.ROLLED_BACK
    assert known.origin(8, "8") is Origin.FORGOTTEN
    assert known.origin(9000, "9000") is Origin.PUBLISHED
