"""What the nodes of an autograd graph keep for the backward, read without unpacking anything.

Unpacking runs the hooks of ``saved_tensors_hooks``: under activation checkpointing that is the
user's forward once more. A node's ``_raw_saved_…`` attributes give the packed value as it lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch

from gradscope.instruments.tensor_summary import is_readable
from gradscope.run.captured_graph import SavedTensors, Shape

_RAW: Final = "_raw_saved_"


# Weakly: a custom Function's class may be one of many that a program makes.
_attributes: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


def _raw_attributes(kind: type) -> tuple[str, ...]:
    known = _attributes.get(kind)
    if known is None:
        known = tuple(sorted(name for name in dir(kind) if name.startswith(_RAW)))
        _attributes[kind] = known
    return known


def saved_tensors_of(node: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Give name and tensor of what a node has saved and that can be read as it lies."""
    for name in _raw_attributes(type(node)):
        try:
            raw = getattr(node, name)
        except RuntimeError:  # a custom Function's, after the backward
            continue
        for each in raw if type(raw) is tuple else (raw,):
            packed = each.data
            if isinstance(packed, torch.Tensor) and is_readable(packed):
                yield name[len(_RAW) :], packed.detach()


class SavedTensorReader:
    """Collects what node after node has saved; it keeps none of the tensors."""

    def __init__(self) -> None:
        self._attributes: dict[type, list[tuple[str, int]]] = {}
        self._names: dict[str, int] = {}
        self._storages: dict[int, int] = {}
        # Of each saved tensor its node, name, shape, size and storage.
        self._all: list[tuple[int, int, Shape | None, int, int]] = []

    def __call__(self, number: int, node: Any) -> None:
        """Read one node.

        Args:
            number: of the node in the graph.
            node: the ``grad_fn``.
        """
        kind = type(node)
        attributes = self._attributes.get(kind)
        if attributes is None:
            attributes = self._attributes[kind] = self._attributes_of(kind)
        for attribute, name in attributes:
            try:
                raw = getattr(node, attribute)
            except RuntimeError:  # a custom Function's, after the backward
                continue
            if type(raw) is tuple:
                for each in raw:
                    self._take(number, name, each)
            else:
                self._take(number, name, raw)

    def result(self) -> SavedTensors:
        """Return everything read so far as plain arrays."""
        node, name, shapes, n_bytes, storage = (
            zip(*self._all, strict=True) if self._all else [()] * 5
        )
        return SavedTensors(
            names=tuple(self._names),
            node=np.array(node, np.int32),
            name=np.array(name, np.int32),
            shapes=tuple(shapes),
            n_bytes=np.array(n_bytes, np.int64),
            storage=np.array(storage, np.int32),
        )

    def _attributes_of(self, kind: type) -> list[tuple[str, int]]:
        names = self._names
        return [
            (name, names.setdefault(name[len(_RAW) :], len(names)))
            for name in _raw_attributes(kind)
        ]

    def _take(self, number: int, name: int, raw: Any) -> None:
        packed = raw.data
        if packed is None:  # freed by the backward, or an optional input that was not given
            return
        n_bytes, storage, shape = 0, -1, None
        if isinstance(packed, torch.Tensor):
            try:
                n_bytes, shape = packed.nbytes, tuple(packed.shape)
                # Parameters and the like are there whether or not a node refers to them.
                if not (packed.requires_grad and packed.is_leaf):
                    address = packed.untyped_storage()._cdata
                    storage = self._storages.setdefault(address, len(self._storages))
            except (RuntimeError, NotImplementedError):  # sparse and nested ones have no storage
                n_bytes, storage, shape = 0, -1, None
        self._all.append((number, name, shape, n_bytes, storage))
