"""The update rules of optimizers as plain arithmetic: one family = one file. Free of torch.

A rule is written once, as a Python function on a :class:`~gradscope.formulas.worksheet.Worksheet`.
The same function works out a whole parameter (NumPy arrays, or torch tensors on a device) and a
single weight (Python floats, or terms that remember how they were computed and can be shown).
"""

from __future__ import annotations

from gradscope.formulas.adadelta import ADADELTA
from gradscope.formulas.adafactor import ADAFACTOR
from gradscope.formulas.adagrad import ADAGRAD
from gradscope.formulas.adam import ADAM, ADAMW
from gradscope.formulas.adamax import ADAMAX
from gradscope.formulas.asgd import ASGD
from gradscope.formulas.formula import Formula
from gradscope.formulas.muon import MUON
from gradscope.formulas.nadam import NADAM
from gradscope.formulas.radam import RADAM
from gradscope.formulas.rmsprop import RMSPROP
from gradscope.formulas.rprop import RPROP
from gradscope.formulas.sgd import SGD
from gradscope.formulas.sparse_adam import SPARSE_ADAM

FORMULAS: dict[str, Formula] = {
    formula.name: formula
    for formula in (
        ADADELTA,
        ADAFACTOR,
        ADAGRAD,
        ADAM,
        ADAMW,
        ADAMAX,
        ASGD,
        MUON,
        NADAM,
        RADAM,
        RMSPROP,
        RPROP,
        SGD,
        SPARSE_ADAM,
    )
}
"""Every rule, by the name of the class in ``torch.optim``."""
