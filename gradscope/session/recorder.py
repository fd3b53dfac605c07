"""From what was read around a step to the rows of the tables. Free of torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gradscope.run.columns import MISSING, Coded
from gradscope.run.recording import Recording
from gradscope.run.schema import GROUPS, MOMENTS, STATUSES
from gradscope.session.gradients import NONE, Consumption
from gradscope.session.ledger import StepRecord

_GROUP_COLUMNS = {column.name for column in GROUPS.columns}
_MOMENT_COLUMNS = tuple(column.name for column in MOMENTS.columns)
_ADAM_DENOMINATOR = ("Adam", "AdamW")


def record_gradients(
    recording: Recording,
    step: int,
    optimizer: int,
    params: Any,
    consumption: Consumption,
    statistics: Any,
    sums_of_squares: Any,
) -> float:
    """Add the rows of ``grads`` for one step; returns the norm of all gradients together.

    Args:
        recording: where the rows go.
        step: number of the step.
        optimizer: number of the optimizer.
        params: int64[n], numbers of the parameters, aligned with what follows.
        consumption: what the step reads.
        statistics: Statistics of the gradients, or None if the step was not recorded in full.
        sums_of_squares: float64[n] where there are no statistics, or None.
    """
    n = len(params)
    values: dict[str, Any] = {
        "step": step,
        "param": params,
        "optimizer": optimizer,
        "status": Coded(consumption.status, STATUSES),
        "n_writes": consumption.n_writes,
        "carried_from": np.where(consumption.carried_from < 0, MISSING, consumption.carried_from),
        "edited": consumption.edited,
        "edited_after_use": consumption.edited_after_use,
    }
    if statistics is not None:
        sums_of_squares = statistics.sum_of_squares
        for name in ("mean", "std", "min", "max", "abs_max", "zero_fraction"):
            values[name] = getattr(statistics, name)
        values["nonfinite"] = np.nan_to_num(statistics.n_nonfinite).astype(np.int64)
    if sums_of_squares is None:
        sums_of_squares = np.full(n, np.nan)
    values["norm"] = np.sqrt(sums_of_squares)
    recording.rows("grads").extend(n, values)
    there = consumption.status != NONE
    return (
        math.sqrt(float(np.sum(sums_of_squares[there & ~np.isnan(sums_of_squares)])))
        if (not np.isnan(sums_of_squares[there]).any())
        else math.nan
    )


def record_groups(recording: Recording, step: int, optimizer: int, groups: list[Any]) -> None:
    """Add the rows of ``groups`` for one step."""
    for number, group in enumerate(groups):
        numbers = {name: float(late.value()) for name, late in group.values.items()}
        named = {name: numbers.pop(name) for name in list(numbers) if name in _GROUP_COLUMNS}
        options = {**{name: f"{value:g}" for name, value in numbers.items()}, **group.options}
        recording.rows("groups").append(
            {
                "step": step,
                "optimizer": optimizer,
                "group": number,
                "n_params": group.n_params,
                **named,
                "options": ", ".join(f"{name}={value}" for name, value in options.items()),
            }
        )


def record_updates(
    recording: Recording, step: int, optimizer: int, params: Any, reading: Any
) -> tuple[float, float]:
    """Add the rows of ``updates``; returns the norms of all weights and of their update."""
    before = np.sqrt(reading.weights_before.value())
    after = np.sqrt(reading.weights_after.value())
    change = np.sqrt(reading.change.value())
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(before > 0, change / before, np.nan)
    recording.rows("updates").extend(
        len(params),
        {
            "step": step,
            "param": params,
            "optimizer": optimizer,
            "weight_norm_before": before,
            "weight_norm_after": after,
            "update_norm": change,
            "update_ratio": ratio,
        },
    )
    return _together(before), _together(change)


def record_state(
    recording: Recording, step: int, optimizer: int, params: Any, when: str, reading: Any
) -> None:
    """Add the rows of ``state`` for one side of a recorded step."""
    n = len(reading.keys)
    values: dict[str, Any] = {
        "step": step,
        "param": params[np.array(reading.places, np.int64)] if n else [],
        "optimizer": optimizer,
        "when": when,
        "key": reading.keys,
        "value": [math.nan if late is None else float(late.value()) for late in reading.values],
    }
    statistics = reading.statistics.value()
    for name in ("norm", "mean", "abs_max"):
        column = np.full(n, np.nan)
        column[reading.tensors] = getattr(statistics, name)
        values[name] = column
    nonfinite = np.zeros(n, np.int64)
    nonfinite[reading.tensors] = np.nan_to_num(statistics.n_nonfinite).astype(np.int64)
    values["nonfinite"] = nonfinite
    recording.rows("state").extend(n, values)


def record_moments(
    recording: Recording, step: int, optimizer: int, params: Any, reading: Any
) -> None:
    """Add the rows of ``moments`` for a recorded step of an Adam-like optimizer.

    Denominator and effective learning rate follow Adam (Kingma and Ba, 2015, algorithm 1), as
    ``torch.optim.adam._single_tensor_adam`` computes them; with amsgrad the greatest second moment
    so far takes the second moment's place.
    """
    after = _by_place(reading.state_after)
    before = _by_place(reading.state_before) if reading.state_before is not None else {}
    kind = recording.optimizers[optimizer].kind
    group_of = {
        number: group
        for number, entry in enumerate(recording.parameters)
        for holder, group in entry.holders
        if holder == optimizer
    }
    rows: list[dict[str, Any]] = []
    for place, state in after.items():
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            continue
        param = int(params[place])
        group = reading.groups[group_of[param]].values if reading.groups else {}
        count = float(state.get("step", math.nan))
        earlier = before.get(place, {})
        values: dict[str, Any] = {
            "step": step,
            "param": param,
            "optimizer": optimizer,
            "step_count": int(count) if math.isfinite(count) else 0,
            "exp_avg_norm_before": _norm(earlier.get("exp_avg")),
            "exp_avg_norm_after": _norm(state["exp_avg"]),
            "exp_avg_sq_norm_before": _norm(earlier.get("exp_avg_sq")),
            "exp_avg_sq_norm_after": _norm(state["exp_avg_sq"]),
        }
        if {"lr", "beta1", "beta2", "eps"} <= set(group) and kind in _ADAM_DENOMINATOR:
            lr, beta1, beta2, eps = (
                float(group[name].value()) for name in ("lr", "beta1", "beta2", "eps")
            )
            correction1, correction2 = 1 - beta1**count, 1 - beta2**count
            second = state.get("max_exp_avg_sq", state["exp_avg_sq"])
            least, greatest = (
                math.sqrt(max(second[name], 0.0) / correction2) + eps if correction2 else math.nan
                for name in ("min", "max")
            )
            values |= {
                "bias_correction1": correction1,
                "bias_correction2": correction2,
                "denominator_min": least,
                "denominator_max": greatest,
                "effective_lr_min": lr / correction1 / greatest if correction1 else math.nan,
                "effective_lr_max": lr / correction1 / least if correction1 else math.nan,
            }
        rows.append(values)
    # All at once: an append costs as much for one row as for all of them.
    columns = {name: [row.get(name, math.nan) for row in rows] for name in _MOMENT_COLUMNS}
    recording.rows("moments").extend(len(rows), columns)


def record_step(
    recording: Recording,
    record: StepRecord,
    *,
    grad_norm: float,
    weight_norm: float,
    update_norm: float,
    loss_scale: float,
    scaled: bool,
    recorded: bool,
    observe_seconds: float,
) -> None:
    """Add the row of ``steps``, and tell the backwards that belong to it."""
    attempt = record.attempt
    status = record.consumption.status
    counts = np.bincount(status, minlength=len(STATUSES))
    recording.rows("steps").append(
        {
            "step": record.step,
            "optimizer": record.optimizer,
            "optimizer_step": record.optimizer_step,
            "outcome": record.outcome,
            "loss": attempt.loss / loss_scale,
            "n_forward": attempt.n_forward,
            "n_backward": len(attempt.taken),
            "order": attempt.spelled_order(),
            "zeroed": attempt.zeroed,
            "zeroed_by": attempt.zeroed_by,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "weight_norm": weight_norm,
            **{f"n_{name}": int(counts[i]) for i, name in enumerate(STATUSES)},
            "graph_nodes": attempt.graph_nodes,
            "train_mode": attempt.train_mode,
            "scaled": scaled,
            "recorded": recorded,
            "forward_ms": 1e3 * attempt.forward_seconds,
            "backward_ms": 1e3 * attempt.backward_seconds,
            "step_ms": 1e3 * record.seconds,
            "observe_ms": 1e3 * observe_seconds,
        }
    )
    backwards = recording.rows("backwards")
    for number in attempt.backwards:
        # A generator's backward also writes the discriminator's gradients, but belongs to the step
        # that it was made for: the first one after it.
        if backwards.array("step")[number] == MISSING:
            backwards.set("step", number, record.step)


def _by_place(reading: Any) -> dict[int, dict[str, Any]]:
    """The state per parameter: numbers as they are, tensors as their least, greatest and norm."""
    statistics = reading.statistics.value()
    least, greatest, norms = statistics.min, statistics.max, statistics.norm
    found: dict[int, dict[str, Any]] = {}
    tensor = {entry: i for i, entry in enumerate(reading.tensors)}
    for entry, (place, key, late) in enumerate(
        zip(reading.places, reading.keys, reading.values, strict=True)
    ):
        state = found.setdefault(place, {})
        if late is not None:
            value = float(late.value())
            # A parameter of one element without dimensions has moments without dimensions.
            state[key] = (
                value if key == "step" else {"min": value, "max": value, "norm": abs(value)}
            )
        else:
            i = tensor[entry]
            state[key] = {
                "min": least[i],
                "max": greatest[i],
                "norm": norms[i],
            }
    return found


def _norm(moment: dict[str, float] | None) -> float:
    return 0.0 if moment is None else moment["norm"]


def _together(norms: Any) -> float:
    """The norm of several tensors together; those that were not read are left out."""
    read = norms[~np.isnan(norms)]
    return float(np.sqrt(np.sum(read**2))) if len(read) else math.nan
