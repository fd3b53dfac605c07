"""From what was read around a step to the rows of the tables. Free of torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.run.columns import MISSING, Coded
from gradscope.run.recording import Recording
from gradscope.run.schema import GROUPS, STATUSES
from gradscope.session.gradients import NONE, Consumption
from gradscope.session.ledger import StepRecord

if TYPE_CHECKING:
    from gradscope.instruments.anatomy import Anatomy

_GROUP_COLUMNS = {column.name for column in GROUPS.columns}


def record_gradients(
    recording: Recording,
    step: int,
    optimizer: int,
    params: Any,
    consumption: Consumption,
    statistics: Any,
    sums_of_squares: Any,
    before_clipping: Any,
) -> tuple[float, float]:
    """Add the rows of ``grads`` for one step.

    Args:
        recording: where the rows go.
        step: number of the step.
        optimizer: number of the optimizer.
        params: int64[n], numbers of the parameters, aligned with what follows.
        consumption: what the step reads.
        statistics: Statistics of the gradients, or None if the step was not recorded in full.
        sums_of_squares: float64[n] where there are no statistics, or None.
        before_clipping: float64[n], the same as clipping found them, NaN for those that it left
            alone; None without clipping.

    Returns:
        The norm of all gradients together, and the same before clipping (NaN without clipping).
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
        "used_by_another": consumption.used_by_another,
    }
    if statistics is not None:
        sums_of_squares = statistics.sum_of_squares
        for name in ("mean", "std", "min", "max", "abs_max", "zero_fraction"):
            values[name] = getattr(statistics, name)
        values["nonfinite"] = np.nan_to_num(statistics.n_nonfinite).astype(np.int64)
    if sums_of_squares is None:
        sums_of_squares = np.full(n, np.nan)
    values["norm"] = np.sqrt(sums_of_squares)
    if before_clipping is not None:
        values["norm_before_clipping"] = np.sqrt(before_clipping)
    recording.rows("grads").extend(n, values)
    there = consumption.status != NONE
    norm = math.sqrt(float(np.sum(sums_of_squares[there]))) if there.any() else 0.0
    if before_clipping is None:
        return norm, math.nan
    unclipped = np.where(np.isnan(before_clipping), sums_of_squares, before_clipping)
    return norm, math.sqrt(float(np.sum(unclipped[there])))


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
    recording: Recording, step: int, optimizer: int, params: Any, anatomy: Anatomy
) -> tuple[float, float]:
    """Add the rows of ``updates``; returns the norms of all weights and of their update."""
    numel, roundoff = recording.numels_and_roundoffs(params)
    before, after, change = (
        np.sqrt(squares)
        for squares in (anatomy.weight_before, anatomy.weight_after, anatomy.update)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        formula, residual = np.sqrt(anatomy.formula), np.sqrt(anatomy.residual)
        larger = np.fmax(change, formula)
        recording.rows("updates").extend(
            len(params),
            {
                "step": step,
                "param": params,
                "optimizer": optimizer,
                "weight_norm_before": before,
                "weight_norm_after": after,
                "update_norm": change,
                "update_ratio": np.where(before > 0, change / before, np.nan),
                "decay_norm": np.sqrt(anatomy.decay),
                "momentum_norm": np.sqrt(anatomy.momentum),
                "fresh_norm": np.sqrt(anatomy.fresh),
                "update_gradient_cosine": -anatomy.update_gradient
                / (change * np.sqrt(anatomy.gradient)),
                "unchanged_fraction": anatomy.unchanged / numel,
                "eps_fraction": anatomy.eps_dominates / numel,
                "residual": np.where(residual == 0, 0.0, residual / larger),
                "rounding": np.where(larger > 0, roundoff * after / larger, 0.0),
            },
        )
    return _together(before), _together(change)


def record_state(
    recording: Recording,
    step: int,
    optimizer: int,
    params: Any,
    when: str,
    reading: Any,
) -> None:
    """Add the rows of ``state`` for one side of a recorded step."""
    layout, statistics = reading.layout, reading.statistics.value()
    n = len(layout.places)
    values: dict[str, Any] = {
        "step": step,
        "param": params[layout.places],
        "optimizer": optimizer,
        "when": when,
        "key": Coded(layout.key, layout.keys) if n else [],
    }
    values["value"] = np.full(n, np.nan)
    values["value"][layout.numbers] = reading.values.value()
    for name in ("norm", "mean", "abs_max"):
        values[name] = np.full(n, np.nan)
        values[name][layout.tensors] = getattr(statistics, name)
    nonfinite = values["nonfinite"] = np.zeros(n, np.int64)
    nonfinite[layout.tensors] = np.nan_to_num(statistics.n_nonfinite).astype(np.int64)
    is_entry = np.zeros(n, np.bool_)
    is_entry[layout.tensors] = is_entry[layout.numbers] = True
    if not is_entry.all():  # the state holds something that is neither tensor nor number
        for name in ("param", "value", "norm", "mean", "abs_max", "nonfinite"):
            values[name] = values[name][is_entry]
        values["key"] = Coded(layout.key[is_entry], layout.keys)
        n = int(is_entry.sum())
    recording.rows("state").extend(n, values)


def record_moments(
    recording: Recording,
    step: int,
    optimizer: int,
    params: Any,
    reading: Any,
    anatomy: Anatomy | None,
) -> None:
    """Add the rows of ``moments`` for a recorded step of an optimizer of the Adam family."""
    after = reading.state_after
    n = len(params)
    norms: dict[str, Any] = {}
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        norms[f"{key}_norm_after"] = after.by_parameter(key, "norm", n)
        # A moment that is not there yet is a moment of zero.
        norms[f"{key}_norm_before"] = np.where(np.isnan(norms[f"{key}_norm_after"]), np.nan, 0.0)
        if reading.state_before is not None:
            before = reading.state_before.by_parameter(key, "norm", n)
            there = ~np.isnan(before)
            norms[f"{key}_norm_before"][there] = before[there]
    # Adamax has a norm of the past gradients in the place of the second moment.
    second = np.fmax(norms["exp_avg_sq_norm_after"], after.by_parameter("exp_inf", "norm", n))
    has_moments = ~np.isnan(norms["exp_avg_norm_after"] + second)
    if not has_moments.any():
        return
    count = after.by_parameter("step", "mean", n)
    beta1, beta2 = (
        np.array([_value(group, name) for group in reading.groups])[reading.group_of]
        if reading.groups
        else np.full(n, np.nan)
        for name in ("beta1", "beta2")
    )
    values: dict[str, Any] = {
        "step": step,
        "param": params,
        "optimizer": optimizer,
        "step_count": np.nan_to_num(count).astype(np.int64),
        **norms,
        "bias_correction1": 1 - beta1**count,
        "bias_correction2": 1 - beta2**count,
    }
    if anatomy is not None:
        values |= _scales(anatomy, recording.numels_and_roundoffs(params)[0])
    if not has_moments.all():
        values = {
            name: value[has_moments] if isinstance(value, np.ndarray) else value
            for name, value in values.items()
        }
    recording.rows("moments").extend(int(has_moments.sum()), values)


def _scales(anatomy: Anatomy, numel: Any) -> dict[str, Any]:
    """The columns of ``moments`` about denominators, rates and directions."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "denominator_min": anatomy.denominator_min,
            "denominator_mean": anatomy.denominator / numel,
            "denominator_max": anatomy.denominator_max,
            "effective_lr_min": anatomy.effective_lr_min,
            "effective_lr_mean": anatomy.effective_lr / numel,
            "effective_lr_max": anatomy.effective_lr_max,
            "momentum_gradient_cosine": anatomy.momentum_gradient
            / np.sqrt(anatomy.first_moment * anatomy.gradient),
        }


def _value(group: Any, name: str) -> float:
    late = group.values.get(name)
    return math.nan if late is None else float(late.value())


def record_step(
    recording: Recording,
    record: StepRecord,
    *,
    grad_norm: float,
    grad_norm_before_clipping: float,
    weight_norm: float,
    update_norm: float,
    loss_scale: float,
    scaled: bool,
    through_scaler: bool,
    in_closure: bool,
    written_between: float,
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
            "n_backward": len(attempt.backwards),
            "order": attempt.spelled_order(),
            "zeroed": attempt.zeroed,
            "zeroed_by": attempt.zeroed_by,
            "grad_norm": grad_norm,
            "grad_norm_before_clipping": grad_norm_before_clipping,
            "update_norm": update_norm,
            "weight_norm": weight_norm,
            **{f"n_{name}": int(counts[i]) for i, name in enumerate(STATUSES)},
            "graph_nodes": attempt.graph_nodes,
            "train_mode": attempt.train_mode,
            "scaled": scaled,
            "recorded": recorded,
            "backwards": ", ".join(map(str, attempt.backwards)),
            "discarded": ", ".join(map(str, attempt.discarded)),
            "through_scaler": through_scaler,
            "in_closure": in_closure,
            "written_between": written_between,
            "forward_ms": 1e3 * attempt.forward_seconds,
            "backward_ms": 1e3 * attempt.backward_seconds,
            "step_ms": 1e3 * record.seconds,
            "observe_ms": 1e3 * observe_seconds,
        }
    )
    for number in attempt.backwards:
        # A generator's backward also writes the discriminator's gradients, but belongs to the step
        # that it was made for: the first one after it.
        recording.claim_backward(number, record.step)


def _together(norms: Any) -> float:
    """The norm of several tensors together; those that were not read are left out."""
    read = norms[~np.isnan(norms)]
    return float(np.sqrt(np.sum(read**2))) if len(read) else math.nan
