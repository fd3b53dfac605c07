"""The tensors in whatever a function was given or gave back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def nested_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Give every tensor in nested lists, tuples and dicts; the order is not theirs."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, list | tuple):
            stack.extend(reversed(item))
        elif isinstance(item, dict):
            stack.extend(reversed(item.values()))
