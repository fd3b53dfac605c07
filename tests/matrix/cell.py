"""One cell of the matrix: a loop watched, and its twin that nobody watches."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
import torch.distributed as dist
from by_hand import ByHand, Step, norm
from features import Loop
from optimizers import Kind
from ranks import results_on_ranks
from traces import snapshot
from twins import differing, everything_of, seed_everything

import gradscope
from gradscope.rules.finding import Severity

AS_PROMISED, PARTLY_SEEN, REFUSED = "as promised", "partly seen", "refused"
UNDEFINED = "undefined"


@dataclass(frozen=True)
class Cell:
    """A feature with an optimizer."""

    feature: type[Loop]
    kind: Kind

    def __str__(self) -> str:
        return f"{self.feature.title}: {self.kind}"


@dataclass(frozen=True)
class Outcome:
    """What came of a cell.

    Attributes:
        verdict: ``as promised``; ``partly seen``: the same, and GS902 says what cannot be seen;
            ``refused``: torch itself raises, without us; ``undefined``: torch itself computes
            what no two runs agree on.
        detail: what torch raises, or what GS902 says.
    """

    verdict: str
    detail: str = ""


def run(cell: Cell) -> Outcome:
    """Run both twins of a cell.

    Raises:
        AssertionError: if anything about the watched one is not as promised.
    """
    if cell.feature.n_ranks > 1 and not dist.is_initialized():
        return _run_on_ranks(cell)
    try:
        twin, left_by_twin, compiled = _train(cell, _unwatched, notes=True)
    except Exception as error:
        return Outcome(REFUSED, f"{type(error).__name__}: {error}")
    watched, left, compiled_watched = _train(cell, _watched, notes=False)
    scope = watched.scope
    bits, bits_of_twin = (everything_of(loop, loop.seen) for loop in (watched, twin))
    if not watched.torch_is_wrong:
        must("these differ by bits", differing(bits, bits_of_twin), [])
    must("traces are left", left - left_by_twin, set())
    more = {what: n for what, n in compiled_watched.items() if n > compiled[what]}
    must("the compiler has done more", more, {})
    assert twin.by_hand is not None
    if watched.sees_steps:
        check_tables(scope, twin.by_hand.steps, watched)
    notes = [n for n in scope._recording.notes if not (watched.note and watched.note in n)]
    for note in notes:
        must(f"unexpected note {note!r}", bool(watched.unseen) and watched.unseen in note, True)
    findings = scope.findings
    told = [
        f for f in findings if f.severity is not Severity.INFO and f.code not in watched.findings
    ]
    must("false findings", [f"{f.code} {f.message}" for f in told if f.code != "GS902"], [])
    codes = [finding.code for finding in findings]
    must("GS902 is said", "GS902" in codes, bool(notes))
    if watched.torch_is_wrong:
        return Outcome(UNDEFINED)
    return Outcome(PARTLY_SEEN, "; ".join(notes)) if notes else Outcome(AS_PROMISED)


def _run_on_ranks(cell: Cell) -> Outcome:
    from cells import CELLS, is_quick

    together = [c for c in CELLS if c.feature is cell.feature and is_quick(c) == is_quick(cell)]
    kinds = tuple(str(c.kind) for c in together)
    results = results_on_ranks(cell.feature.title, cell.feature.n_ranks, kinds)
    verdict, detail = results[str(cell.kind)]
    must("failed in its process", detail if verdict == "failed" else "", "")
    return Outcome(verdict, detail)


def must(what: str, found: Any, expected: Any) -> None:
    """Compare, with a message that says more than ``assert`` can outside of a test's file."""
    if found != expected:
        raise AssertionError(f"{what}: {found!r}, not {expected!r}")


def _train(
    cell: Cell, watch: Callable[..., Any], *, notes: bool
) -> tuple[Loop, set[str], dict[str, Any]]:
    """Train once; returns the loop, what differs afterwards in torch, and the compiler's count."""
    cell.feature.forget_compiled()
    seed_everything()
    loop = cell.feature(cell.kind)
    if notes:
        loop.by_hand = ByHand(loop.named_parameters(), loop.optimizers)
    before = snapshot(loop.models, loop.optimizers)
    loop.scope = loop.train(watch)
    after = snapshot(loop.models, loop.optimizers)
    # The compiler leaves its own functions in the modules whose code it has compiled.
    left = {name for name in after.differences_from(before) if ".__" not in name}
    return loop, left, cell.feature.compiled_so_far()


def _unwatched(models: Any, optimizers: Any) -> Any:
    return nullcontext()


def _watched(models: Any, optimizers: Any) -> gradscope.Scope:
    # Half of the steps are recorded in full; the graphs of two are captured, one of each half.
    # Under "raise" nothing can pass because an instrument has failed and fallen silent.
    return gradscope.watch(models, optimizers, every=2, graph=(0, 3), on_error="raise")


# -- the tables -----------------------------------------------------------------------------------


def check_tables(scope: gradscope.Scope, steps: list[Step], loop: Loop) -> None:
    """Compare the tables with what the twin has noted by hand."""
    tables = scope.tables
    table = tables["steps"]
    names = [entry.name for entry in scope._recording.optimizers]
    must("outcomes", table["outcome"].tolist(), [step.outcome for step in steps])
    must("optimizers", table["optimizer"].tolist(), [names[step.optimizer] for step in steps])
    must("n_backward", table["n_backward"].tolist(), [step.n_backward for step in steps])
    must("losses", table["loss"].tolist(), close([step.loss for step in steps]))
    must("scaled", table["scaled"].tolist(), [step.scaled for step in steps])
    must("some steps are recorded", bool(table["recorded"].any()), True)
    updates = tables["updates"].set_index(["step", "param"])
    grads = tables["grads"].set_index(["step", "param"])
    for number, step in enumerate(steps):
        check_gradients(number, grads.loc[number], step)
        if not loop.measures_updates:
            must("there are no numbers of updates", bool(updates["update_norm"].isna().all()), True)
        elif table["recorded"][number] and step.outcome == "stepped":
            check_updates(number, updates.loc[number], step, torch_is_wrong=loop.torch_is_wrong)


def check_gradients(number: int, rows: pd.DataFrame, step: Step) -> None:
    usual = "fresh" if step.n_summed == 1 else "accumulated"
    status = {name: "none" if norm is None else usual for name, norm in step.gradients.items()}
    norms = {name: math.nan if norm is None else norm for name, norm in step.gradients.items()}
    must(f"statuses at step {number}", rows["status"].to_dict(), status)
    must(f"gradient norms at step {number}", rows["norm"].to_dict(), close(norms))


def check_updates(number: int, rows: pd.DataFrame, step: Step, *, torch_is_wrong: bool) -> None:
    for name, expected in step.update_norms.items():
        # What is worked out in single precision rounds no further than the weights are rounded.
        slack = 1e-6 * norm(step.weights[name])
        found = rows["update_norm"][name]
        must(
            f"update of {name} at step {number}",
            found,
            pytest.approx(expected, rel=1e-4, abs=slack),
        )
        residual = rows["residual"][name]
        if torch_is_wrong:
            if step.weights[name].numel() >= 16:
                must(f"residual of {name} at step {number} is large", bool(residual > 0.5), True)
        else:
            follows = math.isnan(residual) or residual <= max(1e-3, 4 * rows["rounding"][name])
            must(f"{name} follows its formula at step {number}", bool(follows), True)


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-5, abs=1e-30, nan_ok=True)
