from __future__ import annotations

import gc

import pytest
import torch

from gradscope.garbage import no_collection
from gradscope.instruments.autograd_graph import capture_graph


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        paused = []

        @no_collection()
        @no_collection()
        def fail() -> None:
            paused.append(not gc.isenabled())
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert paused == [True]
        assert gc.isenabled() == enabled
        capture_graph([torch.ones(1, requires_grad=True).sum()], lambda leaf: ())
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if was else gc.disable()
