"""What verbs share when they print and write: width and colour, files in the way, what is next."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from gradscope.errors import GradscopeError, OutputExistsError, UsageError

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
    from rich.segment import Segment, Segments

    file = sys.stdout if file is None else file
    console = Console(file=file, width=width_of(file) or READABLE_WIDTH, highlight=False)
    segments = [
        Segment(harmless(text, file), style, control)
        for text, style, control in console.render(shown)
    ]
    if console.is_terminal:
        console.print(Segments(segments), end="")
        return
    plain = "".join(text for text, _, control in segments if not control)
    file.write("\n".join(line.rstrip() for line in plain.split("\n")))


def say(text: str) -> None:
    """Print plain text to standard output."""
    print(harmless(text, sys.stdout))


def tell(text: str) -> None:
    """Print a line about what was done to standard error, where it disturbs no data."""
    sys.stdout.flush()
    print(harmless(text, sys.stderr), file=sys.stderr)


# Control characters but the end of a line, what turns the direction of writing, halves of pairs.
_HARMFUL: Final = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def harmless(text: str, file: IO[str]) -> str:
    """Return a text that steers no terminal, whatever names of the program are in it.

    Args:
        text: to be printed.
        file: where to; characters that it cannot write are spelled out.
    """
    text = _HARMFUL.sub(lambda found: repr(found[0])[1:-1], text)
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def command(*words: str | os.PathLike[str]) -> str:
    """Return a command of ours as one would type it."""
    return " ".join(["gradscope", *(_quoted(os.fspath(word)) for word in words)])


def _quoted(word: str) -> str:
    """A word for a shell; a condition with texts in it is readable in double quotes only."""
    if "'" in word and not set(word) & set('"$`\\!\n'):
        return f'"{word}"'
    return shlex.quote(word)


@contextmanager
def written_to(output: str | os.PathLike[str]) -> Iterator[None]:
    """Say of what file it is that a full disk, or whatever it was, has kept it from being written.

    Raises:
        UsageError: in the place of an :class:`OSError` of the block.
    """
    try:
        yield
    except GradscopeError:
        raise
    except OSError as error:
        raise UsageError(f"--output {output}: cannot be written: {error}") from error


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
    if output.exists() and not output.is_file():
        raise UsageError(f"--output {path}: is a device or a pipe; name a file")
    if not folder.is_dir():
        raise UsageError(f"--output {path}: there is no folder {folder}")
    if output.exists() and not force:
        raise OutputExistsError(
            f"--output {path}: is there already; overwrite it with --force, or name another file"
        )
    if not os.access(output if output.exists() else folder, os.W_OK):
        raise UsageError(f"--output {path}: may not be written")
    return output
