"""gradscope watches a PyTorch training loop and says by name what is wrong with it.

    import gradscope

    with gradscope.watch(model, optimizer) as scope:
        ...  # the loop, unchanged

    print(scope)

Importing the package imports neither torch nor pandas nor rich; each arrives with its first use.
"""

from __future__ import annotations

from gradscope._version import __version__

# What typing.TYPE_CHECKING is; importing typing alone would cost eight milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from gradscope.capturing import Capture, capture, graph
    from gradscope.checking import check_setup
    from gradscope.comparing import RunDifference, diff
    from gradscope.dot import make_dot
    from gradscope.errors import FindingsError, GradscopeError, GradscopeWarning
    from gradscope.graphs.autograd_graph import AutogradGraph
    from gradscope.opening import Run
    from gradscope.opening import open as open
    from gradscope.rules.finding import Finding, Findings, Severity
    from gradscope.rules.rule import Rule
    from gradscope.scope import Scope, watch

__all__ = [
    "AutogradGraph",
    "Capture",
    "Finding",
    "Findings",
    "FindingsError",
    "GradscopeError",
    "GradscopeWarning",
    "Rule",
    "Run",
    "RunDifference",
    "Scope",
    "Severity",
    "__version__",
    "capture",
    "check_setup",
    "diff",
    "graph",
    "make_dot",
    "watch",
]
# And gradscope.open, which a star import would put in the place of Python's own.

_HOMES = {
    "AutogradGraph": "gradscope.graphs.autograd_graph",
    "Capture": "gradscope.capturing",
    "Finding": "gradscope.rules.finding",
    "Findings": "gradscope.rules.finding",
    "FindingsError": "gradscope.errors",
    "GradscopeError": "gradscope.errors",
    "GradscopeWarning": "gradscope.errors",
    "Rule": "gradscope.rules.rule",
    "Run": "gradscope.opening",
    "RunDifference": "gradscope.comparing",
    "Scope": "gradscope.scope",
    "Severity": "gradscope.rules.finding",
    "capture": "gradscope.capturing",
    "check_setup": "gradscope.checking",
    "diff": "gradscope.comparing",
    "graph": "gradscope.capturing",
    # What IPython calls for %load_ext gradscope.
    "load_ipython_extension": "gradscope.integrations.notebook",
    "make_dot": "gradscope.dot",
    "open": "gradscope.opening",
    "unload_ipython_extension": "gradscope.integrations.notebook",
    "watch": "gradscope.scope",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradscope' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "open"})
