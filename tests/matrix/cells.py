"""All cells of the matrix, and which of them every run of the tests looks at."""

from __future__ import annotations

import compiled
import distributed
import features
from cell import Cell
from features import Loop
from optimizers import KINDS, Kind

FEATURES: list[type[Loop]] = [*features.FEATURES, *compiled.COMPILED, *distributed.DISTRIBUTED]

CELLS = [Cell(feature, kind) for feature in FEATURES for kind in KINDS]

_WITH_EVERY_FEATURE = {"AdamW-plain", "AdamW-fused", "SGD-foreach", "LBFGS-plain"}
_WITH_EVERY_OPTIMIZER = {features.Loop, features.Scaled, features.OptimizerInBackward}
_SPARSE = {features.Sparse, features.Accumulation, features.ClipNorm}


def is_quick(cell: Cell) -> bool:
    """Whether a cell is looked at in every run: each feature, and each optimizer, in some cells."""
    kind = str(cell.kind)
    if issubclass(cell.feature, compiled.WithCompiler):
        return kind == "AdamW-plain" and cell.feature.backend != "inductor"
    if cell.feature.n_ranks > 1:
        return kind == "AdamW-plain"
    if cell.kind.needs_sparse_gradients:
        return cell.feature in _SPARSE
    return kind in _WITH_EVERY_FEATURE or cell.feature in _WITH_EVERY_OPTIMIZER


def kind_of(text: str) -> Kind:
    """The optimizer that is written so."""
    return next(kind for kind in KINDS if str(kind) == text)
