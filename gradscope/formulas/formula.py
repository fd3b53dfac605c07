"""What is known of one update rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gradscope.formulas.worksheet import Worksheet


@dataclass(frozen=True, slots=True)
class Formula:
    """One update rule.

    Attributes:
        name: as the explanation of a step calls it.
        source: where the rule comes from: paper and algorithm.
        apply: works out one step on a worksheet.
        state: for each key of ``optimizer.state[p]`` that the rule reads or writes, the name of
            that quantity on the worksheet: ``{"exp_avg": "m"}`` gives the rule ``m_before`` and
            has it write ``m``.
        scalars: the names among these whose quantity is one number for a whole parameter.
        symbols: LaTeX for those names that differ from the common ones.
        elementwise: whether every element can be worked out alone; else the worksheet holds
            arrays in the shape of the weight.
    """

    name: str
    source: str
    apply: Callable[[Worksheet], None]
    state: Mapping[str, str] = field(default_factory=dict)
    scalars: tuple[str, ...] = ("t",)
    symbols: Mapping[str, str] = field(default_factory=dict)
    elementwise: bool = True
