"""Why autograd refused: the order of events behind an exception that ended the program."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradscope.rules.wording import place
from gradscope.run.captured_graph import operation
from gradscope.run.entries import ParameterEntry
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_WIDTH = 80

_MOST_ATTEMPTS = 3
"""How many of the last attempts are shown: several optimizers take turns, and three is a GAN's."""


@dataclass(frozen=True, slots=True)
class ExceptionExplanation:
    """What led to an exception of autograd's.

    Attributes:
        cause: in the words of the program, one or two sentences.
        order: the last attempts, each with what happened in it, the one that raised last.
        fix: what to change.
    """

    cause: str
    order: tuple[tuple[str, str], ...]
    fix: str

    def to_text(self, width: int = _WIDTH) -> str:
        """Return it as text, in lines of at most ``width`` characters."""
        lines = ["gradscope: what led to this", *_wrapped(self.cause, "  ", width)]
        names = max((len(name) for name, _ in self.order), default=0)
        for name, happened in self.order:
            lines += _wrapped(happened, f"    {name:<{names}}  ", width)
        return "\n".join([*lines, *_wrapped(self.fix, "  fix: ", width)])

    def __str__(self) -> str:
        return self.to_text()


def explain_exception(
    run: Recording, kind: str, message: str, file: str | None = None, line: int | None = None
) -> ExceptionExplanation | None:
    """Explain an exception by what was recorded before it; None for one that says nothing to us.

    Args:
        run: everything up to the exception.
        kind: its class.
        message: what it says.
        file: of the innermost line of the program behind it.
        line: its number.
    """
    known: tuple[tuple[str, Callable[[_Story], tuple[str, str]]], ...] = (
        ("modified by an inplace operation", _changed_in_place),
        ("through the graph a second time", _second_time),
        ("does not require grad and does not have a grad_fn", _no_graph),
        ("unscale_() has already been called", _unscaled_twice),
        ("unscale_() is being called after step()", _unscaled_after_step),
        ("step() has already been called since the last update()", _no_update),
        ("No inf checks were recorded", _no_gradients_to_unscale),
        ("can't optimize a non-leaf Tensor", _non_leaf),
        ("is being used in an in-place operation", _leaf_in_place),
        ("grad can be implicitly created only for scalar outputs", _no_scalar),
        ("tensors to be on the same device", _devices),
        ("is not on the expected device", _devices),
    )
    for part, explain in known:
        if part in message:
            story = _Story(run, message, file, line)
            cause, fix = explain(story)
            return ExceptionExplanation(cause, story.order(), fix)
    return None


class _Story:
    """What was recorded of the last moments."""

    def __init__(self, run: Recording, message: str, file: str | None, line: int | None) -> None:
        self.run = run
        self.message = message
        self.at = place(file, line) if file and line else ""
        self.here = f" ({self.at})" if self.at else ""
        self.steps = run.frame("steps")
        self.backwards = run.frame("backwards")
        self.events = run.frame("events")

    def order(self) -> tuple[tuple[str, str], ...]:
        """The last attempts in the order of their ends, the one that raised with where it did."""
        shown = []
        several = self.steps["optimizer"].nunique() > 1
        for _, row in self.steps.tail(_MOST_ATTEMPTS).iterrows():
            of = f" ({row['optimizer']})" if several and row["optimizer"] else ""
            happened = str(row["order"])
            if row["outcome"] == "open":
                happened = happened.removesuffix("step open").rstrip(", ")
                shown.append((f"then{of}", f"{happened} ← raised{self.here}"))
            else:
                shown.append((f"step {row['step']}{of}", happened))
        return tuple(shown)

    @property
    def failed(self) -> pd.Series[Any] | None:
        """The backward that raised, if it was one."""
        last = self.backwards.tail(1)
        return last.iloc[0] if len(last) and last["error"].iloc[0] else None

    def last_event(self, name: str) -> pd.Series[Any] | None:
        rows = self.events.loc[self.events["event"] == name]
        return None if rows.empty else rows.iloc[-1]

    def shaped_like(self, shape: tuple[int, ...]) -> list[ParameterEntry]:
        """Parameters of that shape, or of its transpose, in which a linear layer keeps them."""
        return [p for p in self.run.parameters if p.shape in (shape, shape[::-1])]

    def optimizers_of(self, parameters: list[ParameterEntry]) -> list[str]:
        """The optimizers that hold any of them and have stepped, the last to step first."""
        held = {self.run.optimizers[number].name for p in parameters for number, _ in p.holders}
        stepped = self.steps.loc[self.steps["outcome"] == "stepped", "optimizer"].tolist()
        return [name for name in dict.fromkeys(reversed(stepped)) if name in held]


# -- one function for each complaint: the cause, and the fix ----------------------------------


def _changed_in_place(story: _Story) -> tuple[str, str]:
    shape, made_by = _changed_tensor(story.message)
    like = story.shaped_like(shape) if shape is not None and _is_a_weight(made_by) else []
    stepped = story.optimizers_of(like)
    if stepped:
        names = _some([p.name for p in like if _held_by(story.run, p, stepped[0])])
        cause = (
            f"{stepped[0]}.step() changed {names} in place after the forward whose graph this "
            f"backward{story.here} walks: backward needs the values that the forward used."
        )
        failed = story.failed
        again = failed is not None and not _is_missing(failed["repeats"])
        if again or len(story.run.optimizers) == 1:
            return cause, (
                f"run the forward again after {stepped[0]}.step(), and call backward on the new "
                "loss; or call every backward() of one forward before the step"
            )
        return cause, (
            f"call this backward before {stepped[0]}.step(), or compute its loss again after that "
            "step; a part of the graph that is not to be trained here is left out by .detach()"
        )
    what = "a tensor that backward needs"
    if shape is not None:
        what = f"a tensor of shape {shape}"
        if made_by:
            what += f", made by {operation(made_by)},"
    cause = (
        f"{what} was changed in place between the forward and this backward{story.here}, which "
        "computes a derivative from its old values."
    )
    return cause, (
        "look for +=, x[…] = …, relu_() or inplace=True behind that operation and write x = x + … "
        "instead, or change a clone(); torch.autograd.set_detect_anomaly(True) prints the line of "
        "the forward"
    )


def _second_time(story: _Story) -> tuple[str, str]:
    failed = story.failed
    if failed is None:
        return (
            "a backward freed the graph, and something still wanted to go through it.",
            "call backward once for each forward; .detach() what is to be used again as a number",
        )
    if not _is_missing(failed["repeats"]):
        first = story.backwards.loc[story.backwards["backward"] == failed["repeats"]].iloc[0]
        return (
            f"this is the second backward of the very same loss: the one at {_at(first)} has freed "
            "the graph.",
            f"take one of the two away ({_at(first)}, {_at(failed)}); for the gradients of two "
            "iterations, run the forward twice",
        )
    before = story.backwards.iloc[:-1]
    n_old = 0 if _is_missing(failed["n_old_nodes"]) else int(failed["n_old_nodes"])
    if n_old and len(before):
        n_nodes = int(failed["n_nodes"])
        usual = before["n_nodes"].dropna()
        if len(usual) and n_nodes > int(usual.iloc[0]):
            return (
                f"{n_old} of the {n_nodes} operations behind this loss were made before the last "
                "step: a tensor of an earlier iteration, such as a hidden state, still carries its "
                f"graph, which the backward at {_at(before.iloc[-1])} has freed.",
                "detach what goes from one iteration into the next: hidden = hidden.detach()",
            )
        return (
            f"{n_old} of the {n_nodes} operations behind this loss were made before the last "
            "step and used again: an earlier backward has freed them, and they would not see the "
            "weights change.",
            "compute that part inside the loop; if it is not to be trained, .detach() it once",
        )
    same = before.loc[before["step"] == failed["step"]] if len(before) else before
    if len(same):
        first = same.iloc[-1]
        return (
            f"the backward at {_at(first)} has freed a part of the graph that this loss shares "
            "with that one.",
            "add the losses and call backward once: (loss_a + loss_b).backward()",
        )
    return (
        "a tensor that an earlier backward has gone through was used again: a hidden state that "
        "was not detached, or something computed once before the loop.",
        "detach what goes from one iteration into the next, or compute it anew in each",
    )


def _no_graph(story: _Story) -> tuple[str, str]:
    cut = story.last_event("cut")
    if cut is not None:
        return (
            f"the loss has no path to any parameter: {cut['detail']} at {_at(cut)} cut the graph.",
            f"keep {_at(cut)} differentiable: no .detach(), .item(), .data, torch.tensor(…) or "
            "operation without a derivative between the model and the loss",
        )
    if story.run.parameters and not any(p.requires_grad for p in story.run.parameters):
        return (
            f"all {len(story.run.parameters)} parameters are frozen (requires_grad=False), so "
            "nothing behind this loss asks for a gradient.",
            "set requires_grad_(True) on what is to be trained",
        )
    return (
        "the loss has no path to any parameter that asks for a gradient.",
        "look between the model and the loss for torch.no_grad(), .detach(), .item() or "
        "torch.tensor(…), and whether this loss comes from the model at all",
    )


def _unscaled_twice(story: _Story) -> tuple[str, str]:
    before = story.last_event("unscale")
    where = f" at {_at(before)}" if before is not None and before["file"] else ""
    return (
        f"unscale_() was called{where} before, and no scaler.update() came in between.",
        "call unscale_() once for each step, right before clipping; when micro-batches are "
        "accumulated, only after the last of them; and scaler.update() after every scaler.step()",
    )


def _unscaled_after_step(story: _Story) -> tuple[str, str]:
    return (
        "scaler.step() unscales by itself and has already used these gradients.",
        "call unscale_() before scaler.step(), and scaler.update() after it",
    )


def _no_update(story: _Story) -> tuple[str, str]:
    n_updates = int((story.events["event"] == "scale_update").sum())
    seen = "never called" if not n_updates else f"called {n_updates} times"
    return (
        f"scaler.step() was called again for the same optimizer without scaler.update() in "
        f"between; update() was {seen}.",
        "call scaler.update() once at the end of every iteration, after every scaler.step()",
    )


def _no_gradients_to_unscale(story: _Story) -> tuple[str, str]:
    run = story.run
    for number, optimizer in enumerate(run.optimizers):
        held = [p for p in run.parameters if any(holder == number for holder, _ in p.holders)]
        reached = [p for p in run.parameters if p.reached and p not in held]
        if held and reached and not any(p.reached for p in held):
            return (
                f"none of the {len(held)} parameters that {optimizer.name} holds ever got a "
                f"gradient; backward wrote those of {_some([p.name for p in reached])}, which it "
                "does not hold.",
                f"make {optimizer.name} from the parameters of the model that is trained, after "
                "its last change (.to(), a new head, a copy)",
            )
    return (
        "the optimizer's parameters have no gradient at this point, so the scaler had nothing to "
        "unscale.",
        "call scaler.scale(loss).backward() before scaler.step(), and zero_grad() not in between",
    )


def _non_leaf(story: _Story) -> tuple[str, str]:
    return (
        f"a tensor given to the optimizer{story.here} is the result of an operation and not a "
        "parameter: backward writes no .grad there.",
        "do the operation first and ask for the gradient last: w = (0.1 * torch.randn(3)"
        ".to(device)).requires_grad_(), or nn.Parameter(…) around it",
    )


def _leaf_in_place(story: _Story) -> tuple[str, str]:
    return (
        f"a parameter is written in place{story.here} while gradients are recorded.",
        "put the assignment into with torch.no_grad():, or use torch.nn.init",
    )


def _no_scalar(story: _Story) -> tuple[str, str]:
    losses = story.run.frame("losses")
    kept = losses.loc[losses["reduction"] == "none"]
    if len(kept):
        last = kept.iloc[-1]
        return (
            f"{last['function']} at {_at(last)} was asked for reduction='none', so the loss is a "
            "value for each element.",
            "reduce it: loss.mean().backward()",
        )
    return (
        f"the tensor that backward starts from{story.here} has several elements.",
        "reduce it to one number: loss.mean().backward()",
    )


def _devices(story: _Story) -> tuple[str, str]:
    by_device: dict[str, list[str]] = {}
    for parameter in story.run.parameters:
        by_device.setdefault(parameter.device, []).append(parameter.name)
    if len(by_device) > 1:
        majority = max(by_device, key=lambda device: len(by_device[device]))
        others = "; ".join(
            f"{_some(names)} on {device}"
            for device, names in by_device.items()
            if device != majority
        )
        return (
            f"most parameters are on {majority}, but {others}.",
            f"call model.to({majority!r}) after the last module was added; keep modules in "
            "attributes, nn.ModuleList or nn.ModuleDict, and tensors in register_buffer, so that "
            "they are moved along",
        )
    if by_device:
        (device,) = by_device
        return (
            f"all {len(story.run.parameters)} watched parameters are on {device}: what met them at "
            f"{story.at or 'that line'} is elsewhere.",
            f"move the batch and the targets with .to({device!r}); make new tensors with "
            "device=x.device, and keep constant ones in register_buffer",
        )
    return (
        f"tensors on several devices met{story.here}.",
        "move model and batch to the same device",
    )


# -- words ----------------------------------------------------------------------------------


def _changed_tensor(message: str) -> tuple[tuple[int, ...] | None, str]:
    """Shape of the tensor that was changed, and the operation that made it."""
    shape = re.search(r"\[\S*Tensor \[([\d, ]*)\]\]", message)
    made_by = re.search(r"which is output \d+ of (\w+)", message)
    sizes = None if shape is None else tuple(int(n) for n in re.findall(r"\d+", shape[1]))
    return sizes, made_by[1] if made_by else ""


def _is_a_weight(made_by: str) -> bool:
    """Whether the operation is none, or only a view such as a linear layer takes of its weight."""
    views = ("", "T", "AsStrided", "Transpose", "AccumulateGrad", "View", "Permute")
    return operation(made_by) in views


def _held_by(run: Recording, parameter: ParameterEntry, optimizer: str) -> bool:
    return any(run.optimizers[number].name == optimizer for number, _ in parameter.holders)


def _at(row: pd.Series[Any]) -> str:
    if not row["file"] or _is_missing(row["line"]):
        return "a line that was not seen"
    return place(str(row["file"]), int(row["line"]))


def _is_missing(value: Any) -> bool:
    import pandas as pd

    return value is None or value is pd.NA or value != value


def _some(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _wrapped(text: str, before: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        max(width, len(before) + 20),
        initial_indent=before,
        subsequent_indent=" " * len(before),
        break_long_words=False,
        break_on_hyphens=False,
    )
