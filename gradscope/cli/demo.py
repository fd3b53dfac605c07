"""``gradscope demo``: train a small GPT twice, once properly and once without ``zero_grad``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gradscope.errors import OutputExistsError, RenderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gradscope.scope import Scope

DESCRIPTION = """\
Trains a character GPT of 0.8 million parameters on Python's own documentation, watched by
gradscope: first with a proper loop, then with one that forgets zero_grad. Needs no network and
less than a minute on one core."""

HEALTHY = """\
A small GPT ({n_parameters:,} parameters) learns to predict the next character of Python's
documentation. This is the whole loop, and gradscope.watch is wrapped around it:"""

HEALTHY_LOOK = """\
What to look for: the verdict, right below the title. Nothing should be found, every gradient
should be fresh at every step, and in a hundred steps the loss should fall from 4.7 to about 2.6."""

BROKEN = """\
The same model, data and seed. One line is missing, so each backward adds its gradients to those
of all the steps before it:"""

BROKEN_LOOK = """\
What to look for: nothing crashes, torch warns of nothing, and at first the loss falls all the same,
before it climbs back. The finding names the defect, the line it happens on and what to add."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb ``demo`` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="train a small GPT under watch, then break its loop and see the finding",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "--steps", type=_positive_integer, default=100, help="steps of each run (default: 100)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gradscope-demo"),
        metavar="FOLDER",
        help="where the report, the graph and the tables are written (default: gradscope-demo)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, dropout and batches (default: 0)"
    )
    parser.add_argument(
        "--force", action="store_true", help="write into a folder that already has files in it"
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Run the demo and return the exit status, 0.

    Raises:
        OutputExistsError: the output folder has files in it, and ``--force`` was not given.
    """
    folder: Path = arguments.out
    # Before the training: ten seconds are long to wait for a refusal.
    _refuse_to_overwrite(folder, force=arguments.force)

    from gradscope.demo.loops import train, train_without_zero_grad

    _print_heading("1  A healthy loop")
    print(HEALTHY.format(n_parameters=_count_parameters()))
    _print_loop(train)
    print(HEALTHY_LOOK, end="\n\n")
    scope = _train_watched(train, arguments.steps, arguments.seed)
    print(scope, end="\n\n")
    written = _write(scope, folder)

    _print_heading("2  The same loop without zero_grad")
    print(BROKEN)
    _print_loop(train_without_zero_grad)
    print(BROKEN_LOOK, end="\n\n")
    print(_train_watched(train_without_zero_grad, arguments.steps, arguments.seed), end="\n\n")

    _print_heading("Written, from the healthy run")
    for path in written:
        print(f"  {path}")
    print("\nNext, a script of your own, unedited:\n\n  gradscope run train.py")
    return 0


def _positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _refuse_to_overwrite(folder: Path, *, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file; name another folder with --out")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise OutputExistsError(
            f"the folder {folder} has files in it;"
            " write into it with --force, or name another with --out"
        )


def _count_parameters() -> int:
    from gradscope.demo.char_gpt import CharGPT
    from gradscope.demo.text import CharText

    return sum(parameter.numel() for parameter in CharGPT(CharText().vocab_size).parameters())


def _print_heading(text: str) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(text, style="bold", markup=False)
    console.print("-" * len(text), style="bold")


def _print_loop(loop: Callable[..., Iterator[float]]) -> None:
    """Show the body of a loop with its line numbers, which are those that a finding names."""
    import inspect

    lines, first = inspect.getsourcelines(loop)
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("for "))
    print(f"\n  {Path(inspect.getfile(loop)).name}")
    for number, line in enumerate(lines[start:], first + start):
        print(f"  {number:4} | {line.removeprefix('    ').rstrip()}")
    print()


def _train_watched(loop: Callable[..., Iterator[float]], n_steps: int, seed: int) -> Scope:
    """Run one of the two loops on a fresh model, under watch, and return what was seen."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    import gradscope
    from gradscope.demo.char_gpt import CharGPT
    from gradscope.demo.text import CharText

    torch.manual_seed(seed)
    text = CharText(seed=seed)
    model = CharGPT(text.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with progress, gradscope.watch(model, optimizer) as scope:
        task = progress.add_task("training", total=n_steps, loss=float("nan"))
        for loss in loop(model, optimizer, text.get_batch, n_steps):
            progress.update(task, advance=1, loss=loss)
    return scope


def _write(scope: Scope, folder: Path) -> list[Path]:
    """Write the report, the graph and every table with rows into a folder; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [scope.report(folder / "report.html", force=True)]
    try:
        for path in (folder / "graph.svg", folder / "graph.png", folder / "graph.html"):
            scope.graph().render(path)
            written.append(path)
    except RenderError as error:
        # The tables are worth having where Graphviz has no wheel.
        print(f"no picture of the graph: {error}", file=sys.stderr)
    for name, table in scope.tables.items():
        if table.empty:  # those of several processes
            continue
        path = folder / f"{name}.csv"
        table.to_csv(path, index=False)
        written.append(path)
    return written
