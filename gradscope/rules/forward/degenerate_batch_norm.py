"""GS315: batch normalisation that has nothing to normalise by, or never learns its statistics."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from gradscope.rules.facts import listed, model_of, reached_losses, shape_of, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_LEAST_LOOKS = 2
"""A last batch of one example is no habit."""

_MAP = 4
"""Dimensions of a batch of images: examples, channels, height and width."""

_MOMENTUM = re.compile(r"\bmomentum=([0-9.e+-]+)")

_STATISTICS_LEARNT = "running_statistics=learnt"
"""As ``instruments/module_survey.py`` writes it among the settings."""

_FOLLOWS_THE_LAST = 0.9
"""From here on the running statistics are those of the last batch or two. Other frameworks call
what is kept momentum, and have 0.99 there; torch calls momentum what is taken in."""


class DegenerateBatchNorm(Rule):
    """GS315 degenerate-batch-norm: a batch normalisation sees one example, or learns nothing.

    ## What it finds

    A batch normalisation that runs on batches of a single example; one whose running statistics
    never change, because its momentum is 0 or because it is in evaluation mode and still has the
    statistics it was made with; one whose momentum is near 1.

    ## Why it matters

    Statistics of one example differ from those that evaluation uses, and take away what makes
    examples different. Statistics that stay at a mean of 0 and a variance of 1 normalise nothing,
    and in evaluation the model is another one than in training.

    ## How it is found

    At closer looks gradscope notes mode, settings and batch size of every batch normalisation. The
    finding is raised when the batch size was 1 at all looks, unless losses compare maps, as those
    of models from image to image do; when momentum is 0; when it was in evaluation mode at all
    looks, inside a model in training mode, with scale, shift and running statistics as they are
    made, which tells it from a pretrained one that is frozen. A momentum near 1 is a note.

    ## Example

        loader = DataLoader(dataset, batch_size=1)
        nn.BatchNorm2d(16, momentum=0.0)

    ## Fix

        loader = DataLoader(dataset, batch_size=32)     # or nn.GroupNorm(4, 16)
        nn.BatchNorm2d(16)

    ## When it is wrong

    When a batch normalisation is used as an instance normalisation on purpose.
    """

    code = "GS315"
    name = "degenerate-batch-norm"
    severity = Severity.WARNING
    tables = ("calls", "params", "steps", "losses")
    symptom_of = ("GS306",)

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding for each way in which they are degenerate."""
        calls = run.frame("calls")
        steps = stepped(run)
        norms = calls.loc[
            calls["module_type"].str.contains("BatchNorm") & calls["with_grad"].astype(bool)
        ]
        if norms.empty or steps.empty:
            return []
        trained = {entry.module for entry in run.parameters if entry.holders and entry.reached}
        found: dict[str, list[str]] = {}
        for module, rows in norms.groupby("module", sort=False):
            way = _way(run, calls, str(module), rows, trained)
            if way:
                found.setdefault(way, []).append(str(module))
        if _gives_maps(run):
            found = {way: at for way, at in found.items() if way != "single example"}
        return [self._finding_for(run, way, modules, steps) for way, modules in found.items()]

    def _finding_for(
        self, run: Recording, way: str, modules: list[str], steps: pd.DataFrame
    ) -> Finding:
        says, fix, severity = _SAYS[way]
        kinds = {e.module_type for e in run.parameters if e.module in modules} or {"BatchNorm"}
        return self.finding(
            severity=severity,
            message=f"{listed(modules)} ({', '.join(sorted(kinds))}): {says}",
            fix=fix,
            params=tuple(entry.name for entry in run.parameters if entry.module in modules),
            modules=tuple(modules),
            **span(steps),
            evidence={"way": way, "modules": len(modules)},
        )


_SAYS = {
    "single example": (
        "batches of a single example are normalised by the statistics of that example, and "
        "evaluation will use others",
        "use a larger batch size, or GroupNorm or LayerNorm in the place of batch normalisation",
        Severity.WARNING,
    ),
    "momentum 0": (
        "with momentum=0 the running statistics stay at mean 0 and variance 1, and evaluation will "
        "normalise by these",
        "leave momentum at its default of 0.1; in torch it is the share of the new batch",
        Severity.WARNING,
    ),
    "momentum near 1": (
        "with a momentum near 1 the running statistics are those of the last batch alone",
        "in torch momentum is the share of the new batch: 0.01 for what others call 0.99",
        Severity.INFO,
    ),
    "never learnt": (
        "in evaluation mode while the model trains, with the running statistics of a new module, "
        "mean 0 and variance 1: nothing is normalised",
        "leave it in training mode, or load pretrained statistics before freezing it",
        Severity.WARNING,
    ),
}


def _gives_maps(run: Recording) -> bool:
    """Whether every loss is about maps, such as images, with something to compare at each place."""
    shapes = [shape_of(text) or () for text in reached_losses(run)["input_shape"]]
    return bool(shapes) and all(len(shape) >= _MAP and math.prod(shape[2:]) > 1 for shape in shapes)


def _way(
    run: Recording, calls: pd.DataFrame, module: str, rows: pd.DataFrame, trained: set[str]
) -> str:
    """In which way a batch normalisation is degenerate; nothing for a healthy one."""
    training = rows["training"].astype(bool)
    tracks = rows["settings"].str.contains("track_running_stats=True").all()
    momentum = _MOMENTUM.search(str(rows["settings"].iloc[0]))
    share = float(momentum.group(1)) if momentum else math.nan
    if training.all():
        looks = rows["step"].nunique()
        if looks >= _LEAST_LOOKS and (rows["batch_size"].fillna(0) == 1).all():
            return "single example"
        if tracks and share == 0:
            return "momentum 0"
        return "momentum near 1" if tracks and share >= _FOLLOWS_THE_LAST else ""
    own = [entry for entry in run.parameters if entry.module == module]
    is_new = len(own) == 2 and all(
        math.isclose(entry.norm_first, math.sqrt(entry.numel), rel_tol=1e-6)
        if entry.name.endswith("weight")
        else entry.norm_first == 0
        for entry in own
    )
    # In evaluation mode as a whole: that is another rule's matter, or an evaluation.
    root = model_of(run, own[0].name) if own else ""
    whole = calls.loc[calls["module"].isin(["" if len(run.models) == 1 else root])]
    trains = whole.groupby("step")["training"].all()
    model_trains = bool(rows["step"].map(trains).fillna(value=False).all())
    is_seen = rows["step"].nunique() >= _LEAST_LOOKS and not training.any()
    around = {other.rpartition(".")[0] for other in trained}
    is_trained = module in trained or (bool(own) and module.rpartition(".")[0] in around)
    has_learnt = rows["settings"].str.contains(_STATISTICS_LEARNT, regex=False).any()
    never = is_seen and is_new and is_trained and tracks and model_trains and not has_learnt
    return "never learnt" if never else ""
