"""How the updates of each parameter were made up, over recorded steps, for the page's script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.views.report.forward_order import forward_order
from gradscope.views.report.names import shown
from gradscope.views.report.packing import packed
from gradscope.views.report.thinning import spread

if TYPE_CHECKING:
    from gradscope.run.recording import Recording

MOST_PARAMS = 1000
"""Of how many parameters the updates are taken apart on the page."""

_MOST_CELLS = 200_000
_MOST_RATIOS = 80_000

_OF_UPDATES: Final = (
    "weight_norm_before",
    "weight_norm_after",
    "update_norm",
    "decay_norm",
    "momentum_norm",
    "fresh_norm",
    "update_gradient_cosine",
    "unchanged_fraction",
    "residual",
    "rounding",
)
_OF_MOMENTS: Final = (
    "effective_lr_min",
    "effective_lr_mean",
    "effective_lr_max",
    "momentum_gradient_cosine",
)
_MOST_KEYS = 3


def update_ratios(run: Recording) -> dict[str, Any] | None:
    """Return the ratio of update to weight by parameter and step; None if none is known.

    Returns:
        For JSON: ``names``, ``steps``, ``ratios`` (packed, [names, steps]), ``n_recorded`` and
        ``low`` and ``high``, the least and greatest positive ratio.
    """
    table = run.rows("updates")
    order, n_all = _with_updates(run, 4 * MOST_PARAMS)
    known = table.array("update_ratio")
    if not order or not (np.isfinite(known) & (known > 0)).any():
        return None
    steps, n_recorded = _some_steps(run, _MOST_RATIOS // len(order))
    ratios = _matrix(run, "updates", ["update_ratio"], order, steps)["update_ratio"]
    positive = ratios[np.isfinite(ratios) & (ratios > 0)]
    if not len(positive):
        return None
    return {
        "names": [shown(run.parameters[number].name) for number in order],
        "steps": steps.tolist(),
        "ratios": packed(ratios),
        "n_recorded": n_recorded,
        "n_params": n_all,
        "low": float(positive.min()),
        "high": float(positive.max()),
    }


def anatomy(run: Recording) -> dict[str, Any] | None:
    """Return the parts of each parameter's updates; None if no update was recorded.

    Returns:
        For JSON: ``params``, each with ``name``, ``optimizer``, ``kind`` and ``keys`` of its
        optimizer's state; ``steps``; ``values``, packed [params, steps] by quantity;
        ``n_recorded``, how many steps were recorded in full, ``n_params``, and ``takes_turns``,
        whether there are steps at which a parameter was not taken apart.
    """
    order, n_all = _with_updates(run, MOST_PARAMS)
    if not order:
        return None
    n_quantities = len(_OF_UPDATES) + len(_OF_MOMENTS) + 2 * _MOST_KEYS
    steps, n_recorded = _some_steps(run, max(8, _MOST_CELLS // n_quantities // len(order)))
    values = _matrix(run, "updates", _OF_UPDATES, order, steps)
    values |= _matrix(run, "moments", _OF_MOMENTS, order, steps)
    values |= {"grad_norm": _matrix(run, "grads", ["norm"], order, steps)["norm"]}
    keys = _state_keys(run)
    values |= _states(run, keys, order, steps)
    holders = [run.parameters[number].holders for number in order]
    return {
        "params": [
            {
                "name": shown(run.parameters[number].name),
                "shape": str(run.parameters[number].shape),
                "optimizer": shown(run.optimizers[held[0][0]].name, 60) if held else "",
                "kind": shown(run.optimizers[held[0][0]].kind, 60) if held else "",
                "keys": [shown(key, 40) for key in keys.get(held[0][0], [])] if held else [],
            }
            for number, held in zip(order, holders, strict=True)
        ],
        "steps": steps.tolist(),
        "values": {
            name: packed(matrix) for name, matrix in values.items() if not np.isnan(matrix).all()
        },
        "n_recorded": n_recorded,
        "n_params": n_all,
        "takes_turns": bool(
            (np.isnan(values["unchanged_fraction"]) & (values["update_norm"] > 0)).any()
        ),
    }


def _with_updates(run: Recording, most: int) -> tuple[list[int], int]:
    """Parameters of which updates were recorded, in forward order, and how many there are."""
    recorded = set(np.unique(run.rows("updates").array("param")).tolist())
    order = [number for number in forward_order(run)[0] if number in recorded]
    return order[:most], len(order)


def _some_steps(run: Recording, most: int) -> tuple[npt.NDArray[np.int64], int]:
    """Some recorded steps of every optimizer, and how many there are of all."""
    table = run.rows("updates")
    step, optimizer = table.array("step"), table.array("optimizer")
    own = [np.unique(step[optimizer == number]) for number in np.unique(optimizer)]
    share = max(4, most // max(1, len(own)))
    chosen = np.unique(np.concatenate([spread(steps, share) for steps in own]))
    return chosen.astype(np.int64), sum(map(len, own))


def _matrix(
    run: Recording,
    name: str,
    columns: Any,
    order: list[int],
    steps: npt.NDArray[np.int64],
    only: npt.NDArray[np.bool_] | None = None,
) -> dict[str, npt.NDArray[np.float64]]:
    """Columns of a table as real[parameters, steps], NaN where there is no row."""
    table = run.rows(name)
    row_of = np.full(len(run.parameters) + 1, -1, np.int64)
    row_of[order] = np.arange(len(order))
    row = row_of[table.array("param")]
    at = np.searchsorted(steps, table.array("step"))
    at[at == len(steps)] = 0
    wanted = (row >= 0) & (steps[at] == table.array("step"))
    if only is not None:
        wanted &= only
    found = {}
    for column in columns:
        matrix = np.full((len(order), len(steps)), np.nan)
        matrix[row[wanted], at[wanted]] = table.array(column)[wanted]
        found[column] = matrix
    return found


def _state_keys(run: Recording) -> dict[int, list[str]]:
    """The keys under which each optimizer keeps tensors as large as the parameter."""
    state = run.rows("state")
    is_tensor = np.isnan(state.array("value")) & ~np.isnan(state.array("norm"))
    texts, optimizers = state.texts("key")[is_tensor], state.array("optimizer")[is_tensor]
    return {
        int(number): list(dict.fromkeys(texts[optimizers == number].tolist()))[:_MOST_KEYS]
        for number in np.unique(optimizers)
    }


def _states(
    run: Recording, keys: dict[int, list[str]], order: list[int], steps: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.float64]]:
    """Norms of the state before and after, by the place of the key: ``state0_before`` and so on."""
    state = run.rows("state")
    texts, when, optimizer = state.texts("key"), state.texts("when"), state.array("optimizer")
    found = {}
    for place in range(max(map(len, keys.values()), default=0)):
        is_key = np.zeros(state.n_rows, np.bool_)
        for number, own in keys.items():
            if place < len(own):
                is_key |= (optimizer == number) & (texts == own[place])
        for side in ("before", "after"):
            only = is_key & (when == side)
            matrix = _matrix(run, "state", ["norm"], order, steps, only)["norm"]
            found[f"state{place}_{side}"] = matrix
    return found
