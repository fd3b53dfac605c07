"""``check_setup()``: a look at model, optimizer and loss before any training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from gradscope.errors import UsageError
from gradscope.rules.causes import causes_first
from gradscope.rules.facts import listed
from gradscope.rules.finding import Finding, Findings, Severity
from gradscope.rules.wording import some_of
from gradscope.run.entries import ParameterEntry
from gradscope.run.recording import Recording
from gradscope.scope import calling_frame, checked_models, checked_optimizers, names_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gradscope.run.captured_graph import CapturedGraph
    from gradscope.session.census import Census

_NAMES = {
    "GS101": "parameter-not-in-optimizer",
    "GS102": "stale-optimizer-parameter",
    "GS103": "duplicate-parameter",
    "GS104": "frozen-parameter",
    "GS105": "unused-parameter",
    "GS108": "nothing-to-train",
    "GS111": "decayed-norm-or-bias",
    "GS301": "detached-loss",
    "GS503": "zero-learning-rate",
}
"""What is looked for, by the codes and names of the rules that judge a whole run by it."""


class Setup(Findings):
    """What :func:`check_setup` found: findings as those of a run, and what was looked at.

    Attributes:
        facts: who holds what, in plain words, one fact an entry.
    """

    def __init__(self, findings: Sequence[Finding], facts: Sequence[str]) -> None:
        super().__init__(findings)
        self.facts = tuple(facts)

    def __repr__(self) -> str:
        verdict = super().__repr__() if len(self) else "✓ nothing is in the way of training"
        return "\n".join(self.facts) + "\n\n" + verdict

    def _repr_html_(self) -> str:
        facts = "<br>".join(escape(fact) for fact in self.facts)
        verdict = super()._repr_html_() if len(self) else "✓ nothing is in the way of training"
        return f"<div style='opacity:.7'>{facts}</div>{verdict}"


def check_setup(
    model: nn.Module | Iterable[nn.Module],
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    loss: torch.Tensor | None = None,
) -> Setup:
    """Look at a model and its optimizer before training: no step is made, nothing is changed.

        loss = criterion(model(x), y)
        print(gradscope.check_setup(model, optimizer, loss))

    Neither forward nor backward is called; the graph behind ``loss`` is only read, and can still be
    used for its backward. What shows only while the loop runs is the business of :func:`watch`.

    Args:
        model: the model, or several.
        optimizer: the optimizer, or several.
        loss: a loss that the program has computed; then it is told which parameters it does not
            reach.

    Returns:
        Findings, and in ``facts`` who holds what. Printed, both.

    Raises:
        UsageError: if what is passed is no model, no optimizer, no tensor.
    """
    import torch

    from gradscope.session.census import Census

    models, optimizers = checked_models(model), checked_optimizers(optimizer)
    if loss is not None and not isinstance(loss, torch.Tensor):
        raise UsageError(
            f"loss is a {type(loss).__name__}: pass the tensor that backward() is to be called on"
        )
    run = Recording()
    census = Census(run)
    caller = calling_frame()
    for each, name in zip(models, names_of(caller, 0, "model", len(models), "model"), strict=True):
        census.add_model(each, name)
    for one, name in zip(
        optimizers, names_of(caller, 1, "optimizer", len(optimizers), "optimizer"), strict=True
    ):
        census.add_optimizer(one, name)
    graph = None if loss is None else _graph_of(loss, census)
    found = [
        *_not_held(run, graph),
        *_stale(run, graph),
        *_twice(run),
        *_frozen(run),
        *_zero_learning_rate(run, optimizers),
        *_decayed(run, optimizers),
        *([] if loss is None or graph is None else _not_reached(run, loss, graph)),
    ]
    return Setup(causes_first(found, ()), _facts(run, models, optimizers, loss, graph))


def _finding(code: str, severity: Severity, message: str, fix: str, **details: Any) -> Finding:
    return Finding(code, _NAMES[code], severity, message, fix, **details)


# -- who holds what -------------------------------------------------------------------------


def _not_held(run: Recording, graph: CapturedGraph | None) -> list[Finding]:
    reached = _reached(graph)
    trainable = [p for p in run.parameters if p.in_model and p.requires_grad]
    # What a leftover in an optimizer stands for is told with that one.
    left_over = [p.shape for p in run.parameters if not p.in_model and p.name not in reached]
    missed = [p for p in trainable if not p.holders and p.shape not in left_over]
    if not missed:
        return []
    return [
        _finding(
            "GS101",
            Severity.WARNING,
            f"no optimizer holds {_names(missed)}: {some_of(len(missed), len(trainable))} "
            "trainable tensors will stay as they are",
            f"pass them to {_all_names(run)}, made after the model is complete; or, if they are "
            "to stay as they are, requires_grad_(False)",
            params=_params(missed),
            modules=_modules(missed),
            evidence={"tensors_missed": len(missed), "trainable_tensors": len(trainable)},
        )
    ]


def _stale(run: Recording, graph: CapturedGraph | None) -> list[Finding]:
    """What optimizers hold and no model has: made anew since, or a tensor of its own."""
    reached = _reached(graph)
    free = [p for p in run.parameters if p.in_model and p.requires_grad and not p.holders]
    findings = []
    for number, optimizer in enumerate(run.optimizers):
        held = _held(run, number)
        # A tensor that the loss needs is no leftover, such as a learned temperature.
        strangers = [p for p in held if not p.in_model and p.name not in reached]
        shapes = {p.shape for p in strangers}
        twins = [p for p in free if p.shape in shapes]
        if not strangers:
            continue
        are_masters = _are_masters(strangers, twins)
        is_stale = not are_masters and (bool(twins) or len(strangers) == len(held))
        message = (
            f"{optimizer.name} holds {some_of(len(strangers), len(held))} tensors that belong to "
            "no model that was passed"
        )
        if twins:
            message += f", while no optimizer holds {_names(twins)}, of the same shapes"
        if are_masters:
            message += f" in {twins[0].dtype}: they look like its weights in full precision"
        findings.append(
            _finding(
                "GS102",
                Severity.ERROR if is_stale else Severity.INFO,
                message,
                "give them the model's gradients before each step, and copy them into the model "
                "after it"
                if are_masters
                else f"make {optimizer.name} after the last change to the model (a new layer, "
                "load, .to(), copy), from the parameters that the model has then",
                params=_params(twins or strangers),
                modules=_modules(twins),
                optimizer=optimizer.name,
                evidence={"strangers": len(strangers), "held": len(held), "twins": len(twins)},
            )
        )
    return findings


def _are_masters(strangers: Sequence[ParameterEntry], free: Sequence[ParameterEntry]) -> bool:
    """Whether tensors are weights in full precision of a model in bfloat16 or float16.

    There is one for each of the model's that no optimizer holds.
    """
    return (
        bool(free)
        and all(p.dtype in ("bfloat16", "float16") for p in free)
        and all(p.dtype in ("float32", "float64") for p in strangers)
        and Counter(p.shape for p in free) == Counter(p.shape for p in strangers)
    )


def _twice(run: Recording) -> list[Finding]:
    findings = []
    for entry in run.parameters:
        holders = [holder for holder, _ in entry.holders]
        if len(holders) == len(set(holders)) == 1 or not holders:
            continue
        names = list(dict.fromkeys(run.optimizers[holder].name for holder in holders))
        is_one = len(names) == 1
        where = f"is {len(holders)} times in {names[0]}" if is_one else f"is in {listed(names)}"
        findings.append(
            _finding(
                "GS103",
                Severity.ERROR if is_one else Severity.WARNING,
                f"{entry.name} {where}: each of its steps updates it "
                + ("several times" if is_one else "once more"),
                "pass each parameter once, to one optimizer",
                params=(entry.name,),
                optimizer=names[0] if is_one else None,
                evidence={"times": len(holders), "optimizers": names},
            )
        )
    return _as_one(findings)


def _as_one(findings: list[Finding]) -> list[Finding]:
    """Findings that differ in nothing but the parameter become one."""
    from dataclasses import replace

    together: dict[Any, list[Finding]] = {}
    for finding in findings:
        about = (finding.optimizer, finding.severity, str(finding.evidence))
        together.setdefault(about, []).append(finding)
    merged = []
    for same in together.values():
        params = tuple(param for each in same for param in each.params)
        message = same[0].message
        if len(same) > 1:
            message = listed(params) + ": each " + message.partition(" ")[2]
        merged.append(replace(same[0], params=params, message=message))
    return merged


def _frozen(run: Recording) -> list[Finding]:
    findings = []
    for number, optimizer in enumerate(run.optimizers):
        held = _held(run, number)
        frozen = [p for p in held if not p.requires_grad]
        if held and not frozen:
            continue
        nothing = len(frozen) == len(held)
        what = "no parameter at all" if not held else f"{_names(frozen)}, with requires_grad=False"
        findings.append(
            _finding(
                "GS108" if nothing else "GS104",
                Severity.ERROR if nothing else Severity.INFO,
                f"{optimizer.name} holds {what}: "
                + ("it has nothing to train" if nothing else "they will not be trained"),
                "call requires_grad_(True) on what is to be trained; or pass the optimizer only "
                "parameters that are to be trained",
                params=_params(frozen),
                modules=_modules(frozen),
                optimizer=optimizer.name,
                evidence={"frozen": len(frozen), "held": len(held)},
            )
        )
    return findings


def _zero_learning_rate(
    run: Recording, optimizers: Sequence[torch.optim.Optimizer]
) -> list[Finding]:
    findings = []
    for number, optimizer in enumerate(optimizers):
        groups = [group for group in optimizer.param_groups if group["params"]]
        # A scheduler leaves its mark, and a warm-up may well begin at 0.
        zero = [g for g in groups if float(g.get("lr", 1.0)) == 0 and "initial_lr" not in g]
        if not zero:
            continue
        name = run.optimizers[number].name
        which = "" if len(groups) == 1 else f" in {some_of(len(zero), len(groups))} groups"
        findings.append(
            _finding(
                "GS503",
                Severity.WARNING,
                f"the learning rate of {name} is 0{which}, and no scheduler was made for it: its "
                "steps will change nothing",
                f"give {name} a learning rate above 0",
                optimizer=name,
                evidence={"groups_at_zero": len(zero), "groups": len(groups)},
            )
        )
    return findings


def _decayed(run: Recording, optimizers: Sequence[torch.optim.Optimizer]) -> list[Finding]:
    findings = []
    for number, optimizer in enumerate(optimizers):
        decaying = [
            group
            for group, options in enumerate(optimizer.param_groups)
            if float(options.get("weight_decay") or 0.0) > 0
        ]
        decayed = [
            p
            for p in _held(run, number)
            if p.requires_grad
            and len(p.shape) <= 1
            and (p.name.endswith("bias") or "Norm" in p.module_type)
            and any((number, group) in p.holders for group in decaying)
        ]
        if not decayed:
            continue
        name = run.optimizers[number].name
        findings.append(
            _finding(
                "GS111",
                Severity.INFO,
                f"{name} decays {len(decayed)} biases and weights of norms: {_names(decayed)}",
                "many recipes put them into a parameter group with weight_decay=0",
                params=_params(decayed),
                optimizer=name,
                evidence={"decayed": len(decayed)},
            )
        )
    return findings


# -- the graph of the loss ------------------------------------------------------------------


def _graph_of(loss: torch.Tensor, census: Census) -> CapturedGraph:
    from dataclasses import replace

    from gradscope.instruments.autograd_graph import capture_graph

    captured = capture_graph([loss] if loss.requires_grad else [], census.names_of)
    return replace(captured, registered=census.registered())


def _reached(graph: CapturedGraph | None) -> set[str]:
    return set() if graph is None else {name for names in graph.params for name in names}


def _not_reached(run: Recording, loss: torch.Tensor, graph: CapturedGraph) -> list[Finding]:
    from gradscope.graphs.unreached import unreached

    trainable = [p for p in run.parameters if p.in_model and p.requires_grad]
    if not trainable:
        return []  # nothing to reach, which has a finding of its own
    if not _reached(graph):
        return [_detached(trainable, loss, graph)]
    missing = {name for each in unreached(graph) for p in each.params for name in p.names}
    missed = [p for p in trainable if p.name in missing and p.numel]
    if not missed:
        return []
    whole = _whole_modules(missed, run.parameters)
    # A leaf that is no parameter, of the same shape: another copy of the weights is in use.
    strangers = [
        shape for names, shape in zip(graph.params, graph.param_shape, strict=True) if not names
    ]
    copied = [p for p in missed if p.shape in strangers]
    if copied and len(copied) == len(missed):
        why = (
            "it reaches tensors of the same shapes that belong to no model that was passed: the "
            "forward uses a copy, or modules that were replaced since"
        )
        fix = "compute the loss with the model that was passed, as it is now"
    elif whole:
        why = (
            f"the result of {listed(whole)} does not come into it: not called, called under "
            "no_grad, or detached on the way"
        )
        fix = (
            f"see whether the forward calls {listed(whole)} and whether .detach(), .data, "
            "no_grad() or a function without a derivative lies between it and the loss; "
            "gradscope.capture(model) around the forward tells which"
        )
    else:
        why = "their modules lead to it, but not by way of them"
        fix = "see what the forward of their modules does with them"
    return [
        _finding(
            "GS105",
            Severity.WARNING,
            f"this loss does not reach {_names(missed)} ({some_of(len(missed), len(trainable))} "
            f"trainable tensors): {why}",
            fix,
            params=_params(missed),
            modules=tuple(whole) or _modules(missed),
            evidence={"not_reached": len(missed), "trainable_tensors": len(trainable)},
        )
    ]


def _detached(trainable: list[ParameterEntry], loss: torch.Tensor, graph: CapturedGraph) -> Finding:
    grad_fn = "" if loss.grad_fn is None else loss.grad_fn.name()
    if not loss.requires_grad:
        why = "it does not require grad (grad_fn is None), so backward() will raise"
    elif loss.grad_fn is None:
        why = "it is a new tensor without a graph of its own (grad_fn is None)"
    elif graph.params:
        why = f"its graph (grad_fn {grad_fn}) ends in tensors that belong to no model passed"
    else:
        why = f"its graph (grad_fn {grad_fn}) ends before any parameter"
    return _finding(
        "GS301",
        Severity.ERROR,
        f"the loss has no path to any parameter: {why}",
        "look for .detach(), .data, .item(), torch.tensor(), no_grad() or a function without a "
        "derivative between the model's output and the loss",
        params=_params(trainable),
        evidence={
            "grad_fn": grad_fn,
            "requires_grad": loss.requires_grad,
            "graph_nodes": len(graph.op),
        },
    )


def _whole_modules(missed: list[ParameterEntry], everybody: list[ParameterEntry]) -> list[str]:
    """The outermost modules all of whose trainable parameters are among those missed."""
    trainable = [p for p in everybody if p.in_model and p.requires_grad]
    names = {p.name for p in missed}
    whole: dict[str, None] = {}
    for param in missed:
        parts = param.module.split(".") if param.module else []
        for length in range(1, len(parts) + 1):
            path = ".".join(parts[:length])
            if all(p.name in names for p in trainable if p.name.startswith(path + ".")):
                whole[path] = None
                break
    return list(whole)


# -- in words -------------------------------------------------------------------------------


def _facts(
    run: Recording,
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    loss: torch.Tensor | None,
    graph: CapturedGraph | None,
) -> list[str]:
    of_models = [p for p in run.parameters if p.in_model]
    trainable = [p for p in of_models if p.requires_grad]
    who = ", ".join(f"{model.name} ({model.kind})" for model in run.models)
    facts = [
        f"{who}: {len(of_models):,} tensors of {sum(p.numel for p in of_models):,} numbers, "
        f"{some_of(len(trainable), len(of_models))} trainable"
    ]
    modes = {model.training for model in models}
    facts[0] += "; in training mode" if modes == {True} else "; in eval mode" * (modes == {False})
    for number, optimizer in enumerate(optimizers):
        known = run.optimizers[number]
        held = sum(p.requires_grad for p in _held(run, number) if p.in_model)
        rates = sorted({float(group.get("lr", math.nan)) for group in optimizer.param_groups})
        facts.append(
            f"{known.name} ({known.kind}): holds {some_of(held, len(trainable))} trainable in "
            f"{known.n_groups} group{'s' * (known.n_groups != 1)}, "
            f"lr {', '.join(f'{rate:g}' for rate in rates)}"
        )
    if loss is not None and graph is not None:
        reached = _reached(graph)
        n_reached = sum(p.name in reached for p in trainable)
        facts.append(
            f"loss: a graph of {len(graph.op):,} operations that reaches "
            f"{some_of(n_reached, len(trainable))} trainable"
        )
        if loss.numel() != 1:
            facts[-1] += f"; of shape {tuple(loss.shape)}, and backward() wants a single number"
    return facts


def _held(run: Recording, optimizer: int) -> list[ParameterEntry]:
    return [p for p in run.parameters if any(holder == optimizer for holder, _ in p.holders)]


def _all_names(run: Recording) -> str:
    return " or ".join(optimizer.name for optimizer in run.optimizers)


def _names(entries: list[ParameterEntry]) -> str:
    return listed([entry.name for entry in entries])


def _params(entries: list[ParameterEntry]) -> tuple[str, ...]:
    return tuple(entry.name for entry in entries)


def _modules(entries: list[ParameterEntry]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry.module for entry in entries if entry.module))
