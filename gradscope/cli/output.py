"""What verbs share when they print and write: width and colour, files in the way, what is next."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from gradscope.errors import OutputExistsError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

READABLE_WIDTH = 100
"""How wide prose is where no window says otherwise: in a pipe, or a file."""


def width_of(file: IO[str]) -> int | None:
    """Return how many characters a line may have: ``COLUMNS``, the window's; None for a pipe."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return shutil.get_terminal_size().columns if file.isatty() else None


def show(shown: RenderableType, file: IO[str] | None = None) -> None:
    """Print something of rich's, with colours on a terminal only, without trailing spaces else.

    Args:
        shown: what to print.
        file: where to; standard output by default.
    """
    from rich.console import Console

    file = sys.stdout if file is None else file
    width = width_of(file) or READABLE_WIDTH
    console = Console(file=file, width=width, highlight=False)
    if console.is_terminal:
        console.print(shown)
        return
    plain = io.StringIO()
    Console(file=plain, width=width, color_system=None, highlight=False).print(shown)
    file.write("".join(f"{line.rstrip()}\n" for line in plain.getvalue().splitlines()))


def tell(text: str) -> None:
    """Print a line about what was done to standard error, where it disturbs no data."""
    sys.stdout.flush()
    print(text, file=sys.stderr)


def command(*words: str | os.PathLike[str]) -> str:
    """Return a command of ours as one would type it."""
    return " ".join(["gradscope", *(_quoted(os.fspath(word)) for word in words)])


def _quoted(word: str) -> str:
    """A word for a shell; a condition with texts in it is readable in double quotes only."""
    if "'" in word and not set(word) & set('"$`\\!\n'):
        return f'"{word}"'
    return shlex.quote(word)


def checked_output(path: str, *, force: bool) -> Path:
    """Return where a file is to be written, checked before any work is done.

    Raises:
        OutputExistsError: if a file is there, and ``force`` is not set.
        UsageError: if it cannot be written there.
    """
    output = Path(path)
    folder = output.parent
    if not path or "\0" in path:
        raise UsageError(f"--output {path!r}: is no path of a file")
    if output.is_dir():
        raise UsageError(f"--output {path}: is a folder; name a file")
    if not folder.is_dir():
        raise UsageError(f"--output {path}: there is no folder {folder}")
    if output.exists() and not force:
        raise OutputExistsError(
            f"--output {path}: is there already; overwrite it with --force, or name another file"
        )
    if not os.access(output if output.exists() else folder, os.W_OK):
        raise UsageError(f"--output {path}: may not be written")
    return output
