"""What a program passes as "a loss" or "the parameters": tensors in any wrapping, checked."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import nn

from gradscope.errors import UsageError

_MOST_PARTS: Final = 5


def tensors_in(name: str, value: Any) -> list[torch.Tensor]:
    """Return every tensor in any nesting of tuples, lists, dicts and dataclasses, in order.

    Everything else in it is passed over. A tensor that is met twice is returned twice.

    Args:
        name: what the argument is called, for the error.
        value: what was passed.

    Raises:
        UsageError: if there is no tensor in it.
    """
    tensors: list[torch.Tensor] = []
    opened: dict[int, Any] = {}  # holds what it has opened, so that no id recurs
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, torch.Tensor):
            tensors.append(each)
        elif id(each) not in opened:
            opened[id(each)] = each
            pending.extend(reversed(_parts_of(each)))
    if not tensors:
        raise UsageError(
            f"{name} must be a tensor, or a tuple, list, dict or dataclass with tensors in it; "
            f"this is {described(value)}{_instead_of(value)}"
        )
    return tensors


def named_tensors(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    """Return names and tensors from a module, several modules, a dict, pairs, or None for none.

    The parameters of several modules have ``model0.``, ``model1.`` … in front of their names.

    Args:
        name: what the argument is called, for the error.
        value: what was passed.

    Raises:
        UsageError: if it is none of these.
    """
    if value is None:
        return []
    if modules := modules_in(value):
        return [
            (prefix + path, parameter)
            for prefix, module in modules
            for path, parameter in module.named_parameters(remove_duplicate=False)
        ]
    pairs: Iterable[Any]
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, Iterable) and not isinstance(value, torch.Tensor | str | bytes):
        pairs = value
    else:
        raise _no_names(name, f"this is {described(value)}")
    named = []
    for at, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise _no_names(name, f"item {at} of the {type(value).__name__} is {described(pair)}")
        of, tensor = pair
        if not isinstance(tensor, torch.Tensor):
            raise _no_names(name, f"{str(of)!r} is the name of {described(tensor)}")
        named.append((str(of), tensor))
    return named


def modules_in(value: Any) -> list[tuple[str, nn.Module]]:
    """Return a module, or each of several, after what stands in front of its names.

    Returns:
        ``("", module)`` for one, ``("model0.", module)`` and so on for several; nothing for what is
        no module and no list or tuple of modules.
    """
    modules = [value] if isinstance(value, nn.Module) else value
    if not isinstance(modules, list | tuple) or not all(isinstance(m, nn.Module) for m in modules):
        return []
    if len(modules) == 1:
        return [("", modules[0])]
    return [(f"model{number}.", module) for number, module in enumerate(modules)]


def described(value: Any) -> str:
    """A few words on what was passed, for an error."""
    if value is None:
        return "None"
    kind = type(value).__name__
    if isinstance(value, str | bytes | int | float):
        return f"{kind} {reprlib.repr(value)}"
    if isinstance(value, tuple | list | Mapping):
        kinds = [type(part).__name__ for part in _parts_of(value)]
        shown = ", ".join(kinds[:_MOST_PARTS]) + (", …" if len(kinds) > _MOST_PARTS else "")
        return f"{kind} of {shown}" if kinds else f"empty {kind}"
    return f"of type {kind}"


def _parts_of(container: Any) -> list[Any]:
    if isinstance(container, Mapping):
        return list(container.values())
    if isinstance(container, tuple | list):
        return list(container)
    if dataclasses.is_dataclass(container) and not isinstance(container, type):
        # A field that was not initialised is no attribute.
        return [getattr(container, each.name, None) for each in dataclasses.fields(container)]
    return []


def _instead_of(value: Any) -> str:
    if isinstance(value, nn.Module):
        return " (call the model and pass what it returns)"
    if hasattr(value, "next_functions"):
        return " (pass the tensor whose grad_fn it is)"
    return ""


def _no_names(name: str, reason: str) -> UsageError:
    return UsageError(
        f"{name} must be a dict from names to tensors, pairs of a name and a tensor such as "
        f"model.named_parameters(), or a model; {reason}"
    )
