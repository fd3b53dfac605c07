"""Who is who: models, parameters, optimizers, who holds what, and what the program calls them.

Everything is held weakly: watching keeps no model alive.
"""

from __future__ import annotations

import fnmatch
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from gradscope.instruments.call_log import paths_of
from gradscope.instruments.local import local, placements_of
from gradscope.instruments.replicas import replicated_by_wrappers
from gradscope.instruments.weight_facts import are_copies
from gradscope.run.captured_graph import Registered
from gradscope.run.columns import storable
from gradscope.run.entries import REPLACED, ModelEntry, OptimizerEntry, ParameterEntry
from gradscope.run.recording import Recording
from gradscope.session.gradients import Integers

_WRAPPER = "_orig_mod."
"""What ``torch.compile(model)`` puts in front of every name inside."""


@dataclass(slots=True)
class _Model:
    module: weakref.ref[nn.Module]
    name: str
    # (id of parameter, path) of every registered name, to notice that the model has changed.
    signature: tuple[tuple[int, str], ...] = ()


@dataclass(slots=True)
class _Optimizer:
    optimizer: weakref.ref[torch.optim.Optimizer]
    name: str
    signature: tuple[tuple[int, ...], ...] = ()
    params: Integers = field(default_factory=lambda: np.zeros(0, np.int64))


class Census:
    """The people of a run, numbered in the order in which they were met.

    Args:
        recording: where entries are kept for everybody who does not know torch.
        include: patterns of parameter names to watch; empty for all.
        exclude: patterns of parameter names to leave out.

    Attributes:
        generation: counts changes of who is there; whatever is prepared for a list of parameters
            is good for one generation.
        members: ids of all modules inside watched models.
    """

    def __init__(
        self, recording: Recording, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
    ) -> None:
        self.generation = 0
        self.members: set[int] = set()
        self._recording = recording
        self._include, self._exclude = include, exclude
        self._models: list[_Model] = []
        self._optimizers: list[_Optimizer] = []
        self._parameters: list[weakref.ref[torch.Tensor]] = []
        self._number_of: dict[int, int] = {}
        self._lazy: set[int] = set()
        self._has_stand_ins = False
        self._schedulers: weakref.WeakKeyDictionary[Any, tuple[int, str]] = (
            weakref.WeakKeyDictionary()
        )

    # -- meeting people ---------------------------------------------------------------------

    def add_model(self, model: nn.Module, name: str) -> None:
        """Take in a model; one already known, or inside a known one, is ignored."""
        if id(model) in self.members:
            return
        name = _unused(name, [known.name for known in self._models])
        self._models.append(_Model(weakref.ref(model), name))
        self._recording.models.append(ModelEntry(name, type(model).__name__))
        self.refresh_models()

    def add_optimizer(self, optimizer: torch.optim.Optimizer, name: str) -> int:
        """Take in an optimizer and return its number."""
        known = self.number_of_optimizer(optimizer)
        if known is not None:
            return known
        name = _unused(name, [other.name for other in self._optimizers])
        self._optimizers.append(_Optimizer(weakref.ref(optimizer), name))
        self._recording.optimizers.append(OptimizerEntry(name, type(optimizer).__name__))
        number = len(self._optimizers) - 1
        self.refresh_groups(number)
        return number

    def name_of_scheduler(self, scheduler: Any, optimizer: int) -> str:
        """Return the class of a scheduler, with ``#2`` for a second one of an optimizer's."""
        if scheduler not in self._schedulers:
            taken = [name for holder, name in self._schedulers.values() if holder == optimizer]
            self._schedulers[scheduler] = optimizer, _unused(type(scheduler).__name__, taken)
        return self._schedulers[scheduler][1]

    def refresh_models(self) -> bool:
        """Look again which parameters the models have; returns whether that has changed."""
        changed = False
        self.members = set()
        self._has_stand_ins = False
        for model in self._models:
            module = model.module()
            if module is None:
                continue
            self.members.update(id(part) for part in module.modules())
            registered = list(module.named_parameters(remove_duplicate=False))
            if _are_stand_ins(registered):  # its own are back when that call is over
                self._has_stand_ins = True
                continue
            signature = tuple(
                (id(parameter), path.replace(_WRAPPER, "")) for path, parameter in registered
            )
            if signature != model.signature:
                model.signature = signature
                changed = True
        if changed:
            self._enter_registered()
            self._find_copies()
            self.generation += 1
        self._find_ineffective_freezes()
        return changed

    def refresh_stand_ins(self) -> None:
        """Look again at models that were met while others stood in for their parameters."""
        if self._has_stand_ins:
            self.refresh_models()

    def adopt_unregistered(self, leaves: Iterable[torch.Tensor]) -> None:
        """Take in parameters that lie in plain lists, dicts or attributes of a model's modules."""
        wanted = {id(leaf) for leaf in leaves if self._number(leaf) is None}
        several = len(self._models) > 1
        for known in self._models:
            model = known.module()
            if model is None or not wanted:
                continue
            prefix = f"{known.name}." if several else ""
            for path, holder, leaf in _unregistered_in(model):
                if id(leaf) not in wanted:
                    continue
                wanted.discard(id(leaf))
                entry = self._recording.parameters[self._enter(leaf)]
                entry.name = storable(prefix + path)
                entry.module = storable(prefix + holder.path).rstrip(".")
                entry.module_type = holder.kind
                entry.in_model = False
                self.generation += 1

    def unread(self) -> list[tuple[int, torch.Tensor]]:
        """Return number and tensor of each parameter whose first norm has not been read."""
        return [
            (number, parameter)
            for number, parameter in self.alive()
            if math.isnan(self._recording.parameters[number].norm_first)
            and number not in self._lazy
        ]

    def alive(self) -> list[tuple[int, torch.Tensor]]:
        """Return number and tensor of each parameter that is still there."""
        parameters = ((number, known()) for number, known in enumerate(self._parameters))
        return [(number, known) for number, known in parameters if known is not None]

    def refresh_lazy(self) -> None:
        """See whether lazy parameters have got their shapes, which they do in the first forward."""
        for number in list(self._lazy):
            parameter = self._parameters[number]()
            if not isinstance(parameter, UninitializedParameter):
                self._lazy.discard(number)
                self.generation += 1
                if parameter is not None:
                    _describe(parameter, self._recording.parameters[number])

    def refresh_groups(self, number: int) -> bool:
        """Look again which parameters an optimizer holds; returns whether that has changed."""
        known = self._optimizers[number]
        optimizer = known.optimizer()
        if optimizer is None:
            return False
        signature = tuple(tuple(map(id, group["params"])) for group in optimizer.param_groups)
        if signature == known.signature:
            return False
        held = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if self._models and not all(map(self.knows, held)):
            self.refresh_models()  # one may have got a layer more, and this its parameters
        known.signature = signature
        for entry in self._recording.parameters:
            entry.holders = [holder for holder in entry.holders if holder[0] != number]
        numbers: list[int] = []
        for group_number, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                param = self._number(parameter)
                if param is None:
                    param = self._enter(parameter)
                    self._recording.parameters[
                        param
                    ].name = f"{known.name}.param_groups[{group_number}]['params'][{place}]"
                    self._recording.parameters[param].in_model = False
                entry = self._recording.parameters[param]
                entry.holders.append((number, group_number))
                if self._is_watched(entry.name) and param not in numbers:
                    numbers.append(param)
        self._recording.optimizers[number].n_groups = len(signature)
        known.params = np.array(numbers, np.int64)
        self.generation += 1
        return True

    def grown(self) -> list[int]:
        """Return numbers of the optimizers that have been given more groups since they were met."""
        entries = zip(self._optimizers, self._recording.optimizers, strict=True)
        optimizers = ((known.optimizer(), entry.n_groups) for known, entry in entries)
        return [
            number
            for number, (optimizer, n_groups) in enumerate(optimizers)
            if optimizer is not None and len(optimizer.param_groups) != n_groups
        ]

    def refresh_thawed(self) -> None:
        """See at the end which parameters that were frozen have been trained all the same.

        One that is frozen by now may be so for an evaluation, after the last step.
        """
        for number, parameter in self.alive():
            entry = self._recording.parameters[number]
            entry.requires_grad |= parameter.requires_grad and entry.reached

    def refresh_requires_grad(self, step: int) -> list[int]:
        """Look again which parameters require grad; returns the numbers of those that flipped."""
        flipped = []
        for number, entry in enumerate(self._recording.parameters):
            parameter = self._parameters[number]()
            if parameter is not None and parameter.requires_grad != entry.requires_grad:
                entry.requires_grad = parameter.requires_grad
                entry.requires_grad_changed = step
                flipped.append(number)
        return flipped

    # -- asking -----------------------------------------------------------------------------

    def number_of_optimizer(self, optimizer: torch.optim.Optimizer) -> int | None:
        """Return the number of an optimizer, or None if it is not watched."""
        for number, known in enumerate(self._optimizers):
            if known.optimizer() is optimizer:
                return number
        return None

    def optimizer(self, number: int) -> torch.optim.Optimizer | None:
        """Return an optimizer, or None if it is gone."""
        return self._optimizers[number].optimizer()

    def params_of(self, optimizer: int) -> Integers:
        """Return int64[n], numbers of the watched parameters that an optimizer holds."""
        return self._optimizers[optimizer].params

    def all_params(self) -> Integers:
        """Return int64[n], numbers of all watched parameters."""
        return np.array(
            [
                number
                for number, entry in enumerate(self._recording.parameters)
                if self._is_watched(entry.name) and self._parameters[number]() is not None
            ],
            np.int64,
        )

    def references(self, params: Iterable[int]) -> list[weakref.ref[torch.Tensor]]:
        """Return weak references to parameters by number."""
        return [self._parameters[number] for number in params]

    def params_in(self, part: nn.Module) -> Integers:
        """Return int64[n], numbers of the known parameters of a module."""
        numbers = (self._number(parameter) for parameter in part.parameters())
        return np.array([number for number in numbers if number is not None], np.int64)

    def optimizers_of(self, parts: nn.Module) -> list[int]:
        """Return numbers of the optimizers that hold a parameter of a module."""
        holders = {
            holder
            for parameter in parts.parameters()
            if (number := self._number(parameter)) is not None
            for holder, _ in self._recording.parameters[number].holders
        }
        return sorted(holders)

    def optimizers_of_gradients(self, gradients: list[torch.Tensor]) -> list[int]:
        """Return numbers of the optimizers that hold a parameter with one of these gradients."""
        wanted = {id(gradient) for gradient in gradients}
        holders: set[int] = set()
        for number, reference in enumerate(self._parameters):
            parameter = reference()
            if parameter is not None and parameter.is_leaf and id(parameter.grad) in wanted:
                holders.update(h for h, _ in self._recording.parameters[number].holders)
        return sorted(holders)

    def names_of(self, tensor: torch.Tensor) -> tuple[str, ...]:
        """Return every name of a parameter; nothing for a tensor that is none."""
        number = self._number(tensor)
        if number is None:
            return ()
        entry = self._recording.parameters[number]
        return (entry.name, *entry.aliases)

    def registered(self) -> tuple[Registered, ...]:
        """Return every watched parameter of the models, reached or not."""
        return tuple(
            Registered((entry.name, *entry.aliases), entry.shape, entry.requires_grad)
            for entry in self._recording.parameters
            if entry.in_model and self._is_watched(entry.name)
        )

    def paths_of_modules(self) -> dict[int, str]:
        """Return the path of every module of the models by its id."""
        several = len(self._models) > 1
        models = [(known.name, known.module()) for known in self._models]
        return paths_of(
            (f"{name}." if several else "", module) for name, module in models if module is not None
        )

    def is_member(self, module: nn.Module) -> bool:
        """Whether a module is a watched model, a part of one, or its compiled wrapper."""
        if id(module) in self.members:
            return True
        return is_wrapper(module) and id(module._orig_mod) in self.members

    def note_compiled(self, module: nn.Module) -> list[tuple[str, str]]:
        """Note which parts of a model are compiled; returns path and kind of those that are new."""
        new = []
        for known, entry in zip(self._models, self._recording.models, strict=True):
            model = known.module()
            if model is None or not (model is module or self._is_inside(module, model)):
                continue
            parts = compiled_parts(model)
            if is_wrapper(module):  # it may have been made around a model that is watched already
                parts += [("", _kind(model))] if module._orig_mod is model else []
            for path, kind in parts:
                if path not in entry.compiled:
                    entry.compiled = (*entry.compiled, path)
                    new.append((path, kind))
        return new

    def match(self, params: Integers, patterns: tuple[str, ...]) -> npt.NDArray[np.bool_]:
        """Return bool[n], which of these parameters have a name that matches a pattern."""
        entries = (self._recording.parameters[param] for param in params.tolist())
        return np.array(
            [any(_matches(name, patterns) for name in (e.name, *e.aliases)) for e in entries],
            np.bool_,
        )

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter of a watched model or optimizer."""
        return self._number(tensor) is not None

    # -- inside -----------------------------------------------------------------------------

    def _number(self, tensor: torch.Tensor) -> int | None:
        number = self._number_of.get(id(tensor))
        # An id recurs once its owner is gone.
        if number is None or self._parameters[number]() is not tensor:
            return None
        return number

    def _enter(self, parameter: torch.Tensor) -> int:
        number = len(self._parameters)
        self._parameters.append(weakref.ref(parameter))
        self._number_of[id(parameter)] = number
        entry = ParameterEntry(name="")
        _describe(parameter, entry)
        if isinstance(parameter, UninitializedParameter):
            self._lazy.add(number)
        self._recording.parameters.append(entry)
        return number

    def _enter_registered(self) -> None:
        """Enter the models' parameters; names begin with the model's where there are several."""
        several = len(self._models) > 1
        names: dict[int, list[tuple[str, str, str]]] = {}
        for model in self._models:
            module = model.module()
            if module is None:
                continue
            if _are_stand_ins(module.named_parameters()):
                continue
            prefix = f"{model.name}." if several else ""
            kinds = {
                path.replace(_WRAPPER, ""): type(part).__name__
                for path, part in module.named_modules()
            }
            for path, parameter in module.named_parameters(remove_duplicate=False):
                path = path.replace(_WRAPPER, "")
                number = self._number(parameter)
                if number is None:
                    number = self._enter(parameter)
                holder = path.rpartition(".")[0]
                names.setdefault(number, []).append(
                    (
                        storable(prefix + path),
                        storable(prefix + holder).rstrip("."),
                        kinds.get(holder, ""),
                    )
                )
        for number, known_as in names.items():
            entry = self._recording.parameters[number]
            entry.name, entry.module, entry.module_type = known_as[0]
            entry.aliases = tuple(name for name, _, _ in known_as[1:])
            entry.in_model = True
        self._rename_replaced(set(names))
        # A parameter that was known only by its place in an optimizer may have got its name now.
        for number in range(len(self._optimizers)):
            self._optimizers[number].signature = ()
            self.refresh_groups(number)

    def _rename_replaced(self, registered: set[int]) -> None:
        """Give another name to what was replaced, where another has its place and its name by now.

        Tables are joined by names. Its module has another name, too: it is none of the parameters
        that the module has.

        Args:
            registered: numbers of the parameters that the models have now.
        """
        entries = self._recording.parameters
        taken = {name for n in registered for name in (entries[n].name, *entries[n].aliases)}
        replaced = [e for n, e in enumerate(entries) if n not in registered and e.name in taken]
        for entry in replaced:
            holder, dot, own = entry.name.rpartition(".")
            others = [other.name.removesuffix(f".{own}") for other in entries]
            place = _unused(f"{holder if dot else own}{REPLACED}", others)
            entry.name = f"{place}.{own}" if dot else place
            entry.module = place if dot else ""
            entry.aliases = ()
            entry.in_model = False

    def find_replicas(self) -> None:
        """Note which parameters are replicas of those of other ranks."""
        ranks = replicated_by_wrappers()
        for number, parameter in self.alive():
            self._recording.parameters[number].replicas = ranks.get(id(parameter), ())

    def _find_copies(self) -> None:
        """Note embeddings whose very values another kind of module began with."""
        entries = self._recording.parameters
        embeddings = [n for n, e in enumerate(entries) if e.module_type.endswith("Embedding")]
        for embedding in embeddings:
            table = self._parameters[embedding]()
            for number, entry in enumerate(entries):
                other = self._parameters[number]()
                if (
                    table is not None
                    and other is not None
                    and entry.copy_of is None
                    and entry.shape == entries[embedding].shape
                    and entry.module_type != entries[embedding].module_type
                    and are_copies(table, other)
                ):
                    entry.copy_of = embedding

    def _find_ineffective_freezes(self) -> None:
        for known, entry in zip(self._models, self._recording.models, strict=True):
            model = known.module()
            if model is not None:
                found = dict.fromkeys((*entry.ineffective_freezes, *ineffective_freezes(model)))
                entry.ineffective_freezes = tuple(found)

    @staticmethod
    def _is_inside(module: nn.Module, model: nn.Module) -> bool:
        inner = module._orig_mod if is_wrapper(module) else module
        return any(part is inner for part in model.modules())

    def _is_watched(self, name: str) -> bool:
        is_included = not self._include or _matches(name, self._include)
        return is_included and not _matches(name, self._exclude)


def _are_stand_ins(registered: Iterable[tuple[str, torch.Tensor]]) -> bool:
    """Whether ``functional_call`` has put tensors in the place of a model's parameters."""
    return any(not isinstance(parameter, nn.Parameter) for _, parameter in registered)


@dataclass(frozen=True, slots=True)
class _Holder:
    path: str
    kind: str


def _unregistered_in(model: nn.Module) -> Iterator[tuple[str, _Holder, torch.Tensor]]:
    """Give path, holding module and parameter of what modules hold without having registered it."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_") and name in _OWN_ATTRIBUTES:
                continue
            start = f"{path}.{name}".lstrip(".")
            for inner, holder, tensor in _tensors_under(start, value, 0):
                yield inner, holder or _Holder(path, type(module).__name__), tensor


_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
_DEEPEST = 3


def _tensors_under(
    path: str, value: Any, depth: int
) -> Iterator[tuple[str, _Holder | None, torch.Tensor]]:
    if isinstance(value, nn.Parameter):  # a plain tensor may be an input that wants a gradient
        yield path, None, value
    elif isinstance(value, nn.Module):
        for name, parameter in value.named_parameters():
            holder = path + "." + name.rpartition(".")[0]
            yield f"{path}.{name}", _Holder(holder.rstrip("."), type(value).__name__), parameter
    elif depth < _DEEPEST and isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _tensors_under(f"{path}[{place}]", item, depth + 1)
    elif depth < _DEEPEST and isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_under(f"{path}[{key!r}]", item, depth + 1)


_MISSPELLED = frozenset(
    {
        "require_grad",
        "require_grads",
        "requires_grads",
        "requires_gradient",
        "requires_gradients",
        "require_gradient",
        "required_grad",
        "requiresgrad",
        "requires_Grad",
        "trainable",
    }
)


def ineffective_freezes(model: nn.Module) -> Iterator[str]:
    """Give attributes that were to freeze something and do not, such as ``encoder.requires_grad``.

    ``requires_grad = False`` on a module sets an attribute that nobody reads, and so does a
    misspelled one on a parameter.
    """
    for path, module in model.named_modules():
        own = vars(module)
        is_set = own.get("requires_grad") is False
        if is_set and any(parameter.requires_grad for parameter in module.parameters()):
            yield f"{path}.requires_grad".lstrip(".")
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            for attribute, value in vars(parameter).items():
                if attribute in _MISSPELLED and value is False:
                    yield f"{path}.{name}.{attribute}".lstrip(".")


def is_compiled(module: nn.Module) -> bool:
    """Whether a module as a whole is compiled, by ``torch.compile(it)`` or ``it.compile()``."""
    return getattr(module, "_compiled_call_impl", None) is not None or is_wrapper(module)


def compiled_parts(model: nn.Module) -> list[tuple[str, str]]:
    """Return path and class of every compiled part of a model, those inside of others left out."""
    found: list[tuple[str, str]] = []
    for path, part in model.named_modules():
        path = f"{path}.".replace(_WRAPPER, "").removesuffix(".")
        if is_compiled(part) and not any(
            not outer or path == outer or path.startswith(f"{outer}.") for outer, _ in found
        ):
            found.append((path, _kind(getattr(part, "_orig_mod", part))))
    return found


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile(model)`` returns."""
    return type(module).__name__ == "OptimizedModule"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _describe(parameter: torch.Tensor, entry: ParameterEntry) -> None:
    entry.dtype = str(parameter.dtype).removeprefix("torch.")
    entry.device = str(parameter.device)
    entry.placements = placements_of(parameter)
    entry.n_local = local(parameter).numel() if entry.placements else None
    entry.requires_grad = parameter.requires_grad
    if not isinstance(parameter, UninitializedParameter):
        entry.shape = tuple(parameter.shape)


def _unused(name: str, taken: list[str]) -> str:
    if name not in taken:
        return name
    number = 2
    while f"{name}#{number}" in taken:
        number += 1
    return f"{name}#{number}"
