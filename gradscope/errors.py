"""Everything gradscope raises or warns with.

    GradscopeError(Exception)
     ├─ UsageError(TypeError, ValueError)    what was passed cannot be watched
     ├─ ScopeStateError(RuntimeError)        started twice, asked before anything was seen
     ├─ UnknownRuleError(KeyError)           no rule bears that code or name
     ├─ OutputExistsError(FileExistsError)   an output would overwrite a file
     ├─ RunDirectoryError(OSError)           a directory holds no run, or none that can be read
     ├─ RenderError(RuntimeError)            a picture could not be drawn
     └─ FindingsError                        findings that the program asked to be stopped by
    GradscopeWarning(UserWarning)            something of gradscope's own went wrong, or a finding
                                             that the program asked to be warned of; names a slug

None of these is ever raised from inside a training step, but for a :class:`FindingsError` that was
asked for: an error of gradscope's own is recorded, told once as a :class:`GradscopeWarning`, and
training goes on.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, without the time that importing typing takes
if TYPE_CHECKING:
    from typing import Any


class GradscopeError(Exception):
    """The base of every error that gradscope raises."""


class UsageError(GradscopeError, TypeError, ValueError):
    """What the program passed cannot be used; the message names it and says what to pass."""


class ScopeStateError(GradscopeError, RuntimeError):
    """The scope is not in a state in which that can be done."""


class UnknownRuleError(GradscopeError, KeyError):
    """No rule bears that code or name."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class OutputExistsError(GradscopeError, FileExistsError):
    """A file is in the way, and nothing of the user's is overwritten unasked."""


class RunDirectoryError(GradscopeError, OSError):
    """A directory holds no run, or one that this gradscope cannot read."""


class RenderError(GradscopeError, RuntimeError):
    """Graphviz could not be found, or refused the picture."""


class FindingsError(GradscopeError):
    """Something is wrong with the training loop, and the program asked to be stopped by it.

    Attributes:
        findings: what is wrong, as a :class:`gradscope.Findings`.
    """

    def __init__(self, findings: Any) -> None:
        super().__init__(findings)
        self.findings = findings

    def __str__(self) -> str:
        return f"gradscope: {self.findings!r}"


class GradscopeWarning(UserWarning):
    """Something inside gradscope failed, the training untouched; or a finding, where asked for.

    Attributes:
        slug: the short name of what happened, as listed in ``docs/warnings.md``, or the name of
            the finding's rule.
    """

    def __init__(self, slug: str, text: str) -> None:
        super().__init__(f"gradscope: {text} [{slug}]")
        self.slug = slug


def text_of(error: BaseException) -> str:
    """Return the class of an exception and what it says, as far as it can be printed."""
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:  # an exception of the program's may raise even here
        text = ""
    return f"{name}: {text}" if text else name
