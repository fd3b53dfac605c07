"""What takes patches and hooks out again, also where it fails at first."""

from __future__ import annotations

import pytest

from gradscope.taps.undo import Undo


def test_the_latest_comes_first_and_everything_once() -> None:
    undo, made = Undo(), list[str]()
    for name in ("first", "second", "third"):
        undo.callback(made.append, name)
    undo.close()
    undo.close()
    assert made == ["third", "second", "first"]


@pytest.mark.parametrize("n_failures", [1, 2, 3])
def test_what_fails_is_tried_again_and_keeps_nobody_else_in_place(n_failures: int) -> None:
    undo, made = Undo(), list[str]()
    left = [n_failures]

    def fails_at_first() -> None:
        if left[0]:
            left[0] -= 1
            raise OSError("not yet")
        made.append("second")

    undo.callback(made.append, "first")
    undo.callback(fails_at_first)
    undo.callback(made.append, "third")
    if n_failures > 1:
        with pytest.raises(OSError, match="not yet"):
            undo.close()
        assert made == ["third", "first"]
    undo.close()
    assert sorted(made) == ["first", "second", "third"]
    assert left == [0]


def test_a_block_that_raises_is_undone_and_one_that_does_not_is_kept() -> None:
    made: list[str] = []
    with Undo() as undo:
        undo.callback(made.append, "kept")
    assert made == []
    half = Undo()
    half.callback(made.append, "half")
    with pytest.raises(ValueError, match="halfway"), half:
        raise ValueError("halfway")
    assert made == ["half"]
