"""The loop as it really ran: the verdict, and what was measured behind each of its six lines.

Plain data for every view that shows it; each number comes from the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gradscope.rules import RULES, Finding, Findings, Severity, diagnose
from gradscope.rules.facts import listed
from gradscope.rules.finding import NOT_SELECTED, UNREAD
from gradscope.rules.ranks import is_one_training
from gradscope.run.recording import Recording
from gradscope.run.schema import STATUSES


@dataclass(frozen=True, slots=True)
class LoopLine:
    """One line of the loop.

    Attributes:
        name: the word of the line: ``parameters``, ``forward`` …
        purpose: what the line is for.
        measured: what it did in this run, one fact an entry.
        findings: codes of the findings about this line.
    """

    name: str
    purpose: str
    measured: tuple[str, ...]
    findings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoopSummary:
    """Everything on the screen of a run.

    Attributes:
        title: who was trained by what, for how long.
        verdict: one sentence.
        healthy: whether there is neither error nor warning.
        findings: what is wrong, as far as it is shown.
        lines: the six lines of the loop.
        cost: what watching cost.
        checked: which rules were applied, and what could not be observed.
        hidden: how many findings are too mild to be shown, and how to see them; empty for none.
        ended: class of the exception that ended the program; empty if none did.
        seen: whether any step of an optimizer was seen.
        is_whole: whether nothing of it is lost: no part of gradscope failed, all files can be read.
    """

    title: str
    verdict: str
    healthy: bool
    findings: Findings
    lines: tuple[LoopLine, ...]
    cost: str
    checked: tuple[str, ...]
    hidden: str = ""
    ended: str = ""
    seen: bool = True
    is_whole: bool = True

    @property
    def mark(self) -> str:
        """``✗``, ``✓``, or ``–`` where nobody can say that all is well."""
        if not self.healthy:
            return "✗"
        return "✓" if self.seen and self.is_whole and not self.ended else "–"


# The first digits of a code say which lines of the loop its rule is about.
_LINE_OF_FAMILY = {"1": "parameters", "2": "zero_grad", "3": "forward", "4": "backward",
                   "5": "step", "6": "loss"}  # fmt: skip


_READ_HERE = ("steps", "backwards", "events", "groups", "grads")

_UNFINISHED = " so far: the run has not ended, or was killed"


def summarize(
    run: Recording, findings: Findings | None = None, shows: Severity = Severity.WARNING
) -> LoopSummary:
    """Read the summary of a run off its tables.

    Args:
        run: what was recorded.
        findings: of it; those of all rules by default.
        shows: the least severity that is shown.
    """
    everything = diagnose(run) if findings is None else findings
    findings = Findings([f for f in everything if f.severity >= shows], everything.unchecked)
    ended = _ended(run)
    steps, backwards = run.frame("steps"), run.frame("backwards")
    unread = run.unreadable(_READ_HERE)
    is_blind = any(finding.code == "GS901" for finding in everything)
    lines: tuple[tuple[str, str, Callable[[], list[str]]], ...] = (
        ("parameters", "which numbers will be trained?", lambda: _parameters(run)),
        ("forward", "builds the autograd graph behind loss.grad_fn", lambda: _forward(steps)),
        ("zero_grad", "clears .grad, which accumulates otherwise", lambda: _zero_grad(steps)),
        ("backward", "walks the graph, fills .grad", lambda: _backward(run, steps, backwards)),
        ("step", "reads .grad, updates state and weights", lambda: _step(run, steps)),
        ("loss", "should fall", lambda: _loss(steps)),
    )
    if "steps" in unread and steps.empty:
        lines = lines[:1]  # of the others nothing is known
    return LoopSummary(
        title=_title(run, steps),
        verdict=_verdict(findings, steps, ended, unread, is_blind)
        + _UNFINISHED * run.is_unfinished,
        healthy=not any(finding.severity > 0 for finding in findings),
        findings=findings,
        lines=tuple(
            LoopLine(name, purpose, tuple(measured()), _codes(findings, name))
            for name, purpose, measured in lines
        ),
        cost=_cost(run, steps),
        checked=_checked(run, findings),
        hidden=_hidden(len(everything) - len(findings)),
        ended=ended,
        seen=not steps.empty,
        is_whole=not (unread or is_blind),
    )


def evidence_text(value: object) -> str:
    """Write a value of a finding's evidence out, as every view shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(evidence_text(each) for each in value)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {evidence_text(each)}" for name, each in value.items())
    return str(value)


def _codes(findings: Findings, line: str) -> tuple[str, ...]:
    return tuple(f.code for f in findings if _LINE_OF_FAMILY.get(f.code[2]) == line)


def _title(run: Recording, steps: pd.DataFrame) -> str:
    models = ", ".join(_named(model.name, model.kind) for model in run.models)
    optimizers = ", ".join(_named(each.name, each.kind) for each in run.optimizers)
    who = " · ".join(part for part in (models, optimizers) if part) or "nothing watched"
    number = _counted(len(steps), "step")
    if run.unreadable(("steps",)):
        number = f"{len(steps):,} of {run.n_steps:,} steps that can be read"
    if run.total_steps is not None and len(steps) < run.total_steps:
        number = f"{len(steps):,} of {run.total_steps:,} steps"
    events = run.frame("events")
    seams = events.loc[events["event"] == "seam", "step"]
    if len(seams):
        number += f", gone on with at step {', '.join(map(str, seams))},"
    if len(run.ranks) > 1:
        noun = "rank" if is_one_training(run) else "process"
        number = f"{noun} {min(run.ranks)} of {len(run.ranks)} · {number}"
    return f"{who} · {number} in {_duration(run.seconds)}"


def _verdict(
    findings: Findings, steps: pd.DataFrame, ended: str, unread: tuple[str, ...], is_blind: bool
) -> str:
    if findings:
        worst = max(findings, key=lambda finding: finding.severity)
        return worst.name if len(findings) == 1 else f"{worst.name}: {len(findings)} findings"
    verdict = "no defect found"
    if unread:
        verdict = f"not all of {listed(unread, len(unread))} can be read: see what is not observed"
    elif steps.empty:
        verdict = "no step of a watched optimizer was seen"
    elif is_blind:
        verdict = (
            "no defect found, but a part of gradscope failed and saw nothing from then on (GS901)"
        )
    return f"{verdict} before {ended} ended the program" if ended else verdict


def _ended(run: Recording) -> str:
    """The class of the exception that ended the program; empty if none did."""
    events = run.frame("events")
    ended = events.loc[events["event"] == "ended", "detail"]
    return "" if ended.empty else str(ended.iloc[-1]).partition(":")[0]


def _hidden(n: int) -> str:
    if not n:
        return ""
    notes = "1 note is" if n == 1 else f"{n} notes are"
    return f"{notes} not shown: --show info on the command line, or scope.findings"


def _parameters(run: Recording) -> list[str]:
    facts = []
    registered = [p for p in run.parameters if p.in_model]
    known = registered or run.parameters  # a program may hold tensors without any module
    for number, optimizer in enumerate(run.optimizers):
        held = [p for p in known if any(holder == number for holder, _ in p.holders)]
        facts.append(
            f"{optimizer.name} holds {len(held)} of {_counted(len(known), 'tensor')} "
            f"({sum(p.numel for p in held):,} of {sum(p.numel for p in known):,} numbers) "
            f"in {_counted(optimizer.n_groups, 'group')}"
        )
    unregistered = [p for p in run.parameters if not p.in_model and not p.is_replaced]
    lost = [p for p in unregistered if not p.holders]
    missed = [p for p in (*registered, *lost) if not p.holders and p.requires_grad]
    frozen = [p for p in registered if not p.requires_grad]
    strangers = [p for p in run.parameters if not p.in_model and p.holders]
    if run.optimizers:
        facts.append(
            f"missed by every optimizer: {_listed([p.name for p in missed])}; "
            f"frozen: {_listed([p.name for p in frozen])}"
        )
    if strangers:
        facts.append(f"held, but in no watched model: {_listed([p.name for p in strangers])}")
    grads = run.rows("grads")
    assigned = set(grads.array("param")[~np.isnan(grads.array("norm"))].tolist())
    unreached = [
        p
        for number, p in enumerate(run.parameters)
        if p.in_model and p.requires_grad and not p.reached and number not in assigned
    ]
    if unreached and run.rows("backwards").n_rows:
        facts.append(f"never given a gradient: {_listed([p.name for p in unreached])}")
    return facts


def _forward(steps: pd.DataFrame) -> list[str]:
    if steps.empty:
        return ["no step seen"]
    facts = [f"{_usual(steps['n_forward'], 'call')} a step"]
    if (steps["n_forward"] == 0).all():
        facts = ["no call of a watched model seen"]
    else:
        modes = steps.loc[steps["n_forward"] > 0, "train_mode"]
        facts[0] += f", {_share(modes, 'in training mode', 'in eval mode')}"
    nodes = steps.loc[steps["graph_nodes"] > 0, "graph_nodes"]
    if len(nodes):
        facts.append(f"{_usual(nodes, 'graph node')} made for the loss")
    return facts


def _zero_grad(steps: pd.DataFrame) -> list[str]:
    if steps.empty:
        return ["no step seen"]
    facts = []
    # What a first step finds says nothing about the loop: nothing had been used before.
    later = steps.loc[(steps["optimizer_step"] > 0) & (steps["zeroed"] != "")]
    if later.empty:
        facts.append(
            "one step only: nothing had to be cleared"
            if len(steps) == 1
            else "no backward found a gradient that a step had used"
        )
    words = {
        "none": "cleared to None before backward",
        "zero": "cleared to zero before backward",
        "partly": "cleared only in part before backward",
        "never": "NOT cleared before backward",
    }
    for how, rows in later.groupby("zeroed"):
        by = sorted(set(rows["zeroed_by"]) - {""}) if how != "never" else []
        facts.append(
            f"used gradients {words[str(how)]} at {_of(len(rows), len(later), 'later step')}"
            + (f", by {', '.join(_spelled_by(name) for name in by)}" if by else "")
        )
    for of, rows in _per_optimizer(steps):
        usual = rows["order"].mode()[0]
        at = int((rows["order"] == usual).sum())
        facts.append(f"{of}order at {_of(at, len(rows), 'step')}: {usual}")
    return facts


def _backward(run: Recording, steps: pd.DataFrame, backwards: pd.DataFrame) -> list[str]:
    calls = backwards.loc[backwards["function"] == "backward"]
    if calls.empty:
        return ["never called"]
    facts = []
    raised = calls.loc[calls["error"] != ""]
    if len(raised):
        facts.append(f"raised {raised['error'].iloc[0]} at {_of(len(raised), len(calls), 'call')}")
    if steps.empty:
        return [*facts, f"{_counted(len(calls), 'call')}, but no step followed"]
    stepped = steps.loc[steps["outcome"] == "stepped"]
    counts = {name: int(stepped[f"n_{name}"].sum()) for name in STATUSES}
    total = sum(counts.values())
    shown = ", ".join(
        f"{counts[name]:,} {name}"
        for name in ("fresh", "accumulated", "compounded", "stale", "assigned", "zeroed", "none")
        if counts[name] or name in ("fresh", "compounded", "stale")
    )
    facts.append(
        f"{_usual(steps['n_backward'], 'call')} a step; "
        f"of {total:,} gradients read by steps: {shown}"
    )
    for of, rows in _per_optimizer(steps):
        facts.append(f"{of}gradient norm {_course(rows['grad_norm'])}")
    nonfinite = int((run.rows("grads").array("nonfinite") > 0).sum())
    if nonfinite:
        facts.append(f"{_counted(nonfinite, 'gradient')} with NaN or infinite elements")
    return facts


def _step(run: Recording, steps: pd.DataFrame) -> list[str]:
    if steps.empty:
        return ["never called"]
    groups, moments = run.frame("groups"), run.frame("moments")
    facts = []
    for of, rows in _per_optimizer(steps):
        name = rows["optimizer"].iloc[0]
        outcomes = ", ".join(f"{n} {what}" for what, n in rows["outcome"].value_counts().items())
        rates = [
            _course(group["lr"])
            for _, group in groups.loc[groups["optimizer"] == name].groupby("group")
        ]
        facts.append(f"{of}{outcomes}" + (f"; lr {_distinct(rates)}" if rates else ""))
        own = moments.loc[moments["optimizer"] == name]
        if len(own):
            first, last = own["step"].min(), own["step"].max()
            seen = f"step {first:,} → {last:,}" if first < last else f"step {first:,}"
            norms = ", ".join(
                f"|{key}| {_course(_together(own, f'{key}_norm_after'))}"
                for key in ("exp_avg", "exp_avg_sq")
                if own[f"{key}_norm_after"].notna().any()  # Adamax has no second one
            )
            facts.append(f"{of}state: {norms} ({seen})")
            counted = own["step"].map(rows.set_index("step")["optimizer_step"]) + 1
            if (own["step_count"] != counted).any():  # it began, or begins again, elsewhere
                facts[-1] += f", own step count {_course(own['step_count'])}"
        recorded = rows.loc[rows["weight_norm"] > 0]
        if len(recorded):
            ratio = recorded["update_norm"] / recorded["weight_norm"]
            facts.append(
                f"{of}update / weight {_course(ratio)} "
                f"({_counted(len(recorded), 'step')} recorded in full)"
            )
    return facts


def _loss(steps: pd.DataFrame) -> list[str]:
    facts = []
    for of, rows in _per_optimizer(steps.loc[steps["n_backward"] > 0]):
        known = rows.loc[rows["loss"].notna()]
        if known.empty:
            facts.append(f"{of}NaN or no scalar at {_of(len(rows), len(rows), 'step')}")
            continue
        losses = known["loss"].to_numpy()
        lowest = int(losses.argmin())
        facts.append(
            f"{of}{losses[0]:.4g} first → {losses[-1]:.4g} last"
            + (f" (mean of the last 10: {losses[-10:].mean():.4g})" if len(losses) >= 20 else "")
            + f"; lowest {losses[lowest]:.4g} at step {int(known['step'].iloc[lowest])}"
        )
        infinite = len(rows) - int(np.isfinite(rows["loss"].to_numpy()).sum())
        if infinite:
            facts.append(f"{of}not finite at {_of(infinite, len(rows), 'step')}")
    return facts or ["none seen"]


def _cost(run: Recording, steps: pd.DataFrame) -> str:
    seconds = sum(run.observe_seconds.values())
    if not run.seconds or steps.empty:
        return ""
    # The first steps are recorded densely by design, and are told apart.
    usual = steps.loc[steps["optimizer_step"] >= 3]
    text = f"watching took {_duration(seconds)} of {_duration(run.seconds)}"
    if len(usual) and usual["step_ms"].sum() > 0:
        share = usual["observe_ms"].sum() / usual["step_ms"].sum()
        text += f": {share:.1%} of the step time from the fourth step on"
    return text


def _checked(run: Recording, findings: Findings) -> tuple[str, ...]:
    n_applied = len(RULES) - len(findings.unchecked)
    unwanted = sum(why == NOT_SELECTED for why in findings.unchecked.values())
    n_ranks = len(run.ranks)
    noun = "ranks" if is_one_training(run) else "processes"
    return (
        f"checked: {_counted(n_applied, 'rule')}"
        + (f" on {n_ranks} {noun}" if n_ranks > 1 else "")
        + " (gradscope rule --all)"
        + (f"; not selected: {unwanted}" if unwanted else ""),
        *(
            f"not checked: {who}: {why}"
            if why.startswith(UNREAD)
            else f"not checked: {who}, which failed ({why})"
            for who, why in findings.failed()
        ),
        *(f"not observed: {note}" for note in run.notes),
    )


# -- words ----------------------------------------------------------------------------------


def severity_mark(finding: Finding) -> str:
    """One character for a finding's severity."""
    return {2: "✗", 1: "!", 0: "i"}[int(finding.severity)]


def _named(name: str, kind: str) -> str:
    return kind if name == kind else f"{name} ({kind})"


def _counted(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def _of(some: int, everything: int, thing: str) -> str:
    if some == everything:
        return f"the only {thing}" if some == 1 else f"all {everything:,} {thing}s"
    return f"{some:,} of {everything:,} {thing}s"


def _usual(counts: pd.Series[int], thing: str) -> str:
    least, greatest = int(counts.min()), int(counts.max())
    if least == greatest:
        return _counted(least, thing)
    return f"{least:,}–{greatest:,} {thing}s"


def _share(flags: pd.Series[bool], yes: str, no: str) -> str:
    if flags.all():
        return yes
    if not flags.any():
        return no
    return f"{yes} at {_of(int(flags.sum()), len(flags), 'step')}"


def _listed(names: list[str], most: int = 3) -> str:
    if not names:
        return "none"
    rest = len(names) - most
    shown = ", ".join(names[:most])
    return f"{len(names)} ({shown}{f' and {rest} more' if rest > 0 else ''})"


def _per_optimizer(steps: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each optimizer, with its name for a prefix where there are several."""
    parts = [(str(name), rows) for name, rows in steps.groupby("optimizer", sort=False)]
    if len(parts) == 1:
        return [("", parts[0][1])]
    return [(f"{name}: ", rows) for name, rows in parts]


def _distinct(texts: list[str]) -> str:
    """Each text once, in order."""
    return ", ".join(dict.fromkeys(texts))


def _together(rows: pd.DataFrame, norm: str) -> pd.Series[float]:
    """The norm of all parameters together, per step."""
    return (rows[norm] ** 2).groupby(rows["step"]).sum() ** 0.5


def _course(values: pd.Series[float]) -> str:
    """First to last, or the one value there ever was."""
    known = values.dropna()
    if known.empty:
        return "unknown"
    first, last = known.iloc[0], known.iloc[-1]
    if (known == first).all():
        return f"{first:.3g}"
    return f"{first:.3g} → {last:.3g}"


def _spelled_by(name: str) -> str:
    return "hand" if name == "hand" else f"{name}()"


def _duration(seconds: float) -> str:
    steps: list[tuple[float, Callable[[float], str]]] = [
        (1e-3, lambda s: f"{1e6 * s:.0f} µs"),
        (1, lambda s: f"{1e3 * s:.0f} ms"),
        (120, lambda s: f"{s:.1f} s"),
    ]
    for limit, spelled in steps:
        if seconds < limit:
            return spelled(seconds)
    return f"{seconds / 60:.1f} min"
