"""What goes into a loss function, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd


def spread(run: Recording, rows: pd.DataFrame) -> dict[str, int]:
    """Return the steps that a finding covers: loss functions are called alike in a whole run."""
    first = int(rows["step"].min())
    return {
        "step_first": first,
        "step_last": max(run.n_steps - 1, first),
        "count": max(run.n_steps - first, 1),
    }


def culprits(run: Recording, kind: str) -> tuple[str, ...]:
    """Return the paths of the modules of a class that were called; nothing for a function."""
    calls = run.frame("calls")
    found = calls.loc[calls["module_type"] == kind, "module"]
    return tuple(str(path) for path in dict.fromkeys(found))


def with_kind(modules: tuple[str, ...], kind: str) -> str:
    """``a Softmax (module 3)``."""
    return f"a {kind}" + (f" (module {', '.join(modules)})" if modules else "")
