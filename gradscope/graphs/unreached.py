"""What was computed or registered, but does not lead to the loss, and where it was cut off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from gradscope.run.captured_graph import CapturedGraph, LongIntegers, Registered

Why: TypeAlias = Literal["cut off", "no grad", "not called", "frozen", "unused"]
"""Why something is not reached.

``cut off``: the module made operations, and none of them leads to the loss. ``no grad``: it ran
while gradients were switched off. ``not called``: it never ran. ``frozen``: it does not require
grad. ``unused``: its module leads to the loss, but not by way of this parameter.
"""


@dataclass(frozen=True, slots=True)
class Unreached:
    """A module or parameter that does not lead to the loss.

    Attributes:
        path: the module's path, or the parameter's first name.
        what: the class of the module, or ``"parameter"``.
        why: see :data:`Why`.
        call: the call of the module; -1 for a parameter, and for a module that was not called.
        n_operations: how many operations it made, for nothing.
        params: the parameters that are not reached on its account.
        taken_by: paths of the modules that were given its result, without a graph.
    """

    path: str
    what: str
    why: Why
    call: int = -1
    n_operations: int = 0
    params: tuple[Registered, ...] = ()
    taken_by: tuple[str, ...] = field(default=())


def unreached(captured: CapturedGraph) -> list[Unreached]:
    """Return what does not lead to the loss: modules, outermost first, then single parameters.

    Of modules inside one another only the outermost is told. A module that is called several times
    is reached if one of its calls is. Without a record of module calls only parameters are told.
    """
    reached = {name for names in captured.params for name in names}
    missing = [each for each in captured.registered if not reached.intersection(each.names)]
    if not reached and not all(captured.params):
        # Sharding puts other leaves in the place of the parameters: nothing can be told of them.
        missing = [each for each in missing if not each.requires_grad]
    hidden = _hidden_parameters(captured, missing)
    missing = [each for each in missing if id(each) not in hidden]
    told: list[Unreached] = []
    if len(captured.calls):
        told += _modules(captured, missing)
    explained = {id(param) for each in told for param in each.params}
    for param in missing:
        if id(param) not in explained:
            why: Why = "unused" if param.requires_grad else "frozen"
            told.append(Unreached(param.names[0], "parameter", why, params=(param,)))
    return told


def operations_made(captured: CapturedGraph) -> tuple[LongIntegers, LongIntegers]:
    """Return int64[c] twice: how many operations each call made, and how many lead to the loss.

    Those of the calls inside of it are included.
    """
    calls = captured.calls
    made = calls.last - calls.first
    got = np.bincount(captured.call[captured.call >= 0], minlength=len(calls)).astype(np.int64)
    return made, calls.with_inner(got)


def _modules(captured: CapturedGraph, missing: list[Registered]) -> list[Unreached]:
    calls = captured.calls
    made, got = operations_made(captured)
    in_function = _may_be_inside_a_function(captured)
    is_reached = [False] * len(calls.modules)
    for call, module in enumerate(calls.module.tolist()):
        is_reached[module] |= bool(got[call]) or in_function[call]
    takers: dict[int, list[int]] = {}
    for giver, taker in calls.feeds:
        takers.setdefault(giver, []).append(taker)
    inside_of = _by_module(missing)
    told: list[Unreached] = []
    done: set[str] = set()
    hidden = [False] * len(calls)
    for call, (module, parent) in enumerate(
        zip(calls.module.tolist(), calls.parent.tolist(), strict=True)
    ):
        path, kind = calls.modules[module]
        hidden[call] = parent >= 0 and (hidden[parent] or not (got[parent] or in_function[parent]))
        if hidden[call] or is_reached[module] or path in done or path.startswith("<"):
            continue
        params = tuple(inside_of.get(path, ()))
        are_frozen = not any(each.requires_grad for each in params)
        if made[call]:
            why: Why = "cut off"
        elif params and are_frozen:
            why = "frozen"
        elif params and calls.without_grad[call]:
            why = "no grad"
        else:
            continue
        done.add(path)
        taken = {
            taker
            for giver in takers
            if calls.is_inside(giver, call)
            for taker in takers[giver]
            if not calls.is_inside(taker, call)
        }
        outermost = sorted(taker for taker in taken if int(calls.parent[taker]) not in taken)
        told.append(
            Unreached(
                path,
                kind,
                why,
                call,
                int(made[call]),
                params,
                tuple(dict.fromkeys(calls.path(taker) for taker in outermost)),
            )
        )
    known = {id(param) for each in told for param in each.params}
    called = {around for path, _ in calls.modules for around in (path, *_paths_around(path))}
    # Of a module that never ran its owner may have used a parameter by itself.
    for names in captured.params:
        called |= {around for name in names for around in _paths_around(name)}
    never: dict[str, list[Registered]] = {}
    for param in missing:
        if id(param) not in known:
            module = _never_called(param.names[0], called)
            if module is not None:
                never.setdefault(module, []).append(param)
    told += [Unreached(path, "", "not called", params=tuple(p)) for path, p in never.items()]
    return told


def _never_called(name: str, called: set[str]) -> str | None:
    """Return the outermost module around a parameter that never ran, or None if all of them did.

    Args:
        name: the parameter's name.
        called: the modules that ran or had a parameter used, and those around them: one whose inner
            modules ran is one that its owner reaches into, such as a ``ModuleList``.
    """
    return next((path for path in _paths_around(name) if path not in called), None)


def _paths_around(path: str) -> list[str]:
    """Return the paths of the modules around a parameter or a module, the outermost first."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _by_module(params: list[Registered]) -> dict[str, list[Registered]]:
    """Return the parameters inside of each module, by its path."""
    inside_of: dict[str, list[Registered]] = {"": list(params)}
    for param in params:
        for path in {path: None for name in param.names for path in _paths_around(name)}:
            inside_of.setdefault(path, []).append(param)
    return inside_of


def _hidden_parameters(captured: CapturedGraph, missing: list[Registered]) -> set[int]:
    """Return ids of parameters that may be reached by way of a custom Function, unseen."""
    trainable = [each for each in missing if each.requires_grad]
    calls = captured.calls
    if not len(calls):
        return {id(each) for each in trainable} if _functions(captured) else set()
    paths = {
        calls.path(call) for call, hides in enumerate(_may_be_inside_a_function(captured)) if hides
    }
    inside_of = _by_module(trainable)
    return {id(each) for path in paths for each in inside_of.get(path, ())}


def _functions(captured: CapturedGraph) -> set[int]:
    """Return the sequence numbers of the custom Functions in a graph."""
    custom = [number for number, op in enumerate(captured.ops) if op.endswith("Backward")]
    is_custom = np.isin(captured.op, custom) & (captured.sequence_nr >= 0)
    return set(captured.sequence_nr[is_custom].tolist())


def _may_be_inside_a_function(captured: CapturedGraph) -> list[bool]:
    """Tell which calls without gradients may have run inside a custom Function that is reached.

    A reentrant checkpoint runs its part of the model in the forward of such a Function, without
    gradients, and again in the backward, with them: no graph shows whether it leads to the loss.
    The Function's node is numbered before its forward runs.
    """
    functions = _functions(captured)
    calls = captured.calls
    return [
        without and made == 0 and first - 1 in functions
        for without, made, first in zip(
            calls.without_grad.tolist(),
            (calls.last - calls.first).tolist(),
            calls.first.tolist(),
            strict=True,
        )
    ]
