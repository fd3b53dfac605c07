"""Parameters in the order in which the forward uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.graphs.execution import execution_of

if TYPE_CHECKING:
    from gradscope.run.recording import Recording


def forward_order(run: Recording) -> tuple[list[int], bool]:
    """Return the numbers of all parameters, the one nearest to the input first.

    Each captured graph tells when its parameters were first used. What no graph reaches stays
    behind the parameter that it was registered after.

    Returns:
        the numbers, and whether a graph told the order; otherwise it is that of registration.
    """
    used: dict[str, tuple[int, int]] = {}
    for step in sorted(run.graphs)[:8]:
        captured = run.graphs[step]
        execution = execution_of(captured)
        for leaf, place in zip(execution.leaf.tolist(), execution.target.tolist(), strict=True):
            if leaf >= 0:
                for name in captured.params[leaf]:
                    used.setdefault(name, (step, place))
    if not used:
        return list(range(len(run.parameters))), False
    keys: list[tuple[int, int]] = []
    for entry in run.parameters:
        told = [used[name] for name in (entry.name, *entry.aliases) if name in used]
        keys.append(min(told) if told else (keys[-1] if keys else (-1, -1)))
    return sorted(range(len(keys)), key=keys.__getitem__), True
