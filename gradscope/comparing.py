"""``diff()`` and what it returns: where two runs of the same training part."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from gradscope.comparison.compare import compare
from gradscope.comparison.difference import Comparison, Difference
from gradscope.errors import UsageError
from gradscope.opening import open as open_run
from gradscope.recorded_run import RecordedRun

if TYPE_CHECKING:
    import pandas as pd


class RunDifference:
    """Where two runs A and B part, made by :func:`diff`; False if they do not.

    Printed, it is one screen: the verdict, the first difference with its evidence, how it goes on,
    and what was compared.

    Attributes:
        names: what the two runs are called: their directories, or ``a live scope``.
        comparison: everything that was found, as plain data.
    """

    def __init__(self, names: tuple[str, str], comparison: Comparison) -> None:
        self.names = names
        self.comparison = comparison

    def __bool__(self) -> bool:
        return self.comparison.first is not None

    @property
    def first(self) -> Difference | None:
        """The first difference of all; None if the runs are equal."""
        return self.comparison.first

    @property
    def differences(self) -> tuple[Difference, ...]:
        """The first difference of each kind, in the order in which they happen."""
        return self.comparison.differences

    @property
    def looks_like_rounding(self) -> bool:
        """Whether the runs part by rounding, and nothing else is found beside its growth."""
        first = self.comparison.first
        beyond = self.comparison.beyond_rounding
        return first is not None and first.like_rounding and beyond is None

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per difference, as they happen.

        Columns: ``step`` (missing for what was so before the first), ``stage``, ``quantity``,
        ``param``, ``module``, ``optimizer``, ``a``, ``b``, ``relative`` (NaN for no numbers),
        ``like_rounding``, ``n_different``, ``n_compared``, ``message``.
        """
        import pandas as pd

        names = ("stage", "quantity", "param", "module", "optimizer", "a", "b")
        told = self.differences
        frame: dict[str, Any] = {"step": pd.array([each.step for each in told], dtype="Int64")}
        for name in names:
            frame[name] = pd.Series([getattr(each, name) for each in told], dtype=object)
        far = [math.nan if each.relative is None else each.relative for each in told]
        frame["relative"] = pd.Series(far, dtype="float64")
        frame["like_rounding"] = pd.Series([each.like_rounding for each in told], dtype=bool)
        for name in ("n_different", "n_compared"):
            frame[name] = pd.Series([getattr(each, name) for each in told], dtype="int64")
        frame["message"] = pd.Series([each.message for each in told], dtype=object)
        return pd.DataFrame(frame)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON, as ``gradscope diff --format json`` does."""
        from gradscope.views.run_difference_document import document

        return document(self.names, self.comparison)

    def __repr__(self) -> str:
        from gradscope.views.run_difference import plain_text

        return plain_text(self.names, self.comparison)

    def __rich__(self) -> Any:
        from gradscope.views.run_difference import screen

        return screen(self.names, self.comparison)


def diff(
    a: str | os.PathLike[str] | RecordedRun,
    b: str | os.PathLike[str] | RecordedRun,
    rtol: float = 0.0,
) -> RunDifference:
    """Find where two runs of what should be the same training part, and in what first.

    Everything that both recorded is compared in the order in which it happens: parameters, initial
    weights and, step by step, hyper-parameters, weights and state, order of events, inputs, graph,
    forward, loss, gradients, state, update, weights. Times are not.

    Args:
        a: a run directory, an opened run, or a scope.
        b: another one.
        rtol: relative differences of numbers up to this one count as none. With 0 only numbers are
            equal that are the same to the last bit.

    Returns:
        What differs; printed, one screen.

    Raises:
        RunDirectoryError: if a directory holds no run, or none that can be read.
        UsageError: if something else is passed, or nothing can be compared.
    """
    if not isinstance(rtol, int | float) or isinstance(rtol, bool) or not 0 <= rtol < math.inf:
        raise UsageError(f"rtol={rtol!r}: pass a relative difference, such as 1e-6")
    runs = [_run("a", a), _run("b", b)]
    ended = all(_has_ended(run) for run in runs)
    for run in runs:
        run._settle()
    comparison = compare(runs[0]._recording, runs[1]._recording, float(rtol), ended=ended)
    if comparison.first is None and not comparison.n_common:
        raise UsageError(
            "there is nothing to compare: no step is in both runs "
            f"({' and '.join(f'{n:,} steps' for n in comparison.n_steps)})"
        )
    return RunDifference((_name(a), _name(b)), comparison)


def _run(what: str, given: Any) -> RecordedRun:
    if isinstance(given, RecordedRun):
        return given
    if isinstance(given, str | os.PathLike):
        return open_run(given)
    raise UsageError(f"{what}={given!r}: pass a run directory, an opened run or a scope"[:300])


def _has_ended(run: RecordedRun) -> bool:
    facts = getattr(run._recording, "facts", None)
    if facts is not None:
        return facts.get("how_it_ended") is not None
    session = getattr(run, "_session", None)
    return session is None or not session.running


def _name(given: Any) -> str:
    path = getattr(given, "path", given)
    return os.fspath(path) if isinstance(path, str | os.PathLike) else "a live scope"
