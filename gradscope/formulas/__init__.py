"""The update rules of optimizers as plain arithmetic: one family = one file. Free of torch.

A rule is written once, as a Python function on a :class:`~gradscope.formulas.worksheet.Worksheet`.
The same function works out a whole parameter (NumPy arrays, or torch tensors on a device) and a
single weight (Python floats, or terms that remember how they were computed and can be shown).
"""

from __future__ import annotations

from gradscope.formulas.adam import ADAM, ADAMW
from gradscope.formulas.formula import Formula

FORMULAS: dict[str, Formula] = {
    formula.name: formula
    for formula in (
        ADAM,
        ADAMW,
    )
}
"""Every rule, by the name of the class in ``torch.optim``."""
