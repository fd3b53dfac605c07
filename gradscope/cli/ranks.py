"""What ``gradscope run`` does where several processes train one program."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gradscope.run.directory import layout

if TYPE_CHECKING:
    from gradscope.cli.children import Children
    from gradscope.run.recording import Recording
    from gradscope.session.ranks import Place
    from gradscope.session.session import Session

_MOST_SECONDS = 10.0
"""So long the first rank waits for the others to write their ends."""

_AFTER_A_FAILURE = 1.0
"""So long where it has failed: whoever started it may be waiting to end the others."""


def place_of_program() -> Place:
    """Return which rank this process is, as ``torchrun`` says."""
    from gradscope.session.ranks import place_now

    return place_now()


def make_room(output: Path, place: Place, *, force: bool) -> None:
    """See that this rank can write a new run to a directory.

    Raises:
        UsageError, OutputExistsError: if something lies there.
    """
    # What starts ranks anew after one has failed does not ask whether it may.
    is_again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    layout.make_room(
        "--output",
        output,
        force=force or (is_again and place.world_size > 1),
        rank=place.rank,
        world_size=place.world_size,
    )


def shared_folder() -> Path | None:
    """Return a folder for the time being that all ranks on this machine know; None if none can be.

    All of them were started by one process.
    """
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    user = os.getuid() if hasattr(os, "getuid") else 0
    path = Path(tempfile.gettempdir()) / f"gradscope-{user}-{os.getppid()}-{again[:9]}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    # Anybody may make a folder there.
    if not stat.S_ISDIR(found.st_mode) or (user and found.st_uid != user):
        return None
    return path


def together(
    session: Session, children: Children, place: Place, shared: Path | None, ended: str
) -> Recording | None:
    """Return what all processes have seen; None if there is nothing but what this one has.

    Args:
        session: of this process, which has ended.
        children: the processes that it has started.
        place: of this process among those that train together.
        shared: the folder to which this process has written; None if it has not.
        ended: how the program has ended.
    """
    from gradscope.run.directory.stored import StoredRecording
    from gradscope.session.saving import save_now

    path = children.written
    if path is None and place.world_size > 1 and shared is not None and layout.ranks_in(shared):
        path = shared
    if path is None or (path == shared and session.has_trained and _is_alone(path)):
        return None
    await_others(path, _MOST_SECONDS if ended == "finished" else _AFTER_A_FAILURE)
    if shared is None and session.has_trained:
        number = layout.claim(path, 0, 1)
        criteria = children.watching.criteria
        save_now(path, session.recording, session.elapsed, criteria, {}, number)
    found = StoredRecording(path)
    if not session.has_trained:
        found.notes += session.recording.notes
    return found


def _is_alone(path: Path) -> bool:
    return len(layout.ranks_in(path)) < 2


def await_others(path: Path, most_seconds: float) -> None:
    """Wait until all ranks that write to a folder have ended, or are gone."""
    until = time.monotonic() + most_seconds
    while time.monotonic() < until:
        if all(_has_ended(path, rank) for rank in layout.ranks_in(path)):
            return
        time.sleep(0.05)


def _has_ended(path: Path, rank: int) -> bool:
    from gradscope.session.saving import is_gone

    try:
        facts = layout.read_json(layout.home_of(path, rank) / layout.RUN)
        return facts.get("how_it_ended") is not None or is_gone(facts)
    except (OSError, ValueError, AttributeError):
        return False


def remove_at_exit(path: Path) -> None:
    """Remove a folder when this process ends, and not when one that it has forked does."""
    pid = os.getpid()

    def remove() -> None:
        if os.getpid() == pid:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
