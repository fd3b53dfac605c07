"""What is read of one optimizer around its ``step``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gradscope.instruments.anatomy import Anatomy
from gradscope.instruments.gradients import GradientReader
from gradscope.instruments.hyperparameters import GroupReader, GroupReading
from gradscope.instruments.kept_tensors import Array, TensorKeeper
from gradscope.instruments.late import Known, Late, scalar_of
from gradscope.instruments.optimizer_state import StateReader, StateReading
from gradscope.instruments.statistics import Reals, Statistics
from gradscope.instruments.step_copies import StepCopies, group_numbers
from gradscope.run.weight_step import GivenTogether, TrackedWeights, WeightStep
from gradscope.session.census import Census
from gradscope.session.gradients import GradientLook, Integers, as_slice

_SAMPLE = 8
"""How many parameters are looked at to see whether an update changes gradients, or what writes."""

Attempt = Callable[..., Any]
"""``attempt(part, function, *args)`` runs one instrument; None once that instrument has failed."""


@dataclass(slots=True)
class StepReading:
    """Everything read around one update; what a part of it could not read is None.

    Attributes:
        optimizer: number of the optimizer.
        recorded: whether this step is recorded in full.
        params: int64[n], numbers of the optimizer's parameters; what follows is aligned with it.
        look: gradients right before the update, without their zeros.
        n_there: how many of them there are.
        sums_of_squares: of those gradients; on a recorded step ``statistics`` has them.
        statistics: of those gradients, on a recorded step.
        before_clipping: float64[n], the sums of squares of the gradients that were clipped, as the
            clipping found them; NaN for the others. None if none was clipped.
        found_inf: what a gradient scaler left for a fused optimizer, that skips by itself.
        scaled: whether the gradients are still multiplied by the scaler's scale.
        scale: the scaler's scale, when one is in use.
        groups: hyper-parameters of each group.
        group_of: int64[n], the group of each parameter.
        state_before, state_after: the optimizer's state on both sides of the update.
        anatomy: the update taken apart.
        tracked: a few weights of each parameter.
        keeps: whether the tensors that the program asked for are kept of this step.
        kept: these tensors by name, by place of their parameter, and what else the rule was given.
        through_scaler: whether a gradient scaler called the step.
        in_closure: whether a closure computes its gradients.
        is_nested: whether it is made inside of another optimizer's, or one inside of it.
        written_between: share of the parameters that were written since the step before.
        is_consumed: whether the ledger has been told that the update uses these gradients.
        seconds: spent on all this reading.
    """

    optimizer: int
    recorded: bool
    params: Integers
    look: GradientLook | None = None
    n_there: int = 0
    sums_of_squares: Late[Reals] | None = None
    statistics: Late[Statistics] | None = None
    before_clipping: Late[Reals] | None = None
    found_inf: Late[Any] | None = None
    scaled: bool = False
    scale: Late[Any] | None = None
    groups: list[GroupReading] = field(default_factory=list)
    group_of: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    state_before: StateReading | None = None
    state_after: StateReading | None = None
    anatomy: Late[Anatomy] | None = None
    tracked: Late[TrackedWeights | None] | None = None
    keeps: bool = False
    kept: dict[int, tuple[Late[dict[str, Array]], Late[GivenTogether]]] = field(
        default_factory=dict
    )
    through_scaler: bool = False
    in_closure: bool = False
    is_nested: bool = False
    written_between: float = math.nan
    is_consumed: bool = False
    seconds: float = 0.0

    def squares(self) -> Reals | None:
        """float64[n], sums of squares of the gradients, once known; None if nothing was read."""
        if self.statistics is not None:
            sums: Reals = self.statistics.value().sum_of_squares
            return sums
        return None if self.sums_of_squares is None else self.sums_of_squares.value()

    def is_finite(self) -> bool:
        """Whether every gradient is finite, or that is not known yet."""
        squares = self.sums_of_squares
        if self.look is None or squares is None or not squares.ready():
            return True
        values = squares.value()
        if math.isfinite(values.sum()):
            return True
        return bool(np.count_nonzero(np.isfinite(values)) == self.n_there)

    def skips(self) -> bool:
        """Whether a fused optimizer found infinite gradients under a scaler and does nothing."""
        return self.found_inf is not None and float(self.found_inf.value()) != 0

    def awaited(self) -> list[Any]:
        """Everything that may still be on its way."""
        parts = [
            self.sums_of_squares,
            self.statistics,
            self.before_clipping,
            self.found_inf,
            self.scale,
            self.state_before,
            self.state_after,
            self.anatomy,
            self.tracked,
            *(value for group in self.groups for value in group.values.values()),
            *(value for kept in self.kept.values() for value in kept),
        ]
        return [part for part in parts if part is not None]


class StepObserver:
    """Reads one optimizer, with buffers kept from step to step.

    Args:
        census: who is who.
        optimizer: number of the optimizer.
        attempt: runs one instrument and keeps its errors away.
        keep: patterns of the parameters whose tensors the program asked for.
    """

    def __init__(
        self, census: Census, optimizer: int, attempt: Attempt, keep: tuple[str, ...] = ()
    ) -> None:
        self._census = census
        self._keep = keep
        self._optimizer = optimizer
        self._attempt = attempt
        self._groups = GroupReader()
        self._generation = -1
        self._are_copied = False
        self._versions_left: list[int] | None = None

    def forget_versions(self) -> None:
        """Forget what the last step left: the program may have stepped while nobody watched."""
        self._versions_left = None

    def written_between(self) -> float:
        """Return the share of parameters written in place since the last step ended.

        A few are looked at, and no tensor is read. NaN before the first step, and for a parameter
        that counts no versions.
        """
        now = self.versions()
        before = self._versions_left
        if not now or before is None:
            return math.nan
        return sum(a != b for a, b in zip(before, now, strict=True)) / len(now)

    def versions(self) -> list[int] | None:
        """Return the versions of a few parameters; None where one counts none."""
        self._prepare()
        return self._versions()

    def begin(self, *, recorded: bool, scale: Late[Any] | None, keeps: bool = False) -> StepReading:
        """Read what there is before the update, the gradients left out.

        Args:
            recorded: whether the step is recorded in full.
            scale: the gradient scaler's scale, if one is in use.
            keeps: whether the tensors that the program asked for are kept of it.
        """
        params = self._census.params_of(self._optimizer)
        reading = StepReading(self._optimizer, recorded, params, scale=scale)
        optimizer = self._census.optimizer(self._optimizer)
        if optimizer is None:
            return reading
        self._prepare()
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            reading.found_inf = scalar_of(found_inf)
            reading.scaled = getattr(optimizer, "grad_scale", None) is not None
        reading.groups = self._attempt("hyperparameters", self._groups.read, optimizer) or []
        reading.group_of = self._group_of
        if recorded:
            tensors = self._tensors()
            self._are_copied = self._attempt("anatomy", self._copy, optimizer, tensors) or False
            reading.state_before = self._attempt(
                "optimizer_state", self._read_state, optimizer, tensors
            )
            reading.keeps = keeps and (
                self._attempt("kept_tensors", self._keeper.before, optimizer, tensors) or False
            )
        self._was_recorded = False
        return reading

    def read_gradients(self, reading: StepReading, last: GradientLook | None = None) -> None:
        """Read the gradients as the update is about to read them.

        Args:
            reading: where they go.
            last: the last look at them; where nothing has changed since, it serves once more.
        """
        self._prepare()
        gradients = self._gradients.gradients(self._tensors())
        reading.look, reading.n_there = self._look(gradients, last)
        reading.sums_of_squares = reading.statistics = None
        if reading.recorded and self._are_copied:
            self._are_copied = (
                self._attempt("anatomy", self._copy_gradients, gradients, reading.scaled) or False
            )
        if reading.keeps:
            reading.keeps = (
                self._attempt("kept_tensors", self._keeper.gradients, gradients) or False
            )
        if not reading.n_there:
            return
        if reading.recorded:
            reading.statistics = self._attempt(
                "gradient_statistics", self._gradients.statistics, gradients
            )
        if reading.statistics is None:
            reading.sums_of_squares = self._attempt(
                "gradient_norms", self._gradients.sums_of_squares, gradients
            )

    def look_at_gradients(self) -> GradientLook:
        """Look at the gradients without reading any."""
        return self._look(self.weights_and_gradients()[1])[0]

    def weights_and_gradients(self) -> tuple[list[Any], list[torch.Tensor | None]]:
        """Return the optimizer's parameters and their gradients, to be read and not kept."""
        self._prepare()
        tensors = self._tensors()
        return tensors, self._gradients.gradients(tensors)

    def read_before_clipping(self, clipped: Sequence[torch.Tensor]) -> Late[Reals] | None:
        """Return float64[n], sums of squares of these gradients; NaN for all that are others."""
        self._prepare()
        wanted = {id(gradient) for gradient in clipped}
        gradients = self._gradients.gradients(self._tensors())
        own = [gradient if id(gradient) in wanted else None for gradient in gradients]
        reading: Late[Reals] | None = self._attempt(
            "gradient_norms", self._gradients.sums_of_squares, own
        )
        return reading

    def end(self, reading: StepReading) -> GradientLook | None:
        """Read what there is after the update; returns the gradients as it left them."""
        optimizer = self._census.optimizer(self._optimizer)
        if optimizer is None:
            return None
        if reading.recorded:
            tensors = self._tensors()
            if self._are_copied:
                reading.anatomy = self._attempt("anatomy", self._copies.after, tensors)
                reading.tracked = self._attempt("anatomy", self._copies.tracked, reading.params)
            self._was_recorded = False
            reading.state_after = self._attempt(
                "optimizer_state", self._read_state, optimizer, tensors
            )
            self._was_recorded = True
            if reading.keeps:
                is_copied = reading.anatomy is not None
                reading.kept = (
                    self._attempt("kept_tensors", self._kept, optimizer, tensors, is_copied) or {}
                )
        self._versions_left = self._versions()
        return self._look_after(reading)

    def weight(self, param: int, position: int, index: tuple[int, ...]) -> WeightStep | None:
        """Return any weight around the last recorded step; see :class:`StepCopies`."""
        places = np.flatnonzero(self._census.params_of(self._optimizer) == param)
        if self._generation < 0 or not len(places):
            return None
        return self._copies.weight(int(places[0]), position, index)

    def last_copies(self) -> dict[int, Any]:
        """Return by number all weights of each parameter around the last recorded step."""
        if self._generation < 0:
            return {}
        params = self._census.params_of(self._optimizer).tolist()
        copies = ((param, self._copies.whole(place)) for place, param in enumerate(params))
        return {param: copied for param, copied in copies if copied is not None}

    def _copy(self, optimizer: torch.optim.Optimizer, tensors: Sequence[Any]) -> bool:
        self._copies.before(optimizer, tensors)
        return True

    def _copy_gradients(self, gradients: Sequence[Any], is_scaled: bool) -> bool:
        optimizer = self._census.optimizer(self._optimizer)
        scale = getattr(optimizer, "grad_scale", None) if is_scaled else None
        self._copies.gradients(gradients, scale)
        return True

    def _kept(
        self, optimizer: torch.optim.Optimizer, tensors: Sequence[Any], is_copied: bool
    ) -> Any:
        copies = self._keeper.after(optimizer, tensors)
        # The hyper-parameters are copied with the rest, or else are those of an earlier step.
        nothing: Late[GivenTogether] = Known(GivenTogether(None, {}, {}))
        return {
            place: (late, self._copies.common(place) if is_copied else nothing)
            for place, late in copies.items()
        }

    def _read_state(self, optimizer: torch.optim.Optimizer, tensors: Sequence[Any]) -> StateReading:
        return self._state.read(optimizer, tensors, no_step_since=self._was_recorded)

    def _look_after(self, reading: StepReading) -> GradientLook | None:
        """Look at the gradients again if the update has changed them, which few optimizers do."""
        before = reading.look
        assert before is not None
        tokens, versions, _ = self._gradients.identities(
            self._gradients.gradients([self._references[i]() for i in self._sample])
        )
        if tokens == [before.tokens[i] for i in self._sample] and versions == [
            before.versions[i] for i in self._sample
        ]:
            return None
        return self._look(self._gradients.gradients(self._tensors()))[0]

    def _look(
        self, gradients: Sequence[torch.Tensor | None], last: GradientLook | None = None
    ) -> tuple[GradientLook, int]:
        """A look at all gradients without their zeros, and how many there are."""
        tokens, versions, n_there = self._gradients.identities(gradients)
        if last is not None and last.is_same(self._at, tokens, versions):
            return last, n_there
        return GradientLook(self._at, tokens, versions), n_there

    def _versions(self) -> list[int] | None:
        try:
            return [self._references[i]()._version for i in self._sample]  # type: ignore[union-attr]
        except (AttributeError, RuntimeError):  # one is gone, or was made in inference mode
            return None

    def _tensors(self) -> list[Any]:
        return [reference() for reference in self._references]

    def _prepare(self) -> None:
        if self._generation == self._census.generation:
            return
        params = self._census.params_of(self._optimizer)
        self._at = as_slice(params)
        self._references = self._census.references(params.tolist())
        tensors = self._tensors()
        self._gradients = GradientReader(tensors)
        optimizer = self._census.optimizer(self._optimizer)
        assert optimizer is not None
        self._copies = StepCopies(optimizer, tensors)
        self._are_copied = False  # a model that is met inside of a closure comes after the copying
        self._group_of = group_numbers(optimizer, tensors)
        self._state = StateReader()
        self._keeper = TensorKeeper(np.flatnonzero(self._census.match(params, self._keep)).tolist())
        self._was_recorded = False
        self._versions_left = None
        self._generation = self._census.generation
        # An update treats the gradients of a group alike: a few tell of all.
        places = np.linspace(0, len(tensors) - 1, min(_SAMPLE, len(tensors)))
        self._sample = [int(place) for place in places]
