"""GS306: the model is trained while it is in evaluation mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradscope.rules.facts import (
    belongs_to,
    events_of,
    first_place,
    held_by,
    listed,
    model_of,
    numbers_in,
    stepped,
)
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.entries import ParameterEntry
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_DEPENDS = ("BatchNorm", "SyncBatchNorm", "Dropout", "AlphaDropout", "FeatureAlphaDropout")
"""Modules that do something else in evaluation mode; a model without any does not care."""

_LEAST_STEPS = 4
"""In evaluation mode, one after the other, to the end of the run."""

_DOES_NOTHING = "p=0.0"


class TrainingInEvalMode(Rule):
    """GS306 training-in-eval-mode: the model trains in evaluation mode.

    ## What it finds

    The optimizer steps on losses of a model that is in evaluation mode: since an evaluation after
    which `model.train()` was not called again, or from the start.

    ## Why it matters

    Dropout does nothing in evaluation mode, so the model overfits sooner; batch normalisation uses
    its running statistics and no longer learns them, so it may become unstable.

    ## How it is found

    gradscope notes the mode of the models at every step, and that of every module at closer looks.
    The finding is an error when training began in training mode and went on in evaluation mode to
    the end of the run, and a warning when it was in evaluation mode all along. It needs a batch
    normalisation or dropout that belongs to what is trained. A single module in evaluation mode,
    inside a model in training mode, was put there on purpose, and is silent. So are steps with
    more forwards than backwards: some of them may have another purpose, such as an adversarial
    example, and the mode may be theirs. The line is that of the last call of `eval()` on a model of
    that class, if it was seen.

    ## Example

        model.train()
        for epoch in range(epochs):
            train(model)
            validate(model)          # calls model.eval()

    ## Fix

        for epoch in range(epochs):
            model.train()
            train(model)
            validate(model)

    ## When it is wrong

    When a whole model is fine-tuned in evaluation mode on purpose, to keep its statistics.
    """

    code = "GS306"
    name = "training-in-eval-mode"
    severity = Severity.ERROR
    tables = ("steps", "calls", "params", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        calls = run.frame("calls")
        findings = []
        for optimizer, own in stepped(run).groupby("optimizer", sort=False):
            own = own.loc[own["n_forward"] > 0]
            modes = own["train_mode"].astype(bool).to_numpy()
            if len(own) < _LEAST_STEPS or modes[-1]:
                continue
            n_tail = len(modes) if not modes.any() else int(modes[::-1].argmax())
            if n_tail < _LEAST_STEPS:
                continue
            since = int(own["step"].iloc[len(modes) - n_tail])
            modules = _mode_dependent(run, calls, str(optimizer), since)
            if not modules:
                continue
            if not (
                _is_of_training(own, len(modes) - n_tail)
                or _run_once_a_backward(own, calls.loc[calls["module"].isin(modules)], since)
            ):
                continue
            flipped = bool(modes.any())
            paths = tuple(modules)
            kinds = ", ".join(dict.fromkeys(modules.values()))
            began = (
                f"since step {since}, after {len(modes) - n_tail} steps in training mode"
                if flipped
                else "at every step"
            )
            findings.append(
                self.finding(
                    severity=Severity.ERROR if flipped else Severity.WARNING,
                    message=(
                        f"{optimizer} trains the model in evaluation mode (model.training is "
                        f"False) {began}, and {kinds} ({listed(paths)}) with it"
                    ),
                    fix=(
                        "call model.train() at the beginning of every epoch, and again after every "
                        "evaluation that calls model.eval()"
                    ),
                    modules=paths,
                    optimizer=str(optimizer),
                    step_first=since,
                    step_last=int(own["step"].iloc[-1]),
                    count=n_tail,
                    **_switched_at(run, str(optimizer), since),
                    evidence={
                        "steps_in_eval_mode": int((~modes).sum()),
                        "steps_in_train_mode": int(modes.sum()),
                        "modules": kinds,
                    },
                )
            )
        return findings


def _switched_at(run: Recording, optimizer: str, since: int) -> dict[str, Any]:
    """The last call of ``eval`` before a step, on a model of the class that is trained."""
    trained = {model_of(run, run.parameters[number].name) for number in held_by(run, optimizer)}
    switched = [f"eval {known.kind}" for known in run.models if known.name in trained]
    calls = events_of(run, "mode")
    calls = calls.loc[(calls["step"] <= since) & calls["detail"].isin(switched)]
    return first_place(calls.tail(1))


def _is_of_training(own: pd.DataFrame, n_before: int) -> bool:
    """Whether the mode at the last steps is that of the forwards they train on.

    Where there are more forwards than backwards, and more so than in training mode, some of them
    may be for something else.

    Args:
        own: the steps of an optimizer.
        n_before: how many come before those in evaluation mode.
    """
    extra = own["n_forward"] - own["backwards"].map(lambda text: len(numbers_in(text)))
    usual = max(0, extra.iloc[:n_before].max()) if n_before else 0
    return bool((extra.iloc[n_before:] <= usual).any())


def _run_once_a_backward(own: pd.DataFrame, calls: pd.DataFrame, since: int) -> bool:
    """Whether at a look no module ran more often than there were backwards.

    So it is where a model's parts are called one after the other: many forwards, none of them for
    anything else.

    Args:
        own: the steps of an optimizer.
        calls: the calls of the modules in question.
        since: the first step in evaluation mode.
    """
    most = calls.loc[calls["step"] >= since].groupby("step")["runs"].max()
    backwards = own.set_index("step")["backwards"].map(lambda text: len(numbers_in(text)))
    at = most.index.intersection(backwards.index)
    return len(at) > 0 and bool((most[at] <= backwards[at]).any())


def _mode_dependent(
    run: Recording, calls: pd.DataFrame, optimizer: str, since: int
) -> dict[str, str]:
    """Path and class of the modules that behave differently, and belong to what is trained."""
    trained = [
        entry
        for entry in run.parameters
        if entry.reached
        and entry.requires_grad
        and any(run.optimizers[number].name == optimizer for number, _ in entry.holders)
    ]
    if not trained:
        return {}
    if calls.empty:
        return {
            entry.module: entry.module_type
            for entry in trained
            if entry.module_type.startswith(_DEPENDS)
        }
    late = calls.loc[calls["step"] >= since]
    seen = late if len(late) else calls
    if len(late) and late.loc[_is_root(run, late, trained), "training"].astype(bool).any():
        return {}  # the model trains, and parts of it were put into evaluation mode
    found = {}
    for module, kind, training, settings in zip(
        seen["module"], seen["module_type"], seen["training"], seen["settings"], strict=True
    ):
        if not kind.startswith(_DEPENDS) or (len(late) and training):
            continue
        if _DOES_NOTHING in settings.split(", "):
            continue
        own = [entry for entry in run.parameters if entry.module == module]
        around = module.rpartition(".")[0]
        belongs = (
            any(entry in trained for entry in own)
            if own
            else any(belongs_to(entry.name, around) for entry in trained)
        )
        if belongs:
            found[str(module)] = str(kind)
    return found


def _is_root(run: Recording, calls: pd.DataFrame, trained: list[ParameterEntry]) -> pd.Series[bool]:
    """Which calls are those of whole models, which hold what is trained."""
    roots = [""] if len(run.models) == 1 else [model.name for model in run.models]
    held = {root for root in roots if any(belongs_to(entry.name, root) for entry in trained)}
    return calls["module"].isin(held)
