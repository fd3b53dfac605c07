"""How a watched program ended, in words and by its place."""

from __future__ import annotations

from gradscope.errors import text_of
from gradscope.session.session import Session
from gradscope.taps.user_frame import Location, user_frame


def note_ending(session: Session, error: BaseException) -> None:
    """Put the exception that ended a program into the recording of a session that still runs."""
    if session.running:
        session.event("ended", in_words(error), raised_at(error))


def in_words(error: BaseException) -> str:
    """Return the class of an exception and the first line of what it says."""
    return text_of(error).partition("\n")[0].removesuffix(": ")


def raised_at(error: BaseException) -> Location | None:
    """Return the innermost line of the program behind an exception."""
    found = None
    part = error.__traceback__
    while part is not None:
        if user_frame(part.tb_frame) is part.tb_frame:
            code = part.tb_frame.f_code
            found = Location(code.co_filename, part.tb_lineno, code.co_name)
        part = part.tb_next
    return found
