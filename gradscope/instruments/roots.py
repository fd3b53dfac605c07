"""The roots of backwards: met before, scaled, and whether the graphs behind them are still held."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from gradscope.instruments.graph_nodes import node_of

_KEY = "gradscope"
_KEY_BEHIND = "gradscope behind"
_MOST_REMEMBERED = 4096
_SCALING = ("DivBackward0", "MulBackward0", "NegBackward0")
_LONGEST_CHAIN = 4
_SUMS = ("AddBackward0", "SubBackward0")
_MOST_TERMS = 16
_OF_MANY = ("StackBackward0", "CatBackward0")
"""What may be given thousands of tensors, to name whose nodes takes as long as to read them."""


class _Token:
    """Lies in the metadata of nodes, and so lives exactly as long as one of them.

    Attributes:
        backward: number of the backward that began at the node.
    """

    __slots__ = ("__weakref__", "backward")

    def __init__(self, backward: int) -> None:
        self.backward = backward


class Roots:
    """Remembers where backwards started, and keeps neither roots nor graphs alive."""

    def __init__(self) -> None:
        self._n_backwards = 0
        self._met: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._scaled: dict[int, weakref.ref[torch.Tensor]] = {}
        self._alive: weakref.WeakSet[_Token] = weakref.WeakSet()

    def scaled(self, tensor: torch.Tensor) -> None:
        """Note a tensor that a gradient scaler gave back."""
        self._scaled = {id(tensor): weakref.ref(tensor)}

    def met(self, roots: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Return what is known of the roots of a backward that is about to begin.

        Returns:
            ``repeats``, the number of the earlier backward from the same tensor, or from one that
            is a term of it, where there is one; ``scaled``; and ``n_alive``, how many graphs of
            earlier backwards are still there.
        """
        number = self._n_backwards
        self._n_backwards += 1
        facts: dict[str, Any] = {"n_alive": len(self._alive)}
        for root in roots:
            known = self._scaled.get(id(root))
            facts["scaled"] = facts.get("scaled", False) or (known is not None and known() is root)
            met = self._met.get(id(root))
            if met is not None and met[0]() is root:
                facts["repeats"] = met[1]
            elif (node := node_of(root)) is not None:
                term = _earlier_term(node)
                if term is not None:
                    facts["repeats"] = term.backward
                self._watch(node, number)
            self._met[id(root)] = (weakref.ref(root), number)
        if len(self._met) > _MOST_REMEMBERED:
            self._met = {key: met for key, met in self._met.items() if met[0]() is not None}
        return facts

    def _watch(self, node: Any, number: int) -> None:
        # A node of autograd is no Python object that could be referred to weakly; what its
        # metadata holds is, and goes with it.
        # (loss / k).backward() and scaler.scale(loss).backward() start above what a program keeps.
        for _ in range(_LONGEST_CHAIN):
            below = node.next_functions
            if len(below) != 1 and not (len(below) == 2 and None in (below[0][0], below[1][0])):
                break
            used = below[0][0] if below[0][0] is not None else below[-1][0]
            if type(node).__name__ not in _SCALING or used is None or hasattr(used, "variable"):
                break
            node = used
        token = _Token(number)
        node.metadata[_KEY] = token
        self._alive.add(token)
        # What a program keeps may be the prediction, which lies behind the loss.
        for _ in range(_LONGEST_CHAIN):
            if type(node).__name__ in _OF_MANY:
                break
            givers = [giver for giver, _ in node.next_functions if giver is not None]
            if len(givers) != 1 or hasattr(givers[0], "variable"):
                break
            node = givers[0]
            node.metadata[_KEY_BEHIND] = token


def _earlier_term(node: Any) -> _Token | None:
    """The root of an earlier backward among the terms of a sum of losses.

    The same loss alone, scaled anew, is none: two halves of it are the whole.
    """
    waiting = [(node, False)]
    for _ in range(_MOST_TERMS):
        if not waiting:
            break
        node, is_term = waiting.pop()
        token: _Token | None = node.metadata.get(_KEY)
        if token is not None and is_term:
            return token
        name = type(node).__name__
        if name in _SUMS or name in _SCALING:
            is_term |= name in _SUMS
            waiting += [(used, is_term) for used, _ in node.next_functions if used is not None]
    return None
