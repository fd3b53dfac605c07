"""What a comparison of two runs finds, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

STAGES: Final[Mapping[str, str]] = {
    "parameters": "models and parameters",
    "initial_weights": "initial weights",
    "hyperparameters": "optimizers and hyper-parameters",
    "weights_before": "weights before the step",
    "state_before": "optimizer state before the step",
    "order": "order of events",
    "inputs": "inputs and targets",
    "graph": "autograd graph",
    "forward": "forward",
    "loss": "loss",
    "gradients_before_clipping": "gradients before clipping",
    "gradients": "gradients",
    "state_after": "optimizer state after the step",
    "update": "update",
    "weights_after": "weights after the step",
    "weights_at_the_end": "weights at the end",
}
"""What is compared, in the order in which it happens: before the first step, then within each."""

_PLACE: Final = {stage: place for place, stage in enumerate(STAGES)}

EXACT: Final = ("parameters", "hyperparameters", "order", "graph")
"""Stages in which nothing comes from arithmetic on tensors, so that rounding explains nothing."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of evidence.

    Attributes:
        what: what is compared.
        a, b: its value in each run; None where a run has no such thing.
        relative: how far apart they are, relative to the larger of both or to what they are a part
            of; None for what is no number.
    """

    what: str
    a: Any
    b: Any
    relative: float | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference of one stage.

    Attributes:
        step: number of the step; None for what was so before the first.
        stage: key of :data:`STAGES`.
        quantity: what differs: the column of the table, or a word.
        message: the difference in one sentence, without the step.
        a, b: its value in each run.
        relative: how far apart they are, likewise as in :class:`Fact`; None for no numbers.
        like_rounding: whether all that differs here at this step does so by no more than rounding
            explains.
        hint: what it may come from; empty if the message says it.
        param: the parameter that is named; empty for none.
        module: the module that is named; empty for none.
        optimizer: the optimizer concerned, as A names it; empty for none.
        n_different: how many of its kind differ at that step.
        n_compared: how many of its kind were compared at that step.
        facts: the evidence.
    """

    step: int | None
    stage: str
    quantity: str
    message: str
    a: Any
    b: Any
    relative: float | None = None
    like_rounding: bool = False
    hint: str = ""
    param: str = ""
    module: str = ""
    optimizer: str = ""
    n_different: int = 1
    n_compared: int = 1
    facts: tuple[Fact, ...] = ()

    @property
    def order(self) -> tuple[int, int]:
        """By which differences are sorted: as they happen."""
        return (-1 if self.step is None else self.step, _PLACE[self.stage])

    @property
    def when(self) -> str:
        """The step in words."""
        return "before the first step" if self.step is None else f"step {self.step}"


@dataclass(frozen=True, slots=True)
class Growth:
    """How far two runs are apart at one step: relative differences, NaN where not known in both.

    Attributes:
        step: number of the step.
        loss, grad_norm, weight_norm: of the columns of ``steps`` of these names.
    """

    step: int
    loss: float
    grad_norm: float
    weight_norm: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that a comparison of two runs A and B found.

    Attributes:
        n_steps: how many steps each run has.
        n_common: how many steps were compared.
        rtol: relative differences of numbers up to this one were passed over.
        rounding: up to which relative difference rounding is taken for the cause.
        differences: the first difference of each stage that has one, as they happen.
        beyond_rounding: where the first difference looks like rounding, the first that does not,
            or the step at which the runs suddenly part; None if there is none.
        growth: how the runs drift apart, at a few steps from the first difference on.
        compared: how many values of each stage were compared.
        not_compared: what could not be, in words.
        surroundings: what else is told of the runs and differs, such as the version of torch.
    """

    n_steps: tuple[int, int]
    n_common: int
    rtol: float
    rounding: float
    differences: tuple[Difference, ...] = ()
    beyond_rounding: Difference | None = None
    growth: tuple[Growth, ...] = ()
    compared: Mapping[str, int] = field(default_factory=dict)
    not_compared: tuple[str, ...] = ()
    surroundings: tuple[Fact, ...] = ()

    @property
    def first(self) -> Difference | None:
        """The first difference of all; None if the runs are equal."""
        return self.differences[0] if self.differences else None
