"""What a watch may be told, and the switch in the environment that turns everything off."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gradscope.errors import UsageError

OnError = Literal["record", "raise"]

GraphSteps = Literal["first", "changed", "every"] | frozenset[int] | None
"""Of which steps the autograd graph is captured: each optimizer's first one; besides, those whose
forward makes another number of nodes than before; every one; those of these numbers; or none."""

KEEP_STEPS = 16
"""Of how many of the latest recorded steps tensors are kept where nothing else is asked for."""


SEVERITIES = ("info", "warning", "error")
"""The names of severities, the least first."""


@dataclass(frozen=True, slots=True)
class ProjectConfig:
    """What ``[tool.gradscope]`` in a project's ``pyproject.toml`` asks for.

    Attributes:
        select: rules to look for, as codes, names or beginnings of codes; empty for all.
        ignore: rules not to look for.
        fail_on: the least severity that makes ``gradscope check`` fail.
        ignore_params: patterns of parameter or module names to pass over, by rule.
        thresholds: numbers to use in place of a rule's own, by rule and name.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    fail_on: str = "error"
    ignore_params: dict[str, tuple[str, ...]] = field(default_factory=dict)
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """The options of one watch, checked once at its beginning.

    Attributes:
        budget: the share of the step time that watching may take, 0.01 for one percent. It spaces
            the recorded steps and closer looks; a quarter of it is theirs even where what is seen
            at every step takes more.
        every: record every n-th step in full, whatever it costs; None lets the budget decide.
        include: patterns (as in ``fnmatch``) of parameter names to watch; empty for all.
        exclude: patterns of parameter names to leave out.
        keep: patterns of the parameters of which gradient, weight and state are kept whole, as they
            were before and after recorded steps.
        keep_steps: the steps of which they are kept, which are then recorded in any case; or how
            many of the latest recorded steps.
        graph: of which steps the autograd graph is captured.
        save: the run directory to which the recording is written meanwhile; None for none.
        total_steps: how many steps there will be, of all optimizers together; None if unknown.
        sync_every: compare the ranks of a process group at every n-th step of each optimizer while
            they train; None for never.
        on_error: ``record`` keeps an error of gradscope's own away from the training;
            ``raise`` lets it out, for gradscope's own tests.
    """

    budget: float = 0.01
    every: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    keep_steps: int | frozenset[int] = KEEP_STEPS
    graph: GraphSteps = "first"
    save: Path | None = None
    total_steps: int | None = None
    sync_every: int | None = None
    on_error: OnError = "record"

    def __post_init__(self) -> None:
        if type(self.budget) not in (int, float) or not 0 < self.budget <= 1:
            raise UsageError(
                f"budget={self.budget!r}: pass the share of the step time that observing may "
                "take, greater than 0 and at most 1 (0.03 is three percent)"
            )
        if self.every is not None and not (type(self.every) is int and self.every >= 1):
            raise UsageError(f"every={self.every!r}: pass a whole number of steps, 1 or more")
        total = self.total_steps
        if total is not None and not (type(total) is int and total >= 1):
            raise UsageError(f"total_steps={total!r}: pass a whole number of steps, 1 or more")
        sync = self.sync_every
        if sync is not None and not (type(sync) is int and sync >= 1):
            raise UsageError(f"sync_every={sync!r}: pass a whole number of steps, 1 or more")
        for name, patterns in (
            ("params", self.include),
            ("exclude", self.exclude),
            ("keep", self.keep),
        ):
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise UsageError(
                    f"{name}={patterns!r}: pass a pattern of parameter names such as 'head.*', or "
                    "a list of patterns"
                )
        if isinstance(self.keep_steps, int) and self.keep_steps < 1:
            raise UsageError(
                f"keep_steps={self.keep_steps}: pass how many of the latest recorded steps to "
                "keep, 1 or more, or the numbers of the steps, such as range(100, 110)"
            )
        if self.on_error not in ("record", "raise"):
            raise UsageError(f"on_error={self.on_error!r}: pass 'record' or 'raise'")

    def keeps_step(self, step: int) -> bool:
        """Whether a step was asked for by its number."""
        return bool(self.keep) and not isinstance(self.keep_steps, int) and step in self.keep_steps


def as_steps(name: str, steps: object) -> int | frozenset[int]:
    """Return a number of steps as it is, and several step numbers as a set.

    Raises:
        UsageError: if ``steps`` is neither a whole number nor an iterable of them.
    """
    if isinstance(steps, int) and not isinstance(steps, bool):
        return steps
    numbers = list(steps) if isinstance(steps, Iterable) else []
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
        raise UsageError(
            f"{name}={steps!r}: pass how many of the latest recorded steps to keep, or the numbers "
            "of the steps, such as range(100, 110)"
        )
    return frozenset(numbers)


def as_graph_steps(steps: object) -> GraphSteps:
    """Return what ``watch(graph=)`` was told, several step numbers as a set.

    Raises:
        UsageError: if it is none of the words, no step number and no iterable of them.
    """
    if steps is None or steps in ("first", "changed", "every"):
        return steps
    if type(steps) is int:
        steps = [steps]
    is_listing = isinstance(steps, Iterable) and not isinstance(steps, str)
    numbers = list(steps) if is_listing else [-1]  # type: ignore[call-overload]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise UsageError(
            f"graph={steps!r}: pass 'first', 'changed' or 'every', the numbers of the steps whose "
            "autograd graph to capture, such as [0, 100], or None to capture none"
        )
    return frozenset(numbers)


def as_directory(name: str, path: object) -> Path | None:
    """Return where a run is to be written; None for nowhere.

    Raises:
        UsageError: if ``path`` is no path, or something other than a directory lies there.
    """
    if path is None:
        return None
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise UsageError(f"{name}={path!r}: pass the path of a directory, as in 'runs/exp1'")
    directory = Path(path)
    try:
        is_something_else = directory.exists() and not directory.is_dir()
    except OSError:  # nothing that we may look at: what comes of it is told when it is written
        is_something_else = False
    if is_something_else:
        raise UsageError(f"{name}={str(path)!r}: is a file; pass the path of a directory")
    return directory.absolute()


def as_patterns(name: str, patterns: object) -> tuple[str, ...]:
    """Return one pattern or several as a tuple.

    Raises:
        UsageError: if ``patterns`` is neither a text nor something to iterate over.
    """
    if isinstance(patterns, str):
        return (patterns,)
    if not isinstance(patterns, Iterable):
        raise UsageError(
            f"{name}={patterns!r}: pass a pattern of parameter names such as 'head.*', or a list "
            "of patterns"
        )
    return tuple(patterns)


def project_config(folder: str | Path) -> ProjectConfig:
    """Return what the nearest ``pyproject.toml`` with a table ``[tool.gradscope]`` asks for.

    Args:
        folder: where to begin to look, going upwards.

    Raises:
        UsageError: if a file on the way is no TOML, or a key or value of the table is not known.
    """
    import tomllib

    here = Path(folder).absolute()
    for each in (here, *here.parents):
        path = each / "pyproject.toml"
        try:
            table = tomllib.loads(path.read_text("utf-8")).get("tool", {}).get("gradscope")
        except OSError:  # not there, or nothing that we may read
            continue
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from error
        if table is not None:
            return _as_project_config(table, f"{path}: [tool.gradscope]")
    return ProjectConfig()


def _as_project_config(table: dict[str, Any], where: str) -> ProjectConfig:
    known = ("select", "ignore", "fail-on", "ignore-params", "thresholds")
    for key in table:
        if key not in known:
            raise UsageError(f"{where} has no key {key!r}; there are: {', '.join(known)}")
    fail_on = table.get("fail-on", "error")
    if fail_on not in SEVERITIES:
        raise UsageError(f"{where} fail-on = {fail_on!r}: write one of {', '.join(SEVERITIES)}")
    return ProjectConfig(
        select=_texts(table.get("select", []), f"{where} select"),
        ignore=_texts(table.get("ignore", []), f"{where} ignore"),
        fail_on=fail_on,
        ignore_params={
            rule: _texts(patterns, f"{where} ignore-params.{rule}")
            for rule, patterns in _table(table, "ignore-params", where).items()
        },
        thresholds={
            rule: _numbers(values, f"{where} thresholds.{rule}")
            for rule, values in _table(table, "thresholds", where).items()
        },
    )


def _table(table: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise UsageError(f"{where} {key} = {value!r}: write a table with a key for each rule")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{where} = {value!r}: write a list of texts")
    return tuple(texts)


def _numbers(value: Any, where: str) -> dict[str, float]:
    if not isinstance(value, dict) or not all(
        type(number) in (int, float) for number in value.values()
    ):
        raise UsageError(f"{where} = {value!r}: write a table of numbers, by threshold")
    return value


def switched_off() -> bool:
    """Tell whether ``GRADSCOPE=0`` in the environment asks for watching nothing at all."""
    return os.environ.get("GRADSCOPE", "").strip().lower() in ("0", "off", "false", "no")
