"""Which parameters are meant to be the same on several ranks, as torch's own wrapper says."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


def replicated_by_wrappers() -> dict[int, tuple[int, ...]]:
    """Return the ranks that hold replicas of parameters, by the id of the parameter.

    The program may train the model and hold its wrapper elsewhere, or pass it by: so all objects
    there are are looked through, which takes some ten milliseconds, once.

    A wrapper with a communication hook may do anything with gradients, and one that did not
    synchronise its last forward (``no_sync``) may leave that to the program: these promise nothing.
    """
    found: dict[int, tuple[int, ...]] = {}
    for each in gc.get_objects():
        # Not isinstance: that asks an object for its __class__, which may be a program's function.
        if issubclass(type(each), DistributedDataParallel):
            _add(each, found)
    return found


def _add(wrapper: Any, found: dict[int, tuple[int, ...]]) -> None:
    # One whose making failed half-way lacks things; one of before may have lost its group.
    with contextlib.suppress(AttributeError, KeyError, ValueError, RuntimeError):
        if not wrapper._comm_hooks and wrapper.require_forward_param_sync:
            ranks = tuple(torch.distributed.get_process_group_ranks(wrapper.process_group))
            found.update((id(p), ranks) for p in wrapper._module_parameters if p.requires_grad)
