"""The origin of a gradient that is not finite, in a loop whose steps wait to be accounted for."""

from __future__ import annotations

import torch
from torch import nn

import gradscope


def test_a_step_that_waits_takes_no_origin_of_a_later_one() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradscope.watch(model, optimizer, every=10**9, on_error="raise") as scope:
        for step in range(28):
            x = torch.zeros(2, 3) if step == 21 else torch.ones(2, 3)
            optimizer.zero_grad()
            model(x).square().sum().sqrt().backward()
            optimizer.step()
    told = scope.events.query("event == 'nonfinite'")
    assert told["step"].iloc[0] == 22  # noticed when the step is over; from then on all is NaN
    assert told["detail"].iloc[0].startswith("Sqrt")
