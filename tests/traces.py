"""Everything in which gradscope could leave a trace, by identity."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.amp.grad_scaler
import torch.autograd.graph
import torch.nn.modules.module
import torch.nn.utils.clip_grad
import torch.overrides
import torch.utils._device
import torch.utils._python_dispatch
import torch.utils.checkpoint
from torch import nn
from torch.optim import lr_scheduler
from torch.optim import optimizer as optimizer_module

_MODULES = (
    torch,
    torch.autograd,
    torch.autograd.graph,
    torch.autograd.function,
    torch._tensor,
    torch.nn.modules.module,
    torch.nn.functional,
    torch.nn.utils,
    torch.nn.utils.clip_grad,
    optimizer_module,
    lr_scheduler,
    torch.utils.checkpoint,
    torch.utils._device,
)
_CLASSES = (
    torch.Tensor,
    nn.Module,
    nn.Parameter,
    torch.amp.grad_scaler.GradScaler,
    torch.autograd.Function,
    *(
        kind
        for module in (torch.optim, lr_scheduler)
        for kind in vars(module).values()
        if isinstance(kind, type)
    ),
)
_SPECIAL = {"__init__", "__call__", "__torch_function__", "__getattr__", "__setattr__"}
# Counters of torch itself, and what it caches as it runs.
_MOVES = {
    ("RemovableHandle", "next_id"),
    # set on each optimizer class by its first instance (torch 2.13)
    *((kind.__name__, "step") for kind in vars(torch.optim).values() if isinstance(kind, type)),
}


@dataclass
class Snapshot:
    """Objects by where they were found; kept, so that no id can recur."""

    found: dict[str, Any]

    def differences_from(self, before: Snapshot) -> list[str]:
        """Names of what is new, gone or another object than before."""
        return sorted(
            name
            for name in self.found.keys() | before.found.keys()
            if not _same(self.found.get(name), before.found.get(name))
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (isinstance(one, str | bool | int) and one == other)


def snapshot(models: Iterable[nn.Module] = (), optimizers: Iterable[Any] = ()) -> Snapshot:
    found: dict[str, Any] = {}
    for module in _MODULES:
        for name, value in vars(module).items():
            if callable(value):
                found[f"{module.__name__}.{name}"] = value
    for kind in _CLASSES:
        for name, value in vars(kind).items():
            if (kind.__name__, name) not in _MOVES and (name in _SPECIAL or name[:2] != "__"):
                found[f"class {kind.__name__}.{name}"] = value
    for owner in (torch.nn.modules.module, optimizer_module):
        for name, value in vars(owner).items():
            if name.startswith("_global_") and hasattr(value, "values"):
                found[f"{owner.__name__}.{name}"] = (*value.keys(), *value.values())
    found["function modes"] = tuple(torch.overrides._get_current_function_mode_stack())
    found["dispatch modes"] = tuple(torch.utils._python_dispatch._get_current_dispatch_mode_stack())
    found["saved tensor hooks"] = torch._C._autograd._top_saved_tensors_default_hooks(True)
    found["grad mode"] = (torch.is_grad_enabled(), torch.is_anomaly_enabled())
    found["deterministic"] = torch.are_deterministic_algorithms_enabled()
    found["warning filters"] = tuple(map(str, warnings.filters))
    found["showwarning"] = warnings.showwarning
    found["excepthook"] = (sys.excepthook, threading.excepthook, sys.unraisablehook)
    found["tracing"] = (sys.gettrace() is None, sys.getprofile() is None)
    found["numpy errors"] = str(np.geterr())
    for m, model in enumerate(models):
        for path, part in model.named_modules():
            found[f"model {m} {path}: attributes"] = tuple(vars(part))
            found[f"model {m} {path}: class"] = type(part)
            for name, value in vars(part).items():
                if "hook" in name and hasattr(value, "values"):
                    found[f"model {m} {path}: {name}"] = (*value.keys(), *value.values())
        for name, parameter in model.named_parameters():
            found[f"model {m} {name}: attributes"] = tuple(vars(parameter))
            hooks = parameter._backward_hooks
            found[f"model {m} {name}: hooks"] = tuple(hooks.values()) if hooks else ()
            accumulated = getattr(parameter, "_post_accumulate_grad_hooks", None)
            found[f"model {m} {name}: accumulate hooks"] = (
                tuple(accumulated.values()) if accumulated else ()
            )
    for o, optimizer in enumerate(optimizers):
        found[f"optimizer {o}: attributes"] = tuple(vars(optimizer))
        found[f"optimizer {o}: class"] = type(optimizer)
        found[f"optimizer {o}: groups"] = tuple(
            tuple(group.keys()) for group in optimizer.param_groups
        )
        for name, value in vars(optimizer).items():
            if "hook" in name and hasattr(value, "values"):
                found[f"optimizer {o}: {name}"] = (*value.keys(), *value.values())
    return Snapshot(found)


def clean_up() -> None:
    """Take out whatever a failing test has left, so that the next one fails for itself."""
    session = sys.modules.get("gradscope.session.session")
    if session is not None:
        from gradscope.taps.module_calls import module_calls

        others = (session.optimizer_creation, session.module_creation, module_calls)
        for tap in (*session._TAPS, *others):
            for listener in tap.listeners:
                tap.remove(listener)
    while torch.overrides._get_current_function_mode_stack():
        torch.overrides._pop_mode()
