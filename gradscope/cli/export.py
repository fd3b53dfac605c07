"""``gradscope export DIR --to csv|tensorboard``: a whole run for another tool."""

from __future__ import annotations

import argparse
import datetime
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from gradscope.cli.output import command, tell
from gradscope.cli.recorded import add_output, add_run, opened, tell_notes
from gradscope.errors import OutputExistsError, UsageError

if TYPE_CHECKING:
    from gradscope.opening import Run


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "export",
        help="write a recorded run as CSV files, or for TensorBoard",
        description="Write every row of a recorded run for another tool. csv: a file for each "
        "table. tensorboard: loss, learning rates, norms and update ratios over the steps.",
    )
    add_run(parser)
    parser.add_argument("--to", choices=("csv", "tensorboard"), required=True, help="for what")
    add_output(parser, "the folder to write into (default: DIR-csv, DIR-tensorboard)")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Write the files.

    Raises:
        OutputExistsError: if the folder has something in it already.
        UsageError: if it cannot be made, or tensorboard is not installed.
    """
    run = opened(arguments)
    name = arguments.output or f"{Path(arguments.run).absolute()}-{arguments.to}"
    folder = Path(name)
    _check(folder, force=arguments.force)
    n_notes = len(run.about.get("notes") or ())
    # The folder appears under its name when it is complete.
    whole = folder.absolute()  # "." has no name
    unfinished = whole.with_name(f".{whole.name}.writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        what, following = (
            _write_csv(run, unfinished, folder)
            if arguments.to == "csv"
            else _write_tensorboard(run, unfinished, folder)
        )
        _put_into(folder, unfinished)
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    tell_notes(run, n_notes)
    tell(f"wrote {folder}: {what}")
    tell(f"next: {following}")
    return 0


def _write_csv(run: Run, into: Path, folder: Path) -> tuple[str, str]:
    from gradscope.run.schema import TABLES
    from gradscope.views.table_files import write_csv

    n = 0
    for table in TABLES:
        with open(into / f"{table}.csv", "wb") as file:
            write_csv(run.parts(table), run.dataset(table).schema, file)
        n += 1
    return (
        f"{n} tables as CSV",
        f"pandas.read_csv({str(folder / 'steps.csv')!r}), or any other tool",
    )


def _write_tensorboard(run: Run, into: Path, folder: Path) -> tuple[str, str]:
    from gradscope.views.tensorboard import SCALARS, write_scalars

    # Curves of several ranks under one name would be one curve.
    where = [("rank", "==", run.ranks[0])] if len(run.ranks) > 1 else None
    n = write_scalars(
        ((table, run.parts(table, where=where)) for table in SCALARS),
        into,
        began=_began(run),
        by_optimizer=run.steps["optimizer"].nunique() > 1,
    )
    return f"{n:,} scalars for TensorBoard", f"tensorboard --logdir {command(folder)[10:]}"


def _began(run: Run) -> float:
    """When the run began, in seconds since 1970; 0 if that cannot be told."""
    try:
        return datetime.datetime.fromisoformat(str(run.about.get("started"))).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def _check(folder: Path, *, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder}: is a file; name a folder")
    if not folder.parent.is_dir():
        raise UsageError(f"--output {folder}: there is no folder {folder.parent}")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise OutputExistsError(
            f"--output {folder}: has files in it; write into it with --force, or name another one"
        )


def _put_into(folder: Path, unfinished: Path) -> None:
    if not folder.exists():
        unfinished.rename(folder)
        return
    for path in unfinished.iterdir():
        path.replace(folder / path.name)
