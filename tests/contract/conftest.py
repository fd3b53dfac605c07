from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# Both replace functions of torch's and add warning filters when they are first used (torch 2.13).
from traces import clean_up, snapshot

torch.manual_seed(torch.initial_seed())
torch.compile(lambda: None, backend="eager")()


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was_found() -> Iterator[None]:
    """Every test of the contract leaves torch untouched, and none spoils the next."""
    before = snapshot()
    yield
    after = snapshot()
    clean_up()
    assert after.differences_from(before) == []
