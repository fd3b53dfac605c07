"""Who took part in a run: parameters, optimizers and models, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

REPLACED = "#old"
"""What is added to the path of a module whose parameters others have taken the place of."""


@dataclass(slots=True)
class ParameterEntry:
    """What is known of one parameter; its number is its place in :attr:`Recording.parameters`.

    Attributes:
        name: as ``model.named_parameters()`` gives it, with the model's own name in front where
            several models are watched; a place in ``optimizer.param_groups`` for one in no model;
            with ``#old`` behind its module for one whose place another has taken.
        aliases: its other names, where modules share it.
        module: path of the holding module; ``""`` for the model itself or for none.
        module_type: class name of that module.
        in_model: whether a watched model has it registered.
        shape: its shape.
        dtype: its element type, without ``torch.``.
        device: where it lies.
        requires_grad: at the last look.
        requires_grad_changed: the step at which it was last seen to flip, or None.
        holders: (optimizer number, group number) of each optimizer that holds it.
        reached: whether any backward has written its gradient.
        norm_first: L2 norm of its values when it was first met; NaN if not read.
        norm_last: likewise when the watch ended.
        n_symmetric_looks: at how many closer looks all rows of its values were equal, and of its
            gradient too; of a recurrent layer's those of each gate.
        n_symmetric_columns_looks: likewise of the columns of a matrix.
        n_looks: at how many closer looks both were read.
        copy_of: number of the parameter whose very values it began with, or None.
        replicas: the ranks that hold replicas of it, as a wrapper of torch's says.
        placements: how it is spread over ranks, in words; empty for one that is whole.
        n_local: how many numbers of one that is spread this rank holds; None for one that is whole.
    """

    name: str
    aliases: tuple[str, ...] = ()
    module: str = ""
    module_type: str = ""
    in_model: bool = True
    shape: tuple[int, ...] = ()
    dtype: str = ""
    device: str = ""
    requires_grad: bool = True
    requires_grad_changed: int | None = None
    holders: list[tuple[int, int]] = field(default_factory=list)
    reached: bool = False
    norm_first: float = math.nan
    norm_last: float = math.nan
    n_symmetric_looks: int = 0
    n_symmetric_columns_looks: int = 0
    n_looks: int = 0
    copy_of: int | None = None
    replicas: tuple[int, ...] = ()
    placements: str = ""
    n_local: int | None = None

    @property
    def is_replaced(self) -> bool:
        """Whether another parameter has taken its place in the model."""
        return not self.in_model and REPLACED in self.name

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclass(slots=True)
class OptimizerEntry:
    """What is known of one optimizer; its number is its place in :attr:`Recording.optimizers`.

    Attributes:
        name: as the program names it.
        kind: its class.
        n_groups: how many parameter groups it has.
        hyperparameters: names of the entries of its groups.
    """

    name: str
    kind: str
    n_groups: int = 0


@dataclass(slots=True)
class ModelEntry:
    """One watched model.

    Attributes:
        name: as the program names it.
        kind: its class.
        ineffective_freezes: attributes that look like a freeze and are none.
        compiled: paths of the parts that are compiled; empty for the model itself.
    """

    name: str
    kind: str
    ineffective_freezes: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
