"""Beginning to watch a program that nobody edited."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.config import WatchOptions

if TYPE_CHECKING:
    from gradscope.session.session import Session


def begin_session(path: Path | None, criteria: dict[str, Any], n_steps: int | None) -> Session:
    """Watch everything that this process trains from now on.

    Args:
        path: the run directory to write to, once something trains; None for none.
        criteria: by what the run is judged, as plain data.
        n_steps: stop after so many steps; None for never.
    """
    from gradscope.session.session import Session

    session = Session(WatchOptions(save=path), discovers=True)
    if path is not None:
        session.save_to(path, criteria, waits=True)
    session.start()
    if n_steps is not None:
        from gradscope.session.step_limit import StepLimit

        StepLimit(session, n_steps).start()
    return session
