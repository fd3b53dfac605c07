"""The pytest plugin: a test fails when the training loop in it is broken.

Loaded by pytest itself once gradscope is installed. Neither torch nor any part of gradscope that
needs it is imported before a test asks to be watched.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from gradscope.rules.criteria import Criteria
    from gradscope.scope import Scope

_SEVERITIES = ("info", "warning", "error")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        "gradscope(fail_on='error', select=(), ignore=(), ignore_params={}, thresholds={}, "
        "rules=()): watch every training loop in the test, and fail it with what is wrong",
    )


class GradscopeWatch:
    """A watch around a loop in a test, which fails the test when its block is left.

    Args:
        scope: the watch.
        fail_on: the least severity that fails the test.
    """

    def __init__(self, scope: Scope, fail_on: str) -> None:
        self._scope = scope
        self._fail_on = fail_on

    def __enter__(self) -> Scope:
        return self._scope.__enter__()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> Literal[False]:
        __tracebackhide__ = True
        self._scope.__exit__(kind, error, traceback)
        if error is None:  # a test that has failed already does so for a reason of its own
            _fail(self._scope.findings, self._fail_on)
        return False


@pytest.fixture
def gradscope_watch() -> Callable[..., GradscopeWatch]:
    """Like ``gradscope.watch``, as a context manager that fails the test with what is wrong.

        def test_training(gradscope_watch):
            with gradscope_watch(model, optimizer, fail_on="warning") as scope:
                train(model, optimizer)

    It takes what ``gradscope.watch`` takes, and ``fail_on``: ``"error"`` (the default),
    ``"warning"`` or ``"info"``.
    """

    def watch(
        model: Any, optimizer: Any, *, fail_on: str = "error", **options: Any
    ) -> GradscopeWatch:
        import gradscope

        _check_fail_on(fail_on)
        return GradscopeWatch(gradscope.watch(model, optimizer, **options), fail_on)

    return watch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Watch a test that is marked."""
    __tracebackhide__ = True
    marks = list(item.iter_markers("gradscope"))
    if not marks:
        return (yield)
    # What is nearer to the test overrides what its class or module says.
    options = {key: value for mark in reversed(marks) for key, value in mark.kwargs.items()}
    fail_on = options.pop("fail_on", "error")
    if any(mark.args for mark in marks):
        pytest.fail("the marker gradscope takes keywords only, such as fail_on='warning'", False)
    return (yield from _watched(item, fail_on, options))


def _watched(item: pytest.Item, fail_on: str, options: dict[str, Any]) -> Generator[None, Any, Any]:
    __tracebackhide__ = True
    from gradscope.config import WatchOptions, switched_off

    if switched_off():
        return (yield)
    from gradscope.rules.criteria import criteria
    from gradscope.session.session import Session

    _check_fail_on(fail_on)
    judged_by: Criteria = criteria(**options)
    session = Session(WatchOptions(), discovers=True)
    session.start()
    try:
        result = yield
    except BaseException:
        session.stop()
        with suppress(Exception):  # the test's own failure is what is told, whatever fails here
            found = judged_by.judge(session.recording).at_least(_severity("warning"))
            if found:  # perhaps the reason why it failed
                item.add_report_section("call", "gradscope", repr(found))
        raise
    session.stop()
    _fail(judged_by.judge(session.recording), fail_on)
    return result


def _fail(findings: Any, fail_on: str) -> None:
    __tracebackhide__ = True
    bad = findings.at_least(_severity(fail_on))
    if bad:
        pytest.fail(f"gradscope: {bad!r}", pytrace=False)


def _severity(name: str) -> Any:
    from gradscope.rules.finding import Severity

    return Severity[name.upper()]


def _check_fail_on(fail_on: object) -> None:
    if fail_on not in _SEVERITIES:
        from gradscope.errors import UsageError

        raise UsageError(f"fail_on={fail_on!r}: pass one of {', '.join(_SEVERITIES)}")
